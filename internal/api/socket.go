package api

import (
	"bytes"
	"context"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/websocket"
)

// The limits of a websocket's period, as in the dialect.
const (
	minPeriod = liveGap
	maxPeriod = 15 * time.Second
)

// maxSocketMessage bounds what a client may send over a websocket, which nobody reads.
const maxSocketMessage = 4 << 10

// socketWays are the collections over websockets (RFC 6455), as the dialect has them: the collection, as a GET would show it, at once and whenever it is another one.
func (h *Handler) socketWays() []way {
	about := "A websocket: the whole collection at once, and again whenever it has changed, no more often than every {period} (a duration such as 5s; 100ms to 15s)."
	return []way{
		{path: "/{collection}", about: about, do: h.socket, status: http.StatusSwitchingProtocols},
		{path: "/{period}/{collection}", about: about, do: h.socket, status: http.StatusSwitchingProtocols},
	}
}

// watchable tells whether a noun has a collection that can be watched.
func (n *noun) watchable() bool { return n.list != nil && !n.single }

// socket serves one websocket until its client goes.
func (h *Handler) socket(c *call) (any, error) {
	n := h.nouns[c.vars["collection"]]
	if n == nil || !n.watchable() {
		var known []string
		for _, plural := range slices.Sorted(maps.Keys(h.nouns)) {
			if h.nouns[plural].watchable() {
				known = append(known, plural)
			}
		}
		return nil, Failure(CodeNotFound, "there is no collection %s; there are: %s", quote(c.vars["collection"]), strings.Join(known, ", "))
	}
	gap := minPeriod
	if p, ok := c.vars["period"]; ok {
		d, err := time.ParseDuration(p)
		if err != nil || d < 0 {
			return nil, Failure(CodeInvalid, "period %s is no duration; say 5s, for example", quote(p))
		}
		gap = min(max(d, minPeriod), maxPeriod)
	}
	if !websocket.IsWebSocketUpgrade(c.r) {
		c.w.Header().Set("Upgrade", "websocket")
		return nil, Failure(CodeInvalid, "%s is a websocket; a plain GET finds this collection at /v1/%s", quote(c.r.URL.Path), n.plural)
	}
	// A GET is not looked at by CrossOriginProtection, and a browser lets any page open a websocket.
	if !sameOrigin(c.r) {
		return nil, Failure(CodeForbidden, "a request from another web site is refused")
	}
	s, err := h.live.join(n.kinds)
	if err != nil {
		return nil, err
	}
	defer h.live.leave(s)
	up := websocket.Upgrader{
		HandshakeTimeout: liveWrite, ReadBufferSize: 1 << 10, WriteBufferSize: 16 << 10,
		CheckOrigin: sameOrigin, Error: func(http.ResponseWriter, *http.Request, int, error) {}, // our own answer follows
	}
	conn, err := up.Upgrade(c.w, c.r, nil)
	if err != nil {
		return nil, Because(err, CodeInvalid, "no websocket came about: %v", err)
	}
	h.serveSocket(c, conn, &pump{h: h, s: s, gap: gap}, n)
	return sent{}, nil
}

// sameOrigin tells whether a request comes from a page of this server, or from no page at all.
func sameOrigin(r *http.Request) bool {
	origin := r.Header.Get("Origin")
	if origin == "" {
		return true
	}
	u, err := url.Parse(origin)
	return err == nil && strings.EqualFold(u.Host, r.Host)
}

// serveSocket runs a websocket that has been opened, and closes it.
func (h *Handler) serveSocket(c *call, conn *websocket.Conn, p *pump, n *noun) {
	// The request's context ends with this handler, not with the connection, which is not the server's any more.
	ctx, cancel := context.WithCancel(c.r.Context())
	defer cancel()
	var reader sync.WaitGroup
	defer reader.Wait()
	defer conn.Close() // ends the reader
	gone := make(chan struct{})
	reader.Go(func() {
		defer close(gone)
		defer cancel()
		h.readSocket(conn)
	})
	cut := afterEnd(h, func() { _ = conn.NetConn().SetWriteDeadline(time.Now().Add(liveEnd)) })
	defer cut()
	look := &call{r: c.r.WithContext(ctx), w: discardResponse{}, base: c.base, noun: n, access: c.access}
	var last []byte
	p.c, p.gone = look, gone
	p.alive = func() error { return conn.WriteControl(websocket.PingMessage, nil, time.Now().Add(liveWrite)) }
	p.show = func() error {
		data, err := render(look)
		// A catalogue that does not answer wakes the stream again when it does.
		if err != nil || bytes.Equal(data, last) {
			return nil
		}
		last = data
		if err := conn.SetWriteDeadline(time.Now().Add(liveWrite)); err != nil {
			return err
		}
		return conn.WriteMessage(websocket.TextMessage, data)
	}
	goodbye := func(code int, why string) {
		// A client that does not take it is gone already.
		_ = conn.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(code, why), time.Now().Add(liveEnd))
	}
	switch p.run() {
	case endStopping:
		goodbye(websocket.CloseGoingAway, "the node is stopping")
	case endRefused:
		goodbye(websocket.ClosePolicyViolation, "the token is not good any more")
	}
}

// render makes the collection as a GET would show it.
func render(c *call) ([]byte, error) {
	v, err := c.noun.list(c)
	if err != nil {
		return nil, err
	}
	return encode(v)
}

// readSocket reads until the client goes, or has not answered two pings: control messages are answered on the way, others are for nobody.
func (h *Handler) readSocket(conn *websocket.Conn) {
	extend := func() error { return conn.SetReadDeadline(time.Now().Add(3 * h.cfg.Heartbeat)) }
	conn.SetReadLimit(maxSocketMessage)
	conn.SetPongHandler(func(string) error { return extend() })
	for extend() == nil {
		if _, _, err := conn.NextReader(); err != nil {
			return
		}
	}
}

// afterEnd does something when all streams are told to end; the returned function calls it off.
func afterEnd(h *Handler, do func()) (cancel func()) {
	stop := context.AfterFunc(h.live.ended, do)
	return func() { stop() }
}

// discardResponse is where collections that are sent over a websocket put their headers.
type discardResponse struct{}

func (discardResponse) Header() http.Header         { return http.Header{} }
func (discardResponse) Write(p []byte) (int, error) { return len(p), nil }
func (discardResponse) WriteHeader(int)             {}
