package api

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"ashlar/internal/catalog"
	"ashlar/internal/identity"
)

// This file decides who may ask for what. The rule, in one place:
//
//	unix socket                 anything; its mode says who can open it
//	plain TCP on loopback       anything but what names a path of the node; with Config.RequireToken, as TLS
//	plain TCP anywhere else     nothing (CheckListen does not let it come to that)
//	TLS                         a token, wherever the connection comes from
//	another node (FromNode)     anything: that node has asked for what is to be shown
//
// A token is sent as "Authorization: Bearer SECRET", or as the password of basic authentication; never in a URL or a cookie. One that only reads is good for GET,
// HEAD and those actions of the dialect that change nothing. Where none is asked for, what is sent is ignored: clients of the dialect send an empty one.

// access is what a request may do.
type access struct {
	readOnly bool
}

// admit tells what a request may do; CodeUnauthorized, CodeForbidden, or the catalogue's error.
func (h *Handler) admit(r *http.Request) (access, error) {
	if err := misplaced(r); err != nil {
		return access{}, err
	}
	switch {
	case overUnixSocket(r), isFromNode(r):
		return access{}, nil
	case r.TLS == nil && !overLoopback(r):
		return access{}, Failure(CodeForbidden, "beyond loopback this API is served over TLS only")
	case r.TLS == nil && !h.cfg.RequireToken:
		// A name that a web page's server let point here (DNS rebinding) makes a browser take the page for ours; it still says the name.
		if fromBrowser(r) && !loopbackHost(r.Host) {
			return access{}, Failure(CodeForbidden, "a browser that came here by the name %s is refused; use 127.0.0.1 or localhost", quote(r.Host))
		}
		return access{}, nil
	}
	secret := tokenOf(r)
	if secret == "" {
		return access{}, Failure(CodeUnauthorized, "a token is needed: send it as a bearer token, or as the password of basic authentication (`ashlar token create` on the node makes one)")
	}
	return h.checkToken(r.Context(), secret)
}

// checkToken finds the token that a secret is of. All are compared, always.
func (h *Handler) checkToken(ctx context.Context, secret string) (access, error) {
	tokens, err := list[catalog.Token, struct{}](ctx, h, catalog.KindToken)
	if err != nil {
		return access{}, err
	}
	var found *catalog.Token
	for _, t := range tokens.wanted {
		if identity.TokenMatches(secret, t.SHA256) {
			found = &t
		}
	}
	if found == nil {
		return access{}, Failure(CodeUnauthorized, "this token is not known: it was deleted, or was never one of this cluster")
	}
	if !found.Expires.IsZero() && !h.cfg.Now().Before(found.Expires) {
		return access{}, Failure(CodeUnauthorized, "token %s expired at %s; make another", found.Name, stamp(found.Expires))
	}
	return access{readOnly: found.ReadOnly}, nil
}

// tokenOf reads a request's credential; "" if there is none.
func tokenOf(r *http.Request) string {
	if _, password, ok := r.BasicAuth(); ok {
		return password
	}
	scheme, secret, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if strings.EqualFold(scheme, "Bearer") {
		return strings.TrimSpace(secret)
	}
	return ""
}

// tokenNames are the names under which clients that do not read documentation put a token into a URL.
var tokenNames = [...]string{"token", "access_token", "ashlar_token", "api_key", "apikey"}

// misplaced refuses a token where proxies and logs keep it. It is refused on every connection, so that nobody learns the habit on loopback.
func misplaced(r *http.Request) error {
	wrong := func(where string) error {
		return Failure(CodeUnauthorized, "token in the wrong place: %s ends up in logs and histories; delete this token, make another, and send it in the header "+
			"\"Authorization: Bearer …\"", where)
	}
	for name, values := range r.URL.Query() {
		named := slices.ContainsFunc(tokenNames[:], func(n string) bool { return strings.EqualFold(name, n) })
		if named || slices.ContainsFunc(values, identity.LooksLikeToken) {
			return wrong("what is in a URL")
		}
	}
	// By its name alone a cookie is not ours: those of all servers of a host arrive here, whatever their port.
	for _, c := range r.Cookies() {
		if identity.LooksLikeToken(c.Value) {
			return wrong("what is in a cookie")
		}
	}
	return nil
}

// challenge tells a client how to show a credential (RFC 9110 11.6.1, RFC 6750 3).
func challenge(header http.Header, r *http.Request) {
	bearer := `Bearer realm="ashlar"`
	if tokenOf(r) != "" {
		bearer += `, error="invalid_token"`
	}
	header.Add("WWW-Authenticate", bearer)
	header.Add("WWW-Authenticate", `Basic realm="ashlar", charset="UTF-8"`)
}

// localAddr is where a connection arrived; nil if that is not known.
func localAddr(r *http.Request) net.Addr {
	addr, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	return addr
}

// overUnixSocket tells whether a request came over a unix socket rather than TCP.
func overUnixSocket(r *http.Request) bool {
	addr := localAddr(r)
	return addr != nil && addr.Network() == "unix"
}

// overLoopback tells whether a request came to a loopback address.
func overLoopback(r *http.Request) bool {
	addr := localAddr(r)
	if addr == nil || addr.Network() != "tcp" {
		return false
	}
	ap, err := netip.ParseAddrPort(addr.String())
	return err == nil && ap.Addr().Unmap().IsLoopback()
}

// fromBrowser tells whether a request bears the marks of one.
func fromBrowser(r *http.Request) bool {
	return r.Header.Get("Sec-Fetch-Site") != "" || r.Header.Get("Origin") != ""
}

// loopbackHost tells whether a Host header names this machine by a name that no foreign name server answers for.
func loopbackHost(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.Trim(host, "[]")
	if strings.EqualFold(host, "localhost") {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Unmap().IsLoopback()
}

// mayWrite refuses a changing verb to a token that only reads.
func (c *call) mayWrite() error {
	if c.access.readOnly {
		return Failure(CodeForbidden, "this token only reads: %s %s needs one that may change things", c.r.Method, quote(c.r.URL.Path))
	}
	return nil
}

// isUnauthorized tells that a failure asks for a credential.
func isUnauthorized(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Code == CodeUnauthorized
}
