package dataplane

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sort"
	"strings"
	"sync"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/block/limit"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/nbd"
	"ashlar/internal/replica"
	"ashlar/internal/volume"
)

// The states of a volume in this process.
//
//	           OpenVolume, or open.json at the start
//	(none) ─────────────▶ opening ─────▶ open ──────────▶ closing ─▶ (none)
//	                         │            │ a flush failed    ▲
//	                         └─────────▶ failed ──────────────┘ CloseVolume
//	                          cannot be reopened
const (
	stateOpening = "opening"
	stateOpen    = "open"
	stateFailed  = "failed"
	stateClosing = "closing"
)

// frontendNBD offers a volume over NBD.
const frontendNBD = "nbd"

// How long clients' requests under way may take when their volume is closed, and the pauses between attempts to reopen while the catalogue is away.
const (
	drainTimeout   = 30 * time.Second
	firstRetry     = 50 * time.Millisecond
	longestRetry   = 2 * time.Second
	maxVolumeBytes = 15 << 40
	// maxFrontTries is how often a volume whose data is there, and whose frontend cannot be made, is tried when it is reopened: some 10 s in all. Then its users get errors rather
	// than wait for ever.
	maxFrontTries = 10
)

// errFront: the volume could be opened, and not be offered to its clients.
var errFront = errors.New("its frontend cannot be made")

// slot is a volume's place in this process.
type slot struct {
	token    chan struct{} // capacity 1: held by whoever opens, closes or changes the volume
	noting   sync.Mutex    // held while a failure is put on record: the next who sees it waits until it is
	limiting sync.Mutex    // held while limits are put on record and set

	mu    sync.Mutex // guards the rest, for whoever looks; the holder of the token alone changes it, but for limits and a failure
	args  client.OpenVolume
	state string
	err   error // why it is failed
	vol   *volume.Volume
	rep   *member
	seen  volume.Status // of a volume whose replica is another node's: what it said last
	lock  *os.File      // of the replica, passed by another process: the next open is under it
	dev   *limit.Device // what its frontends serve; nil unless it is open, or was
	space measured
	entry openEntry
}

// take waits for the slot's token.
func (s *slot) take(ctx context.Context) error {
	select {
	case s.token <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *slot) give() { <-s.token }

// change edits the slot for all to see.
func (s *slot) change(edit func(*slot)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	edit(s)
}

// look returns what a slot is; only the copy's plain fields may be used.
func (s *slot) look() (args client.OpenVolume, state string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.args, s.state, s.err
}

// checkOpen refuses arguments that cannot be right, before anything is done with them.
func checkOpen(a client.OpenVolume) error {
	switch {
	case !validID(a.VolumeID), !validID(a.ReplicaID), !validID(a.DiskID), a.Node == "":
		return fmt.Errorf("volume %.40q, replica %.40q, disk %.40q, node %.40q: %w: ids are 32 hex digits", a.VolumeID, a.ReplicaID, a.DiskID, a.Node, client.ErrInvalid)
	case a.ReplicaNode != "" && checkName(a.ReplicaNode) != nil:
		return fmt.Errorf("node %.40q: %w: not a node's name", a.ReplicaNode, client.ErrInvalid)
	case a.Frontend != "" && a.Frontend != frontendNBD && a.Frontend != frontendBlockdev:
		return fmt.Errorf("frontend %.40q: %w: this build has %q and %q", a.Frontend, client.ErrInvalid, frontendNBD, frontendBlockdev)
	}
	if err := checkLimits(a.Limits); err != nil {
		return err
	}
	return checkName(a.Volume)
}

// checkName refuses names that cannot be part of a file's name, a socket's path and a descriptor's name at the holder: 1 to 128 letters, digits and . _ - of ASCII,
// no dot first.
func checkName(name string) error {
	bad := name == "" || len(name) > 128 || strings.HasPrefix(name, ".")
	for _, c := range []byte(name) {
		bad = bad || !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '.' || c == '_' || c == '-')
	}
	if bad {
		return fmt.Errorf("volume name %.40q: %w", name, client.ErrInvalid)
	}
	return nil
}

// slots returns every volume's slot, by volume id.
func (p *Process) slots() []*slot {
	p.mu.Lock()
	defer p.mu.Unlock()
	ids := make([]string, 0, len(p.slotByID))
	for id := range p.slotByID {
		ids = append(ids, id)
	}
	sort.Strings(ids)
	out := make([]*slot, len(ids))
	for i, id := range ids {
		out[i] = p.slotByID[id]
	}
	return out
}

// slot returns a volume's slot, or nil.
func (p *Process) slot(volumeID string) *slot {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.slotByID[volumeID]
}

// newSlot returns a volume's slot, made if there is none; client.ErrUnreachable if the process is ending.
func (p *Process) newSlot(volumeID string) (*slot, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ending {
		return nil, fmt.Errorf("%w: the data process is ending", client.ErrUnreachable)
	}
	s := p.slotByID[volumeID]
	if s == nil {
		s = &slot{token: make(chan struct{}, 1)}
		p.slotByID[volumeID] = s
	}
	return s, nil
}

// forget removes a slot that holds nothing; the caller has its token.
func (p *Process) forget(volumeID string) {
	p.mu.Lock()
	delete(p.slotByID, volumeID)
	p.mu.Unlock()
	p.board.bump()
}

// OpenVolume implements client.Service.
func (p *Process) OpenVolume(ctx context.Context, a client.OpenVolume) (client.VolumeStatus, error) {
	if err := checkOpen(a); err != nil {
		return client.VolumeStatus{}, fmt.Errorf("open volume: %w", err)
	}
	// What was begun is finished, whether or not the asker waits: half an open would only have to be undone.
	ctx, cancel := p.work(ctx)
	defer cancel()
	for {
		s, err := p.newSlot(a.VolumeID)
		if err != nil {
			return client.VolumeStatus{}, fmt.Errorf("open volume %s: %w", a.Volume, err)
		}
		if err := s.take(ctx); err != nil {
			return client.VolumeStatus{}, forWire(err)
		}
		// Closed and forgotten while we waited, or the process ends: begin again.
		if now, err := p.newSlot(a.VolumeID); now != s || err != nil {
			s.give()
			continue
		}
		err = p.openSlot(ctx, s, a)
		st := p.volumeStatus(ctx, s, p.nbd.Stats())
		s.give()
		if err != nil {
			return client.VolumeStatus{}, forWire(fmt.Errorf("open volume %s: %w", a.Volume, err))
		}
		return st, nil
	}
}

// openSlot opens a volume on request; the caller has the slot's token.
func (p *Process) openSlot(ctx context.Context, s *slot, a client.OpenVolume) error {
	args, state, why := s.look()
	if state == stateOpen || state == stateFailed && s.entry.Failed != "" {
		same := args
		same.Salvage = a.Salvage // was for once
		same.Limits = a.Limits   // SetLimits changes them
		switch {
		case same != a:
			return fmt.Errorf("%w: with other arguments; close it first", client.ErrExists)
		case state == stateFailed:
			return fmt.Errorf("%w: close it first, then open it with salvage: %w", client.ErrSalvage, why)
		}
		return nil
	}
	if s.vol != nil { // fenced, or lost: its guests must know before anybody else is served in their place
		return fmt.Errorf("close it first: %w", why)
	}
	if lost := p.list.salvage(a.VolumeID); lost != "" && !a.Salvage {
		if state == "" {
			p.forget(a.VolumeID)
		}
		return fmt.Errorf("%w: %s", client.ErrSalvage, lost)
	}
	was, known := p.list.volume(a.VolumeID)
	was.Open = a
	if err := p.list.put(was); err != nil { // before anything is opened
		return err
	}
	err := p.bringUp(ctx, s, was)
	if err == nil {
		return nil
	}
	if known && state == stateOpening && isAway(err) {
		return err // it is being reopened all the time
	}
	if known { // guests of this boot may wait for it: it stays on the list
		p.failSlot(ctx, s, was, err)
		return err
	}
	p.forget(a.VolumeID)
	return errors.Join(err, p.list.remove(a.VolumeID))
}

// bringUp opens a volume's replica and engine, records the writer it became, and only then exports it. An entry with an epoch is
// resumed; without one the volume was detached since its last writer.
func (p *Process) bringUp(ctx context.Context, s *slot, e openEntry) error {
	s.change(func(s *slot) { s.args, s.state, s.err, s.entry = e.Open, stateOpening, nil, e })
	p.board.bump()
	rep, err := p.reach(ctx, s, e.Open)
	if err != nil {
		return err
	}
	opening, cancel := rep.patient(ctx, p.cfg.far.open)
	defer cancel()
	vol, err := volume.Open(opening, volume.Config{
		VolumeID: e.Open.VolumeID, Name: e.Open.Volume, Node: e.Open.Node, BootID: p.boot, Ledger: p.ledger,
		Replicas: []volume.Member{{ID: e.Open.ReplicaID, Replica: rep.Replica}},
		Resume:   e.Epoch > 0, GuestsGone: e.Epoch == 0, Guests: e.Epoch, Salvage: e.Open.Salvage,
	})
	if err != nil {
		return errors.Join(rep.blame(err), rep.close())
	}
	undo := func(err error) error {
		late, cancel := rep.patient(ctx, p.cfg.far.last)
		defer cancel()
		return errors.Join(rep.blame(err), vol.Suspend(late), rep.close())
	}
	st, err := vol.Status(opening)
	if err == nil && rep.far != nil && e.Epoch > 0 {
		// Only who wrote it notices that the other node's host was booted again before it was flushed (invariant 8), and that was the process before this one.
		err = rep.flush(opening, vol)
	}
	if err != nil {
		return undo(err)
	}
	if was := (replica.Writer{Epoch: e.Epoch, Session: e.Session}); !was.Less(st.Writer) {
		// A copy that forgot a writer this process had: it would let an older connection in beside the new one.
		return undo(fmt.Errorf("%w: it was open as %v, and its copy let in %v", client.ErrFenced, was, st.Writer))
	}
	e.Epoch, e.Session, e.SizeBytes = st.Writer.Epoch, st.Writer.Session, st.SizeBytes
	if err := p.list.put(e); err != nil {
		return undo(err)
	}
	// A client's first request may come, and fail, before enable returns: the slot is complete by then.
	dev := limit.NewDevice(&witness{Device: vol.Device(), failed: func(err error) { p.noteFailure(s, err) }}, limitsOf(e.Open.Limits))
	s.change(func(s *slot) { s.state, s.vol, s.rep, s.dev, s.entry, s.seen = stateOpen, vol, rep, dev, e, st })
	if err := p.enable(ctx, e.Open, dev); err != nil {
		s.change(func(s *slot) { s.state, s.vol, s.rep, s.dev = stateOpening, nil, nil, nil })
		return undo(fmt.Errorf("%w: %w", errFront, err))
	}
	if err := p.list.salvaged(e.Open.VolumeID); err != nil {
		p.log.Error("salvage stays on record", "volume", e.Open.Volume, "error", err)
	}
	p.log.Info("volume open", "volume", e.Open.Volume, "epoch", e.Epoch, "session", e.Session, "resumed", st.Stats.Resumed)
	p.board.bump()
	p.measureSoon()
	p.wg.Go(func() { p.watch(s, vol) })
	if rep.far != nil {
		p.wg.Go(func() { p.watchFar(s, vol, rep) })
	}
	return nil
}

// watch notes when a volume ends by itself.
func (p *Process) watch(s *slot, vol *volume.Volume) {
	select {
	case <-p.life.Done():
		return
	case <-vol.Ended():
	}
	ctx, cancel := context.WithTimeout(p.life, p.cfg.far.ask)
	st, err := vol.Status(ctx) // the copy may not be there to say anything
	cancel()
	switch st.State {
	case volume.StateFailed:
		p.noteFailure(s, st.Err)
	case volume.StateFenced, volume.StateLost:
		s.change(func(s *slot) {
			if s.vol == vol && s.state == stateOpen {
				s.state, s.err = stateFailed, st.Err
			}
		})
		p.board.bump()
	case volume.StateOpen, volume.StateClosed:
	}
	if err != nil {
		p.log.Warn("status of a volume that ended", "error", err)
	}
}

// noteFailure records, durably and before it returns, that a volume's flush failed: a restart of this process must not turn that into success. Called
// again it does nothing.
func (p *Process) noteFailure(s *slot, why error) {
	s.noting.Lock()
	defer s.noting.Unlock()
	s.mu.Lock()
	if s.entry.Failed != "" || s.state == stateClosing || s.state == "" {
		s.mu.Unlock()
		return
	}
	s.entry.Failed = why.Error()
	s.state, s.err = stateFailed, why
	volumeID, name := s.args.VolumeID, s.args.Volume
	s.mu.Unlock()
	p.log.Error("volume failed; it answers errors until it is detached, and then needs salvage", "volume", name, "error", why)
	if err := p.list.fail(volumeID, why.Error()); err != nil {
		p.log.Error("the failure could not be recorded", "volume", name, "error", err)
	}
	p.board.bump()
}

// failSlot leaves a volume that could not be brought up as failed, for somebody to look at. One whose flush failed keeps answering errors to its guests;
// the socket of any other is closed, so that clients do not wait for nothing, and a block device answers errors.
func (p *Process) failSlot(ctx context.Context, s *slot, e openEntry, why error) {
	s.change(func(s *slot) { s.state, s.err, s.entry = stateFailed, why, e })
	var err error
	if e.Failed != "" || e.Open.Frontend == frontendBlockdev { // whose users could not be told otherwise: they wait in the kernel
		err = p.enable(ctx, e.Open, limit.NewDevice(failedDevice{size: e.SizeBytes}, limit.Limits{}))
	} else {
		err = p.disable(ctx, e.Open)
	}
	if err != nil {
		p.log.Error("frontend of a failed volume", "volume", e.Open.Volume, "error", err)
	}
	p.log.Error("volume is not open", "volume", e.Open.Volume, "error", why)
	p.board.bump()
}

// reopen brings up what open.json says was open when the last process of this boot died: all volumes at once, each as soon as it can. It returns at once.
func (p *Process) reopen(f openFile) {
	for _, d := range f.Disks {
		if _, err := p.adopt(d); err != nil {
			p.log.Error("a disk that was in use cannot be", "path", d.Path, "error", err)
		}
	}
	for id, e := range f.Volumes {
		if p.slot(id) != nil {
			continue // taken over from the process before this one
		}
		if e.Epoch == 0 && e.Failed == "" {
			// Its open had not finished, so no guest was served and nobody was told: whoever asked asks again.
			if err := p.list.remove(id); err != nil {
				p.log.Error("open.json", "error", err)
			}
			continue
		}
		s, err := p.newSlot(id)
		if err != nil {
			return
		}
		s.token <- struct{}{} // fresh: nobody else has it
		s.change(func(s *slot) { s.args, s.state, s.entry = e.Open, stateOpening, e })
		p.wg.Go(func() { p.reopenSlot(s, e) })
	}
}

// reopenSlot brings one volume up again, trying for as long as only the catalogue, or the replica's node, is missing. It has the slot's token, and lends it out between attempts.
func (p *Process) reopenSlot(s *slot, e openEntry) {
	e.Open.Salvage = false // was for once
	fronts := 0
	for pause := firstRetry; ; pause = min(2*pause, longestRetry) {
		if e.Failed != "" {
			p.failSlot(p.life, s, e, fmt.Errorf("%s: %w", e.Failed, volume.ErrNeedsSalvage))
			s.give()
			return
		}
		err := p.bringUp(p.life, s, e)
		again := isAway(err)
		if errors.Is(err, errFront) {
			fronts++
			again = fronts < maxFrontTries
		}
		if err != nil && !again {
			p.failSlot(p.life, s, e, err)
		}
		if again {
			s.change(func(s *slot) { s.err = err })
			p.board.bump()
		}
		s.give()
		if !again {
			return
		}
		p.log.Warn("volume is brought up again in a moment", "volume", e.Open.Volume, "error", err)
		select {
		case <-time.After(pause):
		case <-p.life.Done():
			return
		}
		if s.take(p.life) != nil {
			return
		}
		if _, state, _ := s.look(); state != stateOpening { // somebody closed or opened it meanwhile
			s.give()
			return
		}
	}
}

// CloseVolume implements client.Service.
func (p *Process) CloseVolume(ctx context.Context, a client.CloseVolume) error {
	ctx, cancel := p.work(ctx)
	defer cancel()
	s := p.slot(a.VolumeID)
	if s == nil {
		return nil
	}
	how := closeClean
	if a.Force {
		how = closeForced
		s.cutLoose()
	}
	if err := s.take(ctx); err != nil {
		return forWire(err)
	}
	defer s.give()
	if p.slot(a.VolumeID) != s {
		return nil // closed while we waited
	}
	return forWire(p.closeSlot(ctx, s, how))
}

// closing is how a volume is closed.
type closing int

const (
	closeClean  closing = iota // or not at all, while its replica's node is away
	closeForced                // whether or not its replica's node answers
)

// cutLoose ends the connection to a replica whose node is away, so that nothing waits for it any more: neither guests, nor a verb or a close under way. A block device stays until it is known that nobody uses it.
func (s *slot) cutLoose() {
	s.mu.Lock()
	vol, rep, stuck := s.vol, s.rep, s.state == stateClosing || s.args.Frontend != frontendBlockdev
	s.mu.Unlock()
	if vol != nil && stuck && rep.away() != "" {
		vol.Abandon() //nolint:errcheck // whoever closes it finds it closed
	}
}

// closeSlot closes a volume for good: it leaves open.json first, because from here on nobody waits for it to come back.
func (p *Process) closeSlot(ctx context.Context, s *slot, how closing) error {
	args, state, _ := s.look()
	patience := p.cfg.far.close
	if how == closeForced {
		patience = p.cfg.far.last
	} else if away := s.rep.away(); away != "" && state == stateOpen {
		return fmt.Errorf("close volume %s: %w: %s; what its guests wrote cannot be flushed: wait, or close it with force", args.Volume, client.ErrUnreachable, away)
	}
	ctx, cancel := s.rep.patient(ctx, patience)
	defer cancel()
	if err := p.giveUpBlockdev(ctx, s); err != nil {
		return err
	}
	s.cutLoose()
	if err := p.list.remove(args.VolumeID); err != nil {
		return fmt.Errorf("close volume %s: %w", args.Volume, err)
	}
	s.mu.Lock()
	vol, rep, failed := s.vol, s.rep, s.entry.Failed != ""
	s.state = stateClosing
	s.mu.Unlock()
	s.liftLimits()
	p.board.bump()
	var errs []error
	errs = append(errs, p.disable(ctx, args), p.sources.closeOf(ctx, args.VolumeID))
	if vol != nil {
		err := vol.Close(ctx)
		if errors.Is(err, block.ErrFailed) && !failed { // the last flush is a flush
			errs = append(errs, p.list.change(func(f *openFile) { f.Salvage[args.VolumeID] = err.Error() }))
		}
		err = rep.blame(err)
		if how == closeForced && rep.far != nil && err != nil {
			p.log.Warn("a volume was closed without its replica's node", "volume", args.Volume, "error", err)
			err = nil
		}
		errs = append(errs, err, rep.close())
	}
	p.rescan(args.DiskID, args.ReplicaID)
	p.forget(args.VolumeID)
	p.log.Info("volume closed", "volume", args.Volume)
	return errors.Join(errs...)
}

// suspendSlot closes a volume, whose export has ended, so that the next process of this boot takes it up again: open.json and the record's writer stay.
func (p *Process) suspendSlot(ctx context.Context, s *slot) error {
	if err := s.take(ctx); err != nil {
		return err
	}
	defer s.give()
	s.mu.Lock()
	vol, rep, name, volumeID := s.vol, s.rep, s.args.Volume, s.args.VolumeID
	s.vol, s.rep, s.dev, s.state = nil, nil, nil, stateClosing
	s.mu.Unlock()
	ctx, cancel := rep.patient(ctx, p.cfg.far.last)
	defer cancel()
	errs := []error{p.sources.closeOf(ctx, volumeID)}
	if vol != nil {
		err := vol.Suspend(ctx)
		if errors.Is(err, block.ErrFailed) { // the last flush is a flush
			errs = append(errs, p.list.fail(volumeID, err.Error()))
		}
		if rep.far != nil && err != nil { // not flushed, which the next process makes up for
			p.log.Warn("a volume is left as it is", "volume", name, "error", err)
			err = nil
		}
		errs = append(errs, err, rep.close())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("suspend volume %s: %w", name, err)
	}
	return nil
}

// volumeStatus describes a slot; fronts are what p.nbd.Stats says.
func (p *Process) volumeStatus(ctx context.Context, s *slot, fronts map[string]nbd.Stats) client.VolumeStatus {
	s.mu.Lock()
	a, vol, e := s.args, s.vol, s.entry
	st := client.VolumeStatus{VolumeID: a.VolumeID, Volume: a.Volume, ReplicaID: a.ReplicaID, DiskID: a.DiskID, ReplicaNode: a.ReplicaNode,
		Frontend: a.Frontend, State: s.state, SizeBytes: e.SizeBytes, Epoch: e.Epoch, Session: e.Session, Layers: []client.Layer{}, Limits: a.Limits}
	err, dev, space, rep, seen := s.err, s.dev, s.space, s.rep, s.seen
	s.mu.Unlock()
	st.Away = rep.away()
	if isFar(a) && vol == nil && st.State == stateOpening && err != nil {
		st.Away = err.Error()
	}
	st.Space = spaceOf(space.usage.Space)
	// One that is only being made is no place to go to yet.
	if stats, ok := p.blockdev.Stats()[a.Volume]; ok && a.Frontend == frontendBlockdev && (vol != nil || st.State == stateFailed) {
		st.Endpoint, st.Clients = p.blockdev.Path(a.Volume), stats.Conns
		st.Stats = client.Stats{ReadOps: stats.Reads, WriteOps: stats.Writes, FlushOps: stats.Flushes, ZeroOps: stats.Zeroes,
			ReadBytes: stats.ReadBytes, WriteBytes: stats.WrittenBytes, Errors: stats.Errors}
	}
	if stats, ok := fronts[a.Volume]; ok && a.Frontend == frontendNBD {
		st.Endpoint, st.Clients, st.Stats = p.nbd.URI(a.Volume), stats.Conns, statsOf(stats)
		st.TCPEndpoint = p.network.endpoint(a.Volume)
	}
	if dev != nil {
		st.Stats.Throttled = dev.Rate().Waited()
	}
	if vol != nil && rep.far != nil {
		st.SizeBytes, st.Layers = vol.Device().Size(), layersOf(seen, space.usage)
	} else if vol != nil && st.State != stateClosing {
		vs, statusErr := vol.Status(ctx)
		if statusErr == nil {
			st.SizeBytes, st.Layers = vs.SizeBytes, layersOf(vs, space.usage)
		} else if err == nil && st.State == stateOpen {
			p.log.Warn("status of a volume", "volume", a.Volume, "error", statusErr)
		}
	}
	if err = forWire(err); err != nil {
		st.Code, st.Error = client.CodeOf(err), err.Error()
	}
	return st
}

// layersOf turns the engine's words for layers into the wire's.
func layersOf(st volume.Status, space replica.Usage) []client.Layer {
	out := make([]client.Layer, 0, len(st.Layers))
	for _, l := range st.Layers {
		w := client.Layer{ID: string(l.ID), Parent: string(l.Parent), Head: l.Head, SizeBytes: l.SizeBytes, AllocatedBytes: l.AllocatedBytes, Verified: l.Verified,
			DataBytes: max(0, l.DataBytes), Space: spaceOf(space.Layers[l.ID])}
		if l.Parent == st.Record.Chain.Base {
			w.Parent = ""
		}
		if m := l.Snapshot; m != nil {
			w.Snapshot, w.UserCreated, w.Removed, w.Created, w.Labels = m.Name, m.UserCreated, m.Removed, m.Created, m.Labels
		}
		out = append(out, w)
	}
	return out
}

// witness is the volume's Device as its clients have it: it sees a failure before the client does.
type witness struct {
	block.Device
	failed func(error)
}

// see passes err on, once what it means is on record.
func (w *witness) see(err error) error {
	if err != nil && errors.Is(err, block.ErrFailed) {
		w.failed(err)
	}
	return err
}

// WriteAt implements block.Device.
func (w *witness) WriteAt(b []byte, off int64) (int, error) {
	n, err := w.Device.WriteAt(b, off)
	return n, w.see(err)
}

// Zero implements block.Device.
func (w *witness) Zero(off, n int64) error { return w.see(w.Device.Zero(off, n)) }

// Flush implements block.Device.
func (w *witness) Flush() error { return w.see(w.Device.Flush()) }

// failedDevice is what the guests of a volume whose flush failed are left with once the process that saw it is gone.
type failedDevice struct{ size int64 }

var _ block.Device = failedDevice{}

// ReadAt implements block.Device.
func (failedDevice) ReadAt([]byte, int64) (int, error) { return 0, block.ErrFailed }

// WriteAt implements block.Device.
func (failedDevice) WriteAt([]byte, int64) (int, error) { return 0, block.ErrFailed }

// Zero implements block.Device.
func (failedDevice) Zero(int64, int64) error { return block.ErrFailed }

// Flush implements block.Device.
func (failedDevice) Flush() error { return block.ErrFailed }

// Extents implements block.Device.
func (failedDevice) Extents(int64, int64) ([]block.Extent, error) { return nil, block.ErrFailed }

// Size implements block.Device.
func (d failedDevice) Size() int64 { return d.size }

// Close implements block.Device.
func (failedDevice) Close() error { return nil }
