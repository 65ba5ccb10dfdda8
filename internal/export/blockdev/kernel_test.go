package blockdev

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ashlar/internal/block"
)

// TestChoice: FUSE where it can resend; else the kernel's nbd driver where there is one, which is not even looked for otherwise; else FUSE.
func TestChoice(t *testing.T) {
	asked := 0
	kernel := func(there bool) func() bool { return func() bool { asked++; return there } }
	for _, c := range []struct {
		resends, there, want bool
		asked                int
	}{{true, true, false, 0}, {true, false, false, 0}, {false, true, true, 1}, {false, false, false, 1}} {
		asked = 0
		if got := usesKernel(c.resends, kernel(c.there)); got != c.want || asked != c.asked {
			t.Errorf("%+v: %t, asked %d times", c, got, asked)
		}
	}
}

// TestState: the state of a connection is good once.
func TestState(t *testing.T) {
	f, err := New(Config{RunDir: t.TempDir(), Keeper: newKeeper(t), NotHeld: errNotHeld})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if got, err := f.takeState("vol"); got != nil || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if err := f.saveState("vol", []byte("state")); err != nil {
		t.Fatal(err)
	}
	if got, err := f.takeState("vol"); !bytes.Equal(got, []byte("state")) || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if got, err := f.takeState("vol"); got != nil || err != nil {
		t.Errorf("a second time: %q, %v", got, err)
	}
	if err := f.dropState("vol"); err != nil {
		t.Error(err)
	}
}

// kernelVolume is a volume whose driver is the test, which has the other end of the connection.
func kernelVolume(t *testing.T, f *Frontend, size int64) (*kernelServed, pair) {
	t.Helper()
	k, err := f.newKernel("vol", block.NewMem(size), Options{})
	if err != nil {
		t.Fatal(err)
	}
	p, err := k.pair()
	if err != nil {
		t.Fatal(err)
	}
	return k, p
}

// TestDetachLeavesState: after an orderly end the connection lives, and what the next process must know of it is there; a connection that was dead leaves nothing.
func TestDetachLeavesState(t *testing.T) {
	for name, dead := range map[string]bool{"alive": false, "dead": true} {
		t.Run(name, func(t *testing.T) {
			keeper := newKeeper(t)
			f, err := New(Config{RunDir: t.TempDir(), Keeper: keeper, NotHeld: errNotHeld, Tool: []string{"false"}})
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			k, p := kernelVolume(t, f, 1<<20)
			if err := keeper.Put(t.Context(), heldName("vol"), p.ours); err != nil {
				t.Fatal(err)
			}
			defer keeper.Drop(t.Context(), heldName("vol"))
			defer p.kernel.Close()
			k.start(p.ours, p.state)
			if dead {
				if err := p.kernel.Close(); err != nil {
					t.Fatal(err)
				}
				tick := time.NewTicker(time.Millisecond)
				defer tick.Stop()
				for deadline := time.Now().Add(5 * time.Second); len(k.server.Conns()) > 0 && time.Now().Before(deadline); {
					<-tick.C
				}
			}
			if err := k.detach(t.Context()); err != nil {
				t.Fatal(err)
			}
			state, err := f.takeState("vol")
			if err != nil || (state == nil) != dead {
				t.Errorf("state %q, %v", state, err)
			}
			held, err := keeper.Get(t.Context(), heldName("vol"))
			if err != nil {
				t.Fatal(err)
			}
			defer held.Close()
			if hungUp(held) != dead {
				t.Errorf("hung up: %t", !dead)
			}
		})
	}
}

// TestHeldSocket: the connection to the driver is told from a FUSE session by what it is.
func TestHeldSocket(t *testing.T) {
	keeper := newKeeper(t)
	f, err := New(Config{RunDir: t.TempDir(), Keeper: keeper, NotHeld: errNotHeld})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	a, b := os.NewFile(uintptr(fds[0]), "a"), os.NewFile(uintptr(fds[1]), "b")
	defer a.Close()
	defer b.Close()
	other, err := os.Create(filepath.Join(t.TempDir(), "other"))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	for _, c := range []struct {
		file        *os.File
		socket, not bool
	}{{nil, false, false}, {a, true, false}, {other, false, true}} {
		if c.file != nil {
			if err := keeper.Put(t.Context(), heldName("vol"), c.file); err != nil {
				t.Fatal(err)
			}
		}
		held, not, err := f.heldSocket(t.Context(), "vol")
		if err != nil || (held != nil) != c.socket || not != c.not {
			t.Errorf("%+v: %v, %t, %v", c, held, not, err)
		}
		held.Close()
	}
	keeper.Drop(t.Context(), heldName("vol"))
}
