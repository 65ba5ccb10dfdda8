// Package agent is one node's loop: it makes the data process match the catalogue, and reports what is. It follows the catalogue and the data process's
// state, asks plan what follows from both, carries that out (each volume's and each image's actions one at a time, all of them side by side), and writes down
// what it sees. It also serves the data process the catalogue's membership records (ledger.go).
//
// It keeps nothing that the catalogue or the data process does not. It may be stopped between any two steps: the data process goes on by itself, is found
// again, and nothing is done to what no record names.
//
//	catalogue ──follow──►┐                    ┌──actions──► data process (act.go)
//	                     ├─► loop ─► plan ────┤                  │
//	data process ─state─►┘    ▲               └──writes───► catalogue (put.go)
//	                          └───────results, state────────────┘
//
// Read next: plan (what is decided), loop.go, act.go, ../dataplane/client (what is said to the data process).
package agent

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/dataplane/client"
)

// Config is what an Agent needs of the world.
type Config struct {
	// Node is this node's name, Address what others reach it by. Node is required.
	Node, Address string
	// Catalog holds the records. Required.
	Catalog catalog.Catalog
	// EnsureData sees to it that the data process runs and returns what asks it. It is called again whenever the data process stops answering, and must be
	// content when it runs already. Required.
	EnsureData func(context.Context) (client.Service, error)
	// RunDir is where membership records are served to the data process; empty serves none.
	RunDir string
	// Disks are the node's disks at its first start, by name; paths are absolute. Afterwards the node's record says which they are.
	Disks map[string]catalog.DiskWanted
	// Network is where attached volumes are offered over TCP beside their sockets; the zero value: nowhere. That it cannot be done the node's condition Network says.
	Network client.Network
	// Cluster says where this node is in its cluster and what it shows other nodes; nil: in a cluster of one that listens nowhere.
	Cluster *ClusterFiles
	// Member says what this node is in the catalogue's own cluster: voter, learner or client. It is asked often and must not wait. Nil: "".
	Member func() string
	// Stop asks this process to end; Shutdown calls it last. Nil: nothing.
	Stop func()
	// Resync is how often it looks although nothing happened; zero: 30 s.
	Resync time.Duration
	// Now tells the time; nil: time.Now.
	Now func() time.Time
	// NewID makes ids of 32 random hex digits; nil: the kernel's.
	NewID func() string
	// Log takes what a record cannot; nil: dropped.
	Log *slog.Logger
}

// ClusterFiles is what a node is in its cluster (docs/formats/cluster.md, sections 1 and 2). Files are paths; what is in them may be replaced at any time.
type ClusterFiles struct {
	ClusterID, NodeID string
	Host              string // what others reach it by, without a port
	Port              int    // the first of its ports; catalog.PortNode and so on are added to it
	// APIMin and APICurrent are the window of versions that this node speaks to other nodes.
	APIMin, APICurrent int
	// CertFile and KeyFile are shown to other nodes, CAFile is the authority that theirs must be of; PEM.
	CertFile, KeyFile, CAFile string
}

var (
	// ErrConfig: something required is missing or wrong.
	ErrConfig = errors.New("bad agent configuration")
	// ErrFormat: the catalogue is of a later version.
	ErrFormat = errors.New("the catalogue's format is newer than this build")
	// ErrNoTombstone: what was to be destroyed is not marked deleted in its record. Nothing was done.
	ErrNoTombstone = errors.New("not marked deleted in its record")
	// ErrNotHere: this node has no replica of the volume.
	ErrNotHere = errors.New("no replica on this node")
	// ErrDiskAway: a disk is in use, and cannot be read any more.
	ErrDiskAway = errors.New("the disk cannot be read any more")
	// ErrAway: the data process does not answer now.
	ErrAway = errors.New("the data process does not answer")
)

// Elsewhere says that only another node can do what was asked. errors.As finds it in an error; it is an ErrNotHere.
type Elsewhere struct {
	Node string
}

func (e Elsewhere) Error() string { return "only node " + e.Node + " can do that" }

// Unwrap makes it an ErrNotHere, for those who cannot ask that node.
func (e Elsewhere) Unwrap() error { return ErrNotHere }

const (
	resync = 30 * time.Second
	// askTimeout bounds the questions that change nothing.
	askTimeout = 10 * time.Second
)

func (c *Config) check() error {
	if c.Node == "" || c.Catalog == nil || c.EnsureData == nil {
		return fmt.Errorf("%w: node, catalogue and data process are needed", ErrConfig)
	}
	for name, d := range c.Disks {
		if !filepath.IsAbs(d.Path) || filepath.Clean(d.Path) != d.Path {
			return fmt.Errorf("%w: the path of disk %q is %q, which is not absolute and clean", ErrConfig, name, d.Path)
		}
	}
	if c.Network.Address == "" {
		c.Network = client.Network{}
	}
	if c.Member == nil {
		c.Member = func() string { return "" }
	}
	if c.Resync == 0 {
		c.Resync = resync
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.NewID == nil {
		c.NewID = newID
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Stop == nil {
		c.Stop = func() {}
	}
	return nil
}

func newID() string {
	var b [16]byte
	rand.Read(b[:]) //nolint:errcheck // it cannot fail
	return hex.EncodeToString(b[:])
}

// Agent is one node's loop. Run it once; its other methods may be called concurrently at any time.
type Agent struct {
	cfg       Config
	service   atomic.Pointer[client.Service] // nil while the data process is away
	stopping  atomic.Bool                    // Shutdown began: nothing new is done
	notes     chan catalog.EventRecord       // to be recorded, when there is time
	inbox     chan any                       // the loop's
	downloads downloads
	uploading uploading
	wg        sync.WaitGroup // everything Run and Shutdown started
}

// New returns an Agent; ErrConfig.
func New(cfg Config) (*Agent, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	return &Agent{cfg: cfg, notes: make(chan catalog.EventRecord, 256), inbox: make(chan any, 256)}, nil
}

// Run works until ctx ends and everything it began has ended, and returns ctx's error; ErrFormat and ErrOtherCluster at once. That the catalogue or the data process are away is no
// reason to end. It leaves the data process as it is.
func (a *Agent) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer a.wg.Wait()
	defer cancel(nil)
	if a.cfg.RunDir != "" {
		if err := os.RemoveAll(a.streamDir()); err != nil { // sockets of a process that is gone
			return err
		}
		ln, err := client.Listen(client.LedgerSocket(a.cfg.RunDir))
		if err != nil {
			return err
		}
		a.wg.Go(func() {
			if err := client.Serve(ctx, ln, client.LedgerHandler(a.Ledger()), time.Second); err != nil {
				cancel(fmt.Errorf("serve membership records: %w", err))
			}
		})
	}
	if err := a.first(ctx); err != nil {
		return err
	}
	a.wg.Go(func() { a.recordNotes(ctx) })
	newLoop(a).run(ctx)
	return context.Cause(ctx)
}

// data is the data process, if it answered lately.
func (a *Agent) data() (client.Service, error) {
	if s := a.service.Load(); s != nil {
		return *s, nil
	}
	return nil, ErrAway
}

// note has an event recorded when there is time; if there are too many, it is dropped.
func (a *Agent) note(evs ...catalog.EventRecord) {
	for _, ev := range evs {
		select {
		case a.notes <- ev:
		default:
			a.cfg.Log.Warn("event dropped", "reason", ev.Reason, "name", ev.Name, "message", ev.Message)
		}
	}
}

func (a *Agent) recordNotes(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case ev := <-a.notes:
			if err := catalog.Note(ctx, a.cfg.Catalog, ev); err != nil && ctx.Err() == nil {
				a.cfg.Log.Warn("event lost", "reason", ev.Reason, "name", ev.Name, "message", ev.Message, "error", err)
			}
		}
	}
}
