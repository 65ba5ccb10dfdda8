package dataplane

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"time"

	"ashlar/internal/dataplane/client"
	"ashlar/internal/disk"
)

// Names on a disk, docs/formats/disk.md.
const (
	markerName   = "ashlar-disk.json"
	markerNew    = "ashlar-disk.json.new"
	diskLockName = "ashlar-disk.lock"
	replicasDir  = "replicas"
	imagesDir    = "images"
	tmpDir       = "tmp"

	// diskFormat is the version of the layout that this build makes and reads.
	diskFormat = 1
	// maxMarkerBytes bounds what is read of a marker.
	maxMarkerBytes = 64 << 10
)

// marker is ashlar-disk.json: what makes a directory a disk.
type marker struct {
	Format    int       `json:"format"`
	DiskID    string    `json:"diskID"`
	ClusterID string    `json:"clusterID"`
	Created   time.Time `json:"created"`
}

// parseMarker reads the bytes of a marker: client.ErrVersion for a newer format, client.ErrCorrupt for what cannot be one.
func parseMarker(text []byte) (marker, error) {
	var m marker
	if err := json.Unmarshal(text, &m); err != nil {
		return m, fmt.Errorf("%w: %s: %w", client.ErrCorrupt, markerName, err)
	}
	if m.Format > diskFormat {
		return m, fmt.Errorf("%w: the disk has format %d, this build knows 1 to %d", client.ErrVersion, m.Format, diskFormat)
	}
	if m.Format < 1 || !validID(m.DiskID) || m.ClusterID == "" {
		return m, fmt.Errorf("%w: %s: format %d, disk id %.40q, cluster %.40q", client.ErrCorrupt, markerName, m.Format, m.DiskID, m.ClusterID)
	}
	return m, nil
}

// validID tells whether s is 32 lower-case hex digits: what every id on a disk is, so that it can be part of a file's name.
func validID(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == 16 && hex.EncodeToString(b) == s
}

func newID() string {
	var b [16]byte
	rand.Read(b[:]) //nolint:errcheck // never fails: crypto/rand ends the program instead
	return hex.EncodeToString(b[:])
}

// diskDir is a disk in use. It holds the disk's lock until close.
type diskDir struct {
	marker
	path string
	fs   disk.FS
	lock disk.File
	pace func(ctx context.Context, n int64) error // of background work

	change sync.Mutex // held while replicas or images are made or deleted

	mu    sync.Mutex // guards found
	found inventory
}

// openDisk takes the directory fsys, at path, into use: it takes the lock, and formats the directory if it is empty and want names no disk. What lies in tmp
// was left by a process that is gone, and is removed. A directory that is refused is not touched.
func openDisk(fsys disk.FS, want client.Disk, now time.Time) (*diskDir, error) {
	d := &diskDir{path: want.Path, fs: fsys}
	if _, _, err := lookAtDisk(fsys, want); err != nil {
		return nil, fmt.Errorf("disk %s: %w", want.Path, err)
	}
	var err error
	if d.lock, err = lockDisk(fsys); err != nil {
		return nil, fmt.Errorf("disk %s: %w", want.Path, err)
	}
	// Again, with the lock: another process may have formatted it meanwhile.
	there := false
	d.marker, there, err = lookAtDisk(fsys, want)
	if err == nil && !there {
		d.marker, err = format(fsys, marker{Format: diskFormat, DiskID: newID(), ClusterID: want.ClusterID, Created: now.UTC()})
	}
	for _, dir := range []string{replicasDir, imagesDir, tmpDir} { // a copy may have left empty ones out
		if err == nil {
			err = fsys.Mkdir(dir)
		}
	}
	if err == nil {
		err = d.sweep()
	}
	if err == nil {
		err = d.scan()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("disk %s: %w", want.Path, err), d.lock.Close())
	}
	return d, nil
}

// lockDisk takes the lock of a disk, formatted or not. disk.ErrLocked.
func lockDisk(fsys disk.FS) (disk.File, error) {
	f, err := fsys.Open(diskLockName)
	if errors.Is(err, fs.ErrNotExist) {
		f, err = fsys.Create(diskLockName, 0)
		if errors.Is(err, fs.ErrExist) {
			f, err = fsys.Open(diskLockName)
		}
	}
	if err != nil {
		return nil, err
	}
	if err := f.Lock(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// lookAtDisk reads the directory's marker, changing nothing: there is false if it is empty and may be formatted. client.ErrForeignDisk, ErrNotFound (not the disk that
// want names), ErrInvalid (something else is in it), ErrVersion, ErrCorrupt.
func lookAtDisk(fsys disk.FS, want client.Disk) (m marker, there bool, err error) {
	text, err := readAll(fsys, markerName, maxMarkerBytes)
	if errors.Is(err, fs.ErrNotExist) {
		return marker{}, false, mayFormat(fsys, want)
	}
	if err == nil {
		m, err = parseMarker(text)
	}
	switch {
	case err != nil:
		return m, true, err
	case m.ClusterID != want.ClusterID:
		return m, true, fmt.Errorf("%w: it belongs to cluster %s, not %s", client.ErrForeignDisk, m.ClusterID, want.ClusterID)
	case want.DiskID != "" && m.DiskID != want.DiskID:
		return m, true, fmt.Errorf("%w: disk %s is mounted there, not %s", client.ErrNotFound, m.DiskID, want.DiskID)
	}
	return m, true, nil
}

// mayFormat refuses to make a disk of a directory in which there is anything, or in which a certain disk should be.
func mayFormat(fsys disk.FS, want client.Disk) error {
	if want.DiskID != "" {
		return fmt.Errorf("%w: nothing is there, and disk %s should be: is it mounted?", client.ErrNotFound, want.DiskID)
	}
	names, err := fsys.List(".")
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := formattable(fsys, n); err != nil {
			return err
		}
	}
	return nil
}

// formattable tells whether a directory with this name in it still counts as empty: an interrupted format, or a new file system, left it.
func formattable(fsys disk.FS, name string) error {
	switch name {
	case diskLockName, markerNew, "lost+found":
		return nil
	case replicasDir, imagesDir, tmpDir:
		inside, err := fsys.List(name)
		if err != nil || len(inside) == 0 {
			return err
		}
		name += "/" + inside[0]
	}
	return fmt.Errorf("%w: neither a disk nor an empty directory: %q is in it", client.ErrInvalid, name)
}

// format makes an empty directory a disk: the marker comes last, and whole.
func format(fsys disk.FS, m marker) (marker, error) {
	for _, dir := range []string{replicasDir, imagesDir, tmpDir} {
		if err := fsys.Mkdir(dir); err != nil {
			return m, err
		}
	}
	text, err := json.MarshalIndent(m, "", " ")
	if err != nil {
		return m, err
	}
	if err := fsys.Remove(markerNew); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return m, err
	}
	f, err := fsys.Create(markerNew, 0)
	if err != nil {
		return m, err
	}
	if _, err = f.WriteAt(append(text, '\n'), 0); err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = fsys.SyncDir(".")
	}
	if err == nil {
		err = fsys.Rename(markerNew, markerName)
	}
	if err == nil {
		err = fsys.SyncDir(".")
	}
	return m, err
}

// readAll returns a file's content, at most limit bytes of it (client.ErrCorrupt if it has more).
func readAll(fsys disk.FS, name string, limit int64) ([]byte, error) {
	f, err := fsys.OpenRead(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if size > limit {
		return nil, fmt.Errorf("%w: %s has %d bytes", client.ErrCorrupt, name, size)
	}
	buf := make([]byte, size)
	if n, err := f.ReadAt(buf, 0); n < len(buf) {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return buf, nil
}

// sweep removes what writers left in tmp that are gone. A work process dies with the data process that started it, but not before it: a file that
// is locked still has its writer, and is left for the next sweep.
func (d *diskDir) sweep() error {
	names, err := d.fs.List(tmpDir)
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := d.removeUnlocked(path.Join(tmpDir, n)); err != nil {
			return err
		}
	}
	return nil
}

// removeUnlocked removes a file unless somebody has it locked.
func (d *diskDir) removeUnlocked(name string) error {
	info, err := d.fs.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Dir {
		return d.removeTree(name)
	}
	f, err := d.fs.Open(name)
	if err != nil {
		return err
	}
	if err = f.Lock(); err == nil {
		err = d.fs.Remove(name)
	} else if errors.Is(err, disk.ErrLocked) {
		err = nil
	}
	return errors.Join(err, f.Close())
}

// removeTree removes a directory and what is in it.
func (d *diskDir) removeTree(dir string) error {
	names, err := d.fs.List(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := d.removeUnlocked(path.Join(dir, n)); err != nil {
			return err
		}
	}
	if left, err := d.fs.List(dir); err != nil || len(left) > 0 {
		return err
	}
	return d.fs.Remove(dir)
}

// close gives the disk up. Its volumes are closed.
func (d *diskDir) close() error {
	err := d.lock.Close()
	if c, ok := d.fs.(interface{ Close() error }); ok {
		err = errors.Join(err, c.Close())
	}
	if err != nil {
		return fmt.Errorf("disk %s: %w", d.path, err)
	}
	return nil
}

// AdoptDisk implements client.Service. A disk in use already is looked at again, because whoever asks may rebuild a catalogue from the answer.
func (p *Process) AdoptDisk(_ context.Context, a client.Disk) (client.DiskStatus, error) {
	if !filepath.IsAbs(a.Path) || a.ClusterID == "" || strings.ContainsRune(a.Path, 0) {
		return client.DiskStatus{}, fmt.Errorf("adopt disk %q of cluster %q: %w: an absolute path and a cluster are needed", a.Path, a.ClusterID, client.ErrInvalid)
	}
	a.Path = filepath.Clean(a.Path)
	d, err := p.adopt(a)
	if err != nil {
		return client.DiskStatus{}, forWire(fmt.Errorf("adopt: %w", err))
	}
	return d.status(nil), nil
}

// adopt takes a disk into use, once.
func (p *Process) adopt(a client.Disk) (*diskDir, error) {
	p.adopting.Lock()
	defer p.adopting.Unlock()
	for _, d := range p.disks() {
		if d.path == a.Path {
			if d.ClusterID != a.ClusterID {
				return nil, fmt.Errorf("disk %s: %w: it belongs to cluster %s, not %s", a.Path, client.ErrForeignDisk, d.ClusterID, a.ClusterID)
			}
			if away := d.away(); away != nil {
				if err := p.dropDisk(d); err != nil {
					return nil, fmt.Errorf("%w: %w", err, away)
				}
				break
			}
			d.lookAtAll()
			p.board.bump()
			return d, nil
		}
	}
	fsys, err := p.cfg.OpenFS(a.Path)
	if err != nil {
		return nil, fmt.Errorf("disk %s: %w", a.Path, err)
	}
	d, err := openDisk(fsys, a, time.Now())
	if err != nil {
		if c, ok := fsys.(interface{ Close() error }); ok {
			err = errors.Join(err, c.Close())
		}
		return nil, err
	}
	if other, err := p.disk(d.DiskID); err == nil {
		return nil, errors.Join(fmt.Errorf("disk %s: %w: it is a copy of disk %s, which is in use at %s", a.Path, client.ErrExists, d.DiskID, other.path), d.close())
	}
	if err := p.list.useDisk(client.Disk{Path: d.path, ClusterID: d.ClusterID, DiskID: d.DiskID}); err != nil {
		return nil, errors.Join(err, d.close())
	}
	d.pace = p.background.Wait
	p.mu.Lock()
	p.diskByID[d.DiskID] = d
	p.mu.Unlock()
	p.board.bump()
	p.log.Info("disk in use", "path", d.path, "disk", d.DiskID)
	return d, nil
}

// away says why the disk is not where it was: its file system is gone, or returns errors. nil: it is there.
func (d *diskDir) away() error {
	ok, err := disk.Exists(d.fs, markerName)
	if err == nil && !ok {
		err = fs.ErrNotExist
	}
	if err != nil {
		return fmt.Errorf("disk %s: %s cannot be read any more: %w", d.path, markerName, err)
	}
	return nil
}

// dropDisk gives up a disk that is away, so that what comes back in its place can be adopted. client.ErrInUse while a volume is open on it.
func (p *Process) dropDisk(d *diskDir) error {
	for _, s := range p.slots() {
		s.mu.Lock()
		open, name := s.vol != nil && s.args.DiskID == d.DiskID && !isFar(s.args), s.args.Volume
		s.mu.Unlock()
		if open {
			return fmt.Errorf("volume %s is open on it; detach it first: %w", name, client.ErrInUse)
		}
	}
	p.mu.Lock()
	delete(p.diskByID, d.DiskID)
	p.mu.Unlock()
	for _, id := range p.open.on(d) { // other nodes' volumes wait for what comes back
		p.cluster.drop(id)
	}
	p.board.bump()
	p.log.Warn("disk is away", "path", d.path, "disk", d.DiskID)
	if err := d.close(); err != nil {
		p.log.Warn("disk is away", "error", err)
	}
	return nil
}

// disks returns the disks in use, by path.
func (p *Process) disks() []*diskDir {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []*diskDir
	for _, d := range p.diskByID {
		out = append(out, d)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].path < out[j].path })
	return out
}

// disk returns a disk in use by its id. client.ErrNotFound.
func (p *Process) disk(id string) (*diskDir, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if d := p.diskByID[id]; d != nil {
		return d, nil
	}
	return nil, fmt.Errorf("disk %.40q is not in use here: %w", id, client.ErrNotFound)
}
