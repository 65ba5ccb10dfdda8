package nbd

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"ashlar/internal/block"
)

// alone makes calls one at a time until the Client's callers read their replies themselves.
func alone(t *testing.T, c *Client) {
	t.Helper()
	p := make([]byte, 512)
	until(t, "the seat to be vacant", func() bool {
		if _, err := c.ReadAt(p, 0); err != nil {
			t.Fatal(err)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.seat == seatVacant
	})
}

// TestAloneAndNot: a caller that reads its own reply takes those of others for them, and leaves the reading to the receiver when it is done and they are not.
func TestAloneAndNot(t *testing.T) {
	dev := newMemDevice(testSize)
	entered, release := make(chan int64), map[int64]chan struct{}{}
	for _, off := range []int64{4096, 8192} {
		release[off] = make(chan struct{})
	}
	dev.hook = func(c call) error {
		if c.op == "read" && c.off > 0 {
			entered <- c.off
			<-release[c.off]
		}
		return nil
	}
	c := connect(t, Export{Name: "disk", Device: dev, MayWait: func() bool { return true }}, ClientOptions{})
	for round := range 3 {
		alone(t, c)
		done := map[int64]chan error{}
		var wg sync.WaitGroup
		call := func(off int64) {
			done[off] = make(chan error, 1)
			result := done[off]
			wg.Go(func() {
				_, err := c.ReadAt(make([]byte, 4096), off)
				result <- err
			})
			if got := <-entered; got != off {
				t.Fatalf("read at %d, want %d", got, off)
			}
		}
		call(4096) // takes the seat
		call(8192)
		first, second := int64(4096), int64(8192)
		if round%2 == 0 {
			first, second = second, first
		}
		for _, off := range []int64{first, second} {
			release[off] <- struct{}{}
			within(t, "the answer", func() {
				if err := <-done[off]; err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
}

// TestAloneLoss: that the connection is lost is noticed although nobody reads just then, and by who reads.
func TestAloneLoss(t *testing.T) {
	for _, how := range []string{"vacant", "calling", "close while vacant", "close while calling"} {
		t.Run(how, func(t *testing.T) {
			dev := newMemDevice(testSize)
			entered, release := make(chan struct{}, 1), make(chan struct{})
			dev.hook = func(c call) error {
				if c.op == "flush" {
					entered <- struct{}{}
					<-release
				}
				return nil
			}
			s, c := connectServer(t, Export{Name: "disk", Device: dev}, ClientOptions{})
			alone(t, c)
			var wg sync.WaitGroup
			var err error
			calling := how == "calling" || how == "close while calling"
			if calling {
				wg.Go(func() { err = c.Flush() })
				<-entered
			}
			want := ErrDisconnected
			if how == "close while vacant" || how == "close while calling" {
				want = block.ErrClosed
				within(t, "Close", func() { _ = c.Close() })
			} else {
				wg.Go(func() { _ = s.Close() })
			}
			within(t, "the loss", func() { <-c.Dead() })
			close(release)
			within(t, "the call", wg.Wait)
			if !calling {
				err = c.Flush()
			}
			if !errors.Is(err, want) {
				t.Fatalf("%v, want %v", err, want)
			}
		})
	}
}

// TestAloneAtRandom: callers that come and go see what they wrote, also over TLS, whoever reads.
func TestAloneAtRandom(t *testing.T) {
	ca := newAuthority(t)
	server, client := ca.server(ca.good()), ca.client(ca.good())
	for _, cfg := range []struct {
		name           string
		server, client *tls.Config
	}{{name: "plain"}, {"tls", server, client}} {
		t.Run(cfg.name, func(t *testing.T) {
			s, err := NewServer(Config{Exports: Single{Name: "disk", Device: block.NewMem(1 << 20)}, TLS: cfg.server})
			if err != nil {
				t.Fatal(err)
			}
			a, b := socketPair(t)
			var served sync.WaitGroup
			served.Go(func() { _ = s.ServeConn(b) })
			c, err := NewClient(t.Context(), a, "disk", ClientOptions{TLS: cfg.client})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = c.Close(); served.Wait(); _ = s.Close() }()
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d", seed)
			for burst, rnd := 0, rand.New(rand.NewPCG(seed, 0)); burst < 40; burst++ {
				var wg sync.WaitGroup
				for lane := range 1 + rnd.IntN(2)*rnd.IntN(5) {
					own := rand.New(rand.NewPCG(seed, uint64(burst<<8|lane)))
					wg.Go(func() { workAt(t, c, own, int64(lane)*128<<10) })
				}
				wg.Wait()
			}
		})
	}
}

// workAt writes and reads in 128 KiB from off on, which are this caller's own.
func workAt(t *testing.T, c *Client, rnd *rand.Rand, off int64) {
	for range 40 {
		n := 4096 * (1 + rnd.IntN(2)*rnd.IntN(16))
		p, got := bytes.Repeat([]byte{byte(rnd.Uint32())}, n), make([]byte, n)
		if _, err := c.WriteAt(p, off); err != nil {
			t.Error(err)
			return
		}
		if _, err := c.ReadAt(got, off); err != nil || !bytes.Equal(got, p) {
			t.Errorf("%d bytes at %d: %x, want %x (%v)", n, off, got[0], p[0], err)
			return
		}
	}
}

// TestPrompt: a socket that hurries is read as any other: across a pause, to its end, by who closes it meanwhile, and with a deadline.
func TestPrompt(t *testing.T) {
	pair := func() (net.Conn, *promptConn) {
		a, b := socketPair(t)
		t.Cleanup(func() { _ = a.Close(); _ = b.Close() })
		p := promptOf(Prompt(b))
		p.hurry(true)
		return a, p
	}
	a, p := pair()
	got := make(chan string)
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(got)
		for buf := make([]byte, 8); ; {
			n, err := p.Read(buf)
			if err != nil {
				got <- err.Error()
				return
			}
			got <- string(buf[:n])
		}
	})
	pause := time.NewTimer(0)
	defer pause.Stop()
	for _, word := range []string{"one", "two", "three"} {
		if _, err := io.WriteString(a, word); err != nil {
			t.Fatal(err)
		}
		if s := <-got; s != word {
			t.Fatalf("%q, want %q", s, word)
		}
		pause.Reset(3 * promptWait) // the next read has left the kernel and waits in the poller
		<-pause.C
	}
	_ = a.Close()
	if s := <-got; s != io.EOF.Error() {
		t.Fatal(s)
	}
	wg.Wait()

	for _, end := range []string{"closed", "deadline"} {
		_, p := pair()
		failed := make(chan error, 1)
		wg.Go(func() {
			_, err := p.Read(make([]byte, 1))
			failed <- err
		})
		if end == "closed" {
			_ = p.Close()
		} else {
			_ = p.SetReadDeadline(time.Unix(1, 0))
		}
		within(t, end, func() {
			if <-failed == nil {
				t.Error("read nothing, without an error")
			}
		})
	}
	wg.Wait()
}

// TestCork: what is written together arrives in order, however much it is, and what fails is told.
func TestCork(t *testing.T) {
	a, b := socketPair(t)
	p := promptOf(Prompt(a))
	want := make([]byte, 5*corkBytes+123)
	for i := range want {
		want[i] = byte(i >> 8)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		err := p.together(len(want), func() error {
			for at := 0; at < len(want); at += recordBytes {
				if _, err := p.Write(want[at:min(at+recordBytes, len(want))]); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	})
	got := make([]byte, len(want))
	if _, err := io.ReadFull(b, got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("something else arrived (%v)", err)
	}
	wg.Wait()
	_ = b.Close()
	for n := range 2 {
		if err := p.together(2*recordBytes, func() error { _, err := p.Write(want[:2*recordBytes]); return err }); err == nil {
			t.Errorf("write %d to nobody succeeded", n)
		}
	}
	_ = a.Close()
}
