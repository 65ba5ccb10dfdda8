package dataplane

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"
	"syscall"

	"ashlar/internal/dataplane/client"
	"ashlar/internal/dataplane/hold"
	"ashlar/internal/export"
)

// network is what is offered over TCP. The zero value offers nothing.
type network struct {
	setting sync.Mutex // held while it changes

	mu  sync.Mutex // guards the rest
	now client.Network
	tcp *export.TCP // nil: nothing
}

// look returns what is offered, and where.
func (n *network) look() (client.Network, *export.TCP) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.now, n.tcp
}

func (n *network) change(now client.Network, tcp *export.TCP) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.now, n.tcp = now, tcp
}

// endpoint is a volume's URI over TCP; empty if there is none.
func (n *network) endpoint(volume string) string {
	if _, tcp := n.look(); tcp != nil {
		return tcp.URI(volume)
	}
	return ""
}

// SetNetwork implements client.Service. Clients of an address that is left are answered what they sent, and then cut; while the address stays they notice nothing, but for the certificates that
// later ones see.
func (p *Process) SetNetwork(ctx context.Context, a client.Network) error {
	ctx, cancel := p.work(ctx)
	defer cancel()
	p.network.setting.Lock()
	defer p.network.setting.Unlock()
	if err := p.setNetwork(ctx, a); err != nil {
		return forWire(fmt.Errorf("set network: %w", err))
	}
	p.board.bump()
	return nil
}

func (p *Process) setNetwork(ctx context.Context, a client.Network) error {
	if a.Address == "" {
		if a != (client.Network{}) {
			return fmt.Errorf("%w: certificates without an address", client.ErrInvalid)
		}
		if err := p.list.setNetwork(a); err != nil {
			return err
		}
		return errors.Join(p.stopNetwork(ctx), p.listeners.Forget(ctx, heldTCP))
	}
	config, err := networkTLS(a)
	if err != nil {
		return err
	}
	was, tcp := p.network.look()
	if a == was && tcp != nil {
		return nil
	}
	ln, err := p.listeners.listenTCP(ctx, heldTCP, a.Address)
	if err != nil {
		return err
	}
	if err := p.list.setNetwork(a); err != nil {
		return errors.Join(err, ln.Close())
	}
	return errors.Join(p.stopNetwork(ctx), p.serveNetwork(a, ln, config))
}

func (p *Process) serveNetwork(a client.Network, ln net.Listener, config *tls.Config) error {
	tcp, err := p.nbd.ServeTCP(ln, config)
	if err != nil {
		return err
	}
	p.network.change(a, tcp)
	p.log.Info("volumes are offered over TCP", "address", a.Address, "tls", config != nil)
	return nil
}

// stopNetwork ends what is offered over TCP. The listening socket stays with the holder: clients that connect wait in it.
func (p *Process) stopNetwork(ctx context.Context) error {
	_, tcp := p.network.look()
	if tcp == nil {
		return nil
	}
	p.network.change(client.Network{}, nil)
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	if err := tcp.Drain(ctx); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

// restoreNetwork offers over TCP what open.json says was offered. What cannot be (a certificate expired meanwhile) is missing in the State, and the agent asks for it again.
func (p *Process) restoreNetwork(ctx context.Context, a client.Network) {
	if a.Address == "" {
		return
	}
	p.network.setting.Lock()
	defer p.network.setting.Unlock()
	if err := p.setNetwork(ctx, a); err != nil {
		p.log.Error("volumes are not offered over TCP", "address", a.Address, "error", err)
	}
}

// networkTLS checks a Network and returns what its connections need; nil: they are plain.
func networkTLS(a client.Network) (*tls.Config, error) {
	host, port, err := net.SplitHostPort(a.Address)
	if n, e := strconv.ParseUint(port, 10, 16); err != nil || e != nil || n == 0 {
		return nil, fmt.Errorf("address %q: %w: it must be HOST:PORT, with a port from 1 to 65535", a.Address, client.ErrInvalid)
	}
	if (a.CertFile == "") != (a.KeyFile == "") || a.ClientCA != "" && a.CertFile == "" {
		return nil, fmt.Errorf("address %s: %w: a certificate needs its key, and a client authority needs both", a.Address, client.ErrInvalid)
	}
	if !isLoopback(host) && a.ClientCA == "" {
		return nil, fmt.Errorf("address %s: %w: beyond loopback a certificate, its key and an authority of clients' certificates are needed", a.Address, client.ErrInvalid)
	}
	if a.CertFile == "" {
		return nil, nil
	}
	c := &certificates{cert: a.CertFile, key: a.KeyFile, authority: a.ClientCA, make: func(pair tls.Certificate, authorities *x509.CertPool) *tls.Config {
		config := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}}
		if authorities != nil {
			config.ClientAuth, config.ClientCAs = tls.RequireAndVerifyClientCert, authorities
		}
		return config
	}}
	config, err := c.config()
	if err != nil {
		return nil, fmt.Errorf("address %s: %w: %w", a.Address, client.ErrInvalid, err)
	}
	return &tls.Config{MinVersion: tls.VersionTLS12, Certificates: config.Certificates, GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return c.config() }}, nil
}

// isLoopback tells of hosts that only this machine reaches, by number or by the one name that always means that.
func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// listenTCP returns a listener at a TCP address: the one kept under name if it listens there, else a new one, which is kept from then on.
func (h heldListeners) listenTCP(ctx context.Context, name, address string) (net.Listener, error) {
	want, err := net.ResolveTCPAddr("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("address %s: %w: %w", address, client.ErrInvalid, err)
	}
	f, err := h.holder.Get(ctx, name)
	if err == nil {
		ln, err := net.FileListener(f)
		err = errors.Join(err, f.Close())
		if err == nil && sameAddress(ln.Addr(), want) {
			return ln, nil
		}
		if err == nil {
			err = ln.Close() // it listens elsewhere: the new one takes its name
		}
		if err != nil {
			h.report(name, err)
		}
	} else if !errors.Is(err, hold.ErrNotHeld) {
		return nil, err
	}
	ln, err := net.ListenTCP("tcp", want)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("address %s: %w: somebody else listens there", address, client.ErrInUse)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return nil, fmt.Errorf("address %s: %w: it is none of this host's", address, client.ErrInvalid)
	case err != nil:
		return nil, fmt.Errorf("address %s: %w: %w", address, client.ErrInvalid, err)
	}
	if f, err = ln.File(); err == nil {
		err = errors.Join(h.holder.Put(ctx, name, f), f.Close())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("keep %s: %w", name, err), ln.Close())
	}
	return ln, nil
}

// sameAddress tells whether a listener listens at want; all of the host's addresses are one, in either family.
func sameAddress(has net.Addr, want *net.TCPAddr) bool {
	a, ok := has.(*net.TCPAddr)
	return ok && a.Port == want.Port && (a.IP.Equal(want.IP) || a.IP.IsUnspecified() && (want.IP == nil || want.IP.IsUnspecified()))
}
