package remote

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/replica"
)

var (
	// ErrAway: nobody answers on the other node.
	ErrAway = errors.New("the node that has it does not answer")
	// ErrRestarted: the other node's host was booted again, or the disk mounted again, so that what was written and not flushed may be gone. It is a replica.ErrRestarted, by which the engine knows it, and a block.ErrFailed.
	ErrRestarted = fmt.Errorf("the node that has it was booted again since it was written to: %w: %w", replica.ErrRestarted, block.ErrFailed)
	// ErrUnknown: the other node has no such replica or source. A Host answers it.
	ErrUnknown = errors.New("that node has no such thing")
	// ErrBusy: the replica is in use on the other node in a way that leaves no room. A Host answers it.
	ErrBusy = errors.New("in use on that node")
)

// Dial connects to the node that has the replica. The connection is past its TLS handshake, and nothing was said on it yet. It ends when ctx does.
type Dial func(ctx context.Context) (net.Conn, error)

// Config says which replica, and how to reach it.
type Config struct {
	// ReplicaID is required. VolumeID, if not empty, is what the replica must belong to, as far as it knows.
	ReplicaID, VolumeID string
	Dial                Dial
	// Beat is how long the peer may be quiet before it is asked whether it is there; Silence how long it may take to answer before the connection is given up. Zero: 1 s and 3 s.
	Beat, Silence time.Duration
	// Codes are further errors that come back as what they were, if the Server has them too.
	Codes []Code
	Log   *slog.Logger // nil: none
}

// check fills in defaults.
func (c Config) check() (Config, error) {
	if c.Dial == nil || !validID(c.ReplicaID) {
		return c, fmt.Errorf("replica %q: a replica's id and a way to reach it are needed: %w", c.ReplicaID, ErrUnknown)
	}
	return c.defaults(), nil
}

func (c Config) defaults() Config {
	if c.Beat <= 0 {
		c.Beat = time.Second
	}
	if c.Silence <= 0 {
		c.Silence = 3 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// Open asks the replica what it is, and returns it, not let in yet. ErrAway when nobody answers before ctx ends; ErrUnknown; ErrBusy; ErrVersion; replica.ErrChain when it
// belongs to another volume; what the Host there says, as far as it is one of the Codes.
func Open(ctx context.Context, cfg Config) (*Replica, error) {
	cfg, err := cfg.check()
	if err != nil {
		return nil, fmt.Errorf("open remote %w", err)
	}
	r := &Replica{cfg: cfg, talker: newTalker(cfg), fencing: make(chan struct{}, 1)}
	r.life, r.cancel = context.WithCancelCause(context.Background())
	st, err := r.Status(ctx)
	if err == nil && cfg.VolumeID != "" && st.Record.VolumeID != "" && st.Record.VolumeID != cfg.VolumeID {
		err = fmt.Errorf("it belongs to volume %s: %w", st.Record.VolumeID, replica.ErrChain)
	}
	if err != nil {
		_ = r.Close()
		return nil, fmt.Errorf("open remote replica %s: %w", cfg.ReplicaID, err)
	}
	r.size.Store(st.Chain.SizeBytes)
	return r, nil
}
