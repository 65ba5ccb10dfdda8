package etcd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"golang.org/x/sys/unix"

	"ashlar/internal/catalog"
)

// The embedded member is alone: it speaks to nobody, so its clock only decides how soon it elects itself at start and how often it wakes up when idle.
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
)

// member is etcd inside this process.
type member struct {
	etcd   *embed.Etcd
	client *clientv3.Client
	lock   *os.File // flocked while the member runs
}

// startMember starts etcd in dir and waits until it has elected itself.
func startMember(ctx context.Context, dir string, log *slog.Logger) (*member, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	lock, err := claim(dir)
	if err != nil {
		return nil, err
	}
	m := &member{lock: lock}
	if m.etcd, err = startEtcd(config(dir, log)); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	select {
	case <-m.etcd.Server.ReadyNotify():
	case <-m.etcd.Server.StopNotify():
		return nil, errors.Join(fmt.Errorf("stopped while starting: %w", ErrDamaged), m.close())
	case <-ctx.Done():
		return nil, errors.Join(fmt.Errorf("%w: %w", catalog.ErrUnreachable, ctx.Err()), m.close())
	}
	m.client = v3client.New(m.etcd.Server)
	return m, nil
}

func config(dir string, log *slog.Logger) *embed.Config {
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir = memberName, dir
	// No listeners at all. The peer's address is only the member's identity; nobody dials it.
	cfg.ListenPeerUrls, cfg.ListenClientUrls, cfg.ListenClientHttpUrls, cfg.ListenMetricsUrls = nil, nil, nil, nil
	self := []url.URL{{Scheme: "http", Host: "127.0.0.1:0"}}
	cfg.AdvertisePeerUrls, cfg.AdvertiseClientUrls = self, nil
	cfg.InitialCluster = cfg.InitialClusterFromName(memberName)
	cfg.TickMs, cfg.ElectionMs = tickMS, electionMS
	cfg.QuotaBackendBytes = quotaBytes
	cfg.AutoCompactionMode, cfg.AutoCompactionRetention = embed.CompactorModeRevision, keepRevisions
	cfg.SnapshotCount, cfg.SnapshotCatchUpEntries = snapshotCount, catchUpEntries
	cfg.MaxSnapFiles, cfg.MaxWalFiles = 2, 2
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(quiet(log))
	return cfg
}

// startEtcd is embed.StartEtcd, with an error where etcd would end the process because of what it found in its directory.
func startEtcd(cfg *embed.Config) (e *embed.Etcd, err error) {
	defer func() {
		if p := recover(); p != nil {
			e, err = nil, fmt.Errorf("%w: %v", ErrDamaged, p)
		}
	}()
	return embed.StartEtcd(cfg)
}

// claim locks dir for this process and looks at the database, because etcd would wait for its lock without end, and end the process if it is damaged.
func claim(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = ErrInUse
	}
	if err == nil {
		err = look(filepath.Join(dir, "member", "snap", "db"))
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

func (m *member) close() error {
	m.etcd.Close()
	return m.lock.Close()
}
