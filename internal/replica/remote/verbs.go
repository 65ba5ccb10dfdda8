package remote

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"

	"ashlar/internal/block"
	"ashlar/internal/nbd"
	"ashlar/internal/replica"
)

// Confirm implements replica.Replica.
func (r *Replica) Confirm(ctx context.Context, w replica.Writer) error {
	_, err := r.say(ctx, w, "confirm", question{}, nil)
	return r.wrap("confirm", err)
}

// Keep implements replica.Replica.
func (r *Replica) Keep(ctx context.Context, w replica.Writer, rec replica.Record) error {
	_, err := r.say(ctx, w, "keep", question{Record: &rec}, nil)
	return r.wrap("keep record", err)
}

// Change implements replica.Replica.
func (r *Replica) Change(ctx context.Context, w replica.Writer, c replica.Change) error {
	_, err := r.say(ctx, w, "change", question{Change: &c}, nil)
	if err == nil && r.size.Swap(c.Chain.SizeBytes) != c.Chain.SizeBytes {
		// The connection was told the old size; calls find that out too, and wait for the next one.
		if l := r.line.Load(); l != nil {
			if end := l.cur.Load(); end != nil && end.c.Size() != c.Chain.SizeBytes {
				l.giveUp(end, errResized)
			}
		}
	}
	return r.wrap(c.Verb, err)
}

// Prepare implements replica.Replica.
func (r *Replica) Prepare(ctx context.Context, w replica.Writer, c replica.Change, progress func(doneBytes, totalBytes int64)) error {
	_, err := r.say(ctx, w, "prepare", question{Change: &c}, progress)
	return r.wrap("prepare "+c.Verb, err)
}

// SetSnapshot implements replica.Replica.
func (r *Replica) SetSnapshot(ctx context.Context, w replica.Writer, id replica.LayerID, m replica.SnapshotMeta) error {
	_, err := r.say(ctx, w, "set-snapshot", question{Layer: id, Snapshot: &m}, nil)
	return r.wrap("set snapshot", err)
}

// Purge implements replica.Replica.
func (r *Replica) Purge(ctx context.Context, w replica.Writer, progress func(doneBytes, totalBytes int64)) error {
	_, err := r.say(ctx, w, "purge", question{}, progress)
	return r.wrap("purge", err)
}

// Status implements replica.Replica. The writer's session is the engine's, without the number of the connection.
func (r *Replica) Status(ctx context.Context) (replica.Status, error) {
	a, err := r.look(ctx, "status", question{}, nil)
	if err == nil && a.Status == nil {
		err = fmt.Errorf("an answer without what was asked: %w", errFar)
	}
	if err != nil {
		return replica.Status{}, r.wrap("status", err)
	}
	a.Status.Writer = fromWire(a.Status.Writer)
	return *a.Status, nil
}

// Count implements replica.Replica.
func (r *Replica) Count(ctx context.Context) error {
	_, err := r.look(ctx, "count", question{}, nil)
	return r.wrap("count", err)
}

// Space implements replica.Replica.
func (r *Replica) Space(ctx context.Context) (replica.Usage, error) {
	a, err := r.look(ctx, "space", question{}, nil)
	if err == nil && a.Usage == nil {
		err = fmt.Errorf("an answer without what was asked: %w", errFar)
	}
	if err != nil {
		return replica.Usage{}, r.wrap("space", err)
	}
	return *a.Usage, nil
}

// Changed implements replica.Replica. One answer has at most 65536 ranges.
func (r *Replica) Changed(ctx context.Context, d replica.Diff) ([]replica.Range, int64, error) {
	a, err := r.look(ctx, "changed", question{Diff: &diff{From: d.From, To: d.To, Off: d.Off, Max: d.Max}}, nil)
	if err != nil {
		return nil, 0, r.wrap("changed", err)
	}
	return a.Ranges, a.Next, nil
}

// OpenSnapshot implements replica.Replica. While the peer is away it waits, until Close. Between two connections to the peer the layers are not pinned: one that was removed and purged in such a
// gap fails the Device's calls with replica.ErrPruned or ErrNoSnapshot; what they return is never changed content.
func (r *Replica) OpenSnapshot(id replica.LayerID) (block.Device, error) {
	if !validID(string(id)) {
		return nil, r.wrap("open snapshot", fmt.Errorf("layer %q: %w", id, replica.ErrNoSnapshot))
	}
	s := &source{talker: r.talker, name: exportName{kind: kindSnapshot, replica: r.cfg.ReplicaID, layer: id, token: newToken()}}
	s.check = func(ctx context.Context) error {
		_, err := r.talker.ask(ctx, "open-snapshot", question{Replica: r.cfg.ReplicaID, Layer: id}, nil)
		return err
	}
	s.leave = func(ctx context.Context) error {
		_, err := r.talker.ask(ctx, "close-snapshot", question{Replica: r.cfg.ReplicaID, Token: s.name.token}, nil)
		return err
	}
	if err := s.open(r.life, r.cfg); err != nil {
		if r.life.Err() != nil {
			err = block.ErrClosed
		}
		return nil, r.wrap("open snapshot", err)
	}
	return s, nil
}

func newToken() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return hex.EncodeToString(b[:])
}

// source is a read-only Device on another node, over a line of its own.
type source struct {
	talker *talker
	name   exportName
	line   *line
	size   int64                           // written by the first connection
	check  func(ctx context.Context) error // asks the peer why it has no such export; nil means that it has
	leave  func(ctx context.Context) error // tells the peer that the export is not used any more; nil: nothing to tell
	own    bool                            // the talker is nobody else's
}

var _ block.Device = (*source)(nil)

func (s *source) open(ctx context.Context, cfg Config) error {
	s.size = -1
	s.line = newLine(cfg, s.name.String(), s.connect)
	if err := s.line.open(ctx); err != nil {
		s.line.close(err)
		return err
	}
	return nil
}

// connect is the line's.
func (s *source) connect(ctx context.Context) (*wireEnd, error) {
	c, err := s.talker.export(ctx, s.name)
	if errors.Is(err, nbd.ErrNoExport) {
		why := s.check(ctx)
		var far *farError
		if errors.As(why, &far) && !errors.Is(far, block.ErrClosed) {
			return nil, final{why}
		}
		return nil, errors.Join(err, why)
	}
	if err != nil {
		return nil, err
	}
	if s.size < 0 {
		s.size = c.Size() // while open waits; nobody writes it afterwards, so that anybody may read it
	} else if c.Size() != s.size {
		return nil, final{errors.Join(fmt.Errorf("it has %d bytes now, had %d: %w", c.Size(), s.size, block.ErrFailed), c.Close())}
	}
	return newEnd(c, replica.Writer{}), nil
}

func (s *source) wrap(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("remote %s: %s: %w", s.name, what, err)
}

// over is why nothing can be called any more.
func (s *source) over() error {
	s.line.mu.Lock()
	defer s.line.mu.Unlock()
	return s.line.over
}

// ReadAt implements block.Device.
func (s *source) ReadAt(p []byte, off int64) (int, error) {
	err := block.CheckRange(off, int64(len(p)), s.size)
	switch {
	case err != nil:
	case len(p) == 0:
		err = s.over()
	default:
		err = pieces(int64(len(p)), func(from, to int64) error {
			return s.line.do(func(c *nbd.Client) error {
				_, err := c.ReadAt(p[from:to], off+from)
				return err
			})
		})
	}
	if err != nil {
		return 0, s.wrap("read", err)
	}
	return len(p), nil
}

// readOnly is what a call that would write n bytes returns.
func (s *source) readOnly(off, n int64) error {
	if err := s.over(); err != nil {
		return err
	}
	if err := block.CheckRange(off, n, s.size); err != nil || n == 0 {
		return err
	}
	return block.ErrReadOnly
}

// WriteAt implements block.Device; block.ErrReadOnly.
func (s *source) WriteAt(p []byte, off int64) (int, error) {
	return 0, s.wrap("write", s.readOnly(off, int64(len(p))))
}

// Zero implements block.Device; block.ErrReadOnly.
func (s *source) Zero(off, n int64) error { return s.wrap("zero", s.readOnly(off, n)) }

// Flush implements block.Device: there is nothing to flush.
func (s *source) Flush() error { return s.wrap("flush", s.over()) }

// Extents implements block.Device.
func (s *source) Extents(off, n int64) (list []block.Extent, err error) {
	err = block.CheckRange(off, n, s.size)
	switch {
	case err != nil:
	case n == 0:
		err = s.over()
	default:
		err = s.line.do(func(c *nbd.Client) error {
			list, err = c.Extents(off, n)
			return err
		})
	}
	return list, s.wrap("extents", err)
}

// Size implements block.Device.
func (s *source) Size() int64 { return s.size }

// Close implements block.Device. When it returns the peer has let go of the export, or could not be told in time and does so when it notices.
func (s *source) Close() error {
	if errors.Is(s.over(), block.ErrClosed) {
		return s.wrap("close", block.ErrClosed)
	}
	s.line.close(block.ErrClosed)
	if s.leave != nil {
		ctx, cancel := context.WithTimeout(context.Background(), s.line.silence)
		defer cancel()
		_ = s.leave(ctx)
	}
	if s.own {
		s.talker.close()
	}
	return nil
}
