package cluster

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/identity"
)

// RosterConfig is what a Roster needs.
type RosterConfig struct {
	Dir   Dir
	State State // whose etcd it guards
	// Changed is called, by one goroutine of the Keeper's, when Knows may have another answer for somebody who is connected already.
	Changed func()
	Log     *slog.Logger // nil: dropped
}

// Roster is who the nodes of the cluster are, as last known. It is what a voter's member of etcd asks before it lets anybody connect: a node that was removed has a certificate that is good
// for months. The node port reads the catalogue for every request; this cannot, because the catalogue is behind the door that is guarded. So:
//
//	a node as the records were last read       comes in
//	an id that was a node's and is none now    stays out, whatever happens: ids are not used again
//	anybody else                               the records are read at once, and decide; if they cannot be read he comes in, or a voter that was away while
//	                                           another joined could keep out whom it needs to learn of it
//
// A Keeper keeps it up to date. What it knows is kept in roster.json, so that a start without a catalogue does not forget who was removed. It may be used concurrently.
type Roster struct {
	cfg  RosterConfig
	kick chan struct{}

	mu    sync.Mutex // guards all below
	kept  rosterFile
	fresh bool          // the records were read, and nothing says that they could not be now
	next  chan struct{} // closed when a reading has ended that has not begun yet
	told  map[string]bool
}

// rosterFile is roster.json.
type rosterFile struct {
	Format  int               `json:"format"`
	Nodes   map[string]string `json:"nodes"`   // ids by name
	Removed []string          `json:"removed"` // ids that were nodes', latest last
}

const (
	rosterName   = "roster.json"
	rosterFormat = 1
	// maxRemoved bounds how many ids are kept. Certificates end after 90 days.
	maxRemoved = 10_000
	// rosterPatience bounds a reading of the records, and how long a handshake waits for one.
	rosterPatience = 2 * time.Second
)

// OpenRoster reads what was known at last; a file that cannot be read is as none, and said.
func OpenRoster(cfg RosterConfig) *Roster {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	r := &Roster{cfg: cfg, kick: make(chan struct{}, 1), next: make(chan struct{}), told: map[string]bool{}}
	data, err := os.ReadFile(cfg.Dir.Path(rosterName))
	if err == nil {
		err = json.Unmarshal(data, &r.kept)
	}
	if err == nil && r.kept.Format > rosterFormat {
		err = fmt.Errorf("it has format %d, this build reads up to %d: %w", r.kept.Format, rosterFormat, ErrState)
	}
	if err != nil {
		r.kept = rosterFile{}
		if !errors.Is(err, fs.ErrNotExist) {
			cfg.Log.Warn("who was removed from the cluster is not known until the catalogue answers", "file", rosterName, "error", err)
		}
	}
	return r
}

// Admit says who may connect to etcd's ports, given a certificate that the cluster's authority signed. It waits for two seconds at most. identity.ErrPeer.
func (r *Roster) Admit(cert *x509.Certificate) error {
	n, err := r.whose(cert)
	if err != nil {
		return err
	}
	r.mu.Lock()
	known, next, fresh := r.knows(n), r.next, r.fresh
	r.mu.Unlock()
	if known == stranger && fresh {
		r.ask()
		patience := time.NewTimer(rosterPatience)
		defer patience.Stop()
		answered := false
		select {
		case <-next:
			answered = true
		case <-patience.C:
		}
		r.mu.Lock()
		if known = r.knows(n); known == stranger && answered && r.fresh {
			known = gone
		}
		r.mu.Unlock()
	}
	if known == gone {
		return r.refuse(n)
	}
	return nil
}

// Knows is for those who are connected: an error if they are to stay no longer. It does not wait. identity.ErrPeer.
func (r *Roster) Knows(cert *x509.Certificate) error {
	n, err := r.whose(cert)
	if err != nil {
		return err
	}
	r.mu.Lock()
	out := r.knows(n) == gone || r.knows(n) == stranger && r.fresh
	r.mu.Unlock()
	if out {
		return r.refuse(n)
	}
	return nil
}

// whose is the node of a certificate: one of this cluster.
func (r *Roster) whose(cert *x509.Certificate) (identity.Node, error) {
	n, err := identity.NodeOf(cert)
	if err == nil && n.ClusterID != r.cfg.State.ClusterID {
		err = fmt.Errorf("node %s is of cluster %s: %w", n.Name, n.ClusterID, identity.ErrPeer)
	}
	return n, err
}

// acquaintance is what a Roster knows of somebody.
type acquaintance int

const (
	stranger acquaintance = iota
	member
	gone
)

// knows is called with mu held.
func (r *Roster) knows(n identity.Node) acquaintance {
	id, named := r.kept.Nodes[n.Name]
	switch {
	case n.NodeID == r.cfg.State.NodeID || named && id == n.NodeID:
		return member
	case named && id == "": // its record was made anew from what is on its disks, and it writes its id there itself
		return member
	case slices.Contains(r.kept.Removed, n.NodeID):
		return gone
	}
	return stranger
}

// refuse says it once in the log: who was not told that it was removed tries ten times a second.
func (r *Roster) refuse(n identity.Node) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.told[n.NodeID] {
		r.told[n.NodeID] = true
		r.cfg.Log.Warn("a node that is none of this cluster any more is refused by the catalogue's ports", "node", n.Name, "id", n.NodeID)
	}
	return fmt.Errorf("node %s (%s) is none of this cluster: %w", n.Name, n.NodeID, identity.ErrPeer)
}

// ask has the records read.
func (r *Roster) ask() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

// follow keeps the roster as the records are, until ctx ends. Whoever hears of a change calls ask.
func (r *Roster) follow(ctx context.Context, c catalog.Catalog) {
	again := time.NewTimer(0)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.kick:
		case <-again.C:
		}
		if r.read(ctx, c) {
			again.Stop()
		} else {
			again.Reset(retry)
		}
	}
}

// read reads the records, if they can be read, and lets all know who waited for it.
func (r *Roster) read(ctx context.Context, c catalog.Catalog) (fresh bool) {
	r.mu.Lock()
	done := r.next
	r.next = make(chan struct{})
	r.mu.Unlock()
	defer close(done)
	short, cancel := context.WithTimeout(ctx, rosterPatience)
	defer cancel()
	items, _, err := catalog.All[catalog.NodeWanted](short, c, catalog.KindNode, catalog.Wanted)
	if err != nil {
		r.mu.Lock()
		r.fresh = false
		r.mu.Unlock()
		return false
	}
	nodes := map[string]string{}
	for _, n := range items {
		nodes[n.Key.Name] = n.Value.ID
	}
	if err := r.take(nodes); err != nil {
		r.cfg.Log.Warn("who the cluster's nodes are is not kept for the next start", "error", err)
	}
	if r.cfg.Changed != nil {
		r.cfg.Changed()
	}
	return true
}

// take makes nodes the roster: whoever was on it and is not was removed.
func (r *Roster) take(nodes map[string]string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fresh = true
	if maps.Equal(nodes, r.kept.Nodes) {
		return nil
	}
	now := slices.Collect(maps.Values(nodes))
	removed := slices.DeleteFunc(slices.Clone(r.kept.Removed), func(id string) bool { return slices.Contains(now, id) }) // a catalogue that was restored
	for _, name := range slices.Sorted(maps.Keys(r.kept.Nodes)) {
		if id := r.kept.Nodes[name]; id != "" && !slices.Contains(now, id) {
			removed = append(removed, id)
		}
	}
	r.kept = rosterFile{Format: rosterFormat, Nodes: nodes, Removed: removed[max(0, len(removed)-maxRemoved):]}
	data, err := json.MarshalIndent(r.kept, "", " ")
	if err != nil {
		return err
	}
	return r.cfg.Dir.put(rosterName, append(data, '\n'), 0o600)
}
