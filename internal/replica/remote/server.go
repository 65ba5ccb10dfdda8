package remote

import (
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/replica"
)

// Host is the process that has the replicas and sources. All methods may be called concurrently.
type Host interface {
	// OpenReplica returns a replica of this node, opened if it is not. An error that is nobody's sentinel is told as a failure without its words.
	OpenReplica(ctx context.Context, replicaID string) (Served, error)
	// OpenSource opens something to be read: "image/DISKID/IMAGEID", or "layer/REPLICAID/LAYERID", whose own units it has, the others being Absent. The server closes dev.
	OpenSource(ctx context.Context, name string) (dev block.Device, info json.RawMessage, err error)
}

// Served is an open replica.
type Served struct {
	// Connect returns a connection of its own to it, not let in yet.
	Connect func() replica.Replica
	// Release is called once, when the last connection has gone and nobody came again for ServerConfig.Linger.
	Release func()
}

// ServerConfig says what a Server serves.
type ServerConfig struct {
	Host Host
	// MaxConns bounds the connections at one time. Zero: 1024.
	MaxConns int
	// Linger is how long a replica that nobody is connected to stays open. Zero: 10 s.
	Linger time.Duration
	Log    *slog.Logger // nil: none
}

// Server serves replicas and sources to other nodes.
type Server struct{}

// NewServer returns a Server that serves nobody yet.
func NewServer(cfg ServerConfig) *Server { return &Server{} }

// Serve accepts connections of ln, which are plain or past their TLS handshake's beginning, until ctx ends or the server is closed (nil), or ln fails. It closes ln.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error { return errUnfinished }

// Drop ends every connection to a replica and releases it, before it returns.
func (s *Server) Drop(replicaID string) {}

// Close ends every connection and releases everything, and waits until all that has ended.
func (s *Server) Close() error { return nil }
