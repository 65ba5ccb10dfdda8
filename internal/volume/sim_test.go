package volume_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"ashlar/internal/block"
	"ashlar/internal/disk"
	"ashlar/internal/replica"
	"ashlar/internal/replica/local"
	"ashlar/internal/volume"
	"ashlar/internal/volume/ledgertest"
)

// sim is one copy, one catalogue, and several openers who all want the volume: they steal it from each other, the catalogue loses calls and answers, the process dies and the power
// goes, and verbs are said twice, also by those who lost the volume. Clients each own some units and write numbers that only grow; what they read must be between
// what was last acknowledged to them and what they last asked for.
type sim struct {
	testing.TB
	ctx    context.Context
	rand   *rand.Rand // of the director alone
	ledger *ledgertest.Mem
	dir    string
	world  sync.RWMutex // held exclusively while the machine is dead; a client's call holds it shared

	mu      sync.Mutex // guards what follows
	life    *life
	ghosts  []*volume.Volume // of earlier lives
	fsys    *disk.Mem
	boots   int
	r       *local.Replica
	engines []*volume.Volume // by opener; nil: none
	lossy   float64          // how many of 100 calls to the catalogue are lost
	random  *rand.Rand       // of the catalogue's faults
	ops     map[string]int
}

const (
	simOpeners = 3
	simClients = 4
	simUnits   = 6 // of each client
	simBytes   = mib
)

func TestSimulation(t *testing.T) {
	const steps = 120
	for _, seed := range seeds(t, 3, steps) {
		t.Run(fmt.Sprint("seed", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { simulate(t, seed, steps) })
		})
	}
}

func simulate(t *testing.T, seed uint64, steps int) {
	g := newRig(t, simBytes, disk.MemOptions{Seed: seed})
	s := &sim{TB: t, ctx: t.Context(), rand: seeded(seed), random: seeded(seed + 1e9), ledger: g.ledger, dir: g.dir, fsys: g.fsys, boots: 1,
		engines: make([]*volume.Volume, simOpeners), ops: map[string]int{}}
	s.boot()
	s.ledger.OnCall(s.fault)
	ctx, stop := context.WithCancel(s.ctx)
	var all sync.WaitGroup
	clients := make([]*client, simClients)
	for i := range clients {
		c := &client{s: s, first: int64(i * simUnits), rand: seeded(seed*100 + uint64(i))}
		clients[i] = c
		all.Go(func() { c.run(ctx) })
	}
	for i := range simOpeners {
		r := seeded(seed*1000 + uint64(i))
		all.Go(func() { s.opener(ctx, i, r) })
	}
	for range steps {
		s.direct(clients)
	}
	stop()
	all.Wait()
	s.finish(clients)
	t.Logf("seed %d: %v", seed, s.ops)
}

func (s *sim) count(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ops[what]++
}

// wait lets the bubble's time go by.
func wait(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// life is the catalogue as one process has it until it dies: what is not in the catalogue then never will be.
type life struct {
	s    *sim
	mu   sync.RWMutex
	dead bool
}

// Read implements volume.Ledger.
func (l *life) Read(ctx context.Context, volumeID string) (rec replica.Record, rev volume.Rev, err error) {
	err = volume.ErrUnreachable
	l.alive(func() { rec, rev, err = l.s.ledger.Read(ctx, volumeID) })
	return rec, rev, err
}

// Swap implements volume.Ledger.
func (l *life) Swap(ctx context.Context, rec replica.Record, was volume.Rev) (rev volume.Rev, err error) {
	err = volume.ErrUnreachable
	l.alive(func() { rev, err = l.s.ledger.Swap(ctx, rec, was) })
	return rev, err
}

// alive waits as long as the way takes, and runs f if the process still lives then.
func (l *life) alive(f func()) {
	l.s.mu.Lock()
	delay := time.Duration(l.s.random.IntN(4)) * time.Millisecond
	l.s.mu.Unlock()
	<-time.After(delay)
	l.mu.RLock()
	defer l.mu.RUnlock()
	if !l.dead {
		f()
	}
}

func (l *life) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dead = true
}

// fault loses calls of the catalogue, before or after they happened.
func (s *sim) fault(ledgertest.Call) ledgertest.Fault {
	s.mu.Lock()
	lose, after := s.random.Float64()*100 < s.lossy, s.random.IntN(2) == 0
	s.mu.Unlock()
	switch {
	case lose && after:
		return ledgertest.LostAfter
	case lose:
		return ledgertest.LostBefore
	}
	return ledgertest.OK
}

// boot opens the copy; the world is dead, or not begun.
func (s *sim) boot() {
	r, err := local.Open(s.fsys, s.dir, local.OpenConfig{BootID: fmt.Sprint("boot", s.boots)})
	if err != nil {
		s.Fatalf("open replica: %v", err)
	}
	s.r, s.life = r, &life{s: s}
}

// direct is one thing that the director does to the world.
func (s *sim) direct(clients []*client) {
	<-time.After(time.Duration(s.rand.IntN(30)) * time.Millisecond)
	switch k := s.rand.IntN(100); {
	case k < 25:
		s.mu.Lock()
		s.lossy = []float64{0, 0, 10, 40, 100}[s.rand.IntN(5)]
		s.mu.Unlock()
	case k < 33:
		s.die(clients, false)
	case k < 38:
		s.die(clients, true)
	}
}

// die kills the process, or cuts the power; then the machine comes back.
func (s *sim) die(clients []*client, power bool) {
	s.world.Lock() // calls of clients under way end first: what they did is known
	defer s.world.Unlock()
	s.life.end()
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.r
	if power {
		s.ops["power cuts"]++
		s.fsys = s.fsys.CrashClone(disk.CrashOptions{Rand: s.rand})
		s.boots++
	} else {
		s.ops["kills"]++
		s.fsys = s.fsys.Clone()
	}
	if err := old.Close(); err != nil {
		s.Errorf("close: %v", err)
	}
	for i, v := range s.engines {
		if v != nil {
			s.ghosts = append(s.ghosts, v)
		}
		s.engines[i] = nil
	}
	s.boot()
	for _, c := range clients {
		c.afterDeath(power)
	}
}

// opener opens the volume whenever it has lost it, or feels like it, says verbs, and says some again to whoever has it now.
func (s *sim) opener(ctx context.Context, i int, r *rand.Rand) {
	for n := 0; wait(ctx, time.Duration(1+r.IntN(40))*time.Millisecond); n++ {
		v := s.engine(i)
		switch {
		case v == nil:
			s.tryOpen(ctx, i, r)
		case v.Device() != nil && r.IntN(12) == 0:
			s.drop(i, v)
			if err := v.Close(ctx); err != nil {
				s.count("closes that failed")
			}
		default:
			s.verb(ctx, v, r)
		}
	}
}

func (s *sim) engine(i int) *volume.Volume {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.engines[i]
}

func (s *sim) drop(i int, v *volume.Volume) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.engines[i] == v {
		s.engines[i] = nil
	}
}

func (s *sim) tryOpen(ctx context.Context, i int, r *rand.Rand) {
	s.mu.Lock()
	copyNow := s.r
	c := volume.Config{VolumeID: volumeID, Name: "sim", Node: fmt.Sprint("node-", i), BootID: fmt.Sprint("boot", s.boots), Ledger: s.life, Resume: r.IntN(2) == 0,
		Replicas: []volume.Member{{ID: replicaID, Replica: copyNow.Connect()}}}
	s.mu.Unlock()
	v, err := volume.Open(ctx, c)
	if err != nil {
		s.count("opens refused")
		if !expected(err) {
			s.Errorf("open: %v", err)
		}
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.r != copyNow { // it died while it opened
		s.ghosts = append(s.ghosts, v)
		return
	}
	s.ops["opens"]++
	s.engines[i] = v
}

// expected tells whether an error is one of those that the weather explains.
func expected(err error) bool {
	for _, target := range []error{volume.ErrUnreachable, volume.ErrConflict, block.ErrFenced, block.ErrClosed, context.Canceled} {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}

// verb says something to v, sometimes twice at once.
func (s *sim) verb(ctx context.Context, v *volume.Volume, r *rand.Rand) {
	id := replica.LayerID(fmt.Sprintf("%016x%016x", r.Uint64(), r.Uint64()))
	name := "s" + string(id[:8])
	do := func() error { return v.Snapshot(ctx, id, replica.SnapshotMeta{Name: name, UserCreated: true}) }
	switch r.IntN(8) {
	case 0:
		do = func() error { return v.Purge(ctx, nil) }
	case 1, 2:
		do = func() error { return removeSome(ctx, v) }
	case 3:
		size := v.Device().Size()
		if size < 2*simBytes {
			do = func() error { return v.Expand(ctx, id, size+16*block.UnitBytes) }
		}
	}
	var both sync.WaitGroup
	for range 1 + r.IntN(2) {
		both.Go(func() {
			if err := do(); err == nil {
				s.count("verbs done")
			} else if s.count("verbs refused"); !expected(err) && !errors.Is(err, block.ErrFailed) && !errors.Is(err, volume.ErrInvalid) && !errors.Is(err, replica.ErrNoSnapshot) {
				s.Errorf("verb: %v", err)
			}
		})
	}
	both.Wait()
}

// removeSome keeps the number of snapshots small.
func removeSome(ctx context.Context, v *volume.Volume) error {
	layers, err := v.Layers(ctx)
	if err != nil {
		return err
	}
	for i, l := range layers {
		if i%3 == 1 && l.Snapshot != nil {
			if err := v.RemoveSnapshot(ctx, l.Snapshot.Name); err != nil {
				return err
			}
		}
	}
	return nil
}

// client owns some units, each of which holds a number.
type client struct {
	s     *sim
	first int64
	rand  *rand.Rand

	// asked is the last number asked for, acked the last acknowledged, safe the last that a flush made durable. Only the client's goroutine uses them, and the director while the world
	// is dead.
	asked, acked, safe [simUnits]uint64
}

// afterDeath is told that the machine died, when no call is under way.
func (c *client) afterDeath(power bool) {
	if power {
		c.acked = c.safe
	}
}

func (c *client) run(ctx context.Context) {
	for wait(ctx, time.Duration(c.rand.IntN(3))*time.Millisecond) {
		c.s.world.RLock()
		if v := c.s.engine(c.rand.IntN(simOpeners)); v != nil {
			c.use(v)
		}
		c.s.world.RUnlock()
	}
}

// use does one thing with an engine, which may have lost the volume without knowing.
func (c *client) use(v *volume.Volume) {
	unit := c.rand.Int64N(simUnits)
	off := (c.first + unit) * block.UnitBytes
	switch c.rand.IntN(8) {
	case 0, 1, 2, 3:
		c.asked[unit]++
		if _, err := v.Device().WriteAt(number(c.asked[unit]), off); err == nil {
			c.acked[unit] = c.asked[unit]
			c.s.count("writes")
		} else if !expected(err) {
			c.s.Errorf("write: %v", err)
		}
	case 4:
		before := c.acked
		if err := v.Device().Flush(); err == nil {
			c.safe = before
			c.s.count("flushes")
		} else if !expected(err) {
			c.s.Errorf("flush: %v", err)
		}
	default:
		c.check(v, unit)
	}
}

func number(n uint64) []byte {
	p := make([]byte, block.UnitBytes)
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], n)
	}
	return p
}

// check reads a unit: every word of it (every sector, after a power cut) is a number between the last acknowledged and the last asked for.
func (c *client) check(v *volume.Volume, unit int64) {
	p := make([]byte, block.UnitBytes)
	if _, err := v.Device().ReadAt(p, (c.first+unit)*block.UnitBytes); err != nil {
		if !expected(err) {
			c.s.Errorf("read: %v", err)
		}
		return
	}
	c.s.count("reads")
	for i := 0; i < len(p); i += 8 {
		if n := binary.LittleEndian.Uint64(p[i:]); n < c.acked[unit] || n > c.asked[unit] {
			c.s.Errorf("unit %d holds %d; acknowledged %d, asked for %d", c.first+unit, n, c.acked[unit], c.asked[unit])
			return
		}
	}
}

// finish mends the world, opens the volume once more and looks at everything.
func (s *sim) finish(clients []*client) {
	s.ledger.OnCall(nil)
	for _, v := range s.ghosts {
		_ = v.Close(s.ctx) // only so that nothing of it is left running
	}
	for i, v := range s.engines {
		if v != nil {
			if err := v.Close(s.ctx); err != nil && !expected(err) {
				s.Errorf("close engine %d: %v", i, err)
			}
		}
	}
	if err := s.r.Close(); err != nil {
		s.Errorf("close: %v", err)
	}
	g := &rig{TB: s.TB, ctx: s.ctx, fsys: s.fsys, ledger: s.ledger, dir: s.dir, boots: s.boots + 1}
	g.open()
	for _, c := range clients {
		for unit := range int64(simUnits) {
			c.check(g.v, unit)
		}
	}
	g.wantSettled()
	g.close()
	checkHistory(s.TB, s.ledger.History())
}

// checkHistory checks every record that the catalogue ever had.
func checkHistory(t testing.TB, history []replica.Record) {
	t.Helper()
	ids := map[replica.LayerID]uint64{}
	for i, rec := range history {
		inSync := 0
		for _, m := range rec.Members {
			if m.InSync {
				inSync++
			}
		}
		if inSync == 0 || rec.Opened > rec.Epoch {
			t.Errorf("record %d: %+v", i, rec)
		}
		if i == 0 {
			continue
		}
		was := history[i-1]
		if !was.Less(rec) || rec.Chain.Generation < was.Chain.Generation || rec.Chain.SizeBytes < was.Chain.SizeBytes || rec.Opened < was.Opened {
			t.Errorf("record %d went back: %+v after %+v", i, rec, was)
		}
		if rec.Chain.Generation > was.Chain.Generation && (was.Pending == nil || !rec.Chain.Equal(was.Pending.Chain)) {
			t.Errorf("record %d: chain changed without having been pending: %+v after %+v", i, rec, was)
		}
		if first := rec.Chain.Layers[0]; first != was.Chain.Layers[0] {
			if ids[first]++; ids[first] > 1 {
				t.Errorf("record %d: head %s was a head before", i, first)
			}
		}
	}
}
