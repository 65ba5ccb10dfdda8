// Package api is the REST interface: Longhorn's /v1 dialect, so that existing clients work unchanged, and what Ashlar adds in the same style. It turns
// requests into records of the catalogue and records into resources; it decides nothing about placement and touches no bytes. The dialect stops here:
// docs/rest.md says what is served, docs/compat.md which parts of the dialect mean nothing in Ashlar.
//
// Read next: resource.go (the shapes on the wire), route.go (which request goes where), auth.go (who may), volume.go, operation.go
// (verbs that wait), live.go (streams), download.go and upload.go (bytes), forward.go (what other nodes answer), openapi.go (the description), client (the other end).
package api

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"ashlar/internal/catalog"
)

// Config is what a Handler needs of the world.
type Config struct {
	// Catalog holds the records. Required.
	Catalog catalog.Catalog
	// Extra answers what is no record; nil makes those verbs answer 501.
	Extra Extra
	// Node is the name of the node that answers.
	Node string
	// Version is this build's.
	Version string
	// Now tells the time; nil means time.Now.
	Now func() time.Time
	// Random makes ids; nil means the kernel's generator. It is read under no lock, so a reader that is not the kernel's must allow concurrent reads.
	Random io.Reader
	// OperationTimeout bounds how long a snapshot verb waits for its result; zero means 60 s. The operation goes on after it.
	OperationTimeout time.Duration
	// CodeOf gives the code (one of this package's, as text) of an error that Extra returned; nil reads only the catalogue's sentinels.
	CodeOf func(error) string
	// Heartbeat is how often a quiet stream shows that it lives; zero means 15 s.
	Heartbeat time.Duration
	// RequireToken asks for a token on plain loopback too; over TLS one is always asked for, over the unix socket never.
	RequireToken bool
	// Frontend is what a volume gets whose creator names none: blockdev where this machine can have block devices, which is what clients of the dialect expect;
	// "" means nbd.
	Frontend string
	// Forward returns what passes requests on to another node (PassTo makes one), for what only that one can answer. The error says why it cannot be asked. Nil: there is no
	// cluster, and such requests are refused.
	Forward func(ctx context.Context, node string) (http.Handler, error)
	// NodeOf tells from an error of Extra which node has what was asked for; "" if it is none of these. Nil: no error is.
	NodeOf func(error) string
	// CanEvict tells whether all that lies on a node's disk (disk "": on all its disks) would find another place now; the error says why not, for each object. Nil:
	// evictions are accepted unseen.
	CanEvict func(ctx context.Context, node, disk string) error
	// Cluster makes this node one of a cluster; nil makes those verbs answer 501.
	Cluster Cluster
	// Log takes what a client cannot be told: panics and unreadable records. Nil discards.
	Log *slog.Logger
}

// Extra is what is no record and still has to be asked of a node. The agent implements it; its methods speak in plain types because the agent and this package
// do not know each other. All methods may be called concurrently.
type Extra interface {
	// VolumeCounters calls each once for every volume that is open on this node, with what its frontend did since it was opened: readOps, writeOps, flushOps,
	// zeroOps, readBytes, writeBytes, errors, clients. A counter it does not have is left out.
	VolumeCounters(ctx context.Context, each func(volume string, counters map[string]uint64)) error
	// Upload takes the bytes of an image whose source is upload and that waits for them (state pending on its disk), and returns when all were taken; the image may still be
	// refused afterwards, which its record says. sizeBytes is what was announced, -1 if nothing was. Once only: a second is refused, also after a failure.
	Upload(ctx context.Context, image string, sizeBytes int64, r io.Reader) error
	// Download returns the bytes of an image file of a volume's snapshot (kind "volume"; an empty snapshot is the present, of which one is taken for the time) or of an image
	// (kind "image") in format raw or qcow2, and how many they are, -1 if that is not known before the end. A body that breaks off ends with an error, never with io.EOF.
	Download(ctx context.Context, kind, name, snapshot, format string) (body io.ReadCloser, sizeBytes int64, err error)
	// Diff calls each for every range in which two snapshots of an attached volume may differ, ascending, from off on, and returns where to go on; that is sizeBytes at the end.
	Diff(ctx context.Context, r DiffRange, each func(off, n int64, zero bool)) (nextOff, sizeBytes int64, err error)
	// Shutdown begins to stop this node, guests' I/O included: volumes are flushed and closed, then the data process, the holder and serve end. It returns
	// when that has begun, so that the answer can still be sent.
	Shutdown(ctx context.Context) error
}

// DiffRange is an alias of a plain struct, so that the agent can say it too: From (empty: what is below the oldest) is older than To (empty: the present).
type DiffRange = struct {
	Volume, From, To string
	Off              int64
}

// Handler answers the REST API. It may be called concurrently and keeps nothing but what the catalogue keeps: any number of them may serve one catalogue. Close ends
// its streams.
type Handler struct {
	cfg      Config
	nouns    map[string]*noun
	origin   *http.CrossOriginProtection
	live     *live
	sums     *sums
	document func() []byte // of OpenAPI
}

var _ http.Handler = (*Handler)(nil)

// New returns a Handler. It panics without a Catalog, which is a mistake of the program.
func New(cfg Config) *Handler {
	if cfg.Catalog == nil {
		panic("api: New without a Catalog")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Random == nil {
		cfg.Random = rand.Reader
	}
	if cfg.OperationTimeout == 0 {
		cfg.OperationTimeout = time.Minute
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Heartbeat == 0 {
		cfg.Heartbeat = heartbeat
	}
	if cfg.Frontend == "" {
		cfg.Frontend = catalog.FrontendNBD
	}
	h := &Handler{cfg: cfg, origin: http.NewCrossOriginProtection(), live: newLive(cfg.Catalog), sums: &sums{of: map[string]string{}}}
	h.nouns = h.routes()
	h.document = sync.OnceValue(h.describe)
	return h
}

// Close ends all streams (events, websockets), tells their clients that the server goes away, and waits for them; later ones are refused. Other requests are
// answered as before. Call it before the server's own shutdown, which would wait for streams.
func (h *Handler) Close() error {
	h.live.close()
	return nil
}

// newID returns a new random id, 32 hex digits. Ids are never used again.
func (h *Handler) newID() (string, error) {
	var b [16]byte
	if _, err := io.ReadFull(h.cfg.Random, b[:]); err != nil {
		return "", fmt.Errorf("new id: %w", err)
	}
	return hex.EncodeToString(b[:]), nil
}
