package layer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/bits"
	"path"
	"sync"
	"sync/atomic"

	"encoding/json"

	"ashlar/internal/block"
	"ashlar/internal/disk"
)

var (
	// ErrVersion: the file has a higher version than this program knows; both are named.
	ErrVersion = errors.New("unknown format version")
	// ErrSalvage: a flush on this layer failed; it opens only with Options.Salvage, a person's decision.
	ErrSalvage = errors.New("a flush failed on this layer, and what it had not flushed may be gone: opening it needs salvage")
	// ErrState: the layer's state does not allow this (a head where a sealed one is needed, or the other way round). Nothing was changed.
	ErrState = errors.New("layer is in the wrong state for this")
)

// BootID names a time during which the page cache cannot have lost anything: the host's boot, and the file system's mount if that may
// change within it. A layer opened with the id that its log names trusts what a killed process left in the page cache.
type BootID [16]byte

// Options say how to create or open a layer.
type Options struct {
	BootID   BootID // required unless ReadOnly; see there what it must name
	ReadOnly bool   // Open: take no lock and write nothing; recovery happens in memory
	Salvage  bool   // Open: also open a layer whose flush failed; what it had not flushed may be gone

	// Pace, if not nil, is asked before background work (Settle, Prune, Merge into the layer) moves n bytes more, and may wait; its error ends the work, which may be
	// done again. It is called without locks that guests' I/O needs.
	Pace func(ctx context.Context, n int64) error

	limits limits // for tests: small ones make every rare thing frequent
}

// limits are the sizes that decide how often things happen. Zero fields mean the defaults.
type limits struct {
	segmentBytes int64 // half of the log; Create only
	uncovered    int   // units (or records of discards) in U at which writers wait
	chunkUnits   int   // units that one lock, one pwrite and one set of records cover
	mapBytes     int64 // memory of a stack's map above which clean parts are dropped
	maxSlots     int   // layers a stack numbers before it starts over
	writeBacks   int   // how often dirty data is taken to the medium before a flush begins
	inline       bool  // no background goroutine: who finds work to be done does it
}

func (m limits) withDefaults() limits {
	if m.segmentBytes == 0 {
		m.segmentBytes = segmentBytes
	}
	if m.uncovered == 0 {
		m.uncovered = 64 << 10
	}
	if m.chunkUnits == 0 {
		m.chunkUnits = regionUnits
	}
	if m.writeBacks == 0 {
		m.writeBacks = 32
		if m.inline {
			m.writeBacks = 1
		}
	}
	if m.maxSlots == 0 {
		m.maxSlots = maxSlot
	}
	return m
}

// Layer is one open layer file. It is counted: Create, Open and Retain each give a reference, which Close gives back; the last closes the file.
// All methods may be called concurrently.
type Layer struct {
	fsys     disk.FS
	name     string
	f        disk.File
	sb       Superblock
	readOnly bool
	limits   limits
	boot     BootID
	pace     func(ctx context.Context, n int64) error // Options.Pace

	refs    atomic.Int64
	failed  atomic.Bool // a Sync or the log failed: no write, flush or header change succeeds any more
	summed  atomic.Bool // Meta.Sums: compare every read
	sealed  atomic.Bool // Meta.State: its map only loses units from now on
	overlay map[int64][]byte

	countMu sync.Mutex      // keeps counting apart from a seal and from pruning
	data    atomic.Int64    // Data units of the tallied pages
	tallied []atomic.Uint64 // a bit for each map page: count.go
	counted atomic.Bool     // all pages are

	presentMu sync.Mutex // held while an element of present is made or changed
	present   []atomic.Pointer[presence]

	metaMu sync.Mutex // guards meta and slots; held across their fdatasync
	meta   Meta
	slots  *disk.Slots

	workMu sync.Mutex // one Settle or Prune at a time
	log    *logPosition
	logMu  sync.Mutex // guards log, which a Stack takes when the layer becomes its head
}

// logPosition is where a head's log goes on.
type logPosition struct {
	current int // the half in use; the other is free
	gen     uint32
	seed    uint32
	nextSeq uint64
	tail    int64
}

// Create makes a layer file for a disk of sizeBytes (a positive multiple of 4096, at most 15 TiB) and returns once it is durable with its name.
// m.ID and m.Kind are required; an empty m.State means head. The file's log and header are allocated, so that they never meet a full
// disk; units take space as they are written. fs.ErrExist if the name is taken, block.ErrNoSpace if the disk is full; a failure leaves no
// file, a crash may leave one without a superblock, which Open calls corrupt.
func Create(fsys disk.FS, name string, m Meta, sizeBytes int64, o Options) (*Layer, error) {
	if m.State == "" {
		m.State = StateHead
	}
	if err := m.check(); err != nil {
		return nil, fmt.Errorf("layer: create %s: %w", name, err)
	}
	if sizeBytes < unitBytes || sizeBytes > MaxSizeBytes || sizeBytes%unitBytes != 0 {
		return nil, fmt.Errorf("layer: create %s: size %d is not a positive multiple of %d up to %d: %w", name, sizeBytes, unitBytes, int64(MaxSizeBytes), block.ErrRange)
	}
	if m.State == StateSealed || o.BootID == (BootID{}) {
		return nil, fmt.Errorf("layer: create %s: state %s needs to be building or head, and a boot id: %w", name, m.State, ErrState)
	}
	lim := o.limits.withDefaults()
	sb := newSuperblock(m.ID, sizeBytes, lim.segmentBytes)
	f, err := fsys.Create(name, sb.fileBytes())
	if err != nil {
		return nil, fmt.Errorf("layer: create %s: %w", name, mapError(err))
	}
	l := &Layer{fsys: fsys, name: name, f: f, sb: sb, limits: lim, boot: o.BootID, pace: o.Pace}
	if err := l.initialize(m); err != nil {
		// The file was never whole; nobody else knows it.
		return nil, errors.Join(fmt.Errorf("layer: create %s: %w", name, mapError(err)), f.Close(), fsys.Remove(name))
	}
	l.refs.Store(1)
	return l, nil
}

// initialize writes all that a new file holds, and makes it durable.
func (l *Layer) initialize(m Meta) error {
	if err := l.f.Lock(); err != nil {
		return err
	}
	for _, r := range []Range{{0, superBytes}, l.sb.Slots, l.sb.Log} {
		if err := l.f.Reserve(r.Off, r.N); err != nil {
			return err
		}
	}
	if _, err := l.f.WriteAt(l.sb.encode(), 0); err != nil {
		return err
	}
	if err := l.startLog(0, 1, 1); err != nil {
		return err
	}
	l.open(m)
	l.startCount(0, true)
	if err := l.storeMeta(m); err != nil { // syncs the whole file
		return err
	}
	return l.fsys.SyncDir(path.Dir(l.name))
}

// open sets what a layer keeps in memory of its header.
func (l *Layer) open(m Meta) {
	l.meta = m
	l.slots = disk.OpenSlots(l.f, l.sb.Slots.Off, slotBytes)
	l.summed.Store(m.Sums)
	l.sealed.Store(m.State == StateSealed)
	l.present = make([]atomic.Pointer[presence], (l.mapPages()+presencePages-1)/presencePages)
	l.tallied = make([]atomic.Uint64, (l.mapPages()+63)/64)
	if m.Settled && m.DataBytes != nil { // before it is settled, a power cut may have taken some away
		l.startCount(*m.DataBytes/unitBytes, true)
	}
}

func (l *Layer) mapPages() int64 { return (l.sb.units() + pageUnits - 1) / pageUnits }

// Inspect reads a file's superblock and header, and changes nothing. It takes no lock and does not recover: what it tells of a file in use, or of one
// that was not closed, is its identity. ErrVersion, block.ErrCorrupt.
func Inspect(fsys disk.FS, name string) (Meta, Superblock, error) {
	f, err := fsys.OpenRead(name)
	if err != nil {
		return Meta{}, Superblock{}, fmt.Errorf("layer: inspect %s: %w", name, err)
	}
	sb, m, err := readHeader(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return m, sb, fmt.Errorf("layer: inspect %s: %w", name, err)
	}
	return m, sb, nil
}

// readHeader reads and checks what identifies a file.
func readHeader(f disk.File) (Superblock, Meta, error) {
	fileBytes, err := f.Size()
	if err != nil {
		return Superblock{}, Meta{}, err
	}
	b := make([]byte, superBytes)
	if _, err := f.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return Superblock{}, Meta{}, err
	}
	sb, err := decodeSuperblock(b, fileBytes)
	if err != nil {
		return sb, Meta{}, err
	}
	payload, _, err := disk.OpenSlots(f, sb.Slots.Off, slotBytes).Load()
	if errors.Is(err, disk.ErrNoRecord) {
		return sb, Meta{}, fmt.Errorf("header: %w: %w", err, block.ErrCorrupt)
	}
	if err != nil {
		return sb, Meta{}, err
	}
	m, err := decodeMeta(payload)
	if err == nil && m.ID != sb.ID {
		err = fmt.Errorf("header is of layer %s, superblock of %s: %w", m.ID, sb.ID, block.ErrCorrupt)
	}
	return sb, m, err
}

// decodeMeta reads a header. block.ErrCorrupt.
func decodeMeta(b []byte) (Meta, error) {
	var m Meta
	if err := json.Unmarshal(b, &m); err != nil {
		return Meta{}, fmt.Errorf("header: %w: %w", err, block.ErrCorrupt)
	}
	if err := m.check(); err != nil {
		return m, fmt.Errorf("header: %w", err)
	}
	return m, nil
}

// Open opens a layer file, and recovers it if it was not settled: docs/formats/layer.md section 5. It holds the file's lock (disk.ErrLocked)
// until the last Close. ErrVersion, ErrSalvage; block.ErrCorrupt if the file does not hold what its format demands.
func Open(fsys disk.FS, name string, o Options) (*Layer, error) {
	l, err := openFile(fsys, name, o)
	if err != nil {
		return nil, fmt.Errorf("layer: open %s: %w", name, mapError(err))
	}
	return l, nil
}

func openFile(fsys disk.FS, name string, o Options) (*Layer, error) {
	if o.BootID == (BootID{}) && !o.ReadOnly {
		return nil, fmt.Errorf("no boot id given: %w", ErrState)
	}
	open := fsys.Open
	if o.ReadOnly {
		open = fsys.OpenRead
	}
	f, err := open(name)
	if err != nil {
		return nil, err
	}
	l := &Layer{fsys: fsys, name: name, f: f, readOnly: o.ReadOnly, limits: o.limits.withDefaults(), boot: o.BootID, pace: o.Pace}
	if err := l.load(o); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	l.refs.Store(1)
	return l, nil
}

// load reads the header and recovers.
func (l *Layer) load(o Options) error {
	if !o.ReadOnly {
		if err := l.f.Lock(); err != nil {
			return err
		}
	}
	sb, m, err := readHeader(l.f)
	if err != nil {
		return err
	}
	l.sb = sb
	if m.Failed && !o.Salvage {
		return ErrSalvage
	}
	l.open(m)
	if m.Settled {
		return l.freeLog()
	}
	return l.recover()
}

// freeLog punches a settled layer's log, which a crash between the header and the hole may have left.
func (l *Layer) freeLog() error {
	if l.readOnly {
		return nil
	}
	off, _, err := l.f.NextData(l.sb.Log.Off)
	if errors.Is(err, io.EOF) || err == nil && off >= l.sb.Log.end() {
		return nil
	}
	if err != nil {
		return err
	}
	// Whoever wrote the header may have died before it was durable. If it were lost after the log, neither would be left.
	if err := l.f.Sync(); err != nil {
		return err
	}
	return l.f.Punch(l.sb.Log.Off, l.sb.Log.N)
}

// paced waits until background work may move n bytes more.
func (l *Layer) paced(ctx context.Context, n int64) error {
	if err := ctx.Err(); err != nil || l.pace == nil {
		return err
	}
	return l.pace(ctx, n)
}

// Retain takes one more reference and returns l.
func (l *Layer) Retain() *Layer {
	if l.refs.Add(1) <= 1 {
		panic("layer: Retain after the last Close")
	}
	return l
}

// Close gives a reference back; the last closes the file and frees its lock. It makes nothing durable.
func (l *Layer) Close() error {
	switch n := l.refs.Add(-1); {
	case n > 0:
		return nil
	case n < 0:
		l.refs.Add(1)
		return fmt.Errorf("layer %s: close: %w", l.sb.ID, block.ErrClosed)
	}
	if err := l.f.Close(); err != nil {
		return fmt.Errorf("layer %s: close: %w", l.sb.ID, err)
	}
	return nil
}

// Name is the file's name in its FS, as it was opened.
func (l *Layer) Name() string { return l.name }

// ID is the layer's id.
func (l *Layer) ID() ID { return l.sb.ID }

// SizeBytes is the size of the disk the layer describes; it never changes.
func (l *Layer) SizeBytes() int64 { return l.sb.SizeBytes }

// File is the open file, for handing its descriptor and lock on. Nobody may write to it.
func (l *Layer) File() disk.File { return l.f }

// AllocatedBytes is the space the file takes on its disk now, shared extents included.
func (l *Layer) AllocatedBytes() (int64, error) {
	n, err := l.f.Allocated()
	if err != nil {
		return 0, fmt.Errorf("layer %s: %w", l.sb.ID, mapError(err))
	}
	return n, nil
}

// Meta returns a copy of the header.
func (l *Layer) Meta() Meta {
	l.metaMu.Lock()
	defer l.metaMu.Unlock()
	return l.meta.clone()
}

// SetMeta changes the header, and returns once the change survives a power cut; after an error the old or the new one is there. edit must not
// change ID, State, Settled, Sums, Failed, Pruned or DataBytes (ErrState). The header's JSON must fit into 32 KiB (disk.ErrTooLarge).
func (l *Layer) SetMeta(edit func(*Meta)) error {
	return l.changeMeta(func(m *Meta) error {
		before := *m
		edit(m)
		if m.ID != before.ID || m.State != before.State || m.Settled != before.Settled || m.Sums != before.Sums || m.Failed != before.Failed || m.Pruned != before.Pruned || m.DataBytes != before.DataBytes {
			return ErrState
		}
		return nil
	})
}

// changeMeta stores what edit makes of the header.
func (l *Layer) changeMeta(edit func(*Meta) error) error {
	l.metaMu.Lock()
	defer l.metaMu.Unlock()
	if l.readOnly {
		return fmt.Errorf("layer %s: change header: %w", l.sb.ID, block.ErrReadOnly)
	}
	if l.failed.Load() {
		return fmt.Errorf("layer %s: change header: %w", l.sb.ID, block.ErrFailed)
	}
	m := l.meta.clone()
	err := edit(&m)
	if err == nil {
		err = m.check()
	}
	if err == nil {
		err = l.storeMeta(m)
	}
	if err != nil {
		return fmt.Errorf("layer %s: change header: %w", l.sb.ID, mapError(err))
	}
	return nil
}

// storeMeta makes m the header, durably; metaMu is held, or nobody else knows the layer. A failure other than a header that is too large fails the layer:
// an fdatasync may have failed.
func (l *Layer) storeMeta(m Meta) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := l.slots.Store(b); err != nil {
		if !errors.Is(err, disk.ErrTooLarge) {
			l.failLocked()
		}
		return err
	}
	l.meta = m
	l.summed.Store(m.Sums)
	l.sealed.Store(m.State == StateSealed)
	return nil
}

// fail ends all writing for good, and says so in the header if that still works.
func (l *Layer) fail() {
	l.metaMu.Lock()
	defer l.metaMu.Unlock()
	l.failLocked()
}

func (l *Layer) failLocked() {
	if l.failed.Swap(true) || l.meta.State == StateSealed || l.meta.ID == "" {
		return // all that a sealed layer promises is on the medium: its log still stands above its map
	}
	m := l.meta.clone()
	m.Failed = true
	b, err := json.Marshal(m)
	if err != nil {
		return
	}
	// Fresh slots, because those in use refuse after a failed Sync. If this fails too, reads of the header tell nothing, and after a
	// power cut the log's checksums do.
	if disk.OpenSlots(l.f, l.sb.Slots.Off, slotBytes).Store(b) == nil {
		l.meta = m
	}
}

// errFailed is what every change returns after fail.
func (l *Layer) errFailed() error { return fmt.Errorf("layer %s: %w", l.sb.ID, block.ErrFailed) }

// mapError adds block's word for what disk says.
func mapError(err error) error {
	switch {
	case errors.Is(err, disk.ErrNoSpace) && !errors.Is(err, block.ErrNoSpace):
		return fmt.Errorf("%w: %w", block.ErrNoSpace, err)
	case errors.Is(err, fs.ErrClosed) && !errors.Is(err, block.ErrClosed):
		return fmt.Errorf("%w: %w", block.ErrClosed, err)
	}
	return err
}

// presence tells which of 256 neighbouring map pages of a layer hold anything, so that a deep stack is not read layer by layer where
// only a few have units. Pruning takes units away: a stale bit only costs a read. Checkpoints and seals add them (wrotePage).
type presence [presencePages / 64]atomic.Uint64

const presencePages = 256

// hasPage tells whether a map page may hold anything on disk.
func (l *Layer) hasPage(page int64) (bool, error) {
	if page >= l.mapPages() {
		return false, nil
	}
	slot := &l.present[page/presencePages]
	p := slot.Load()
	if p == nil {
		l.presentMu.Lock()
		defer l.presentMu.Unlock()
		var err error
		if p, err = l.findPresent(page / presencePages * presencePages); err != nil {
			return false, fmt.Errorf("layer %s: %w", l.sb.ID, mapError(err))
		}
		slot.Store(p)
	}
	return p.has(page), nil
}

func (p *presence) has(page int64) bool {
	i := page % presencePages
	return p[i/64].Load()>>(i%64)&1 != 0
}

func (p *presence) add(page int64) {
	i := page % presencePages
	p[i/64].Or(1 << (i % 64))
}

// wrotePage notes that a map page has been written.
func (l *Layer) wrotePage(page int64) {
	l.presentMu.Lock() // so that a findPresent which did not see the page is not stored after this
	defer l.presentMu.Unlock()
	if p := l.present[page/presencePages].Load(); p != nil {
		p.add(page)
	}
}

// findPresent looks for data among 256 map pages from first on.
func (l *Layer) findPresent(first int64) (*presence, error) {
	var p presence
	start := l.sb.Map.Off + first*pageBytes
	end := min(start+presencePages*pageBytes, l.sb.Map.end())
	for at := start; at < end; {
		off, n, err := l.f.NextData(at)
		if errors.Is(err, io.EOF) || err == nil && off >= end {
			break
		}
		if err != nil {
			return nil, err
		}
		for i := max(0, off-start) / pageBytes; i < presencePages && i*pageBytes+start < off+n; i++ {
			p.add(i)
		}
		at = off + n
	}
	for page := range l.overlay {
		if i := page - first; i >= 0 && i < presencePages {
			p.add(i)
		}
	}
	return &p, nil
}

// readPage reads a map page into codes (4096 bytes) and tells whether any of its units is not Absent. block.ErrCorrupt if a code is invalid.
func (l *Layer) readPage(page int64, codes []byte) (bool, error) {
	if page >= l.mapPages() {
		return false, nil
	}
	if b := l.overlay[page]; b != nil {
		copy(codes, b)
	} else if _, err := l.f.ReadAt(codes[:pageBytes], l.sb.Map.Off+page*pageBytes); err != nil {
		return false, fmt.Errorf("layer %s: read map page %d: %w", l.sb.ID, page, mapError(err))
	}
	any := uint64(0)
	for i := 0; i < pageBytes; i += 8 {
		w := loadCodes(codes[i:])
		if bad := w & (w >> 1) & evenBits; bad != 0 {
			return false, fmt.Errorf("layer %s: map: unit %d has an invalid state: %w", l.sb.ID, page*pageUnits+int64(i)*4+int64(bits.TrailingZeros64(bad)/2), block.ErrCorrupt)
		}
		any |= w
	}
	return any != 0, nil
}
