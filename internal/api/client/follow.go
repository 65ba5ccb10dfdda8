package client

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/gorilla/websocket"

	"ashlar/internal/api"
)

// The bounds of the pause before a stream is opened again, and how long one may say nothing: three of the node's signs of life.
const (
	againMin    = 100 * time.Millisecond
	againMax    = 5 * time.Second
	followQuiet = 45 * time.Second
)

// FollowEvents calls each for every event after a revision ("": from the oldest on; "now": from now on), in order, until each fails (its error), ctx ends (its error), or
// the node refuses. A node that goes away is asked again, ever more slowly up to every 5 s, and the stream goes on where it was: no event comes twice for the same
// revision. away is told when the stream is lost, and with nil when it is back; nil: nobody is told.
func (c *Client) FollowEvents(ctx context.Context, after string, each func(api.Event) error, away func(error)) error {
	return again(ctx, away, func(ctx context.Context, lives func()) error { return c.events(ctx, &after, lives, each) })
}

// again opens a stream again and again, as long as it only gets lost. lives is called by the stream when something came.
func again(ctx context.Context, away func(error), open func(ctx context.Context, lives func()) error) error {
	if away == nil {
		away = func(error) {}
	}
	pause, lost := againMin, false
	for {
		err := open(ctx, func() {
			if lost {
				away(nil)
			}
			pause, lost = againMin, false
		})
		var stop *stopped
		switch {
		case errors.As(err, &stop):
			return stop.why
		case ctx.Err() != nil:
			return ctx.Err()
		}
		if !lost {
			away(err)
		}
		lost = true
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		}
		pause = min(2*pause, againMax)
	}
}

// stopped is an error after which a stream is not opened again.
type stopped struct{ why error }

func (s *stopped) Error() string { return s.why.Error() }

// refusal makes a node's answer the end, except one that says that it is stopping.
func refusal(err error) error {
	if api.CodeOf(err) == api.CodeUnreachable {
		return err
	}
	return &stopped{err}
}

// events reads one stream and keeps after up to date.
func (c *Client) events(ctx context.Context, after *string, lives func(), each func(api.Event) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r, err := c.request(ctx, http.MethodGet, "/v1/events?after="+url.QueryEscape(*after), nil)
	if err != nil {
		return &stopped{err}
	}
	r.Header.Set("Accept", "application/x-ndjson")
	res, err := c.http.Do(r)
	if err != nil {
		return c.unreachable(ctx, err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		_, err := decode[struct{}](ctx, c, res)
		return refusal(err)
	}
	quiet := time.AfterFunc(followQuiet, cancel)
	defer quiet.Stop()
	lines := bufio.NewScanner(res.Body)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		lives()
		quiet.Reset(followQuiet)
		var e api.Event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return &stopped{api.Because(err, api.CodeInternal, "%s sent an event that is none: %v", c.address, err)}
		}
		if e.Type == "event" {
			if err := each(e); err != nil {
				return &stopped{err}
			}
		}
		*after = e.Revision // of a sign of life too: how far the stream came
	}
	return fmt.Errorf("%s: the stream of events ended: %w", c.address, errors.Join(lines.Err(), net.ErrClosed))
}

// Watch calls each with a whole collection (volumes, backingimages, nodes, …) at once and whenever it has changed, until each fails (its error), ctx ends (its error), or
// the node refuses. A node that goes away is asked again, as FollowEvents does.
func Watch[T any](ctx context.Context, c *Client, collection string, each func([]T) error) error {
	return again(ctx, nil, func(ctx context.Context, lives func()) error {
		conn, err := c.socket(ctx, collection)
		if err != nil {
			return err
		}
		defer conn.Close()
		// A read does not look at the context.
		defer context.AfterFunc(ctx, func() { conn.Close() })()
		extend := func() error { return conn.SetReadDeadline(time.Now().Add(followQuiet)) }
		answer := conn.PingHandler()
		conn.SetPingHandler(func(data string) error { return errors.Join(extend(), answer(data)) })
		for {
			var got api.Collection[T]
			if err := errors.Join(extend(), conn.ReadJSON(&got)); err != nil {
				return c.unreachable(ctx, err)
			}
			lives()
			if err := each(got.Data); err != nil {
				return &stopped{err}
			}
		}
	})
}

// socket opens a collection's websocket.
func (c *Client) socket(ctx context.Context, collection string) (*websocket.Conn, error) {
	transport := c.http.Transport.(*http.Transport)
	d := websocket.Dialer{HandshakeTimeout: 10 * time.Second, NetDialContext: transport.DialContext, TLSClientConfig: transport.TLSClientConfig}
	header := http.Header{}
	if c.token != "" {
		header.Set("Authorization", "Bearer "+c.token)
	}
	conn, res, err := d.DialContext(ctx, "ws"+c.base[len("http"):]+"/v1/ws/"+url.PathEscape(collection), header)
	if err == nil {
		conn.SetReadLimit(maxAnswer)
		return conn, nil
	}
	if res != nil && errors.Is(err, websocket.ErrBadHandshake) {
		_, err := decode[struct{}](ctx, c, res)
		return nil, refusal(err)
	}
	return nil, c.unreachable(ctx, err)
}
