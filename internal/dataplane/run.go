package dataplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/block/limit"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/dataplane/hold"
	"ashlar/internal/disk"
	"ashlar/internal/export"
	"ashlar/internal/export/blockdev"
	"ashlar/internal/job"
	"ashlar/internal/volume"
)

// Config says what a data process is. RunDir and Version are needed.
type Config struct {
	// RunDir holds sockets, locks, logs and open.json; absolute, and normally on a tmpfs: it belongs to one boot.
	RunDir string
	// Version of this build; part of the control socket's name.
	Version string
	// Binary, HoldArgs and DataArgs say how the holder starts this program; see hold.Config.
	Binary             string
	HoldArgs, DataArgs []string
	// Systemd: see hold.Config.
	Systemd bool
	// Job says how imports are run; the zero value executes this binary with "work".
	Job job.Config
	// Direct goes around the page cache for guests' data (O_DIRECT).
	Direct bool
	// BlockTool is the program, and its first arguments, that ends in a call of blockdev.Tool; default: this one, with "blockdev".
	BlockTool []string
	// SocketGroup, unless empty, is a group, by name or number, that may open the volumes' NBD sockets beside root: libvirt's unprivileged QEMU, say.
	SocketGroup string
	// BootID is the host's; default: the kernel's.
	BootID string
	// OpenFS opens the directory of a disk; default disk.OpenReal.
	OpenFS func(path string) (disk.FS, error)
	// Now is the clock by which other nodes' certificates are judged, and this node's; nil: time.Now.
	Now func() time.Time
	// Log gets what happened; default: standard error, bounded if that is the run directory's data.log.
	Log *slog.Logger
	// NoExec leaves the process as it is: no PR_SET_IO_FLUSHER, for which it would execute itself, and no raised limits. For tests.
	NoExec bool
	far    farTimes // for tests
	// TakeOver takes over from the process that has the run directory, under running guests, if there is one.
	TakeOver bool
}

func (c Config) check() (Config, error) {
	if !filepath.IsAbs(c.RunDir) {
		return c, fmt.Errorf("data process: %w: run directory %q is not an absolute path", client.ErrInvalid, c.RunDir)
	}
	if c.Version == "" || strings.ContainsAny(c.Version, "/ \n") {
		return c, fmt.Errorf("data process: %w: version %q", client.ErrInvalid, c.Version)
	}
	if c.BootID == "" {
		id, err := hostBootID()
		if err != nil {
			return c, fmt.Errorf("data process: %w", err)
		}
		c.BootID = id
	}
	if c.OpenFS == nil {
		c.OpenFS = c.openReal
	}
	c.far = c.far.defaults()
	if c.Job.Turns == nil {
		c.Job.Turns = make(chan struct{}, maxWork)
	}
	return c, nil
}

// openReal is the default OpenFS.
func (c Config) openReal(path string) (disk.FS, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("%s: %w: not a directory", path, client.ErrInvalid)
	}
	return disk.OpenReal(path, disk.RealOptions{Direct: c.Direct})
}

func (c Config) hold() hold.Config {
	return hold.Config{RunDir: c.RunDir, Binary: c.Binary, HoldArgs: c.HoldArgs, DataArgs: c.DataArgs, Systemd: c.Systemd, Log: c.Log}
}

// stopTimeout bounds the orderly end: after it the process goes as if it were killed, which it survives.
const stopTimeout = time.Minute

// Run is a data process: it brings up what open.json says and serves the control socket until ctx ends (volumes are then flushed and left for the next process to take up)
// or a client says Shutdown. ErrInUse (client's) if a data process has this run directory.
func Run(ctx context.Context, cfg Config) (err error) {
	cfg, err = cfg.check()
	if err != nil {
		return err
	}
	if cfg.Log == nil {
		log, end, err := hold.Logger(cfg.hold().DataLog())
		if err != nil {
			return fmt.Errorf("data process: %w", err)
		}
		defer end()
		cfg.Log = log
	}
	flusher := false
	if !cfg.NoExec {
		flusher = becomeFlusher(cfg.Log)
		raiseLimits(cfg.Log)
		if os.Getenv("GOMAXPROCS") == "" {
			runtime.GOMAXPROCS(processors(runtime.GOMAXPROCS(0), cfg.Direct))
		}
	}
	if cfg.TakeOver {
		if err := succeed(ctx, cfg, flusher); !errors.Is(err, errNobody) {
			return err
		}
	}
	locks, err := hold.LockData(cfg.RunDir, cfg.Version)
	if err != nil {
		return forWire(fmt.Errorf("data process: %w", err))
	}
	defer locks.Close()
	keeper, err := hold.Keep(ctx, cfg.hold())
	if err != nil {
		return fmt.Errorf("data process: %w", err)
	}
	defer keeper.Close()
	p, err := newProcess(cfg, keeper)
	if err != nil {
		return err
	}
	p.flusher, p.locks = flusher, locks
	return p.serve(ctx)
}

// Process is a data process's state. It implements client.Service; all methods may be called concurrently.
type Process struct {
	cfg       Config
	log       *slog.Logger
	boot      string
	started   time.Time
	flusher   bool
	holder    holder
	ledger    volume.Ledger
	nbd       *export.NBD
	blockdev  *blockdev.Frontend
	listeners heldListeners
	list      *openList
	board     *board
	locks     *hold.DataLocks // nil in tests that hand nothing over
	admit     admission       // of verbs
	over      overState       // hand-over to a successor

	background *limit.Rate // what the node does for itself, all of it together
	network    network
	cluster    cluster
	open       openReplicas
	met        metWriters // by copies
	sources    *sources
	measure    chan struct{} // capacity 1: somebody wants spaces measured

	life   context.Context // of everything in the background
	cancel context.CancelFunc
	wg     sync.WaitGroup
	asked  chan client.Shutdown // capacity 1: somebody said Shutdown, and everything is closed

	adopting, importing sync.Mutex // held while a disk is taken into use, an import started

	mu       sync.Mutex // guards the rest
	ending   bool       // nothing is opened any more
	diskByID map[string]*diskDir
	slotByID map[string]*slot
	jobByID  map[string]*importJob
}

var _ client.Service = (*Process)(nil)

// newProcess reads open.json; nothing is open yet.
func newProcess(cfg Config, h holder) (*Process, error) {
	if err := os.MkdirAll(client.DataDir(cfg.RunDir), 0o700); err != nil {
		return nil, fmt.Errorf("data process: %w", err)
	}
	list, err := loadOpenList(cfg.RunDir, cfg.BootID)
	if errors.Is(err, errOpenList) {
		cfg.Log.Error("volumes wait for the agent to open them", "error", err)
	} else if err != nil {
		return nil, fmt.Errorf("data process: %w", err)
	}
	now := time.Now()
	p := &Process{cfg: cfg, log: cfg.Log, boot: cfg.BootID, started: now, holder: h, list: list, board: newBoard(now),
		asked: make(chan client.Shutdown, 1), background: limit.NewRate(limit.Limits{}), measure: make(chan struct{}, 1),
		diskByID: map[string]*diskDir{}, slotByID: map[string]*slot{}, jobByID: map[string]*importJob{}}
	p.listeners = heldListeners{holder: h, report: func(name string, err error) {
		cfg.Log.Warn("a kept socket cannot be used; clients connect to a new one", "name", name, "error", err)
	}}
	if p.blockdev, err = newBlockdev(cfg, h); err != nil {
		return nil, fmt.Errorf("data process: %w", err)
	}
	if p.sources, err = newSources(cfg); err != nil {
		return nil, fmt.Errorf("data process: %w", err)
	}
	if p.nbd, err = newFrontend(cfg, p.listeners); err != nil {
		return nil, fmt.Errorf("data process: %w", err)
	}
	p.ledger = wireLedger{to: client.NewPeerLedger(client.NewLedgerClient(client.LedgerSocket(cfg.RunDir)), p.cluster.peers, p.cluster.dialLedger)}
	p.knowCluster(list.snapshot().Cluster)
	p.life, p.cancel = context.WithCancel(context.Background())
	return p, nil
}

// serve brings everything up, answers the control socket, and takes everything down.
func (p *Process) serve(ctx context.Context) error {
	was := p.list.snapshot()
	if err := p.sweepListeners(ctx, was); err != nil {
		return fmt.Errorf("data process: %w", err)
	}
	ln, err := p.listeners.Listen(ctx, heldControl+p.cfg.Version, client.DataSocket(p.cfg.RunDir, p.cfg.Version))
	if err != nil {
		return fmt.Errorf("data process: %w", err)
	}
	successors, err := client.Listen(handoverSocket(p.cfg.RunDir))
	if err != nil {
		return fmt.Errorf("data process: %w", err)
	}
	p.knowCluster(was.Cluster)
	p.reopen(was)
	p.restoreCluster(ctx, was.Cluster)
	p.restoreNetwork(ctx, was.Network)
	p.wg.Go(p.measureSpaces)
	p.log.Info("data process ready", "version", p.cfg.Version, "pid", os.Getpid(), "volumes", len(was.Volumes))
	serving, stop := context.WithCancel(ctx)
	defer stop()
	var verb client.Shutdown
	said := false
	p.wg.Go(func() {
		select {
		case verb = <-p.asked:
			said = true
			stop()
		case <-serving.Done():
		}
	})
	p.wg.Go(func() { p.meetSuccessors(serving, successors) })
	context.AfterFunc(serving, p.board.bump) // long polls are answered
	err = client.Serve(serving, ln, p.doorkeeper(client.Handler(p)), stopTimeout)
	stop()
	late, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	err = errors.Join(err, p.close(late))
	p.over.parted()
	if said {
		err = errors.Join(err, p.leave(late, verb))
	}
	return err
}

// leave takes the control socket away, and ends the holder if that was asked for.
func (p *Process) leave(ctx context.Context, verb client.Shutdown) error {
	if !verb.Holder {
		return nil
	}
	return errors.Join(p.removeControl(ctx, p.cfg.Version), p.holder.Stop(ctx))
}

// close suspends what is still open, ends everything in the background, and gives the disks up.
func (p *Process) close(ctx context.Context) error {
	err := errors.Join(p.suspendAll(ctx), p.sources.close(ctx))
	p.cancel()
	p.wg.Wait()
	for _, d := range p.disks() {
		err = errors.Join(err, d.close())
	}
	if err != nil {
		p.log.Error("not everything ended in order", "error", err)
	}
	return err
}

// suspendAll ends the exports, after their clients' requests under way, and suspends every volume. Clients that come now wait in the sockets, which stay with
// the holder.
func (p *Process) suspendAll(ctx context.Context) error {
	patience := drainTimeout
	for _, s := range p.slots() {
		s.liftLimits()
		s.mu.Lock()
		rep := s.rep
		s.mu.Unlock()
		if rep.away() != "" { // its guests' requests will not end, and those of other volumes wait for the next process
			patience = min(patience, p.cfg.far.last)
		}
	}
	drain, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	p.stopCluster()
	return errors.Join(p.stopNetwork(drain), p.nbd.Drain(drain), p.detachBlockdevs(drain), p.endAll(ctx, p.suspendSlot))
}

// endAll lets nothing more be opened and calls end for every volume at once.
func (p *Process) endAll(ctx context.Context, end func(context.Context, *slot) error) error {
	p.mu.Lock()
	p.ending = true
	p.mu.Unlock()
	slots := p.slots()
	errs := make([]error, len(slots))
	var wg sync.WaitGroup
	for i, s := range slots {
		wg.Go(func() { errs[i] = end(ctx, s) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// Shutdown implements client.Service. With Holder everything is closed for good, and nothing starts again by itself; without, the next process takes everything
// up again.
func (p *Process) Shutdown(ctx context.Context, a client.Shutdown) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	var err error
	if a.Holder {
		if err := p.closeBlockdevs(ctx); err != nil {
			return forWire(err)
		}
		err = p.endAll(ctx, func(ctx context.Context, s *slot) error {
			if err := s.take(ctx); err != nil {
				return err
			}
			defer s.give()
			return p.closedAllTheSame(p.closeSlot(ctx, s, closeForced))
		})
		p.stopCluster()
	} else {
		err = p.suspendAll(ctx)
	}
	select {
	case p.asked <- a:
	default: // somebody else asked
	}
	return forWire(err)
}

// closedAllTheSame passes an error of a close on, unless it only means that the catalogue does not know of the close yet: nobody can ask this process again.
func (p *Process) closedAllTheSame(err error) error {
	if errors.Is(err, volume.ErrUnreachable) && !errors.Is(err, block.ErrFailed) {
		p.log.Warn("the catalogue does not know that a volume is closed", "error", err)
		return nil
	}
	return err
}

// work returns the context of what was begun for somebody: it goes on when they go away, and ends with the process.
func (p *Process) work(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(p.life, cancel)
	return ctx, func() { stop(); cancel() }
}

func (p *Process) hello() client.Hello {
	return client.Hello{Version: p.cfg.Version, APIMin: client.APIMin, APICurrent: client.APICurrent, PID: os.Getpid(), BootID: p.boot,
		Started: p.started, IOFlusher: p.flusher}
}
