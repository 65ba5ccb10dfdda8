package nbd

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net"
	"os"
	"path/filepath"
	"time"

	"ashlar/internal/block"
)

// ErrTLS: TLS is wanted by one side and refused by the other, or could not be set up; the error says why.
var ErrTLS = errors.New("TLS")

// ErrRefused: the server does not give the export to us, or lacks what we cannot do without.
var ErrRefused = errors.New("refused by the NBD server")

// ClientOptions says how to reach a server. The zero value is a plain connection that may write.
type ClientOptions struct {
	// ReadOnly refuses whatever writes before it is sent, also when the server would take it.
	ReadOnly bool
	// States asks for ashlar:layer, so that Extents tells Absent from Zero; without it, or from a server that does not have it, base:allocation.
	States bool
	// TLS encrypts the connection before anything is asked for, and is what verifies the server's certificate and presents ours.
	// ServerName, if empty, is the URI's host, or "localhost" for a unix socket. An nbds URI without it uses what
	// its tls-certificates says (ClientCertificates), else the system's authorities.
	TLS *tls.Config
	// DialContext makes the connection; nil means a net.Dialer.
	DialContext func(ctx context.Context, network, address string) (net.Conn, error)
}

// Limits of what a server is listened to during the negotiation.
const (
	maxOptionReplyBytes = 64 << 10
	maxOptionReplies    = 256
)

// agreed is what the negotiation leaves behind at the client.
type agreed struct {
	sizeBytes  int64
	flags      uint16
	structured bool
	contextID  uint32 // of the context that Extents asks; 0 when there is none
	state      func(flags uint32) block.State
	minBlock   int64 // power of two, at most 64 KiB
	maxPayload int64 // multiple of minBlock
}

// Dial connects to the export that uri names (see ParseURI) and negotiates: fixed newstyle, GO, structured replies and base:allocation if
// the server has them. ctx bounds all that, not the Client's life.
//
// Errors: ErrURI; ErrTLS; ErrNoExport; ErrServerClosed; ErrRefused; ErrProtocol; what the network says, wrapped; ctx's cause.
func Dial(ctx context.Context, uri string, o ClientOptions) (*Client, error) {
	t, err := ParseURI(uri)
	if err != nil {
		return nil, err
	}
	if t.Certificates != "" {
		if o.TLS != nil {
			return nil, fmt.Errorf("nbd: %w: the URI names certificates, and others are given", ErrTLS)
		}
		if o.TLS, err = ClientCertificates(t.Certificates); err != nil {
			return nil, err
		}
	}
	if t.TLS || o.TLS != nil {
		cfg := &tls.Config{MinVersion: tls.VersionTLS12}
		if o.TLS != nil {
			cfg = o.TLS.Clone()
		}
		if cfg.ServerName == "" {
			cfg.ServerName = "localhost"
			if host, _, err := net.SplitHostPort(t.Address); t.Network == "tcp" && err == nil {
				cfg.ServerName = host
			}
		}
		o.TLS = cfg
	}
	dial := o.DialContext
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	nc, err := dial(ctx, t.Network, t.Address)
	if err != nil {
		return nil, fmt.Errorf("nbd: connect to %s: %w", t.Address, err)
	}
	return NewClient(ctx, nc, t.Export, o)
}

// ClientCertificates reads the files of a directory, PEM, under the names that NBD's other clients expect (nbd_set_tls_certificates(3)
// and the URI's tls-certificates of https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md): ca-cert.pem has the authorities that a server's certificate must be signed by; client-cert.pem and
// client-key.pem, which may be missing together, are what is shown to the server. Every error is an ErrTLS.
func ClientCertificates(dir string) (*tls.Config, error) {
	fail := func(err error) (*tls.Config, error) { return nil, fmt.Errorf("nbd: %w: %s: %w", ErrTLS, dir, err) }
	authorities, err := os.ReadFile(filepath.Join(dir, "ca-cert.pem"))
	if err != nil {
		return fail(err)
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: x509.NewCertPool()}
	if !cfg.RootCAs.AppendCertsFromPEM(authorities) {
		return fail(errors.New("ca-cert.pem has no certificate"))
	}
	cert, key := filepath.Join(dir, "client-cert.pem"), filepath.Join(dir, "client-key.pem")
	pair, err := tls.LoadX509KeyPair(cert, key)
	if errors.Is(err, fs.ErrNotExist) {
		_, noCert := os.Lstat(cert)
		_, noKey := os.Lstat(key)
		if errors.Is(noCert, fs.ErrNotExist) && errors.Is(noKey, fs.ErrNotExist) {
			return cfg, nil
		}
	}
	if err != nil {
		return fail(err)
	}
	cfg.Certificates = []tls.Certificate{pair}
	return cfg, nil
}

// NewClient is Dial over a connection that exists. It takes nc over, and closes it when it fails. With ClientOptions.TLS its ServerName
// must be set.
func NewClient(ctx context.Context, nc net.Conn, export string, o ClientOptions) (*Client, error) {
	// A context that ends makes every read and write of the negotiation fail.
	stop := context.AfterFunc(ctx, func() { _ = nc.SetDeadline(time.Unix(1, 0)) })
	in := Prompt(nc)
	n := &negotiator{nc: nc, in: in, br: bufio.NewReaderSize(in, receiveBytes), export: export, states: o.States}
	a, err := n.run(ctx, o.TLS)
	if !stop() {
		err = fmt.Errorf("nbd: negotiate: %w", context.Cause(ctx))
	}
	if err == nil && a.minBlock > block.UnitBytes && !o.ReadOnly && a.flags&flagReadOnly == 0 {
		err = fmt.Errorf("nbd: export %q takes blocks of %d bytes only, open it read-only: %w", export, a.minBlock, block.ErrAlign)
	}
	if err != nil {
		return nil, errors.Join(err, nc.Close())
	}
	return newClient(n, nc, a, o.ReadOnly), nil
}

// negotiator is the client's side of one negotiation.
type negotiator struct {
	nc     net.Conn // the TLS connection once there is one
	in     net.Conn // what nc is made of; reading from it may be told to be quick
	br     *bufio.Reader
	export string
	states bool // ask for ashlar:layer first

	answered bool // an option over the present nc
}

func (n *negotiator) run(ctx context.Context, cfg *tls.Config) (agreed, error) {
	if err := n.greet(); err != nil {
		return agreed{}, err
	}
	if cfg != nil {
		if err := n.startTLS(ctx, cfg); err != nil {
			return agreed{}, err
		}
	}
	a := agreed{minBlock: 1, maxPayload: maxPayloadBytes}
	rep, err := n.ask(optStructuredReply, nil, nil)
	if err != nil {
		return a, err
	}
	if rep == repErrTLSReqd {
		return a, fmt.Errorf("nbd: export %q: the server requires %w", n.export, ErrTLS)
	}
	if a.structured = rep == repAck; a.structured {
		if err = n.askContexts(&a); err != nil {
			return a, err
		}
	}
	return a, n.choose(&a)
}

func (n *negotiator) greet() error {
	var hello [18]byte
	if _, err := io.ReadFull(n.br, hello[:]); err != nil {
		return fmt.Errorf("nbd: read the server's greeting: %w", err)
	}
	flags := be.Uint16(hello[16:])
	switch {
	case be.Uint64(hello[:]) != magicServer:
		return fmt.Errorf("nbd: this is no NBD server, it says %q: %w", hello[:8], ErrProtocol)
	case be.Uint64(hello[8:]) != magicOption || flags&flagFixedNewstyle == 0:
		return fmt.Errorf("nbd: the server does not negotiate (fixed newstyle): %w", ErrRefused)
	}
	return n.write(be.AppendUint32(nil, uint32(flags&(flagFixedNewstyle|flagNoZeroes))))
}

func (n *negotiator) write(p []byte) error {
	if _, err := n.nc.Write(p); err != nil {
		return fmt.Errorf("nbd: negotiate: %w", err)
	}
	return nil
}

// startTLS changes over to TLS. What the server sent before it could know that would be plain text in an encrypted stream: refused.
func (n *negotiator) startTLS(ctx context.Context, cfg *tls.Config) error {
	rep, err := n.ask(optStartTLS, nil, nil)
	switch {
	case err != nil:
		return err
	case rep != repAck:
		return fmt.Errorf("nbd: the server has no %w (reply %#x)", ErrTLS, rep)
	case n.br.Buffered() > 0:
		return fmt.Errorf("nbd: plain bytes after STARTTLS: %w", ErrProtocol)
	}
	tc := tls.Client(n.in, cfg)
	if err := tc.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("nbd: %w handshake: %w", ErrTLS, err)
	}
	n.answered = false
	n.nc, n.br = tc, bufio.NewReaderSize(tc, receiveBytes)
	return nil
}

// ask sends an option and gives each reply before the final one to each. It returns the final one's type: an ack or an error.
func (n *negotiator) ask(opt uint32, data []byte, each func(rep uint32, data []byte) error) (uint32, error) {
	p := be.AppendUint64(nil, magicOption)
	p = be.AppendUint32(p, opt)
	p = be.AppendUint32(p, uint32(len(data)))
	if err := n.write(append(p, data...)); err != nil {
		if _, _, why := n.reply(opt); why != nil && !n.answered {
			err = why // a server that hung up on us over TLS said why before it did
		}
		return 0, err
	}
	for range maxOptionReplies {
		rep, data, err := n.reply(opt)
		if err != nil || rep == repAck || rep>>31 != 0 {
			return rep, err
		}
		if each == nil {
			return 0, fmt.Errorf("nbd: reply %d to option %d: %w", rep, opt, ErrProtocol)
		}
		if err := each(rep, data); err != nil {
			return 0, err
		}
	}
	return 0, fmt.Errorf("nbd: more than %d replies to option %d: %w", maxOptionReplies, opt, ErrProtocol)
}

func (n *negotiator) reply(opt uint32) (rep uint32, data []byte, err error) {
	var head [optionReplyBytes]byte
	if _, err := io.ReadFull(n.br, head[:]); err != nil {
		// With TLS 1.3 a server that does not like our certificate says so only now.
		if _, encrypted := n.nc.(*tls.Conn); encrypted && !n.answered {
			err = fmt.Errorf("%w: %w", ErrTLS, err)
		}
		return 0, nil, fmt.Errorf("nbd: read reply to option %d: %w", opt, err)
	}
	size := be.Uint32(head[16:])
	if be.Uint64(head[:]) != magicOptionReply || be.Uint32(head[8:]) != opt || size > maxOptionReplyBytes {
		return 0, nil, fmt.Errorf("nbd: reply %x to option %d: %w", head, opt, ErrProtocol)
	}
	data = make([]byte, size)
	if _, err := io.ReadFull(n.br, data); err != nil {
		return 0, nil, fmt.Errorf("nbd: read reply to option %d: %w", opt, err)
	}
	n.answered = true
	return be.Uint32(head[12:]), data, nil
}

// allocation is the meta context that every server has.
const allocation = "base:allocation"

// askContexts selects the one context that Extents is to ask.
func (n *negotiator) askContexts(a *agreed) (err error) {
	if n.states {
		a.state = layerState
		if a.contextID, err = n.askContext(layerContext); err != nil || a.contextID != 0 {
			return err
		}
	}
	a.state = allocationState
	a.contextID, err = n.askContext(allocation)
	return err
}

// askContext selects a context and returns its id, 0 when the server does not have it.
func (n *negotiator) askContext(context string) (id uint32, err error) {
	p := be.AppendUint32(nil, uint32(len(n.export)))
	p = append(p, n.export...)
	p = be.AppendUint32(p, 1)
	p = be.AppendUint32(p, uint32(len(context)))
	rep, err := n.ask(optSetMetaContext, append(p, context...), func(rep uint32, data []byte) error {
		if rep != repMetaContext || len(data) < 4 {
			return fmt.Errorf("nbd: reply %d to SET_META_CONTEXT: %w", rep, ErrProtocol)
		}
		if string(data[4:]) == context {
			id = be.Uint32(data)
		}
		return nil
	})
	if err != nil || rep != repAck {
		return 0, err
	}
	return id, nil
}

// choose ends the negotiation with GO.
func (n *negotiator) choose(a *agreed) error {
	p := be.AppendUint32(nil, uint32(len(n.export)))
	p = append(p, n.export...)
	p = be.AppendUint16(p, 1)
	p = be.AppendUint16(p, infoBlockSize)
	known := false
	rep, err := n.ask(optGo, p, func(rep uint32, data []byte) error {
		if rep != repInfo || len(data) < 2 {
			return fmt.Errorf("nbd: reply %d to GO: %w", rep, ErrProtocol)
		}
		switch typ, data := be.Uint16(data), data[2:]; {
		case typ == infoExport && len(data) == 10:
			size := be.Uint64(data)
			if size > math.MaxInt64 {
				return fmt.Errorf("nbd: an export of %d bytes: %w", size, ErrProtocol)
			}
			a.sizeBytes, a.flags, known = int64(size), be.Uint16(data[8:]), true
		case typ == infoBlockSize && len(data) == 12:
			return a.blockSizes(be.Uint32(data), be.Uint32(data[8:]))
		case typ == infoExport, typ == infoBlockSize:
			return fmt.Errorf("nbd: information %d of %d bytes: %w", typ, len(data), ErrProtocol)
		}
		return nil
	})
	switch {
	case err != nil:
		return err
	case rep == repErrUnknown:
		return fmt.Errorf("nbd: export %q: %w", n.export, ErrNoExport)
	case rep == repErrShutdown:
		return fmt.Errorf("nbd: export %q: %w", n.export, ErrServerClosed)
	case rep == repErrTLSReqd:
		return fmt.Errorf("nbd: export %q: the server requires %w", n.export, ErrTLS)
	case rep != repAck:
		return fmt.Errorf("nbd: export %q: reply %#x to GO: %w", n.export, rep, ErrRefused)
	case !known || a.flags&flagHasFlags == 0:
		return fmt.Errorf("nbd: export %q without size and flags: %w", n.export, ErrProtocol)
	}
	return nil
}

// blockSizes takes what the server says of its blocks. The protocol allows a minimum of 1 to 64 KiB, powers of two.
func (a *agreed) blockSizes(minimum, maximum uint32) error {
	if minimum == 0 || minimum > 64<<10 || minimum&(minimum-1) != 0 || maximum < minimum {
		return fmt.Errorf("nbd: blocks of %d to %d bytes: %w", minimum, maximum, ErrProtocol)
	}
	a.minBlock = int64(minimum)
	a.maxPayload = min(int64(maximum), maxPayloadBytes) / a.minBlock * a.minBlock
	return nil
}
