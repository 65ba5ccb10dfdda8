package dataplane

import (
	"context"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"ashlar/internal/dataplane/client"
)

// readyProcs waits for every node's data process, gives it its disk and tells it of the cluster.
func (w *town) readyProcs() (clients []*client.Client) {
	w.t.Helper()
	for i, b := range w.beds {
		c := b.readyProcs()
		w.tell(i, c)
		clients = append(clients, c)
	}
	return clients
}

// TestKillNodes kills, in turn, the data process that has the replica and the one that has the guest, both as processes of their own, while the catalogue is away: each comes back by itself, the guest waits, and all that was
// acknowledged is there.
func TestKillNodes(t *testing.T) {
	t.Parallel()
	w := newTown(t, 2, newProcs)
	cs := w.readyProcs()
	a := w.farVolume(cs[1], 1, 1, 0)
	w.beds[0].open(cs[0], a)
	w.beds[0].cat.away()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	g := &patientGuest{t: t, socket: filepath.Join(w.beds[0].runDir, "nbd", a.Volume+".sock"), name: a.Volume}
	defer g.close()
	l := &ackedLog{acked: map[int64]uint64{}, pending: map[int64]uint64{}}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var writeErr error
	wg.Go(func() { writeErr = g.writeSome(l, rand.New(rand.NewPCG(seed, 1)), stop) })
	session := uint64(1)
	var pauses []time.Duration
	for range steps(2) {
		for _, node := range []int{1, 0} {
			before := g.answered.Load()
			eventually(t, "the guest writes", func() bool { return g.answered.Load() > before+100 })
			b := w.beds[node]
			pid := b.dataPID()
			began := time.Now()
			b.kill(pid)
			if node == 0 {
				session++
			}
			eventually(t, "another data process runs, and the volume is open", func() bool {
				now := b.dataPID()
				if now == 0 || now == pid {
					return false
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				st, err := cs[0].State(ctx)
				return err == nil && len(st.Volumes) == 1 && st.Volumes[0].State == stateOpen && st.Volumes[0].Session == session
			})
			before = g.answered.Load()
			eventually(t, "the guest is answered", func() bool { return g.answered.Load() > before+1 })
			pauses = append(pauses, time.Since(began).Round(time.Millisecond))
		}
	}
	close(stop)
	wg.Wait()
	if writeErr != nil {
		t.Fatalf("the guest was answered: %v", writeErr)
	}
	g.verify(l)
	st, _ := status(t, cs[0], a.VolumeID)
	if st.Epoch != 1 {
		t.Errorf("epoch %d", st.Epoch)
	}
	t.Logf("%d writes acknowledged; from each kill (replica's process, guest's process, …) to the next answer: %v; %d reconnections of the guest", l.seq, pauses, g.reconnects)
}
