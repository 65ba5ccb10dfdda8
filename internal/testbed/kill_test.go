//go:build integration

package testbed_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// comeBack is how soon volumes must be back after the data process was killed.
const comeBack = 5 * time.Second

// kill kills a process of the node and waits until another has taken its place.
func (b *bed) kill(sub string) (was, is int) {
	b.Helper()
	was = b.p.PID(sub)
	if err := b.p.Kill(sub); err != nil {
		b.Fatal(err)
	}
	b.until(20*time.Second, "another ashlar "+sub, func() bool {
		is = b.p.PID(sub)
		return is != 0 && is != was
	})
	return was, is
}

// sameData wants the data process to be the one it was.
func (b *bed) sameData(pid int) {
	b.Helper()
	if now := b.p.PID("data"); now != pid || pid == 0 {
		b.Fatalf("the data process was %d and is %d", pid, now)
	}
}

// restartServe starts serve again, and wants it to find everything as it is.
func (b *bed) restartServe(attached ...string) {
	b.Helper()
	start := time.Now()
	if err := b.p.StartServe(b.ctx); err != nil {
		b.Fatal(err)
	}
	b.Logf("serve is ready again after %d ms", time.Since(start).Milliseconds())
	for _, name := range attached {
		if v := b.volume(name); v.State != "attached" || v.Robustness != "healthy" || v.Controllers[0].Endpoint != b.uri(name) {
			b.Fatalf("volume %s after the restart: %+v", name, v)
		}
	}
}

// TestKillServe kills serve, again and again, under fio verify and under a plain client whose connection must never break.
func TestKillServe(t *testing.T) {
	b := newBed(t)
	b.cli("volume", "create", "v", "--size", "256Mi")
	b.cli("volume", "create", "w", "--size", "64Mi")
	b.attach("v", "w")
	data := b.p.PID("data")
	plain := b.dial("w")
	f := b.startFio(b.uri("v"), 48*mib, 3000)
	for n := range 3 {
		f.running()
		if err := b.p.KillServe(); err != nil {
			t.Fatal(err)
		}
		b.refused(exitUnreachable, []string{"ashlar serve"}, "volume", "list")
		for i := range 50 {
			if err := plain.write(int64(i)*4096, bytes.Repeat([]byte{byte(n + 1)}, 4096)); err != nil {
				t.Fatalf("a write while serve is dead: %v", err)
			}
		}
		b.restartServe("v", "w")
		b.sameData(data)
	}
	// In the middle of a verb, too: the operation is carried out, once.
	for n := range 3 {
		name := fmt.Sprintf("cut%d", n)
		cmd := exec.CommandContext(b.ctx, program, "--run-dir", b.p.RunDir, "snapshot", "create", "w", name)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		b.until(10*time.Second, "a request on its way", func() bool {
			code, got := b.rest("POST", "/v1/volumes/w?action=snapshotCRList", "{}")
			return code == 200 && strings.Contains(fmt.Sprint(got), name) || cmd.ProcessState != nil || n == 0
		})
		if err := b.p.KillServe(); err != nil {
			t.Fatal(err)
		}
		cmd.Wait() // it may have got its answer, or not
		b.restartServe("v", "w")
		if n > 0 { // it was on record
			b.until(20*time.Second, name+" is taken", func() bool { return b.snapshots("w")[name].UserCreated })
		}
		b.cli("volume", "expand", "w", "--size", fmt.Sprintf("%dMi", 66+2*n))
	}
	ops, worst := f.wait()
	t.Logf("fio verified %d operations over 6 kills of serve without an error; the slowest took %v", ops, worst.Round(time.Millisecond))
	b.sameData(data)
	if err := plain.read(0, make([]byte, 4096)); err != nil {
		t.Errorf("the connection from before the kills: %v", err)
	}
	b.clean("v", "w")
}

// TestKillHold kills the holder: nothing happens to guests, and it is back; then the holder and serve at once, and then the data process, which the new holder
// starts again without any help of serve.
func TestKillHold(t *testing.T) {
	b := newBed(t)
	b.cli("volume", "create", "v", "--size", "256Mi")
	b.attach("v")
	b.qemuIO("v", "write -P 0x61 128M 8M")
	data := b.p.PID("data")
	f := b.startFio(b.uri("v"), 24*mib, 3000)
	b.kill("hold")
	f.running()
	b.sameData(data)

	hold := b.p.PID("hold")
	if err := errors.Join(b.p.KillServe(), b.p.Kill("hold")); err != nil {
		t.Fatal(err)
	}
	b.until(20*time.Second, "a new holder without serve", func() bool { p := b.p.PID("hold"); return p != 0 && p != hold })
	b.sameData(data)
	ops, worst := f.wait()
	t.Logf("fio verified %d operations over two deaths of the holder; the slowest took %v", ops, worst.Round(time.Millisecond))

	start := time.Now()
	_, data = b.kill("data")
	b.dial("v")
	b.Logf("the data process is back under the new holder, without serve, after %d ms", time.Since(start).Milliseconds())
	b.qemuIO("v", "read -P 0x61 128M 8M", "write -P 0x62 128M 1M")
	b.restartServe("v")
	b.sameData(data)

	// All three at once: nobody is left to start anybody; the next serve brings all back.
	if err := errors.Join(b.p.KillServe(), syscall.Kill(b.p.PID("hold"), syscall.SIGKILL), syscall.Kill(b.p.PID("data"), syscall.SIGKILL)); err != nil {
		t.Fatal(err)
	}
	// "At once" takes a moment, in which whoever still lives may start another: that one dies too.
	b.until(20*time.Second, "all are dead", func() bool {
		dead := true
		for _, sub := range []string{"hold", "data"} {
			if pid := b.p.PID(sub); pid != 0 {
				dead = false
				syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		return dead
	})
	if err := b.p.StartServe(b.ctx); err != nil {
		t.Fatal(err)
	}
	b.dial("v")
	b.qemuIO("v", "read -P 0x62 128M 1M", "read -P 0x61 129M 7M")
	b.until(10*time.Second, "the volume is attached again", func() bool { return b.volume("v").State == "attached" })
	b.clean("v")
}

// TestKillData kills the data process under fio verify through nbdkit's retry filter, which connects again as QEMU does: no error reaches fio.
func TestKillData(t *testing.T) {
	b := newBed(t)
	b.cli("volume", "create", "v", "--size", "256Mi")
	b.attach("v")
	proxy := b.path("retry.sock")
	cmd := exec.CommandContext(b.ctx, "nbdkit", "-f", "-U", proxy, "--filter=retry", "nbd", "socket="+b.socket("v"), "export=v", "retry=30", "retries=30", "retry-delay=1", "retry-exponential=no")
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	b.until(10*time.Second, "nbdkit", func() bool { _, err := b.try("nbdinfo", "--size", "nbd+unix:///?socket="+proxy); return err == nil })
	f := b.startFio("nbd+unix:///?socket="+proxy, 40*mib, 2000)
	for range 4 {
		f.running()
		start := time.Now()
		was, is := b.kill("data")
		c := b.dial("v")
		if err := c.read(0, make([]byte, 4096)); err != nil {
			t.Fatal(err)
		}
		took := time.Since(start)
		c.close()
		b.Logf("data process %d killed, %d serves after %d ms", was, is, took.Milliseconds())
		if took > comeBack {
			t.Errorf("it took %v", took)
		}
		before := b.writes("v")
		b.until(20*time.Second, "fio goes on", func() bool { return b.writes("v") > before+500 })
	}
	ops, worst := f.wait()
	t.Logf("fio verified %d operations over 4 kills of the data process without an error; the slowest took %v (the filter waits 1 s before it connects again)", ops, worst.Round(time.Millisecond))
	b.clean("v")
}

// writes counts what a volume's clients wrote since its data process started.
func (b *bed) writes(volume string) (n float64) {
	out, err := b.try("curl", "-s", "http://"+b.p.Listen+"/metrics")
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(out) {
		if strings.Contains(line, "write") && strings.Contains(line, `volume="`+volume+`"`) && strings.Contains(line, "ops") {
			fmt.Sscan(line[strings.LastIndex(line, " "):], &n)
		}
	}
	return n
}

// Blocks of the journal test: two units, so that a write in flight may be found half done.
const (
	blockBytes = 8192
	unitBytes  = 4096
	blocks     = 256 // per writer
)

// journal is one writer's outside log: what each unit was told to be, and what of that was acknowledged.
type journal struct {
	volume, socket string
	base           int64
	rng            *rand.Rand
	acked          []uint64 // by unit: the newest acknowledged write
	tried          []uint64 // by unit: the newest write that was sent, acknowledged or not
	next           uint64
	total          *atomic.Int64
	broke          int
	longest        time.Duration // from the loss of a connection to the next acknowledgement
}

// fill is what write number seq puts into a unit; every eighth write is a discard.
func (j *journal) fill(unit int, seq uint64, p []byte) {
	clear(p)
	if seq == 0 || seq%8 == 5 {
		return
	}
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], seq)
	binary.LittleEndian.PutUint64(seed[8:], uint64(j.base)+uint64(unit))
	rand.NewChaCha8(seed).Read(p)
}

// verify reads everything and wants each unit to be as acknowledged, or as last tried. What is found is what is there from now on.
func (j *journal) verify(c *client) error {
	got, want := make([]byte, blockBytes), make([]byte, unitBytes)
	for block := range blocks {
		if err := c.read(j.base+int64(block)*blockBytes, got); err != nil {
			return err
		}
		for u := range blockBytes / unitBytes {
			unit := block*(blockBytes/unitBytes) + u
			have := got[u*unitBytes : (u+1)*unitBytes]
			j.fill(unit, j.acked[unit], want)
			if bytes.Equal(have, want) {
				continue
			}
			j.fill(unit, j.tried[unit], want)
			if !bytes.Equal(have, want) {
				return fmt.Errorf("volume %s, unit at %d: neither write %d, which was acknowledged, nor %d, the last one sent: %w", j.volume, j.base+int64(unit)*unitBytes, j.acked[unit], j.tried[unit], errLost)
			}
			j.acked[unit] = j.tried[unit]
		}
	}
	copy(j.tried, j.acked)
	return nil
}

var errLost = errors.New("an acknowledged write is lost")

// step sends one request and notes its acknowledgement.
func (j *journal) step(c *client) error {
	j.next++
	block := j.rng.IntN(blocks)
	per := blockBytes / unitBytes
	p := make([]byte, blockBytes)
	for u := range per {
		j.tried[block*per+u] = j.next
		j.fill(block*per+u, j.next, p[u*unitBytes:(u+1)*unitBytes])
	}
	off := j.base + int64(block)*blockBytes
	var err error
	if j.next%8 == 5 {
		err = c.do([]uint16{nbdTrim, nbdZero}[j.next/8%2], off, nil, blockBytes)
	} else {
		err = c.write(off, p)
	}
	if err != nil {
		return err
	}
	for u := range per {
		j.acked[block*per+u] = j.next
	}
	j.total.Add(1)
	if j.next%16 == 0 {
		return c.flush()
	}
	return nil
}

// write works until ctx ends: it connects, verifies, and writes until the connection breaks, again and again.
func (j *journal) write(ctx context.Context) error {
	var lost time.Time
	for {
		c, err := redial(context.WithoutCancel(ctx), j.socket, j.volume, 20*time.Second)
		if err != nil {
			return err
		}
		err = j.verify(c)
		for err == nil && ctx.Err() == nil {
			if err = j.step(c); err == nil && !lost.IsZero() {
				j.longest, lost = max(j.longest, time.Since(lost)), time.Time{}
			}
		}
		if err == nil {
			err = j.verify(c)
		}
		c.close()
		switch {
		case err == nil:
			return nil
		case errors.Is(err, errNBD) || errors.Is(err, errLost):
			return err
		}
		j.broke++
		if lost.IsZero() {
			lost = time.Now()
		}
	}
}

// TestAcknowledgedSurvives kills the data process ten times under writers that log outside what was acknowledged to them, on several volumes at once, while snapshots are taken
// and deleted; all of it must be there, and check must find nothing.
func TestAcknowledgedSurvives(t *testing.T) {
	b := newBed(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	b.raw("golden.raw", 16*mib, 6)
	b.cli("image", "import", "golden", b.path("golden.raw"))
	volumes := []string{"a", "b", "c"}
	var total atomic.Int64
	var writers []*journal
	for _, v := range volumes {
		b.cli("volume", "create", v, "--size", "64Mi", "--image", "golden")
		b.attach(v)
		b.qemuIO(v, "write -z 0 16M")
		for w := range 2 {
			units := blocks * blockBytes / unitBytes
			writers = append(writers, &journal{volume: v, socket: b.socket(v), base: int64(w) * 8 * mib, rng: rand.New(rand.NewPCG(seed, uint64(len(writers)))),
				acked: make([]uint64, units), tried: make([]uint64, units), total: &total})
		}
	}
	ctx, cancel := context.WithCancel(b.ctx)
	defer cancel()
	var wg sync.WaitGroup
	failed := make(chan error, len(writers))
	for _, j := range writers {
		wg.Go(func() { failed <- j.write(ctx) })
	}
	const kills = 10
	for n := range kills {
		had := total.Load()
		b.until(30*time.Second, "the writers go on", func() bool {
			if len(failed) > 0 {
				t.Fatal(<-failed)
			}
			return total.Load() > had+2000
		})
		if n%2 == 0 { // the kill falls into the snapshot's time or not
			args := []string{"snapshot", "create", volumes[n%3], fmt.Sprintf("s%d", n)}
			wg.Go(func() { b.p.Run(ctx, nil, args...) })
			b.until(5*time.Second, "a moment", func() bool { return total.Load() > had+2000+int64(n*20) })
		}
		b.kill("data")
	}
	had := total.Load()
	b.until(30*time.Second, "the writers go on", func() bool { return total.Load() > had+2000 || len(failed) > 0 })
	cancel()
	wg.Wait()
	var longest []time.Duration
	broke := 0
	for _, j := range writers {
		if err := <-failed; err != nil {
			t.Error(err)
		}
		longest = append(longest, j.longest)
		broke += j.broke
	}
	worst := slices.Max(longest)
	t.Logf("%d kills, %d broken connections, %d acknowledged writes and discards on 3 volumes, none lost; the longest time to the next acknowledgement was %d ms (with the verification of all that came before)",
		kills, broke, total.Load(), worst.Milliseconds())
	if worst > comeBack {
		t.Errorf("a volume was back only after %v", worst)
	}
	b.until(10*time.Second, "all volumes are attached", func() bool {
		return !slices.ContainsFunc(volumes, func(v string) bool { return b.volume(v).State != "attached" })
	})
	b.clean(volumes...)
	// Once more from the disk: the same after detach and attach.
	for _, v := range volumes {
		b.cli("volume", "detach", v)
		b.attach(v)
	}
	for _, j := range writers {
		if err := j.verify(b.dial(j.volume)); err != nil {
			t.Error(err)
		}
	}
}
