package client

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
)

// Client asks a data process. It is a Service; besides that one's errors every method returns ErrUnreachable when nobody answered (what was asked may
// have been done: say it again) and ErrVersion when the process is of another age. Each request has a connection of its own, so a process that was replaced
// is found at once. While a data process is being started again its socket takes connections that wait; bound the wait with ctx.
type Client struct {
	caller
}

var _ Service = (*Client)(nil)

// New returns a client of the data process that listens on socket. Nothing is connected yet.
func New(socket string) *Client { return &Client{caller: newCaller(socket)} }

// Hello implements Service.
func (c *Client) Hello(ctx context.Context) (Hello, error) {
	return call[Hello](ctx, c.caller, "hello", nothing{})
}

// AdoptDisk implements Service.
func (c *Client) AdoptDisk(ctx context.Context, a Disk) (DiskStatus, error) {
	return call[DiskStatus](ctx, c.caller, "adopt-disk", a)
}

// State implements Service.
func (c *Client) State(ctx context.Context) (State, error) {
	return call[State](ctx, c.caller, "state", nothing{})
}

// WaitState implements Service.
func (c *Client) WaitState(ctx context.Context, afterRev uint64) (State, error) {
	for {
		st, err := call[State](ctx, c.caller, "wait-state", WaitState{AfterRev: afterRev})
		if err != nil || st.Rev != afterRev {
			return st, err
		}
	}
}

// CreateReplica implements Service.
func (c *Client) CreateReplica(ctx context.Context, a CreateReplica) error {
	return c.say(ctx, "create-replica", a)
}

// DeleteReplica implements Service.
func (c *Client) DeleteReplica(ctx context.Context, a DeleteReplica) error {
	return c.say(ctx, "delete-replica", a)
}

// RebuildReplica implements Service.
func (c *Client) RebuildReplica(ctx context.Context, a RebuildReplica) error {
	return c.say(ctx, "rebuild-replica", a)
}

// OpenVolume implements Service.
func (c *Client) OpenVolume(ctx context.Context, a OpenVolume) (VolumeStatus, error) {
	return call[VolumeStatus](ctx, c.caller, "open-volume", a)
}

// CloseVolume implements Service.
func (c *Client) CloseVolume(ctx context.Context, a CloseVolume) error {
	return c.say(ctx, "close-volume", a)
}

// Operate implements Service.
func (c *Client) Operate(ctx context.Context, a Operate) (VolumeStatus, error) {
	return call[VolumeStatus](ctx, c.caller, "operate", a)
}

// ImportImage implements Service.
func (c *Client) ImportImage(ctx context.Context, a ImportImage) (Job, error) {
	return call[Job](ctx, c.caller, "import-image", a)
}

// CancelImport implements Service.
func (c *Client) CancelImport(ctx context.Context, a CancelImport) error {
	return c.say(ctx, "cancel-import", a)
}

// DeleteImage implements Service.
func (c *Client) DeleteImage(ctx context.Context, a DeleteImage) error {
	return c.say(ctx, "delete-image", a)
}

// Check implements Service.
func (c *Client) Check(ctx context.Context, a Check) (Problems, error) {
	return call[Problems](ctx, c.caller, "check", a)
}

// SetLimits implements Service.
func (c *Client) SetLimits(ctx context.Context, a SetLimits) error {
	return c.say(ctx, "set-limits", a)
}

// SetBackground implements Service.
func (c *Client) SetBackground(ctx context.Context, a Background) error {
	return c.say(ctx, "set-background", a)
}

// SetCluster implements Service.
func (c *Client) SetCluster(ctx context.Context, a Cluster) error {
	return c.say(ctx, "set-cluster", a)
}

// CopyReplica implements Service.
func (c *Client) CopyReplica(ctx context.Context, a CopyReplica) (Job, error) {
	return call[Job](ctx, c.caller, "copy-replica", a)
}

// SetNetwork implements Service.
func (c *Client) SetNetwork(ctx context.Context, a Network) error {
	return c.say(ctx, "set-network", a)
}

// OpenSource implements Service.
func (c *Client) OpenSource(ctx context.Context, a OpenSource) (Source, error) {
	return call[Source](ctx, c.caller, "open-source", a)
}

// CloseSource implements Service.
func (c *Client) CloseSource(ctx context.Context, a CloseSource) error {
	return c.say(ctx, "close-source", a)
}

// ExportImage implements Service.
func (c *Client) ExportImage(ctx context.Context, a ExportImage) (Job, error) {
	return call[Job](ctx, c.caller, "export-image", a)
}

// Diff implements Service.
func (c *Client) Diff(ctx context.Context, a Diff) (Changes, error) {
	return call[Changes](ctx, c.caller, "diff", a)
}

// Shutdown implements Service.
func (c *Client) Shutdown(ctx context.Context, a Shutdown) error {
	return c.say(ctx, "shutdown", a)
}

// caller posts JSON: what Client, LedgerClient and PeerLedger share.
type caller struct {
	whom   string // for people: the socket, or the node
	prefix string // of the verbs' paths
	header http.Header
	window Window
	http   *http.Client
}

// newCaller asks whoever listens on a unix socket.
func newCaller(socket string) caller {
	return newDialer(socket, "/", func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	})
}

// newDialer asks whoever is at the other end of a connection. An error of dial means that nothing was said: errNotSent.
func newDialer(whom, prefix string, dial func(context.Context) (net.Conn, error)) caller {
	return caller{whom: whom, prefix: prefix, window: ThisBuild(), http: &http.Client{Transport: &http.Transport{
		// One connection a request: a kept one may lead to a process that is gone, and then nobody knows what was done.
		DisableKeepAlives:  true,
		DisableCompression: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			conn, err := dial(ctx)
			if err != nil {
				err = fmt.Errorf("%w: %w", errNotSent, err)
			}
			return conn, err
		},
	}}}
}

// say calls a verb that answers nothing.
func (c caller) say(ctx context.Context, verb string, in any) error {
	_, err := call[nothing](ctx, c, verb, in)
	return err
}

// call says one verb and returns its answer, or the failure as an error that wraps its sentinel.
func call[Out any](ctx context.Context, c caller, verb string, in any) (Out, error) {
	var out Out
	what := verb + " on " + c.whom
	body, err := json.Marshal(in)
	if err != nil {
		return out, fmt.Errorf("%s: %w: %w", what, ErrInvalid, err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://ashlar"+c.prefix+verb, bytes.NewReader(body))
	if err != nil {
		return out, fmt.Errorf("%s: %w: %w", what, ErrInvalid, err)
	}
	for name, values := range c.header {
		req.Header[http.CanonicalHeaderKey(name)] = values
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set(windowHeader, c.window.String())
	res, err := c.http.Do(req)
	if err != nil {
		return out, unreachable(what, err)
	}
	defer res.Body.Close()
	if err := c.window.check(res.Header.Get(windowHeader)); err != nil {
		return out, fmt.Errorf("%s: %w", what, err)
	}
	data, err := io.ReadAll(io.LimitReader(res.Body, maxAnswerBytes))
	if err != nil {
		return out, unreachable(what, err)
	}
	if res.StatusCode != http.StatusOK {
		return out, failureFrom(res.StatusCode, data)
	}
	if err := json.Unmarshal(data, &out); err != nil {
		return out, fmt.Errorf("%s: %w: answer is not what was asked for: %w", what, ErrInternal, err)
	}
	return out, nil
}

// failureFrom reads the other side's failure; what is none of ours is internal.
func failureFrom(status int, data []byte) error {
	var f failed
	if err := json.Unmarshal(data, &f); err != nil || f.Code == "" {
		return fmt.Errorf("%w: HTTP status %d", ErrInternal, status)
	}
	return Failure(f.Code, f.Message)
}
