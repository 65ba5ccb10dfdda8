package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/identity"
)

// This file is the wire between nodes (docs/formats/cluster.md, section 3): its window of versions, its errors, and how one node asks another.

// HeaderWindow carries each side's window of versions, MIN-CURRENT, in every request and every answer.
const HeaderWindow = "Ashlar-Node-Api"

// The limits of bodies.
const (
	maxRequest = 64 << 10
	maxAnswer  = 1 << 20
)

// askTimeout bounds one question to another node, dialTimeout the way there.
const (
	askTimeout  = 15 * time.Second
	dialTimeout = 5 * time.Second
)

// window is the range of versions a side speaks, both ends included.
type window struct{ min, current int }

// nodeWindow, "MIN-CURRENT", replaces the window where a build says so (-ldflags "-X ashlar/internal/cluster.nodeWindow=7-9"): a build that shares no version with those before it.
var nodeWindow = ""

func thisBuild() window {
	var other window
	if n, err := fmt.Sscanf(nodeWindow, "%d-%d", &other.min, &other.current); n == 2 && err == nil {
		return other
	}
	return window{APIMin, APICurrent}
}

func (w window) String() string { return fmt.Sprintf("%d-%d", w.min, w.current) }

// check refuses a side whose window, as it sent it, shares no version with ours: client.ErrVersion, with both named.
func (w window) check(sent string) error {
	lo, hi, _ := strings.Cut(sent, "-")
	low, err1 := strconv.Atoi(lo)
	high, err2 := strconv.Atoi(hi)
	switch {
	case err1 != nil || err2 != nil || low < 1 || high < low || len(sent) > 20:
		return client.Failure(client.CodeVersion, fmt.Sprintf("the other side sent no window of versions that it speaks to other nodes (%.20q); this side speaks %s", sent, w))
	case high < w.min || w.current < low:
		return client.Failure(client.CodeVersion, fmt.Sprintf("the nodes' versions have nothing in common: this side speaks %s, the other side %s; upgrade the older one", w, sent))
	}
	return nil
}

// wireError is what an answer other than 200 says.
type wireError struct {
	Code    client.Code `json:"code"`
	Message string      `json:"message"`
}

// status is the HTTP status of a code.
func status(code client.Code) int {
	switch code {
	case client.CodeInvalid:
		return http.StatusBadRequest
	case client.CodeNotFound:
		return http.StatusNotFound
	case client.CodeExists, client.CodeInUse, client.CodeConflict:
		return http.StatusConflict
	case client.CodeFenced:
		return http.StatusForbidden
	case client.CodeVersion:
		return http.StatusUpgradeRequired
	case client.CodeUnreachable:
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}

// codeOf is the wire's code of an error: that of the data process's wire, or of the catalogue's errors.
func codeOf(err error) client.Code {
	switch {
	case errors.Is(err, catalog.ErrUnreachable), errors.Is(err, context.DeadlineExceeded):
		return client.CodeUnreachable
	case errors.Is(err, catalog.ErrConflict):
		return client.CodeConflict
	case errors.Is(err, identity.ErrRequest):
		return client.CodeInvalid
	case errors.Is(err, identity.ErrPeer):
		return client.CodeFenced
	}
	return client.CodeOf(err)
}

// refuse answers with an error.
func refuse(w http.ResponseWriter, err error) {
	code := codeOf(err)
	answer(w, status(code), wireError{Code: code, Message: err.Error()})
}

func answer(w http.ResponseWriter, status int, v any) {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err) // nothing that is answered can fail to be encoded
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(append(data, '\n')) // a client that went away is nobody's error
}

// decode reads a request's body: one JSON object, no more than maxRequest bytes.
func decode(r *http.Request, into any) error {
	data, err := io.ReadAll(io.LimitReader(r.Body, maxRequest+1))
	if err != nil {
		return client.Failure(client.CodeInvalid, "the request broke off")
	}
	if len(data) > maxRequest {
		return client.Failure(client.CodeInvalid, fmt.Sprintf("the request has more than %d bytes", maxRequest))
	}
	return parse(data, into)
}

// parse reads one JSON object and nothing after it.
func parse(data []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(data))
	if err := d.Decode(into); err != nil {
		return client.Failure(client.CodeInvalid, fmt.Sprintf("the request cannot be read: %v", err))
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return client.Failure(client.CodeInvalid, "the request cannot be read: something follows it")
	}
	return nil
}

// Peer is another node: who it is and its address, HOST:PORT.
type Peer struct {
	Name, NodeID, Address string
}

// verify wants the id of the node that is meant, if that is known.
func (p Peer) verify(n identity.Node) error {
	if p.NodeID != "" && n.NodeID != p.NodeID {
		return fmt.Errorf("node %s at %s has another id than its record: %w", p.Name, p.Address, identity.ErrPeer)
	}
	return nil
}

// transport returns what carries requests to a peer, wherever they are addressed to. Connections are not kept.
func transport(t *identity.NodeTLS, p Peer) *http.Transport {
	return &http.Transport{
		DisableKeepAlives: true, DisableCompression: true, TLSClientConfig: t.Client(p.Name, p.verify), TLSHandshakeTimeout: dialTimeout,
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			d := net.Dialer{Timeout: dialTimeout}
			return d.DialContext(ctx, network, p.Address)
		},
	}
}

// question is what one node asks another: a path, a body, and what the answer is read into.
type question struct {
	path    string
	in, out any
}

// ask posts a question to a node and reads its answer. An error of the other side wraps its sentinel of package client; client.ErrUnreachable if none came; client.ErrVersion.
func ask(ctx context.Context, via http.RoundTripper, address string, q question) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	body, err := json.Marshal(q.in)
	if err != nil {
		return err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+address+q.path, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("%w: %w", ErrAddress, err)
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set(HeaderWindow, thisBuild().String())
	res, err := via.RoundTrip(r)
	if err != nil {
		return fmt.Errorf("ask %s: %w: %w", address, client.ErrUnreachable, err)
	}
	defer res.Body.Close()
	if err := thisBuild().check(res.Header.Get(HeaderWindow)); err != nil {
		return fmt.Errorf("ask %s: %w", address, err)
	}
	data, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("ask %s: %w: %w", address, client.ErrUnreachable, err)
	}
	if res.StatusCode != http.StatusOK {
		var e wireError
		if json.Unmarshal(data, &e) != nil || e.Code == "" {
			return fmt.Errorf("ask %s: %w: HTTP status %d", address, client.ErrInternal, res.StatusCode)
		}
		return client.Failure(e.Code, e.Message)
	}
	if err := json.Unmarshal(data, q.out); err != nil {
		return fmt.Errorf("ask %s: %w: %w", address, client.ErrInternal, err)
	}
	return nil
}
