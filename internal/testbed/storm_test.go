//go:build integration

package testbed_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"ashlar/internal/testbed"
)

// storm is a volume with what it must hold: by block, the number that was written last; the same for every snapshot. Commands are given to it while
// processes die.
type storm struct {
	*bed
	rng    *rand.Rand
	head   map[int]uint64
	snaps  map[string]map[int]uint64
	sizeMB int
	next   uint64
	kills  map[string]int
	did    map[string]int
	unsure int // commands whose answer was lost
}

const stormBlock = 64 * kib

func stormFill(block int, seq uint64) []byte {
	p := make([]byte, stormBlock)
	if seq == 0 {
		return p
	}
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], seq)
	binary.LittleEndian.PutUint64(seed[8:], uint64(block))
	rand.NewChaCha8(seed).Read(p)
	return p
}

// strike kills something while f runs, or nothing.
func (s *storm) strike(f func() error) error {
	var wg sync.WaitGroup
	var err error
	wg.Go(func() { err = f() })
	victim := []string{"data", "serve", "hold", "data", "", "", ""}[s.rng.IntN(7)]
	after := time.Duration(s.rng.IntN(60)) * time.Millisecond
	if victim != "" {
		<-time.After(after)
		if victim == "serve" {
			if e := errors.Join(s.p.KillServe(), s.p.StartServe(s.ctx)); e != nil {
				s.Fatal(e)
			}
		} else if e := s.p.Kill(victim); e != nil && !errors.Is(e, os.ErrNotExist) && !errors.Is(e, syscall.ESRCH) {
			s.Error(e)
		}
		s.kills[victim]++
	}
	wg.Wait()
	if victim != "" && err != nil {
		s.unsure++
	}
	return err
}

// verb runs a command under fire and again until it is done or done already; done looks.
func (s *storm) verb(name string, done func() bool, args ...string) {
	s.did[name]++
	err := s.strike(func() error { return s.p.Run(s.ctx, nil, args...) })
	if err == nil {
		return
	}
	s.Logf("%q under fire: %v", args, err)
	s.until(40*time.Second, fmt.Sprintf("%q, which failed with %v", args, err), func() bool {
		if done() {
			return true
		}
		err = s.p.Run(s.ctx, nil, args...)
		return err == nil || done()
	})
}

// write writes some blocks under fire; each is sent again until it is acknowledged.
func (s *storm) write() {
	s.did["write"]++
	s.strike(func() error {
		var c *client
		defer func() { c.close() }()
		for range 1 + s.rng.IntN(30) {
			block := s.rng.IntN(s.sizeMB * mib / stormBlock)
			s.next++
			seq := s.next
			if s.rng.IntN(6) == 0 {
				seq = 0
			}
			for sent := false; !sent; {
				if c == nil {
					var err error
					if c, err = redial(s.ctx, s.socket("storm"), "storm", 20*time.Second); err != nil {
						return err
					}
				}
				var err error
				if seq == 0 {
					err = c.do(nbdTrim, int64(block)*stormBlock, nil, stormBlock)
				} else {
					err = c.write(int64(block)*stormBlock, stormFill(block, seq))
				}
				if errors.Is(err, errNBD) {
					s.Fatalf("a write at block %d: %v", block, err)
				}
				if sent = err == nil; !sent {
					c.close()
					c = nil
				}
			}
			s.head[block] = seq
		}
		return nil
	})
}

// look compares everything with what it must be.
func (s *storm) look() {
	s.Helper()
	for try := 0; ; try++ {
		c, err := redial(s.ctx, s.socket("storm"), "storm", 20*time.Second)
		if err != nil {
			s.Fatal(err)
		}
		got := make([]byte, stormBlock)
		for block := range s.sizeMB * mib / stormBlock {
			if err = c.read(int64(block)*stormBlock, got); err != nil {
				break
			}
			if !bytes.Equal(got, stormFill(block, s.head[block])) {
				s.Fatalf("block %d does not hold write %d", block, s.head[block])
			}
		}
		c.close()
		if err == nil {
			return
		}
		if errors.Is(err, errNBD) || try == 5 {
			s.Fatal(err)
		}
	}
}

// attached waits until the volume can be used; while the data process is coming back the node says that it is not ready.
func (s *storm) attached() {
	s.Helper()
	var last error
	err := testbed.Until(s.ctx, 20*time.Second, func() (bool, error) {
		last = s.p.Run(s.ctx, nil, "volume", "attach", "storm", "--timeout", "5s")
		return last == nil, nil
	})
	if err != nil {
		code, v := s.rest("GET", "/v1/volumes/storm", "")
		s.Fatalf("the volume cannot be attached: %v\n%d %v\n%s", last, code, v, s.cli("status"))
	}
}

func (s *storm) step() {
	names := slices.Sorted(maps.Keys(s.snaps))
	switch n := s.rng.IntN(20); {
	case n < 10:
		s.write()
	case n < 14:
		name := "s" + strconv.FormatUint(s.next, 10) + "-" + strconv.Itoa(len(s.did)) + "-" + strconv.Itoa(s.did["snapshot"])
		s.verb("snapshot", func() bool { _, ok := s.snapshots("storm")[name]; return ok }, "snapshot", "create", "storm", name)
		s.snaps[name] = maps.Clone(s.head)
	case n < 16 && len(names) > 0:
		name := names[s.rng.IntN(len(names))]
		s.verb("snapshot delete", func() bool { v, ok := s.snapshots("storm")[name]; return !ok || v.MarkRemoved }, "snapshot", "delete", "storm", name)
		delete(s.snaps, name)
	case n < 18 && len(names) > 0:
		name := names[s.rng.IntN(len(names))]
		s.verb("detach", func() bool { return s.volume("storm").State == "detached" }, "volume", "detach", "storm")
		reverted := false
		s.verb("revert", func() bool { return reverted }, "snapshot", "revert", "storm", name)
		s.verb("attach", func() bool { return s.volume("storm").State == "attached" }, "volume", "attach", "storm")
		s.head = maps.Clone(s.snaps[name])
	case n < 19 && s.sizeMB < 64:
		want := s.sizeMB + 2
		s.verb("expand", func() bool { return s.volume("storm").Size == strconv.Itoa(want*mib) }, "volume", "expand", "storm", "--size", strconv.Itoa(want)+"Mi")
		s.sizeMB = want
	default:
		s.verb("detach", func() bool { return s.volume("storm").State == "detached" }, "volume", "detach", "storm")
		s.verb("attach", func() bool { return s.volume("storm").State == "attached" }, "volume", "attach", "storm")
	}
}

// TestStorm gives a volume random commands and writes while its processes are killed at random, and compares it with a model after each.
func TestStorm(t *testing.T) {
	b := newBed(t)
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("ASHLAR_SEED"); text != "" {
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seed = n
	}
	steps := 60
	if n, err := strconv.Atoi(os.Getenv("ASHLAR_STEPS")); err == nil {
		steps *= n
	}
	t.Logf("seed %d, %d steps", seed, steps)
	s := &storm{bed: b, rng: rand.New(rand.NewPCG(seed, 0)), head: map[int]uint64{}, snaps: map[string]map[int]uint64{}, sizeMB: 16, kills: map[string]int{}, did: map[string]int{}}
	b.cli("volume", "create", "storm", "--size", "16Mi")
	s.attached()
	for range steps {
		s.step()
		s.attached()
		s.look()
	}
	for _, name := range slices.Sorted(maps.Keys(s.snaps)) {
		b.cli("volume", "detach", "storm")
		b.cli("snapshot", "revert", "storm", name)
		s.attached()
		s.head = s.snaps[name]
		s.look()
	}
	t.Logf("did %v, killed %v, lost %d answers; %d snapshots read back", s.did, s.kills, s.unsure, len(s.snaps))
	b.clean("storm")
	b.until(20*time.Second, "all processes are there", func() bool { return b.p.PID("data") != 0 && b.p.PID("hold") != 0 })
}

// TestImportSurvives kills serve, and then the data process, in the middle of an import: it goes on, or begins again, by itself.
func TestImportSurvives(t *testing.T) {
	b := newBed(t)
	golden := b.raw("golden.raw", 64*mib, 50)
	b.tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", golden, b.path("golden.qcow2"))
	text, err := os.ReadFile(b.path("golden.qcow2"))
	if err != nil {
		t.Fatal(err)
	}
	half, release, slow := make(chan struct{}, 16), make(chan struct{}), true
	var mu sync.Mutex
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { // no ranges: it has to come in one piece
		mu.Lock()
		wait := slow
		mu.Unlock()
		w.Header().Set("Content-Length", strconv.Itoa(len(text)))
		if r.Method == http.MethodHead {
			return
		}
		w.Write(text[:len(text)/2])
		w.(http.Flusher).Flush()
		if wait {
			half <- struct{}{}
			select {
			case <-release:
			case <-r.Context().Done():
				return
			}
		}
		io.Copy(w, bytes.NewReader(text[len(text)/2:]))
	}))
	defer s.Close()
	ready := func(name string) {
		t.Helper()
		b.until(90*time.Second, "image "+name+" is ready", func() bool {
			var i imageView
			b.json(&i, "image", "show", name)
			for _, d := range i.DiskFileStatusMap {
				if d.State == "failed" {
					t.Fatalf("image %s: %+v", name, i)
				}
				return d.State == "ready"
			}
			return false
		})
		b.cli("volume", "create", "of-"+name, "--image", name)
		b.attach("of-" + name)
		b.same("of-"+name, golden)
	}
	b.cli("image", "import", "one", s.URL, "--no-wait")
	<-half
	if err := b.p.KillServe(); err != nil {
		t.Fatal(err)
	}
	b.restartServe()
	close(release)
	ready("one")

	release = make(chan struct{})
	b.cli("image", "import", "two", s.URL, "--no-wait")
	<-half
	mu.Lock()
	slow = false
	mu.Unlock()
	b.kill("data")
	close(release)
	start := time.Now()
	ready("two")
	t.Logf("an import whose data process was killed is ready %d ms later", time.Since(start).Milliseconds())
	b.until(10*time.Second, "nothing is left of the first attempt", func() bool { return len(b.list(b.disk()+"/tmp")) == 0 })
}
