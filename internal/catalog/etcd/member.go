package etcd

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"golang.org/x/sys/unix"

	"ashlar/internal/catalog"
)

// A member that is alone speaks to nobody, so its clock only decides how soon it elects itself at start and how often it wakes up when idle.
// Measured: 50 ms make it ready in 0.05 to 0.3 s and cost 0.4 % of a core when idle; 200 ms would be 0.2 to 1 s and 0.25 %.
const (
	tickMS     = 50
	electionMS = 5 * tickMS
	// quotaBytes bounds the database. 10,000 volumes with their records and history are below 200 MiB.
	quotaBytes = 1 << 30
	// keepRevisions is how much history watchers can resume from; compaction runs every five minutes.
	keepRevisions = "10000"
	// snapshotCount bounds the log that is replayed at start; nobody has to catch up, so few old entries are kept in memory.
	snapshotCount  = 10_000
	catchUpEntries = 100
	memberName     = "ashlar"
	lockName       = "ashlar.lock"
	lockPatience   = 200 * time.Millisecond
	// stopPatience bounds the wait for a member that stopped by itself: what etcd was doing then may never end.
	stopPatience = 3 * time.Second
	// passOnPatience bounds the attempt to pass leadership on at the end.
	passOnPatience = time.Second
)

// member is etcd inside this process.
type member struct {
	etcd   *embed.Etcd
	client *clientv3.Client // inside this process; nil if the member is one of several
	lock   *os.File         // flocked while the member runs
	log    *slog.Logger

	failed  chan struct{} // closed when it stopped by itself
	closing chan struct{} // closed when close begins
	stopped chan struct{} // closed when etcd has stopped; made by the first stop
	workers sync.WaitGroup

	mu    sync.Mutex // guards all below
	err   error      // why it stopped
	begun bool       // stop was called

	ports *ports // nil if it is alone
}

func newMember(log *slog.Logger) *member {
	return &member{log: log, failed: make(chan struct{}), closing: make(chan struct{}), stopped: make(chan struct{})}
}

// gaveUp is called by etcd's goroutines, from anywhere: the member is of no use any more.
func (m *member) gaveUp(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err == nil {
		m.err = err
		close(m.failed)
	}
}

// stopping tells whether stop was called.
func (m *member) stopping() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.begun
}

// state returns what the member is doing, and why it stopped.
func (m *member) state() (State, error) {
	m.mu.Lock()
	err := m.err
	m.mu.Unlock()
	switch {
	case errors.Is(err, ErrRemoved):
		return StateRemoved, err
	case err != nil:
		return StateFailed, err
	case m.client != nil:
		return StateAlone, nil
	}
	select {
	case <-m.etcd.Server.ReadyNotify(): // before, it does not know what it is
	default:
		return StateStarting, nil
	}
	self := m.etcd.Server.Cluster().Member(m.etcd.Server.MemberID())
	switch {
	case self == nil:
		return StateRemoved, ErrRemoved
	case self.IsLearner:
		return StateLearner, nil
	}
	return StateVoter, nil
}

// startAlone starts a member in dir that listens nowhere and waits until it has elected itself.
func startAlone(ctx context.Context, dir string, log *slog.Logger) (*member, error) {
	m := newMember(log)
	if err := m.start(dir, aloneConfig(dir)); err != nil {
		return nil, err
	}
	select {
	case <-m.etcd.Server.ReadyNotify():
	case <-m.failed:
		_, err := m.state()
		return nil, errors.Join(fmt.Errorf("stopped while starting: %w: %w", ErrDamaged, err), m.close())
	case <-m.etcd.Server.StopNotify():
		return nil, errors.Join(fmt.Errorf("stopped while starting: %w", ErrDamaged), m.close())
	case <-ctx.Done():
		return nil, errors.Join(fmt.Errorf("%w: %w", catalog.ErrUnreachable, ctx.Err()), m.close())
	}
	m.client = v3client.New(m.etcd.Server)
	return m, nil
}

// start starts etcd in dir; it may not be ready yet. After an error nothing is left but what etcd did not give back.
func (m *member) start(dir string, cfg *embed.Config) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	lock, err := claim(dir)
	if err != nil {
		return err
	}
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(guarded(m.log, m))
	if err := m.startEtcd(cfg); err != nil {
		return errors.Join(err, lock.Close())
	}
	m.lock = lock
	return nil
}

func aloneConfig(dir string) *embed.Config {
	cfg := config(dir)
	cfg.Name = memberName
	// No listeners at all. The peer's address is only the member's identity; nobody dials it.
	cfg.ListenPeerUrls, cfg.ListenClientUrls = nil, nil
	cfg.AdvertisePeerUrls, cfg.AdvertiseClientUrls = []url.URL{{Scheme: "http", Host: "127.0.0.1:0"}}, nil
	cfg.InitialCluster = cfg.InitialClusterFromName(memberName)
	cfg.TickMs, cfg.ElectionMs = tickMS, electionMS
	cfg.SnapshotCatchUpEntries = catchUpEntries
	return cfg
}

// config is what every member has in common.
func config(dir string) *embed.Config {
	cfg := embed.NewConfig()
	cfg.Dir = dir
	cfg.ListenClientHttpUrls, cfg.ListenMetricsUrls = nil, nil
	cfg.QuotaBackendBytes = quotaBytes
	cfg.AutoCompactionMode, cfg.AutoCompactionRetention = embed.CompactorModeRevision, keepRevisions
	cfg.SnapshotCount = snapshotCount
	cfg.MaxSnapFiles, cfg.MaxWalFiles = 2, 2
	cfg.EnableGRPCGateway = false
	// Two clusters must not take each other's members for their own, though all begin with the same name and address.
	cfg.InitialClusterToken = rand.Text()
	return cfg
}

// startEtcd is embed.StartEtcd in a goroutine of its own, because etcd may end that where it would end the process.
func (m *member) startEtcd(cfg *embed.Config) error {
	var err error
	var wg sync.WaitGroup
	wg.Go(func() {
		done := false
		defer func() {
			if p := recover(); p != nil {
				err = fmt.Errorf("%w: %v", ErrDamaged, p)
			} else if !done {
				m.mu.Lock()
				err = m.err
				m.mu.Unlock()
				if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EIO) && !errors.Is(err, syscall.EROFS) {
					err = fmt.Errorf("%w: %w", ErrDamaged, err)
				}
			}
		}()
		m.etcd, err = embed.StartEtcd(cfg)
		done = true
	})
	wg.Wait()
	return err
}

// follow stops the member when it failed by itself.
func (s *Store) follow(m *member) {
	m.workers.Go(func() {
		select {
		case <-m.closing:
			return
		case <-m.failed:
		case <-m.etcd.Server.StopNotify():
			select {
			case <-m.closing:
				return
			default:
			}
			m.gaveUp(ErrRemoved) // etcd stops by itself for no other reason
		}
		_, err := m.state()
		s.log.Error("the catalogue's member on this node stopped", "error", err)
		m.stop()
	})
}

// claim locks dir for this process and looks at the database, because etcd would wait for its lock without end, and end the process if it is damaged.
func claim(dir string) (*os.File, error) {
	f, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	if err := look(filepath.Join(dir, "member", "snap", "db")); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// lockDir locks dir for whoever holds the file open.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = ErrInUse
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// look opens the database as its reader and closes it again.
func look(name string) error {
	fi, err := os.Stat(name)
	if errors.Is(err, fs.ErrNotExist) || err == nil && fi.Size() == 0 {
		return nil // etcd will make it
	}
	if err != nil {
		return err
	}
	db, err := bbolt.Open(name, 0o600, &bbolt.Options{ReadOnly: true, Timeout: lockPatience})
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return ErrInUse
	case err != nil:
		return fmt.Errorf("%s: %w: %w", name, ErrDamaged, err)
	}
	return db.Close()
}

// stop stops etcd without waiting for it: whoever asks a member that is half dead would only wait for an answer.
func (m *member) stop() {
	m.mu.Lock()
	begun := m.begun
	m.begun = true
	m.mu.Unlock()
	if begun {
		return
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(m.stopped) // also if etcd ends this goroutine
		if m.ports != nil {
			m.ports.endStreams()
		}
		select {
		case <-m.failed: // whoever is connected shall ask others at once; etcd's own stop may never end
		default:
			m.passOn()
		}
		if m.ports != nil {
			m.ports.close()
		}
		m.etcd.Close()
	})
}

// passOn lets another member lead, so that nobody has to find out that this one is gone. etcd's own attempt would wait for seconds for members that are gone too.
func (m *member) passOn() {
	tried := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(tried)
		_ = m.etcd.Server.TryTransferLeadershipOnShutdown() // an election, then
	})
	patience := time.NewTimer(passOnPatience)
	defer patience.Stop()
	select {
	case <-tried:
	case <-patience.C:
	}
	m.etcd.Server.HardStop()
	wg.Wait()
}

// close stops the member and waits for it. If it had failed it may be that etcd never ends; then its directory stays in use until the process ends.
func (m *member) close() error {
	close(m.closing)
	m.workers.Wait()
	m.stop()
	select {
	case <-m.stopped:
	case <-m.failed:
		patience := time.NewTimer(stopPatience)
		defer patience.Stop()
		select {
		case <-m.stopped:
		case <-patience.C:
			return nil
		}
	}
	if m.lock == nil { // it never started
		return nil
	}
	return m.lock.Close()
}
