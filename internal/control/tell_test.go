package control_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"ashlar/internal/catalog"
)

// slow is a catalogue whose every change takes a while, as one takes that is made durable, and that counts what was told of volumes and when others were placed.
type slow struct {
	*catalog.Mem
	mu     sync.Mutex
	told   map[string]int // by volume: how often its observed record was put
	puts   int            // of all those
	events int
	placed map[string]int // by volume: puts when its membership was put
	at     func(puts int) // called before each of those puts
}

func (s *slow) Put(ctx context.Context, k catalog.Key, v []byte, was catalog.Rev) (catalog.Rev, error) {
	select {
	case <-time.After(5 * time.Millisecond):
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	s.mu.Lock()
	switch {
	case k.Kind == catalog.KindVolume && k.Part == catalog.Observed:
		s.told[k.Name]++
		s.puts++
		if s.at != nil {
			s.at(s.puts)
		}
	case k.Kind == catalog.KindMembership:
		s.placed[k.Name] = s.puts
	case k.Kind == catalog.KindEvent:
		s.events++
	}
	s.mu.Unlock()
	return s.Mem.Put(ctx, k, v, was)
}

func (s *slow) count() (puts, events int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.puts, s.events
}

// TestManyWithoutPlace: of 1,000 volumes that no node can take each is told once, and a volume that can be placed, made while that goes on, does not wait for more than a few of them. When the
// figures in what is told change they are told anew, a few in a second.
func TestManyWithoutPlace(t *testing.T) {
	const many = 1000
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		put(c, catalog.SettingKey(catalog.SettingOverProvisioning), catalog.Setting{Value: "100"})
		for i := range many {
			name := fmt.Sprintf("big%04d", i)
			put(c, catalog.VolumeKey(catalog.Wanted, name), catalog.VolumeWanted{Name: name, ID: "id-" + name, SizeBytes: 1 << 50, Copies: 1})
		}
		s := &slow{Mem: c.mem, told: map[string]int{}, placed: map[string]int{}}
		const when = 300
		s.at = func(puts int) {
			if puts == when {
				c.volume("small") // its name comes after all others'
			}
		}
		stop := start(s, nil)
		<-time.After(2 * time.Minute)
		synctest.Wait()
		if after := s.placed["id-small"] - when; !c.placed("small") || after > 2*128 {
			t.Fatalf("placed %v, after %d others were told why they are not", c.placed("small"), after)
		}
		puts, events := s.count()
		for i := range many { // "small" took room: those that were told before are told that there is less
			if n := s.told[fmt.Sprintf("big%04d", i)]; n < 1 || n > 2 {
				t.Fatalf("big%04d was told %d times", i, n)
			}
		}
		if again := puts - many; again < when || again > when+2*128 || events > 300 {
			t.Errorf("%d told anew, %d events", again, events)
		}
		put(c, catalog.SettingKey(catalog.SettingOverProvisioning), catalog.Setting{Value: "90"})
		<-time.After(20 * time.Second)
		if now, _ := s.count(); now-puts != 128 {
			t.Errorf("%d of %d told anew within 20 s", now-puts, many)
		}
		<-time.After(many / 128 * 25 * time.Second)
		synctest.Wait()
		if now, _ := s.count(); now-puts != many {
			t.Errorf("%d of %d told anew in the end", now-puts, many)
		}
		puts, _ = s.count()
		<-time.After(time.Hour)
		synctest.Wait()
		if later, _ := s.count(); later != puts {
			t.Errorf("%d more, although nothing changed", later-puts)
		}
		_ = stop()
	})
}

// refusing says of every membership that it changed meanwhile.
type refusing struct {
	*catalog.Mem
	mu    sync.Mutex
	tries map[catalog.Key]int
}

func (r *refusing) Put(ctx context.Context, k catalog.Key, v []byte, was catalog.Rev) (catalog.Rev, error) {
	r.mu.Lock()
	r.tries[k]++
	r.mu.Unlock()
	if k.Kind == catalog.KindMembership {
		return 0, catalog.ErrConflict
	}
	return r.Mem.Put(ctx, k, v, was)
}

// TestConflictsWait: what conflicts is tried again five times a second at most, and keeps no other volume waiting.
func TestConflictsWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		c.volume("v")
		r := &refusing{Mem: c.mem, tries: map[catalog.Key]int{}}
		stop := start(r, nil)
		<-time.After(10*time.Second + time.Millisecond)
		for n := range 20 {
			c.volume(fmt.Sprint("w", n)) // what changes is no reason to try at once
			synctest.Wait()
		}
		_ = stop()
		if n := r.tries[catalog.MembershipKey("id-v")]; n < 40 || n > 52 {
			t.Errorf("tried %d times in 10 s", n)
		}
		for n := range 20 {
			if w, _ := get[catalog.VolumeWanted](c, catalog.VolumeKey(catalog.Wanted, fmt.Sprint("w", n))); len(w.Replicas) != 1 {
				t.Errorf("w%d has no place", n)
			}
		}
	})
}
