package remote

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/replica"
)

// progressEvery bounds how often a peer is told how far a verb is.
const progressEvery = 100 * time.Millisecond

// errQuestion: the body of a verb is not what the verb takes.
var errQuestion = errors.New("a question that is none of this protocol")

// answer serves one verb.
func (s *Server) answer(w http.ResponseWriter, req *http.Request) {
	if !s.enter() {
		http.Error(w, "closed", http.StatusServiceUnavailable)
		return
	}
	defer s.wg.Done()
	verb, ok := strings.CutPrefix(req.URL.Path, "/1/")
	if req.Method != http.MethodPost || !ok {
		http.Error(w, "unknown", http.StatusNotFound)
		return
	}
	q, err := readQuestion(req.Body)
	if err != nil {
		s.cfg.Log.Warn("another node asks what is no question", "remote", req.RemoteAddr, "verb", verb, "err", err)
		http.Error(w, "malformed", http.StatusBadRequest)
		return
	}
	out := newSpeaker(w, s.cfg)
	defer out.stop()
	a, err := s.carryOut(req.Context(), verb, q, out.progress)
	if errors.Is(err, errQuestion) {
		s.cfg.Log.Warn("another node asks what is no question", "remote", req.RemoteAddr, "verb", verb, "err", err)
	}
	if err != nil {
		if gone(err) && req.Context().Err() == nil {
			err = fmt.Errorf("%w: %w", err, block.ErrClosed) // what stopped the verb is that the replica is being closed here
		}
		a.Failure = failureOf(err, s.cfg.Codes)
	}
	out.answer(a)
}

// enter counts a verb among what Close waits for; false when it is too late.
func (s *Server) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.wg.Add(1)
	}
	return !s.closed
}

// readQuestion reads the body of a verb. What it does not know could matter, and is refused.
func readQuestion(body io.Reader) (question, error) {
	var q question
	limited := &io.LimitedReader{R: body, N: maxQuestionBytes + 1}
	dec := json.NewDecoder(limited)
	dec.DisallowUnknownFields()
	if err := dec.Decode(&q); err != nil {
		return q, fmt.Errorf("%w: %w", errQuestion, err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) || limited.N == 0 {
		return q, fmt.Errorf("more than one question, or more than %d bytes: %w", maxQuestionBytes, errQuestion)
	}
	return q, nil
}

// carryOut carries out a verb.
func (s *Server) carryOut(ctx context.Context, verb string, q question, progress func(done, total int64)) (answer, error) {
	if verb == "source" {
		return s.source(ctx, q)
	}
	o, err := s.acquire(ctx, q.Replica)
	if err != nil {
		return answer{}, err
	}
	defer s.release(o)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(o.life, cancel)()
	if q.Writer == nil {
		return s.look(ctx, o, verb, q)
	}
	if verb == "fence" {
		return s.fence(ctx, o, *q.Writer)
	}
	t, err := s.use(o, *q.Writer)
	if err != nil {
		return answer{}, err
	}
	defer s.leave(t)
	return answer{}, say(ctx, t, verb, q, progress)
}

// say carries out a verb of a writer that was let in.
func say(ctx context.Context, t *seat, verb string, q question, progress func(done, total int64)) error {
	switch {
	case verb == "confirm":
		return t.r.Confirm(ctx, t.w)
	case verb == "keep" && q.Record != nil:
		return t.r.Keep(ctx, t.w, *q.Record)
	case verb == "change" && q.Change != nil:
		return t.r.Change(ctx, t.w, *q.Change)
	case verb == "prepare" && q.Change != nil:
		return t.r.Prepare(ctx, t.w, *q.Change, progress)
	case verb == "set-snapshot" && q.Snapshot != nil:
		return t.r.SetSnapshot(ctx, t.w, q.Layer, *q.Snapshot)
	case verb == "purge":
		return t.r.Purge(ctx, t.w, progress)
	}
	return fmt.Errorf("verb %q of a writer: %w", verb, errQuestion)
}

// look carries out a verb that needs no writer.
func (s *Server) look(ctx context.Context, o *opened, verb string, q question) (a answer, err error) {
	switch {
	case verb == "status":
		var st replica.Status
		st, err = o.watch.Status(ctx)
		a.Status = &st
	case verb == "count":
		err = o.watch.Count(ctx)
	case verb == "space":
		var u replica.Usage
		u, err = o.watch.Space(ctx)
		a.Usage = &u
	case verb == "changed" && q.Diff != nil:
		d := replica.Diff{From: q.Diff.From, To: q.Diff.To, Off: q.Diff.Off, Max: min(q.Diff.Max, maxRanges)}
		a.Ranges, a.Next, err = o.watch.Changed(ctx, d)
	case verb == "open-snapshot":
		var dev block.Device
		if dev, err = o.watch.OpenSnapshot(q.Layer); err == nil {
			err = dev.Close()
		}
	case verb == "close-snapshot" && q.Token != "":
		err = s.closeSnapshot(ctx, o, q.Token)
	default:
		err = fmt.Errorf("verb %q without a writer: %w", verb, errQuestion)
	}
	if err != nil {
		return answer{}, err
	}
	return a, nil
}

// closeSnapshot ends the connections that read a snapshot under a token, and waits for that.
func (s *Server) closeSnapshot(ctx context.Context, o *opened, token string) error {
	var list []*bytesConn
	s.mu.Lock()
	for b := range s.bytes {
		if b.o == o && b.token == token {
			b.cut()
			list = append(list, b)
		}
	}
	s.mu.Unlock()
	for _, b := range list {
		select {
		case <-b.ended:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// source says what a source is.
func (s *Server) source(ctx context.Context, q question) (answer, error) {
	if !validSource(q.Source) {
		return answer{}, fmt.Errorf("source %q: %w", q.Source, ErrUnknown)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.life, cancel)()
	dev, info, err := s.cfg.Host.OpenSource(ctx, q.Source)
	if err != nil {
		return answer{}, err
	}
	return answer{Info: info, Size: dev.Size()}, dev.Close()
}

// speaker writes an answer, and meanwhile, every beat, that there will be one.
type speaker struct {
	beat, patience time.Duration

	turn  chan struct{} // capacity 1, holds a token of whoever writes, which may take the patience; guards the rest
	w     http.ResponseWriter
	enc   *json.Encoder
	timer *time.Timer
	said  time.Time // the last line
	done  bool
}

func newSpeaker(w http.ResponseWriter, cfg ServerConfig) *speaker {
	w.Header().Set("Content-Type", "application/x-ndjson")
	p := &speaker{beat: cfg.Beat, patience: cfg.Patience, turn: make(chan struct{}, 1), w: w, enc: json.NewEncoder(w)}
	p.turn <- struct{}{}
	defer func() { <-p.turn }()
	p.timer = time.AfterFunc(p.beat, func() { p.line(answerLine{}) })
	return p
}

// progress says how far the verb is, not too often.
func (p *speaker) progress(done, total int64) {
	p.turn <- struct{}{}
	often := time.Since(p.said) < progressEvery && done < total
	<-p.turn
	if !often {
		p.line(answerLine{Done: done, Total: total})
	}
}

// line says one line. That it cannot be sent, the request's context says.
func (p *speaker) line(l answerLine) {
	p.turn <- struct{}{}
	defer func() { <-p.turn }()
	if p.done {
		return
	}
	p.said = time.Now()
	p.timer.Reset(p.beat)
	p.hurry()
	if p.enc.Encode(l) == nil {
		_ = http.NewResponseController(p.w).Flush()
	}
}

// hurry bounds how long a peer that takes nothing can keep a verb, and with it the replica; the token is held. A connection without deadlines is bounded by the kernel.
func (p *speaker) hurry() {
	_ = http.NewResponseController(p.w).SetWriteDeadline(time.Now().Add(p.patience))
}

// stop says nothing any more.
func (p *speaker) stop() {
	p.turn <- struct{}{}
	defer func() { <-p.turn }()
	p.done = true
	p.timer.Stop()
}

// answer says the last line.
func (p *speaker) answer(a answer) {
	p.turn <- struct{}{}
	defer func() { <-p.turn }()
	p.done = true
	p.timer.Stop()
	p.hurry()
	_ = p.enc.Encode(answerLine{Answer: &a})
}
