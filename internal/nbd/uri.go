package nbd

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"strings"
)

// ErrURI: the text is not an NBD URI that can be used.
var ErrURI = errors.New("unusable NBD URI")

// defaultPort is NBD's port, for a URI that names none.
const defaultPort = "10809"

// Target is where an NBD URI leads.
type Target struct {
	Network string // "tcp" or "unix", as for net.Dial
	Address string // host:port, or the socket's path
	Export  string // name; empty asks for the server's default export
	TLS     bool   // the URI says nbds
	// Certificates, if not empty, is the absolute path of a directory with the files of a client over TLS; see ClientCertificates.
	Certificates string
}

// ParseURI takes an NBD URI apart, as https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md defines them:
// nbd://HOST[:PORT]/EXPORT, nbds://…, nbd+unix:///EXPORT?socket=PATH, nbds+unix://…, the latter and nbds also with
// tls-certificates=DIR. Other parameters are refused and not ignored: a key that is named and not used would be a surprise. Every
// error is an ErrURI.
func ParseURI(uri string) (Target, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return Target{}, fmt.Errorf("nbd: %w: %w", ErrURI, err)
	}
	bad := func(why string) (Target, error) {
		return Target{}, fmt.Errorf("nbd: %w: %q: %s", ErrURI, uri, why)
	}
	t := Target{Export: strings.TrimPrefix(u.Path, "/")}
	scheme, transport, _ := strings.Cut(u.Scheme, "+")
	t.TLS = scheme == "nbds"
	if scheme != "nbd" && scheme != "nbds" {
		return bad("the scheme is none of nbd, nbds, nbd+unix, nbds+unix")
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return bad("the part after ? does not parse")
	}
	for name, values := range query {
		socket, certificates := name == "socket" && transport == "unix", name == "tls-certificates" && t.TLS && filepath.IsAbs(values[0])
		if len(values) != 1 || !socket && !certificates {
			return bad(fmt.Sprintf("the parameter %q does not belong here", name))
		}
	}
	t.Certificates = query.Get("tls-certificates")
	switch {
	case !strings.HasPrefix(uri[len(u.Scheme):], "://") || u.Fragment != "":
		return bad("want SCHEME://…")
	case len(t.Export) > maxNameBytes:
		return bad("the export's name is too long")
	case transport == "":
		t.Network = "tcp"
		port := u.Port()
		if port == "" {
			port = defaultPort
		}
		host := u.Hostname()
		if host == "" {
			host = "localhost"
		}
		t.Address = net.JoinHostPort(host, port)
	case transport == "unix":
		t.Network, t.Address = "unix", query.Get("socket")
		if u.Host != "" || t.Address == "" {
			return bad("want " + u.Scheme + ":///EXPORT?socket=PATH")
		}
	default:
		return bad("no such transport: " + transport)
	}
	return t, nil
}
