package remote

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
)

// Client shakes hands on nc, over which replicas are then used. It takes nc over, and closes it when it fails.
func Client(ctx context.Context, nc net.Conn, cfg *tls.Config) (net.Conn, error) {
	tc := tls.Client(nc, cfg)
	if err := tc.HandshakeContext(ctx); err != nil {
		return nil, errors.Join(err, nc.Close())
	}
	return tc, nil
}

// Listener gives TLS to what ln accepts; the handshake is the first read's.
func Listener(ln net.Listener, cfg *tls.Config) net.Listener { return tls.NewListener(ln, cfg) }
