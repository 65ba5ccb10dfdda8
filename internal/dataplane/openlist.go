package dataplane

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"sync"

	"golang.org/x/sys/unix"

	"ashlar/internal/dataplane/client"
)

// openFormat is the version of open.json, docs/formats/open.md.
const openFormat = 1

// maxOpenBytes bounds what is read of open.json.
const maxOpenBytes = 64 << 20

// openEntry is a volume that this boot's guests may be using. Epoch zero: the open had not finished, and nobody was served.
type openEntry struct {
	Open      client.OpenVolume `json:"open"`
	Epoch     uint64            `json:"epoch"`
	Session   uint64            `json:"session"`
	SizeBytes int64             `json:"sizeBytes"`
	Failed    string            `json:"failed,omitempty"` // a flush failed: errors until it is detached, then salvage
}

// openFile is open.json.
type openFile struct {
	Format  int                  `json:"format"`
	BootID  string               `json:"bootID"`
	Disks   []client.Disk        `json:"disks"`
	Volumes map[string]openEntry `json:"volumes"` // by volume id
	Salvage map[string]string    `json:"salvage"` // detached after a flush failed: volume id -> why
	Network client.Network       `json:"network,omitzero"`
	Cluster client.Cluster       `json:"cluster,omitzero"`
}

// openList is open.json: what this process, killed and started again on the same boot, opens by itself. Each change is durable (file and name
// flushed) when its method returns, and comes before what it announces. All methods may be called concurrently.
type openList struct {
	path   string
	bootID string
	mu     sync.Mutex // guards the rest, and the file
	f      openFile
	shared *os.File // open.lock while a hand-over is under way and two processes write the file, each the entries of its own volumes
}

// errOpenList: open.json is there, and is not ours to read.
var errOpenList = errors.New("open.json cannot be used")

// loadOpenList reads open.json of a run directory. What another boot left is forgotten: its guests are gone. A file that cannot be read is put
// aside (open.json.bad) and reported with errOpenList, beside an empty list that works.
func loadOpenList(runDir, bootID string) (*openList, error) {
	l := &openList{path: filepath.Join(client.DataDir(runDir), "open.json"), bootID: bootID}
	l.f = emptyOpenFile(bootID)
	text, err := os.ReadFile(l.path)
	if errors.Is(err, fs.ErrNotExist) {
		return l, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", l.path, err)
	}
	f, err := parseOpenFile(text)
	if err != nil {
		if e := os.Rename(l.path, l.path+".bad"); e != nil {
			return nil, fmt.Errorf("put %s aside: %w", l.path, errors.Join(e, err))
		}
		return l, fmt.Errorf("%s was put aside: %w", l.path, err)
	}
	if f.BootID == bootID {
		l.f = f
	}
	return l, nil
}

func emptyOpenFile(bootID string) openFile {
	return openFile{Format: openFormat, BootID: bootID, Volumes: map[string]openEntry{}, Salvage: map[string]string{}}
}

// parseOpenFile reads and checks the bytes of an open.json.
func parseOpenFile(text []byte) (openFile, error) {
	f := emptyOpenFile("")
	if len(text) > maxOpenBytes {
		return f, fmt.Errorf("%w: %d bytes", errOpenList, len(text))
	}
	if err := json.Unmarshal(text, &f); err != nil {
		return f, fmt.Errorf("%w: %w", errOpenList, err)
	}
	if f.Format != openFormat {
		return f, fmt.Errorf("%w: format %d, this build reads %d", errOpenList, f.Format, openFormat)
	}
	if f.BootID == "" || f.Volumes == nil || f.Salvage == nil {
		return f, fmt.Errorf("%w: no boot id, volumes or salvage", errOpenList)
	}
	for id, e := range f.Volumes {
		if id != e.Open.VolumeID || checkOpen(e.Open) != nil || e.SizeBytes < 0 {
			return f, fmt.Errorf("%w: bad entry of volume %.40q", errOpenList, id)
		}
	}
	return f, nil
}

// change edits the list and writes it. When the write fails the list in memory is what it was.
func (l *openList) change(edit func(*openFile)) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.shared != nil {
		if err := flockFile(l.shared, unix.LOCK_EX); err != nil {
			return fmt.Errorf("change %s: %w", l.path, err)
		}
		defer flockFile(l.shared, unix.LOCK_UN) //nolint:errcheck // it was locked
		if err := l.reread(); err != nil {
			return err
		}
	}
	next := l.f.clone()
	edit(&next)
	if err := writeDurably(l.path, next); err != nil {
		return err
	}
	l.f = next
	return nil
}

// share lets another process change the list as well, from now until unshare: every change begins with reading the file again.
func (l *openList) share() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.shared != nil {
		return nil
	}
	f, err := os.OpenFile(filepath.Join(filepath.Dir(l.path), "open.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("share %s: %w", l.path, err)
	}
	l.shared = f
	return nil
}

// unshare ends share: the list is this process's alone, and what the other one wrote is known. Without share before it does nothing.
func (l *openList) unshare() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.shared == nil {
		return nil
	}
	err := errors.Join(l.reread(), l.shared.Close())
	l.shared = nil
	return err
}

// reload reads what another process may have written.
func (l *openList) reload() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.shared == nil {
		return nil
	}
	return l.reread()
}

// reread reads the file; l.mu is held. A file that is replaced meanwhile is read as it was or as it is.
func (l *openList) reread() error {
	text, err := os.ReadFile(l.path)
	if errors.Is(err, fs.ErrNotExist) {
		l.f = emptyOpenFile(l.bootID)
		return nil
	}
	if err != nil {
		return fmt.Errorf("read %s again: %w", l.path, err)
	}
	f, err := parseOpenFile(text)
	if err != nil {
		return fmt.Errorf("read %s again: %w", l.path, err)
	}
	l.f = f
	return nil
}

// flockFile calls flock(2) on f's descriptor, and waits if it must.
func flockFile(f *os.File, how int) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var lockErr error
	err = raw.Control(func(fd uintptr) {
		for lockErr = unix.EINTR; lockErr == unix.EINTR; {
			lockErr = unix.Flock(int(fd), how)
		}
	})
	return errors.Join(err, lockErr)
}

// dupFile returns a copy of a descriptor as a File.
func dupFile(fd uintptr, name string) (*os.File, error) {
	copied, err := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate the descriptor of %s: %w", name, err)
	}
	return os.NewFile(uintptr(copied), name), nil
}

func (f openFile) clone() openFile {
	c := openFile{Format: f.Format, BootID: f.BootID, Network: f.Network, Cluster: f.Cluster, Volumes: map[string]openEntry{}, Salvage: map[string]string{}}
	c.Disks = append(c.Disks, f.Disks...)
	c.Cluster.Peers = slices.Clone(f.Cluster.Peers)
	for id, e := range f.Volumes {
		c.Volumes[id] = e
	}
	for id, why := range f.Salvage {
		c.Salvage[id] = why
	}
	return c
}

// snapshot returns a copy of the list.
func (l *openList) snapshot() openFile {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.f.clone()
}

// volume returns a volume's entry.
func (l *openList) volume(id string) (openEntry, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e, ok := l.f.Volumes[id]
	return e, ok
}

// salvage says why a volume that is not open needs salvage; "" if it does not as far as this list knows.
func (l *openList) salvage(id string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.f.Salvage[id]
}

// useDisk records a disk in use.
func (l *openList) useDisk(d client.Disk) error {
	return l.change(func(f *openFile) {
		for i := range f.Disks {
			if f.Disks[i].Path == d.Path {
				f.Disks[i] = d
				return
			}
		}
		f.Disks = append(f.Disks, d)
		sort.Slice(f.Disks, func(i, j int) bool { return f.Disks[i].Path < f.Disks[j].Path })
	})
}

// setNetwork records what is offered over TCP.
func (l *openList) setNetwork(a client.Network) error {
	return l.change(func(f *openFile) { f.Network = a })
}

// setCluster records what this process was told of its cluster.
func (l *openList) setCluster(a client.Cluster) error {
	return l.change(func(f *openFile) { f.Cluster = a })
}

// put records a volume about to be opened, or what its open came to.
func (l *openList) put(e openEntry) error {
	return l.change(func(f *openFile) { f.Volumes[e.Open.VolumeID] = e })
}

// fail records that a volume failed; nothing takes that back but a close followed by an open with salvage.
func (l *openList) fail(volumeID, why string) error {
	return l.change(func(f *openFile) {
		if e, ok := f.Volumes[volumeID]; ok && e.Failed == "" {
			e.Failed = why
			f.Volumes[volumeID] = e
		}
	})
}

// remove forgets a volume that is about to be closed, but not that it needs salvage.
func (l *openList) remove(volumeID string) error {
	return l.change(func(f *openFile) {
		if e := f.Volumes[volumeID]; e.Failed != "" {
			f.Salvage[volumeID] = e.Failed
		}
		delete(f.Volumes, volumeID)
	})
}

// salvaged forgets that a volume needed salvage: a person decided, and it is open.
func (l *openList) salvaged(volumeID string) error {
	if l.salvage(volumeID) == "" {
		return nil
	}
	return l.change(func(f *openFile) { delete(f.Salvage, volumeID) })
}

// writeDurably replaces the file at path with v as JSON: the old content or the new survives a crash, and the new one once it returned.
func writeDurably(path string, v any) error {
	text, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	tmp, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	_, err = tmp.Write(append(text, '\n'))
	if err == nil {
		err = tmp.Sync()
	}
	if err = errors.Join(err, tmp.Close()); err == nil {
		err = os.Rename(path+".new", path)
	}
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
