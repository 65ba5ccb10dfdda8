package remote

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/nbd"
)

// ErrVersion: the two nodes' versions do not speak the same protocol.
var ErrVersion = errors.New("the other node speaks no version of this protocol that this one does")

// errLost: a question was not answered. What it asked for may or may not be done.
var errLost = errors.New("no answer")

// talker says verbs to one peer, over HTTP connections that it keeps.
type talker struct {
	dial    Dial
	silence time.Duration
	codes   []Code
	http    *http.Client
	pool    *http.Transport
	// refused is what the peer said of our protocol, until somebody was told; nil: nothing. The HTTP client may lose it, because it comes before anything was asked.
	refused atomic.Pointer[error]
}

func newTalker(cfg Config) *talker {
	t := &talker{dial: cfg.Dial, silence: cfg.Silence, codes: cfg.Codes}
	t.pool = &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			nc, err := t.connect(ctx, preambleVerbs)
			if err != nil {
				return nil, err
			}
			return &greeted{Conn: nc, talker: t}, nil
		},
		DisableCompression: true, MaxIdleConnsPerHost: 2, IdleConnTimeout: 30 * time.Second, MaxResponseHeaderBytes: 16 << 10,
	}
	t.http = &http.Client{Transport: t.pool}
	return t
}

// close closes the connections that nobody uses; the others are closed by who ends their questions.
func (t *talker) close() { t.pool.CloseIdleConnections() }

// connect makes a connection and says what it is for.
func (t *talker) connect(ctx context.Context, preamble string) (net.Conn, error) {
	nc, err := t.dial(ctx)
	if err != nil {
		return nil, err
	}
	tune(nc, t.silence)
	stop := context.AfterFunc(ctx, func() { _ = nc.SetDeadline(time.Unix(1, 0)) })
	_, err = io.WriteString(nc, preamble)
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("greet: %w", err), nc.Close())
	}
	return nc, nil
}

// export connects to an export; each step has to be answered within the silence.
func (t *talker) export(ctx context.Context, n exportName) (*nbd.Client, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 2*t.silence, errSilent)
	defer cancel()
	nc, err := t.connect(ctx, preambleBytes)
	if err != nil {
		return nil, err
	}
	return nbd.NewClient(ctx, nc, n.String(), nbd.ClientOptions{States: true, ReadOnly: n.kind != kindReplica})
}

// ask says a verb once. An error that is no errLost and no ctx's is the peer's answer, a *farError, or says that we do not understand each other.
func (t *talker) ask(ctx context.Context, verb string, q question, progress func(done, total int64)) (answer, error) {
	body, err := json.Marshal(q)
	if err != nil {
		return answer{}, fmt.Errorf("%s: %w", verb, err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	quiet := time.AfterFunc(t.silence, func() { cancel(errSilent) })
	defer quiet.Stop()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://replica/1/"+verb, bytes.NewReader(body))
	if err != nil {
		return answer{}, fmt.Errorf("%s: %w", verb, err)
	}
	resp, err := t.http.Do(req)
	if err != nil {
		return answer{}, t.lost(ctx, verb, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusServiceUnavailable {
		return answer{}, t.lost(ctx, verb, block.ErrClosed)
	}
	if resp.StatusCode != http.StatusOK {
		return answer{}, fmt.Errorf("%s: status %d: %w", verb, resp.StatusCode, errFar)
	}
	dec := json.NewDecoder(io.LimitReader(resp.Body, maxAnswerBytes))
	for {
		var l answerLine
		if err := dec.Decode(&l); err != nil {
			return answer{}, t.lost(ctx, verb, err)
		}
		quiet.Reset(t.silence)
		if l.Answer == nil {
			if progress != nil && l.Total > 0 {
				progress(l.Done, l.Total)
			}
			continue
		}
		_, _ = io.CopyN(io.Discard, resp.Body, 64) // to the end, so that the connection can be used again
		if f := l.Answer.Failure; f != nil {
			return *l.Answer, fromWords(*f, t.codes)
		}
		return *l.Answer, nil
	}
}

// lost says that there was no answer, and why.
func (t *talker) lost(ctx context.Context, verb string, err error) error {
	if refused := t.refused.Swap(nil); refused != nil {
		return fmt.Errorf("%s: %w", verb, *refused)
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	return fmt.Errorf("%s: %w: %w", verb, errLost, err)
}

// refusalPrefix begins what a server says to a preamble it does not know.
const refusalPrefix = "ashlar-no/"

// greeted is a connection on which the server may refuse the preamble instead of answering.
type greeted struct {
	net.Conn
	talker *talker
	heard  bool
}

// Read implements net.Conn.
func (g *greeted) Read(p []byte) (int, error) {
	n, err := g.Conn.Read(p)
	if !g.heard && n > 0 {
		g.heard = true
		if n >= len(refusalPrefix) && string(p[:len(refusalPrefix)]) == refusalPrefix {
			err = fmt.Errorf("%q, here 1-1: %w", p[:min(n, 40)], ErrVersion)
			g.talker.refused.Store(&err)
			return 0, err
		}
		g.talker.refused.Store(nil) // whoever it was, this one understands us
	}
	return n, err
}
