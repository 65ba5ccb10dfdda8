package api

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
)

// Transport is how a TCP listener speaks.
type Transport int

// The transports.
const (
	Plain   Transport = iota // HTTP
	OverTLS                  // HTTP over TLS, where a token is asked for
)

// ErrListen: the address to listen on is refused.
var ErrListen = errors.New("listening beyond loopback needs TLS")

// CheckListen tells whether the REST API may listen on a TCP address. Plain: loopback only. Anything else is then ErrListen, also an empty host, which would be every
// interface, and a name other than localhost, which could come to mean another machine. Over TLS any address will do.
func CheckListen(addr string, t Transport) error {
	host, port, err := net.SplitHostPort(addr)
	if err == nil {
		_, err = net.LookupPort("tcp", port)
	}
	if err != nil {
		return fmt.Errorf("listen on %q: %w (want HOST:PORT, for example 127.0.0.1:9500)", addr, err)
	}
	if t == OverTLS || host == "localhost" {
		return nil
	}
	ip, err := netip.ParseAddr(host)
	if err != nil || !ip.Unmap().IsLoopback() {
		return fmt.Errorf("listen on %q: %w; give it a certificate, or use 127.0.0.1:PORT and a tunnel", addr, ErrListen)
	}
	return nil
}

// Listen opens a TCP listener for a Handler after CheckListen: over TLS with settings (identity makes them), plain without (nil).
func Listen(addr string, settings *tls.Config) (net.Listener, error) {
	t := Plain
	if settings != nil {
		t = OverTLS
	}
	if err := CheckListen(addr, t); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", addr)
	if err != nil || settings == nil {
		return l, err
	}
	return tls.NewListener(l, settings), nil
}
