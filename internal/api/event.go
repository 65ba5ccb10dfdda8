package api

import (
	"cmp"
	"encoding/json"
	"fmt"
	"mime"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"ashlar/internal/catalog"
)

// seenEvent is an event with the revision at which it came to be what it is.
type seenEvent struct {
	rev    catalog.Rev
	record catalog.EventRecord
}

// events reads all events there are, oldest first, and the catalogue's revision.
func (h *Handler) events(c *call) ([]seenEvent, catalog.Rev, error) {
	entries, rev, err := h.cfg.Catalog.List(c.r.Context(), catalog.KindEvent)
	if err != nil {
		return nil, 0, err
	}
	var out []seenEvent
	for _, e := range entries {
		item, err := catalog.Decode[catalog.EventRecord](e)
		if err != nil {
			h.cfg.Log.Error("unreadable record left out", "error", err)
			continue
		}
		out = append(out, seenEvent{rev: e.Rev, record: item.Value})
	}
	slices.SortStableFunc(out, func(a, b seenEvent) int {
		return cmp.Or(a.record.Time.Compare(b.record.Time), cmp.Compare(a.record.ID, b.record.ID))
	})
	return out, rev, nil
}

func (h *Handler) event(c *call, e seenEvent) Event {
	r := e.record
	return Event{
		Resource: c.resource(r.ID), EventType: r.Type, ObjectKind: string(r.Kind), ObjectName: r.Name, Reason: r.Reason, Message: r.Message,
		Count: r.Count, Time: stamp(r.Time), Revision: strconv.FormatInt(int64(e.rev), 10),
	}
}

// eventGet gets one. Events are forgotten after a day.
func (h *Handler) eventGet(c *call) (any, error) {
	e, err := h.cfg.Catalog.Get(c.r.Context(), catalog.EventKey(c.id))
	if err != nil {
		return nil, h.gone(c, err)
	}
	item, err := catalog.Decode[catalog.EventRecord](e)
	if err != nil {
		return nil, err
	}
	return h.event(c, seenEvent{rev: e.Rev, record: item.Value}), nil
}

// The content types of streams.
const (
	mediaSSE    = "text/event-stream"
	mediaNDJSON = "application/x-ndjson"
)

func eventQuery() []param {
	return []param{
		{name: "follow", about: "true: as a stream (as the Accept header does)", options: []string{"true", "false"}},
		{name: "after", about: "of a stream: the revision of the last event seen; nothing: from the oldest on; now: only what happens from now on"},
	}
}

// eventList lists what happened, oldest first, or streams it as it happens.
func (h *Handler) eventList(c *call) (any, error) {
	if media := streamMedia(c.r); media != "" {
		return h.eventStream(c, media)
	}
	all, _, err := h.events(c)
	if err != nil {
		return nil, err
	}
	var data []Event
	for _, e := range all {
		data = append(data, h.event(c, e))
	}
	return collect(c, c.noun.schema, data), nil
}

// streamMedia tells how a client wants its stream: "" if it wants none.
func streamMedia(r *http.Request) string {
	for accept := range strings.SplitSeq(r.Header.Get("Accept"), ",") {
		if media, _, err := mime.ParseMediaType(accept); err == nil && (media == mediaSSE || media == mediaNDJSON) {
			return media
		}
	}
	if follow, err := strconv.ParseBool(r.URL.Query().Get("follow")); err == nil && follow {
		return mediaNDJSON
	}
	return ""
}

// eventWriter writes a stream in one of its two forms.
type eventWriter struct {
	w    http.ResponseWriter
	rc   *http.ResponseController
	sse  bool
	last catalog.Rev // sent
}

// eventStream sends events in the order in which they came to be, from a revision on, as long as the client listens.
func (h *Handler) eventStream(c *call, media string) (any, error) {
	after, err := h.eventsAfter(c)
	if err != nil {
		return nil, err
	}
	s, err := h.live.join(c.noun.kinds)
	if err != nil {
		return nil, err
	}
	defer h.live.leave(s)
	out := &eventWriter{w: c.w, rc: http.NewResponseController(c.w), sse: media == mediaSSE, last: after}
	c.w.Header().Set("Content-Type", media)
	c.w.Header().Set("Cache-Control", "no-store")
	c.w.Header().Set("X-Content-Type-Options", "nosniff")
	c.w.Header().Set("X-Accel-Buffering", "no")
	c.w.Header().Set("Connection", "close") // its deadlines are no other request's
	c.w.WriteHeader(http.StatusOK)
	// From the first line on the client knows where to go on.
	if err := out.alive(); err != nil {
		return sent{}, nil
	}
	cut := afterEnd(h, func() { _ = out.rc.SetWriteDeadline(time.Now().Add(liveEnd)) })
	defer cut()
	p := &pump{h: h, c: c, s: s, gap: liveGap, gone: c.r.Context().Done(), alive: out.alive, show: func() error { return h.showEvents(c, out) }}
	p.run()
	_ = out.rc.SetWriteDeadline(time.Now().Add(liveEnd))
	return sent{}, nil
}

// eventsAfter reads where a stream begins. A revision that the catalogue has not reached yet is of another one, from before a restore: then it begins with everything.
func (h *Handler) eventsAfter(c *call) (catalog.Rev, error) {
	_, rev, err := h.events(c)
	if err != nil {
		return 0, err
	}
	// A browser that reconnects keeps the URL and says in the header how far it came.
	text := cmp.Or(c.r.Header.Get("Last-Event-ID"), c.r.URL.Query().Get("after"))
	switch text {
	case "":
		return 0, nil
	case "now":
		return rev, nil
	}
	after, err := strconv.ParseInt(text, 10, 64)
	if err != nil || after < 0 {
		return 0, Failure(CodeInvalid, "events: %s is no revision; give the \"revision\" of the last event seen, or now", quote(text))
	}
	if catalog.Rev(after) > rev {
		return 0, nil
	}
	return catalog.Rev(after), nil
}

// showEvents sends what is newer than what was sent. A catalogue that does not answer wakes the stream again when it does.
func (h *Handler) showEvents(c *call, out *eventWriter) error {
	all, _, err := h.events(c)
	if err != nil {
		return nil
	}
	slices.SortFunc(all, func(a, b seenEvent) int { return cmp.Compare(a.rev, b.rev) })
	for _, e := range all {
		if e.rev <= out.last {
			continue
		}
		if err := out.send(h.event(c, e)); err != nil {
			return err
		}
		out.last = e.rev
	}
	return out.rc.Flush()
}

func (o *eventWriter) send(e Event) error {
	data, err := json.Marshal(e)
	if err != nil {
		panic(err) // an Event can always be encoded
	}
	if o.sse {
		return o.write("id: %s\ndata: %s\n\n", e.Revision, data)
	}
	return o.write("%s\n", data)
}

// alive shows that the stream lives, and how far it came.
func (o *eventWriter) alive() error {
	err := error(nil)
	if o.sse {
		err = o.write(": still here\nid: %d\n\n", o.last)
	} else {
		err = o.write("{\"type\":\"heartbeat\",\"revision\":\"%d\"}\n", o.last)
	}
	if err == nil {
		err = o.rc.Flush()
	}
	return err
}

func (o *eventWriter) write(format string, args ...any) error {
	// A writer without deadlines is a test's.
	_ = o.rc.SetWriteDeadline(time.Now().Add(liveWrite))
	_, err := fmt.Fprintf(o.w, format, args...)
	return err
}
