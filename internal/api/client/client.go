// Package client speaks the REST API of a node: typed calls, errors back as values with their code (*api.Error), and waits for what an answer has only
// promised. It is what the commands, and everything else in front of the API, are made of.
//
// Read next: wait.go (waiting), bytes.go (files up and down), follow.go (events and collections as they change), api (the other end, and the structs that travel).
package client

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
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
	token   string // to show; "" none
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

// Options say how to show who one is, and whom to trust.
type Options struct {
	// TokenFile holds a token, alone. Nobody but its owner may be able to read it.
	TokenFile string
	// Token is a token from elsewhere (the environment), if there is no TokenFile. Not from an argument: every user of a machine can read those.
	Token string
	// CAFile holds the certificates of the authorities that may have signed the node's, PEM; "" means the system's.
	CAFile string
}

// New is Open without options.
func New(address string) (*Client, error) { return Open(address, Options{}) }

const addressForms = "use unix:///PATH, http://HOST:PORT or https://HOST:PORT"

// Open returns a Client for an address: unix:///path/to/api.sock, http://host:port, or https://host:port with a token. It connects to nothing yet. A token is shown over
// TLS and to loopback only. CodeInvalid.
func Open(address string, o Options) (*Client, error) {
	u, err := url.Parse(address)
	if err != nil {
		return nil, api.Because(err, api.CodeInvalid, "server %q: not an address; %s", address, addressForms)
	}
	dialer := &net.Dialer{Timeout: 5 * time.Second}
	transport := &http.Transport{
		MaxIdleConnsPerHost: 4, IdleConnTimeout: time.Minute, DialContext: dialer.DialContext, TLSHandshakeTimeout: 10 * time.Second, ExpectContinueTimeout: 10 * time.Second,
		DisableCompression: true,
	}
	// A redirect would take the token, or a file's bytes, to where nobody said.
	stay := func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	c := &Client{http: &http.Client{Transport: transport, CheckRedirect: stay}, base: strings.TrimSuffix(address, "/"), address: address}
	if c.token, err = o.token(); err != nil {
		return nil, err
	}
	switch {
	case u.Scheme == "unix" && u.Path != "":
		c.base, c.token = "http://localhost", ""
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", u.Path)
		}
	case u.Scheme == "http" && u.Host != "":
		if ip := net.ParseIP(u.Hostname()); c.token != "" && u.Hostname() != "localhost" && !ip.IsLoopback() {
			return nil, api.Failure(api.CodeInvalid, "server %q: a token is not sent in plain text beyond this machine; use https://", address)
		}
	case u.Scheme == "https" && u.Host != "":
		if transport.TLSClientConfig, err = o.tls(); err != nil {
			return nil, err
		}
	default:
		return nil, api.Failure(api.CodeInvalid, "server %q: not an address; %s", address, addressForms)
	}
	return c, nil
}

// token reads the token there is.
func (o Options) token() (string, error) {
	secret := o.Token
	if o.TokenFile != "" {
		st, err := os.Stat(o.TokenFile)
		if err == nil && st.Mode().IsRegular() && st.Mode().Perm()&0o077 != 0 {
			return "", api.Failure(api.CodeInvalid, "token file %s has mode %04o: others can read it; chmod 600 it, or make another token", o.TokenFile, st.Mode().Perm())
		}
		data, err := os.ReadFile(o.TokenFile)
		if err != nil {
			return "", api.Because(err, api.CodeInvalid, "token file: %v", err)
		}
		secret = string(data)
	}
	secret = strings.TrimSpace(secret)
	if strings.ContainsFunc(secret, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return "", api.Failure(api.CodeInvalid, "what was given as a token is none: it has spaces or other characters that no token has")
	}
	return secret, nil
}

// tls are the settings for a node beyond this machine.
func (o Options) tls() (*tls.Config, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if o.CAFile == "" {
		return cfg, nil
	}
	data, err := os.ReadFile(o.CAFile)
	if err != nil {
		return nil, api.Because(err, api.CodeInvalid, "authority's certificate: %v", err)
	}
	cfg.RootCAs = x509.NewCertPool()
	if !cfg.RootCAs.AppendCertsFromPEM(data) {
		return nil, api.Failure(api.CodeInvalid, "%s holds no certificate in PEM; on a node it is DATA-DIR/identity/ca.crt", o.CAFile)
	}
	return cfg, nil
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
	r, err := c.request(ctx, method, path, payload)
	if err != nil {
		return err
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
	var data bytes.Buffer
	if n := res.ContentLength; n > 0 && n <= maxAnswer {
		data.Grow(int(n) + bytes.MinRead) // what ReadFrom wants to have left at the end
	}
	if _, err := data.ReadFrom(io.LimitReader(res.Body, maxAnswer)); err != nil {
		return c.unreachable(ctx, err)
	}
	return c.answer(res, data.Bytes(), answer)
}

// answer decodes an answer's body into a value, which may be nil, or makes its error.
func (c *Client) answer(res *http.Response, data []byte, into any) error {
	if res.StatusCode < 200 || res.StatusCode > 299 {
		return failure(res.StatusCode, data)
	}
	if into == nil || len(data) == 0 {
		return nil
	}
	if err := json.Unmarshal(data, into); err != nil {
		return api.Because(err, api.CodeInternal, "%s answered %s %s with what is not its answer: %v", c.address, res.Request.Method, res.Request.URL.Path, err)
	}
	return nil
}

// request makes a request that says who asks.
func (c *Client) request(ctx context.Context, method, path string, body io.Reader) (*http.Request, error) {
	r, err := http.NewRequestWithContext(ctx, method, c.base+path, body)
	if err != nil {
		return nil, api.Because(err, api.CodeInvalid, "%s %s: %v", method, path, err)
	}
	if c.token != "" {
		r.Header.Set("Authorization", "Bearer "+c.token)
	}
	return r, nil
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
	var untrusted *tls.CertificateVerificationError
	if errors.As(err, &untrusted) {
		e := api.Because(err, api.CodeUnreachable, "the node at %s is not trusted: %v; name the authority that signed its certificate, on a node DATA-DIR/identity/ca.crt", c.address, untrusted.Err)
		e.Status = 0
		return e
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
