// Package ledgertest is the in-memory twin of the catalogue as the engine sees it (Mem), which loses answers, delays, and is restored from old backups on
// request, and the contract of volume.Ledger as a test suite (Run), which every way to the catalogue passes.
//
// Read next: package volume, ledger.go.
package ledgertest

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"

	"ashlar/internal/replica"
	"ashlar/internal/volume"
)

// Mem is a Ledger in memory. It keeps records as JSON, as a catalogue does, so that nothing is shared with the caller. All methods may be called concurrently.
type Mem struct {
	mu      sync.Mutex // guards what follows
	rev     volume.Rev
	entries map[string]entry
	hook    func(Call) Fault
	calls   int
	history []replica.Record // every record ever swapped in, in order
}

type entry struct {
	json []byte
	rev  volume.Rev
}

var _ volume.Ledger = (*Mem)(nil)

// NewMem returns an empty catalogue.
func NewMem() *Mem { return &Mem{entries: map[string]entry{}} }

// Call is one call of a Ledger.
type Call struct {
	N    int            // counted from 1 over all calls
	Swap bool           // or a Read
	Rec  replica.Record // of a Swap
	Was  volume.Rev     // of a Swap
}

// Fault says what becomes of a call.
type Fault uint8

// What may become of a call.
const (
	// OK: nothing.
	OK Fault = iota
	// LostBefore: nobody could be asked; nothing happened.
	LostBefore
	// LostAfter: it happened, and the answer was lost.
	LostAfter
	// Conflict: a Swap is told that the record changed meanwhile, although it did not.
	Conflict
)

// OnCall has f decide what becomes of each call from now on. It is called without a lock, before anything happens, and may wait (a delay), or act on the Mem (Clone, another
// writer's Swap). nil removes it.
func (m *Mem) OnCall(f func(Call) Fault) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hook = f
}

func (m *Mem) call(c Call) Fault {
	m.mu.Lock()
	m.calls++
	c.N = m.calls
	hook := m.hook
	m.mu.Unlock()
	if hook == nil {
		return OK
	}
	return hook(c)
}

// Read implements volume.Ledger.
func (m *Mem) Read(ctx context.Context, volumeID string) (replica.Record, volume.Rev, error) {
	fault := m.call(Call{Rec: replica.Record{VolumeID: volumeID}})
	if err := ctx.Err(); err != nil {
		return replica.Record{}, 0, fmt.Errorf("ledger: read %s: %w: %w", volumeID, volume.ErrUnreachable, err)
	}
	if fault == LostBefore || fault == LostAfter {
		return replica.Record{}, 0, fmt.Errorf("ledger: read %s: %w", volumeID, volume.ErrUnreachable)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	e, ok := m.entries[volumeID]
	if !ok {
		return replica.Record{}, 0, fmt.Errorf("ledger: read %s: %w", volumeID, volume.ErrNoRecord)
	}
	var rec replica.Record
	if err := json.Unmarshal(e.json, &rec); err != nil {
		return replica.Record{}, 0, fmt.Errorf("ledger: read %s: %w", volumeID, err)
	}
	return rec, e.rev, nil
}

// Swap implements volume.Ledger.
func (m *Mem) Swap(ctx context.Context, rec replica.Record, was volume.Rev) (volume.Rev, error) {
	fault := m.call(Call{Swap: true, Rec: rec, Was: was})
	if err := ctx.Err(); err != nil || fault == LostBefore {
		return 0, fmt.Errorf("ledger: swap %s: %w", rec.VolumeID, volume.ErrUnreachable)
	}
	b, err := json.Marshal(rec)
	if err != nil {
		return 0, fmt.Errorf("ledger: swap %s: %w", rec.VolumeID, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	e, ok := m.entries[rec.VolumeID]
	switch {
	case !ok && was != 0:
		return 0, fmt.Errorf("ledger: swap %s: %w", rec.VolumeID, volume.ErrNoRecord)
	case e.rev != was, fault == Conflict:
		return 0, fmt.Errorf("ledger: swap %s: revision is %d, not %d: %w", rec.VolumeID, e.rev, was, volume.ErrConflict)
	}
	m.rev++
	m.entries[rec.VolumeID] = entry{json: b, rev: m.rev}
	m.history = append(m.history, rec)
	if fault == LostAfter {
		return 0, fmt.Errorf("ledger: swap %s: %w", rec.VolumeID, volume.ErrUnreachable)
	}
	return m.rev, nil
}

// Delete removes a record, as the control plane does.
func (m *Mem) Delete(volumeID string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.entries, volumeID)
}

// Clone returns a catalogue with the same content, without the hook: what is found after everything else died, or a backup to Restore.
func (m *Mem) Clone() *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := NewMem()
	c.rev = m.rev
	for id, e := range m.entries {
		c.entries[id] = e
	}
	c.history = append(c.history, m.history...)
	return c
}

// Restore puts the content of a backup in the place of everything. Revisions go on growing, as they do when etcd is restored with a bump.
func (m *Mem) Restore(backup *Mem) {
	c := backup.Clone()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.entries = map[string]entry{}
	for id, e := range c.entries {
		m.rev++
		m.entries[id] = entry{json: e.json, rev: m.rev}
	}
}

// History returns every record that was ever swapped in.
func (m *Mem) History() []replica.Record {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]replica.Record(nil), m.history...)
}

// Calls returns how many calls there were.
func (m *Mem) Calls() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.calls
}
