package export

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"

	"ashlar/internal/block"
	"ashlar/internal/nbd"
)

// ErrName: a volume's name cannot be part of a path.
var ErrName = errors.New("unusable volume name")

// ErrExists: the volume is exported already, or is still being removed.
var ErrExists = errors.New("already exported")

// ErrClosed: the frontend was closed.
var ErrClosed = errors.New("frontend closed")

// NBDConfig says where an NBD frontend has its sockets.
type NBDConfig struct {
	// Dir is where the sockets are, VOLUME.sock each; it is made with mode 0700. Required, and absolute.
	Dir string
	// Listeners keeps the sockets, under the name "nbd/VOLUME"; required.
	Listeners Listeners
	// MaxConns bounds the connections of one volume at a time; zero means nbd's default.
	MaxConns int
	// Report, if not nil, is told of connections that broke off, concurrently.
	Report func(volume string, err error)
}

func (c NBDConfig) check() (NBDConfig, error) {
	if !filepath.IsAbs(c.Dir) {
		return c, fmt.Errorf("export: socket directory %q is not an absolute path", c.Dir)
	}
	if c.Listeners == nil {
		return c, errors.New("export: config without listeners")
	}
	if c.Report == nil {
		c.Report = func(string, error) {}
	}
	return c, nil
}

// NBD is the frontend that serves each volume over NBD on a unix socket of its own, under the volume's name and as the default export.
// All methods may be called concurrently.
type NBD struct {
	cfg NBDConfig

	mu      sync.Mutex // guards the rest
	closed  bool
	volumes map[string]*served
}

// served is an exported volume. A place that Add has reserved has no server yet.
type served struct {
	export   nbd.Export
	server   *nbd.Server
	listener net.Listener
	wg       sync.WaitGroup // Serve
	removing bool
	visitors map[*visitor]bool // connections over TCP that asked for it
	past     nbd.Stats         // of those that ended
}

// servers are all that serve it now.
func (v *served) servers() []*nbd.Server {
	all := []*nbd.Server{v.server}
	for t := range v.visitors {
		all = append(all, t.server)
	}
	return all
}

// NewNBD returns a frontend that exports nothing yet.
func NewNBD(cfg NBDConfig) (*NBD, error) {
	cfg, err := cfg.check()
	if err != nil {
		return nil, err
	}
	return &NBD{cfg: cfg, volumes: map[string]*served{}}, nil
}

// Options are what Add may be told about an export.
type Options struct {
	ReadOnly    bool        // refuse writes, trims and zeroes
	Description string      // for clients that list exports
	MayWait     func() bool // see nbd.Export; nil: never
	Far         bool        // the same
}

// Path is where volume's socket is, whether it is exported or not.
func (n *NBD) Path(volume string) string { return filepath.Join(n.cfg.Dir, volume+".sock") }

// URI is what clients connect to: nbd+unix:///VOLUME?socket=PATH.
func (n *NBD) URI(volume string) string {
	return "nbd+unix:///" + escape(volume) + "?socket=" + escape(n.Path(volume))
}

// Add exports dev as volume and returns its URI; clients that already wait in a kept socket are served at once. The Device stays the
// caller's, who must Remove the volume before closing it if clients are to see an orderly end.
// It returns ErrName, ErrExists, ErrPathTooLong, ErrInUse (another process serves at that path) or ErrClosed, and then nothing is exported.
func (n *NBD) Add(ctx context.Context, volume string, dev block.Device, opts Options) (uri string, err error) {
	if err := checkName(volume); err != nil {
		return "", err
	}
	if err := checkPath(n.Path(volume)); err != nil {
		return "", err
	}
	export := nbd.Export{Name: volume, Description: opts.Description, Device: dev, ReadOnly: opts.ReadOnly, MayWait: opts.MayWait, Far: opts.Far}
	server, err := nbd.NewServer(nbd.Config{
		Exports:  nbd.Single(export),
		MaxConns: n.cfg.MaxConns,
		Report:   func(err error) { n.cfg.Report(volume, err) },
	})
	if err != nil {
		return "", fmt.Errorf("export %s: %w", volume, err)
	}
	v := &served{export: export, visitors: map[*visitor]bool{}}
	if err := n.reserve(volume, v); err != nil {
		return "", err
	}
	l, err := n.cfg.Listeners.Listen(ctx, heldName(volume), n.Path(volume))
	n.mu.Lock()
	defer n.mu.Unlock()
	if err == nil && n.closed {
		err = errors.Join(ErrClosed, l.Close())
	}
	if err != nil {
		delete(n.volumes, volume)
		return "", fmt.Errorf("export %s: %w", volume, err)
	}
	v.server, v.listener = server, l
	v.wg.Go(func() {
		if err := server.Serve(l); err != nil && !errors.Is(err, nbd.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			n.cfg.Report(volume, err)
		}
	})
	return n.URI(volume), nil
}

// heldName is a volume's socket among the Listeners.
func heldName(volume string) string { return "nbd/" + volume }

func (n *NBD) reserve(volume string, v *served) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return fmt.Errorf("export %s: %w", volume, ErrClosed)
	}
	if n.volumes[volume] != nil {
		return fmt.Errorf("export %s: %w", volume, ErrExists)
	}
	n.volumes[volume] = v
	return nil
}

// Remove ends volume's export and takes its socket away: what clients have sent is answered, until ctx ends, then their connections are cut.
// A volume that is not exported only loses its socket, so that Remove can be repeated, and clean up after another process. When it returns
// nil, no call to the Device is running any more; after ctx ended one may be.
func (n *NBD) Remove(ctx context.Context, volume string) error {
	if err := checkName(volume); err != nil {
		return err
	}
	n.mu.Lock()
	v := n.volumes[volume]
	if v != nil && (v.server == nil || v.removing) {
		n.mu.Unlock()
		return fmt.Errorf("export: remove %s, which is being added or removed: %w", volume, ErrExists)
	}
	var servers []*nbd.Server
	if v != nil {
		v.removing = true // no visitor comes any more
		servers = v.servers()
	}
	n.mu.Unlock()

	// The path goes first: from here on clients are told that there is nothing, rather than left waiting.
	err := errors.Join(removeSocket(n.Path(volume)), n.cfg.Listeners.Forget(ctx, heldName(volume)))
	if v != nil {
		err = errors.Join(err, endServers(servers, func(s *nbd.Server) error { return s.Drain(ctx) }))
		v.wg.Wait()
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if v != nil {
		delete(n.volumes, volume)
	}
	if err != nil {
		return fmt.Errorf("export: remove %s: %w", volume, err)
	}
	return nil
}

func removeSocket(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s is not a socket: %w", path, ErrInUse)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Drain ends all exports as Remove does, except that the sockets stay: clients that connect wait in those that are kept, for the process
// that comes next.
func (n *NBD) Drain(ctx context.Context) error {
	return n.end(func(s *nbd.Server) error { return s.Drain(ctx) })
}

// Close is Drain without grace: connections are cut at once. It waits for calls to Devices that are under way.
func (n *NBD) Close() error {
	return n.end((*nbd.Server).Close)
}

func (n *NBD) end(how func(*nbd.Server) error) error {
	n.mu.Lock()
	n.closed = true
	var all []*served
	var servers []*nbd.Server
	for _, v := range n.volumes {
		if v.server != nil {
			all = append(all, v)
			servers = append(servers, v.servers()...)
		}
	}
	n.mu.Unlock()
	err := endServers(servers, how)
	for _, v := range all {
		v.wg.Wait()
	}
	return err
}

// Stats returns what each exported volume did since it was added.
func (n *NBD) Stats() map[string]nbd.Stats {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := make(map[string]nbd.Stats, len(n.volumes))
	for name, v := range n.volumes {
		if v.server != nil {
			st := v.past
			for _, s := range v.servers() {
				st = addStats(st, s.Stats()[name])
			}
			out[name] = st
		}
	}
	return out
}

// Conns describes the connections to volume; none when it is not exported.
func (n *NBD) Conns(volume string) []nbd.ConnInfo {
	n.mu.Lock()
	defer n.mu.Unlock()
	v := n.volumes[volume]
	if v == nil || v.server == nil {
		return nil
	}
	var all []nbd.ConnInfo
	for _, s := range v.servers() {
		all = append(all, s.Conns()...)
	}
	return all
}

// checkName refuses names that would leave the directory or not be seen in it. A leading dot is for sockets that are not in place yet.
func checkName(volume string) error {
	bad := volume == "" || volume[0] == '.' || !utf8.ValidString(volume) ||
		strings.ContainsFunc(volume, func(r rune) bool { return r == '/' || unicode.IsControl(r) })
	if bad {
		return fmt.Errorf("export: volume %q: %w", volume, ErrName)
	}
	return nil
}

// escape percent-encodes everything that could mean something in a URI, and leaves slashes, so that paths can be read. Spaces become %20:
// clients do not agree on what a plus is.
func escape(s string) string {
	var b strings.Builder
	for i := range len(s) {
		c := s[i]
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', strings.IndexByte("-._~/", c) >= 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}
