package remote

import (
	"context"
	"crypto/tls"
	"errors"
	"net"

	"ashlar/internal/nbd"
)

// Client shakes hands on nc, over which replicas are then used. It takes nc over, and closes it when it fails.
func Client(ctx context.Context, nc net.Conn, cfg *tls.Config) (net.Conn, error) {
	tc := tls.Client(nbd.Prompt(nc), cfg)
	if err := tc.HandshakeContext(ctx); err != nil {
		return nil, errors.Join(err, nc.Close())
	}
	return tc, nil
}

// Listener gives TLS to what ln accepts; the handshake is the first read's.
func Listener(ln net.Listener, cfg *tls.Config) net.Listener {
	return tls.NewListener(prompts{ln}, cfg)
}

// prompts is a listener of connections in nbd's own form.
type prompts struct{ net.Listener }

// Accept implements net.Listener.
func (l prompts) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return nbd.Prompt(nc), nil
}
