// Package client speaks the REST API of a node: typed calls, errors back as values with their code (*api.Error), and waits for what an answer has only
// promised. It is what the commands, and everything else in front of the API, are made of.
//
// Read next: wait.go (waiting), api (the other end, and the structs that travel).
package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"ashlar/internal/api"
)

// maxAnswer bounds an answer; a list of many thousand volumes fits.
const maxAnswer = 256 << 20

// Client speaks to one node. It may be used concurrently. Close drops its idle connections.
type Client struct {
	http    *http.Client
	base    string // http://host
	address string // as given, for messages
}

// DefaultListen is the TCP address a node listens on where nothing else is said.
const DefaultListen = "127.0.0.1:9500"

// Socket is the path of a node's API socket.
func Socket(runDir string) string { return filepath.Join(runDir, "api.sock") }

// Address finds a node on this machine: its socket if there is one in runDir, else the default TCP address.
func Address(runDir string) string {
	if _, err := os.Stat(Socket(runDir)); err == nil {
		return "unix://" + Socket(runDir)
	}
	return "http://" + DefaultListen
}

// New returns a Client for an address: unix:///path/to/api.sock, or http://host:port. It connects to nothing yet. CodeInvalid.
func New(address string) (*Client, error) {
	u, err := url.Parse(address)
	if err != nil {
		return nil, api.Because(err, api.CodeInvalid, "server %q: not an address; use unix:///PATH or http://HOST:PORT", address)
	}
	dialer := &net.Dialer{Timeout: 5 * time.Second}
	transport := &http.Transport{MaxIdleConnsPerHost: 4, IdleConnTimeout: time.Minute, DialContext: dialer.DialContext}
	c := &Client{http: &http.Client{Transport: transport}, base: strings.TrimSuffix(address, "/"), address: address}
	switch {
	case u.Scheme == "unix" && u.Path != "":
		c.base = "http://localhost"
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", u.Path)
		}
	case u.Scheme == "http" && u.Host != "":
	default:
		return nil, api.Failure(api.CodeInvalid, "server %q: not an address; use unix:///PATH or http://HOST:PORT", address)
	}
	return c, nil
}

// Close drops idle connections.
func (c *Client) Close() error {
	c.http.CloseIdleConnections()
	return nil
}

// call sends a request and decodes the answer into answer, which may be nil. Every failure is an *api.Error: the server's own, or CodeUnreachable with status 0 when
// no answer came (what was asked may have been done), except when ctx has ended: then the error wraps the context's.
func (c *Client) call(ctx context.Context, method, path string, body, answer any) error {
	var payload io.Reader
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return fmt.Errorf("%s %s: %w", method, path, err)
		}
		payload = bytes.NewReader(data)
	}
	r, err := http.NewRequestWithContext(ctx, method, c.base+path, payload)
	if err != nil {
		return api.Because(err, api.CodeInvalid, "%s %s: %v", method, path, err)
	}
	if body != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	r.Header.Set("Accept", "application/json")
	res, err := c.http.Do(r)
	if err != nil {
		return c.unreachable(ctx, err)
	}
	defer res.Body.Close()
	data, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if err != nil {
		return c.unreachable(ctx, err)
	}
	if res.StatusCode < 200 || res.StatusCode > 299 {
		return failure(res.StatusCode, data)
	}
	if answer == nil || len(data) == 0 {
		return nil
	}
	if err := json.Unmarshal(data, answer); err != nil {
		return api.Because(err, api.CodeInternal, "%s answered %s %s with what is not its answer: %v", c.address, method, path, err)
	}
	return nil
}

// unreachable says that no answer came.
func (c *Client) unreachable(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("asking %s: %w", c.address, ctx.Err())
	}
	cause := err
	var op *net.OpError
	if errors.As(err, &op) {
		cause = op.Err
	}
	e := api.Because(err, api.CodeUnreachable, "no answer from the node at %s: %v", c.address, cause)
	e.Status = 0
	return e
}

// failure makes the error of an answer.
func failure(status int, data []byte) error {
	var body api.ErrorBody
	if err := json.Unmarshal(data, &body); err != nil || body.Message == "" {
		e := api.Failure(api.CodeInternal, "the answer was status %d without a reason", status)
		e.Status = status
		return e
	}
	e := api.Failure(body.Reason, "%s", body.Message)
	e.Status = status
	return e
}

// one calls and returns the decoded answer.
func one[T any](ctx context.Context, c *Client, method, path string, body any) (T, error) {
	var v T
	err := c.call(ctx, method, path, body, &v)
	return v, err
}

// list gets a collection.
func list[T any](ctx context.Context, c *Client, method, path string) ([]T, error) {
	v, err := one[api.Collection[T]](ctx, c, method, path, nil)
	return v.Data, err
}

// at is the path of a resource, with an action if there is one.
func at(plural, id, action string) string {
	p := "/v1/" + plural + "/" + url.PathEscape(id)
	if action != "" {
		p += "?action=" + action
	}
	return p
}
