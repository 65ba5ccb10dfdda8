package agent_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/dataplane/client"
)

// chaos fails calls, loses answers, and kills whoever calls in the middle of a call: the call hangs until the caller is stopped.
type chaos struct {
	mu     sync.Mutex
	rng    *rand.Rand
	on     bool
	crash  bool // somebody hangs: stop it
	counts map[string]int
}

// roll decides what happens to a call on one side of its effect.
func (c *chaos) roll(ctx context.Context, what string, failure error) error {
	c.mu.Lock()
	if !c.on {
		c.mu.Unlock()
		return nil
	}
	r := c.rng.Float64()
	switch {
	case r < 0.04:
		c.counts["failed "+what]++
		c.mu.Unlock()
		return failure
	case r < 0.05:
		c.counts["crash at "+what]++
		c.crash = true
		c.mu.Unlock()
		<-ctx.Done()
		return ctx.Err()
	}
	c.mu.Unlock()
	return nil
}

func (c *chaos) crashed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	was := c.crash
	c.crash = false
	return was
}

func (c *chaos) set(on bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.on = on
}

// unsure is a catalogue whose calls fail before or after they did something.
type unsure struct {
	*catalog.Mem
	chaos *chaos
}

func (u unsure) around(ctx context.Context, what string, fn func() error) error {
	failure := fmt.Errorf("%w: %w", catalog.ErrUnreachable, errInjected)
	if err := u.chaos.roll(ctx, what+" before", failure); err != nil {
		return err
	}
	if err := fn(); err != nil {
		return err
	}
	return u.chaos.roll(ctx, what+" after", failure)
}

func (u unsure) Get(ctx context.Context, k catalog.Key) (e catalog.Entry, err error) {
	err = u.around(ctx, "get", func() (err error) { e, err = u.Mem.Get(ctx, k); return err })
	return e, err
}

func (u unsure) Put(ctx context.Context, k catalog.Key, v []byte, was catalog.Rev) (rev catalog.Rev, err error) {
	err = u.around(ctx, "put", func() (err error) { rev, err = u.Mem.Put(ctx, k, v, was); return err })
	return rev, err
}

func (u unsure) Delete(ctx context.Context, k catalog.Key, was catalog.Rev) error {
	return u.around(ctx, "delete", func() error { return u.Mem.Delete(ctx, k, was) })
}

// unsureLedger does not answer while the agent is stopped.
type unsureLedger struct {
	client.Ledger
	w *world
}

func (l unsureLedger) Read(ctx context.Context, id string) (client.MembershipEntry, error) {
	if !l.w.up.Load() {
		return client.MembershipEntry{}, client.ErrUnreachable
	}
	return l.Ledger.Read(ctx, id)
}

// history is a random life of a node.
type history struct {
	*world
	rng     *rand.Rand
	chaos   *chaos
	volumes map[string]bool // live ones
	images  map[string]bool
	sources map[string]string
	asked   map[string][]string // operations by volume, in the order they were asked for
	gone    []catalog.VolumeWanted
	names   int
}

// TestRandomHistory: whatever is asked for, and whoever is killed at whatever point, in the end everything is as wanted, and on the way nothing was destroyed that
// should not be, nothing was done twice, and what no record names was left alone.
func TestRandomHistory(t *testing.T) {
	const steps = 60
	runs := 12
	if s, err := strconv.Atoi(os.Getenv("ASHLAR_STEPS")); err == nil {
		runs *= max(1, s)
	}
	first := rand.Uint64()
	if s, err := strconv.ParseUint(os.Getenv("ASHLAR_SEED"), 10, 64); err == nil {
		first, runs = s, 1
	}
	for i := range runs {
		seed := first + uint64(i)
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Logf("seed %d: repeat with ASHLAR_SEED", seed)
			synctest.Test(t, func(t *testing.T) { randomHistory(t, seed, steps) })
		})
	}
}

func randomHistory(t *testing.T, seed uint64, steps int) {
	h := &history{
		world: newWorld(t), rng: rand.New(rand.NewPCG(seed, 1)), chaos: &chaos{rng: rand.New(rand.NewPCG(seed, 2)), counts: map[string]int{}},
		volumes: map[string]bool{}, images: map[string]bool{}, sources: map[string]string{}, asked: map[string][]string{},
	}
	defer h.end()
	h.cat = unsure{h.mem, h.chaos}
	h.calm = 24 * time.Hour // nothing may depend on another look at everything
	h.host.fault = func(ctx context.Context, verb string, early bool) error {
		return h.chaos.roll(ctx, verb, fmt.Errorf("%w: %w", client.ErrUnreachable, errInjected))
	}
	h.start()
	h.settle(0)
	h.strays()
	h.chaos.set(true)
	for range steps {
		h.step()
		h.settle(time.Duration(h.rng.IntN(3)) * time.Duration(h.rng.IntN(2000)) * time.Millisecond)
		if h.chaos.crashed() {
			h.restart()
		}
	}
	h.chaos.set(false)
	h.mem.Away(false)
	h.restart()
	h.settle(40 * time.Minute)
	h.check()
	if p := h.agent.PlanAll(t.Context()); len(p.Actions) > 0 || len(p.Writes) > 0 {
		t.Errorf("plans of what changed missed %+v %+v", p.Actions, p.Writes)
	}
	t.Logf("at the end %d volumes, %d images; chaos %v", len(h.volumes), len(h.images), h.chaos.counts)
}

// restart is a crash of serve.
func (h *history) restart() {
	h.stop()
	h.start()
}

// strays puts things on the disk and into the data process that no record names.
func (h *history) strays() {
	h.host.mu.Lock()
	defer h.host.mu.Unlock()
	d := h.host.disks["/disks/default"]
	c := client.CreateReplica{DiskID: d.status.DiskID, ReplicaID: h.id(), VolumeID: h.id(), Volume: "stray", SizeBytes: 1 << 20}
	d.replicas[c.ReplicaID] = &fakeReplica{CreateReplica: c, layers: []client.Layer{{ID: c.ReplicaID, Head: true, SizeBytes: 1 << 20}}, record: []byte(`{"epoch":3}`)}
	o := client.OpenVolume{VolumeID: c.VolumeID, Volume: "stray", Node: node, DiskID: d.status.DiskID, ReplicaID: c.ReplicaID, Frontend: "nbd"}
	h.host.open[c.VolumeID] = o
	h.host.proc.volumes[c.VolumeID] = h.host.proc.status(o, d, d.replicas[c.ReplicaID], 3)
	id := h.id()
	d.images[id] = client.ImageFound{ImageID: id, Name: "stray"}
	h.host.proc.touch()
}

func (h *history) any(m map[string]bool) (string, bool) {
	var names []string
	for n := range m {
		names = append(names, n)
	}
	if len(names) == 0 {
		return "", false
	}
	slices.Sort(names)
	return names[h.rng.IntN(len(names))], true
}

func (h *history) step() {
	v, haveVolume := h.any(h.volumes)
	i, haveImage := h.any(h.images)
	switch n := h.rng.IntN(20); {
	case n < 3 && len(h.volumes) < 8:
		h.names++
		name := fmt.Sprintf("v%d", h.names%10)
		if _, there := get[catalog.VolumeWanted](h.world, catalog.VolumeKey(catalog.Wanted, name)); !there {
			h.createVolume(name, i)
			h.volumes[name] = true
		}
	case n < 5 && len(h.images) < 4:
		h.names++
		name := fmt.Sprintf("i%d", h.names)
		h.sources[name] = []string{"ok", "ok", "flaky", "bad", "evil"}[h.rng.IntN(5)]
		h.createImage(name, h.sources[name])
		h.images[name] = true
	case n < 6 && haveVolume && len(h.images) < 4:
		h.names++
		name := fmt.Sprintf("i%d", h.names)
		h.sources[name] = "volume " + v
		h.createVolumeImage(name, v, "")
		h.images[name] = true
	case n < 8 && haveVolume:
		h.attach(v, catalog.Ticket{DisableFrontend: h.rng.IntN(3) == 0})
	case n < 10 && haveVolume:
		h.detach(v)
	case n < 15 && haveVolume:
		verb := []string{
			catalog.VerbSnapshot, catalog.VerbSnapshot, catalog.VerbRevert, catalog.VerbExpand, catalog.VerbSnapshotRemove, catalog.VerbPurge, catalog.VerbCheck,
			catalog.VerbExport, catalog.VerbExport,
		}[h.rng.IntN(9)]
		op := catalog.Operation{Verb: verb, Snapshot: fmt.Sprintf("s%d", h.rng.IntN(6))}
		if verb == catalog.VerbExpand {
			op.SizeBytes = int64(16+h.rng.IntN(64)) << 20
		}
		if verb == catalog.VerbExport {
			h.names++
			op.Path, op.Format = fmt.Sprintf("/file%d", h.names), "raw"
			if h.rng.IntN(2) == 0 {
				op.Snapshot = ""
			}
		}
		w, _ := get[catalog.VolumeWanted](h.world, catalog.VolumeKey(catalog.Wanted, v))
		h.asked[w.ID] = append(h.asked[w.ID], h.operate(v, op))
	case n < 16 && haveVolume:
		w, _ := get[catalog.VolumeWanted](h.world, catalog.VolumeKey(catalog.Wanted, v))
		h.bury(v)
		delete(h.volumes, v)
		h.gone = append(h.gone, w)
	case n < 17 && haveImage:
		for name := range h.volumes {
			if w, _ := get[catalog.VolumeWanted](h.world, catalog.VolumeKey(catalog.Wanted, name)); w.Image == i {
				return // the API refuses
			}
		}
		h.buryImage(i)
		delete(h.images, i)
	case n < 18:
		h.host.kill()
	case n < 19:
		h.mem.Away(true)
		h.settle(time.Duration(h.rng.IntN(3000)) * time.Millisecond)
		h.mem.Away(false)
	default:
		h.restart()
	}
}

// check is what must be so in the end.
func (h *history) check() {
	d := h.host.disks["/disks/default"]
	for name := range h.images {
		s := h.imageState(name)
		want := catalog.ImageReady
		if src := h.sources[name]; src == "bad" || src == "evil" {
			want = catalog.ImageFailed
		} else if v, ok := strings.CutPrefix(src, "volume "); ok && !h.canBeRead(v) && s.State != catalog.ImageUnknown {
			continue // its volume was deleted, or cannot be made
		}
		h.want("image "+name+" from "+h.sources[name]+" should be "+want, s.State == want, s)
	}
	for name := range h.volumes {
		h.checkVolume(name, d)
	}
	for _, w := range h.gone {
		for _, r := range w.Replicas {
			h.want("replica of deleted volume "+w.Name, d.replicas[r.ReplicaID] == nil, r)
		}
		_, still := get[catalog.Membership](h.world, catalog.MembershipKey(w.ID))
		h.want("membership of deleted volume "+w.Name, !still)
	}
	h.checkOperations()
	n, _ := get[catalog.NodeObserved](h.world, catalog.NodeKey(catalog.Observed, node))
	h.want("three strays", len(n.Unrecorded) == 3, n.Unrecorded)
	h.want("the stray volume is open", h.host.proc.volumes[n.Unrecorded[2].ID] != nil, h.host.proc.volumes)
	es, _, err := h.mem.List(context.Background(), "")
	h.want("list", err == nil, err)
	for _, e := range es {
		switch k := e.Key; {
		case k.Kind == catalog.KindVolume:
			h.want("no record of a deleted volume", h.volumes[k.Name], k.String())
		case k.Kind == catalog.KindImage:
			h.want("no record of a deleted image", h.images[k.Name], k.String())
		}
	}
}

// canBeRead tells whether a volume is there, with its replica.
func (h *history) canBeRead(name string) bool {
	w, _ := get[catalog.VolumeWanted](h.world, catalog.VolumeKey(catalog.Wanted, name))
	src := h.sources[w.Image]
	return h.volumes[name] && src != "bad" && src != "evil" && !strings.HasPrefix(src, "volume ")
}

func (h *history) checkVolume(name string, d *fakeDisk) {
	w, _ := get[catalog.VolumeWanted](h.world, catalog.VolumeKey(catalog.Wanted, name))
	h.want("placed", len(w.Replicas) == 1, w)
	r := d.replicas[w.Replicas[0].ReplicaID]
	if src := h.sources[w.Image]; w.Image != "" && (src == "bad" || src == "evil" || strings.HasPrefix(src, "volume ") && h.imageState(w.Image).State != catalog.ImageReady) {
		o := h.wantState(name, catalog.VolumeCreating, catalog.RobustnessUnknown)
		h.want("why not", r == nil && o.Conditions[catalog.ConditionWaitForImage].Status == catalog.ConditionTrue, o)
		return
	}
	var o catalog.VolumeObserved
	if len(w.Tickets) > 0 {
		o = h.wantState(name, catalog.VolumeAttached, catalog.RobustnessHealthy)
		h.want("endpoint", (o.Endpoint == "") == w.Tickets[0].DisableFrontend, o, w)
	} else {
		o = h.wantState(name, catalog.VolumeDetached, catalog.RobustnessUnknown)
	}
	_, open := h.host.proc.volumes[w.ID]
	h.want("open as wanted", open == (len(w.Tickets) > 0) && r != nil, open, w)
	h.want("size", o.SizeBytes == r.layers[len(r.layers)-1].SizeBytes, o.SizeBytes, r.layers)
	if o.Epoch > 0 { // a volume with nothing but its head may have been open only while the record could not be written, or only claimed
		h.want("snapshots shown", len(o.Snapshots) == len(r.layers) || len(o.Snapshots) == 0 && len(r.layers) == 1, o.Snapshots, r.layers)
	}
	h.want("nothing to complain of", o.Error == "", o.Error)
	h.wantNothingLeft(name)
}

// checkOperations: each took effect once at most, all ended, in the order they were asked for.
func (h *history) checkOperations() {
	for _, ids := range h.asked {
		at := -1
		for _, id := range ids {
			i := slices.Index(h.host.order, id)
			if i < 0 {
				continue
			}
			h.want("operations in order", i > at, ids, h.host.order)
			at = i
		}
	}
	items, _, err := catalog.All[catalog.Operation](context.Background(), h.mem, catalog.KindOperation, catalog.Wanted)
	h.want("operations", err == nil, err)
	for _, it := range items {
		op := it.Value
		h.want("operation ended", op.Finished != nil && (op.State == catalog.OperationDone) == (op.Code == ""), op)
		switch op.Verb {
		case catalog.VerbExport:
			h.want("one file, or none and failed", h.host.files[op.Path] == 1 && op.Code == "" || h.host.files[op.Path] == 0 && op.Code != "" ||
				op.Code == catalog.CodeExists && strings.Contains(op.Message, "may be whole"), op, h.host.files[op.Path])
		case catalog.VerbSnapshot, catalog.VerbRevert, catalog.VerbExpand:
			h.want("took effect once, or not and failed", h.host.deeds[op.ID] == 1 && op.Code == "" || h.host.deeds[op.ID] == 0 && op.Code != "", op, h.host.deeds[op.ID])
		}
	}
}
