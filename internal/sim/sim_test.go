package sim

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/anishathalye/porcupine"

	"ashlar/internal/catalog"
)

// seeds are how many simulations are run; ASHLAR_STEPS multiplies them, ASHLAR_SEED runs one.
func seeds(t *testing.T, n uint64) []uint64 {
	t.Helper()
	if s, err := strconv.ParseUint(os.Getenv("ASHLAR_SEED"), 10, 64); err == nil {
		return []uint64{s}
	}
	if f, err := strconv.ParseUint(os.Getenv("ASHLAR_STEPS"), 10, 64); err == nil {
		n *= f
	}
	var out []uint64
	for s := range n {
		out = append(out, s+1)
	}
	return out
}

const (
	volumeID = "000000000000000000000000000000a1"
	volume1  = "v1"
)

// world is a simulation: a cluster, one volume with its copy somewhere, and a guest of it on every node.
type world struct {
	*testing.T
	*Cluster
	rng     *rand.Rand
	history *History
	guests  sync.WaitGroup
	stop    context.CancelFunc
	away    []bool
	deeds   map[string]int
}

func newWorld(t *testing.T, seed uint64) *world {
	level := slog.LevelError + 4
	if os.Getenv("ASHLAR_SEED") != "" {
		level = slog.LevelInfo
	}
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: level}))
	names := []string{"a", "b", "c"}
	c, err := NewCluster(names, seed, 0.03, log)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{T: t, Cluster: c, rng: rand.New(rand.NewPCG(seed, 0x51)), history: NewHistory(), away: make([]bool, len(names)), deeds: map[string]int{}}
	for i := range names {
		if err := c.StartServe(i); err != nil {
			t.Fatal(err)
		}
	}
	v := catalog.VolumeWanted{Name: volume1, ID: volumeID, SizeBytes: sizeBytes, Copies: 1, Frontend: catalog.FrontendNBD, Created: time.Now()}
	v.Tickets = []catalog.Ticket{{Node: names[w.rng.IntN(len(names))], Kind: catalog.TicketAPI}}
	if _, err := catalog.Write(t.Context(), c.Mem, catalog.VolumeKey(catalog.Wanted, volume1), v, 0); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	w.stop = cancel
	for i, m := range c.Machines {
		g := &Guest{ID: i, Machine: m, VolumeID: volumeID, History: w.history, Seed: seed}
		w.guests.Go(func() { g.Run(ctx) })
	}
	return w
}

// want moves the attachment, without a word to whoever has it.
func (w *world) want(node string) {
	_, _, err := catalog.Update(w.Context(), w.Mem, catalog.VolumeKey(catalog.Wanted, volume1), func(v *catalog.VolumeWanted) error {
		v.Tickets = nil
		if node != "" {
			v.Tickets = []catalog.Ticket{{Node: node, Kind: catalog.TicketAPI}}
		}
		return nil
	})
	if err != nil {
		w.Error(err)
	}
}

// breakSomething does one thing that goes wrong in a cluster, or undoes one.
func (w *world) breakSomething() {
	i := w.rng.IntN(len(w.Machines))
	j := (i + 1 + w.rng.IntN(len(w.Machines)-1)) % len(w.Machines)
	one, other := w.Machines[i].Name, w.Machines[j].Name
	switch what := w.rng.IntN(15); what {
	case 0:
		w.count("one-way cut")
		w.Net.Cut(one, other)
	case 1:
		w.count("cut")
		w.Net.Cut(one, other)
		w.Net.Cut(other, one)
	case 2:
		w.count("late")
		w.Net.Late(one, other, time.Duration(w.rng.Int64N(int64(2*time.Second))))
	case 3, 4:
		w.count("heal")
		w.Net.Heal()
	case 5:
		w.count("data process killed")
		w.Machines[i].Kill()
	case 6:
		w.count("serve stopped or started")
		if w.nodes[i].stop != nil {
			w.StopServe(i)
		} else if err := w.StartServe(i); err != nil {
			w.Error(err)
		}
	case 7:
		w.count("catalogue away or back")
		w.away[i] = !w.away[i]
		w.SetAway(i, w.away[i])
	case 8:
		w.count("leader unseated")
		w.Unseat(time.Duration(w.rng.Int64N(int64(10 * time.Second))))
	case 9, 10:
		w.count("attachment moved")
		w.want(one)
	case 11, 12, 13:
		w.strand(i)
	case 14: // what was under way is lost on its way there or back, and said again
		w.count("connections broken")
		w.Net.Break(one)
	}
}

// strand leaves a writer alone with its volume: cut off from the catalogue and not from the copy, while another node is to have it.
func (w *world) strand(to int) {
	for from := range w.Machines {
		if from != to && w.has(from) {
			w.count("writer stranded")
			w.away[from] = true
			w.SetAway(from, true)
		}
	}
	w.away[to] = false
	w.SetAway(to, false)
	w.want(w.Machines[to].Name)
}

// has tells whether a machine has the volume for its guest.
func (w *world) has(i int) bool {
	dev, _ := w.Machines[i].Device(volumeID)
	return dev != nil
}

func (w *world) count(what string) { w.deeds[what]++ }

// settle makes everything whole but one node, which neither has the copy nor is wanted, and whose agent is dead; and wants the volume to be attached where it is wanted.
func (w *world) settle(node int) {
	w.Net.Heal()
	v, _, _ := catalog.Read[catalog.VolumeWanted](w.Context(), w.Mem, catalog.VolumeKey(catalog.Wanted, volume1))
	dead := -1
	for i, m := range w.Machines {
		if i != node && len(v.Replicas) > 0 && v.Replicas[0].Node != m.Name && w.rng.IntN(3) > 0 {
			dead = i
		}
	}
	for i := range w.Machines {
		if i == dead {
			w.count("left dead")
			w.SetAway(i, true)
			w.StopServe(i)
			continue
		}
		w.SetAway(i, false)
		if err := w.StartServe(i); err != nil {
			w.Error(err)
		}
	}
	name := w.Machines[node].Name
	w.want(name)
	var o catalog.VolumeObserved
	for deadline := time.Now().Add(3 * time.Minute); time.Now().Before(deadline); <-time.After(time.Second) {
		o, _, _ = catalog.Read[catalog.VolumeObserved](w.Context(), w.Mem, catalog.VolumeKey(catalog.Observed, volume1))
		if o.State == catalog.VolumeAttached && o.Node == name && w.has(node) {
			return
		}
	}
	w.Errorf("3 minutes after everything was whole again the volume is %s on %q, not attached on %s: %s", o.State, o.Node, name, o.Error)
}

// oneWriter wants nobody to be answered under an epoch who asked after somebody was answered under a later one.
func (w *world) oneWriter(t *testing.T) {
	t.Helper()
	deeds := slices.DeleteFunc(w.history.Deeds(), func(d Deed) bool { return d.Unknown || d.Epoch == 0 })
	answered := slices.Clone(deeds)
	slices.SortFunc(answered, func(a, b Deed) int { return cmp.Compare(a.Answered, b.Answered) })
	slices.SortFunc(deeds, func(a, b Deed) int { return cmp.Compare(a.Sent, b.Sent) })
	var newest Deed
	for _, d := range deeds {
		for ; len(answered) > 0 && answered[0].Answered < d.Sent; answered = answered[1:] {
			if answered[0].Epoch > newest.Epoch {
				newest = answered[0]
			}
		}
		if d.Epoch < newest.Epoch {
			t.Errorf("two writers: %+v was answered, although %+v was before", d, newest)
			return
		}
	}
}

// judge wants a history that a single disk could have had, unit by unit.
func (w *world) judge(t *testing.T) {
	t.Helper()
	w.oneWriter(t)
	register := porcupine.Model{
		Partition: func(ops []porcupine.Operation) [][]porcupine.Operation {
			parts := make([][]porcupine.Operation, units)
			for _, op := range ops {
				u := op.Input.(Deed).Unit
				parts[u] = append(parts[u], op)
			}
			return parts
		},
		Init: func() any { return uint64(0) },
		Step: func(state, input, _ any) (bool, any) {
			if d := input.(Deed); d.Write {
				return true, d.Value
			} else {
				return d.Value == state, state
			}
		},
	}
	var ops []porcupine.Operation
	for i, d := range known(w.history.Deeds()) {
		ops = append(ops, porcupine.Operation{ClientId: i, Input: d, Call: d.Sent, Return: d.Answered})
	}
	switch porcupine.CheckOperationsTimeout(register, ops, time.Minute) {
	case porcupine.Illegal:
		t.Errorf("no single disk could have answered so")
		slices.SortFunc(ops, func(a, b porcupine.Operation) int { return cmp.Compare(a.Call, b.Call) })
		for _, op := range ops {
			t.Logf("%+v", op.Input)
		}
	case porcupine.Unknown:
		t.Errorf("%d deeds: not judged within a minute", len(ops))
	}
}

// known decides about the writes that were not answered well. Values are never written twice, so one that nobody read may as well not have happened; one that was read had happened when the first who read it
// was answered.
func known(deeds []Deed) (out []Deed) {
	read := map[uint64]int64{}
	for _, d := range deeds {
		if at, ok := read[d.Value]; !d.Write && (!ok || d.Answered < at) {
			read[d.Value] = d.Answered
		}
	}
	for _, d := range deeds {
		at, seen := read[d.Value]
		if d.Unknown && !seen {
			continue
		}
		if d.Unknown {
			d.Answered = at
		}
		out = append(out, d)
	}
	return out
}

// TestCluster breaks a cluster in every way a seed can think of, under guests on all nodes who do not care who is wanted where, and wants never two writers, never a stale read, nothing acknowledged lost, and
// that it all ends well.
func TestCluster(t *testing.T) {
	deeds, done, fenced := map[string]int{}, 0, 0
	for _, seed := range seeds(t, 12) {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			var w *world
			synctest.Test(t, func(t *testing.T) {
				w = newWorld(t, seed)
				<-time.After(15 * time.Second)
				for range 25 {
					w.breakSomething()
					<-time.After(time.Duration(w.rng.Int64N(int64(8 * time.Second))))
				}
				last := w.rng.IntN(len(w.Machines))
				w.settle(last)
				<-time.After(5 * time.Second)
				w.stop()
				w.guests.Wait()
				for u := range units {
					if dev, _ := w.Machines[last].Device(volumeID); dev != nil {
						sent := w.history.now()
						v, err := ReadUnit(dev, u)
						if err != nil {
							t.Error(err)
							continue
						}
						w.history.add(Deed{Guest: 99, Unit: u, Value: v, Sent: sent, Answered: w.history.now()})
					}
				}
				for _, m := range w.Machines {
					fenced += m.fenced
				}
				if err := w.Close(); err != nil {
					t.Error(err)
				}
			})
			w.judge(t)
			done += len(w.history.Deeds())
			for k, n := range w.deeds {
				deeds[k] += n
			}
		})
	}
	t.Logf("%d requests of guests, %d engines fenced, %v", done, fenced, deeds)
	if os.Getenv("ASHLAR_SEED") == "" && (done < 1000 || fenced == 0) {
		t.Error("that proves nothing: hardly anything was asked, or nobody was fenced")
	}
}
