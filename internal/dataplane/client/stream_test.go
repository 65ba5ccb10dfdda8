package client

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"testing/iotest"
)

// streamOf is b as a stream, written in pieces of n bytes.
func streamOf(t testing.TB, b []byte, n int) []byte {
	t.Helper()
	var out bytes.Buffer
	w := NewStreamWriter(&out)
	for rest := b; len(rest) > 0; rest = rest[min(n, len(rest)):] {
		if _, err := w.Write(rest[:min(n, len(rest))]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// TestStream: what was written is read, whatever the pieces, and nothing behind the end mark is touched.
func TestStream(t *testing.T) {
	const seed = 11
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, seed))
	for _, size := range []int{0, 1, 4096, MaxStreamChunk, MaxStreamChunk + 1, 3*MaxStreamChunk + 17} {
		b := make([]byte, size)
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		for _, piece := range []int{1 + rng.IntN(10_000), MaxStreamChunk, 1 << 30} {
			wire := bytes.NewReader(append(streamOf(t, b, piece), "rest"...))
			got, err := io.ReadAll(NewStreamReader(wire))
			if err != nil || !bytes.Equal(got, b) {
				t.Fatalf("%d bytes in pieces of %d: %d came, %v", size, piece, len(got), err)
			}
			if wire.Len() != 4 {
				t.Fatalf("%d bytes are left behind the end mark, want 4", wire.Len())
			}
		}
	}
	got, err := io.ReadAll(NewStreamReader(iotest.DataErrReader(iotest.OneByteReader(bytes.NewReader(streamOf(t, []byte("hello"), 2))))))
	if err != nil || string(got) != "hello" {
		t.Fatalf("%q, %v", got, err)
	}
}

// TestStreamCut: cut anywhere, a stream never ends well.
func TestStreamCut(t *testing.T) {
	wire := streamOf(t, []byte("some bytes of a file"), 7)
	for n := range len(wire) {
		got, err := io.ReadAll(NewStreamReader(bytes.NewReader(wire[:n])))
		if !errors.Is(err, ErrStreamCut) {
			t.Fatalf("cut at %d of %d: %q, %v", n, len(wire), got, err)
		}
	}
	if _, err := io.ReadAll(NewStreamReader(bytes.NewReader([]byte("GET / HTTP/1.1\r\n")))); !errors.Is(err, ErrStreamFormat) {
		t.Fatal(err)
	}
	broken := errors.New("broken")
	if _, err := io.ReadAll(NewStreamReader(iotest.ErrReader(broken))); !errors.Is(err, broken) {
		t.Fatal(err)
	}
	var out bytes.Buffer
	w := NewStreamWriter(&out)
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("x")); !errors.Is(err, ErrStreamFormat) || out.Len() != 4 {
		t.Fatalf("write after the end: %v", err)
	}
}

// TestStreamOverSocket: a sender that closes its socket without a word has not sent a file.
func TestStreamOverSocket(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	b := bytes.Repeat([]byte("0123456789abcdef"), 200_000)
	for _, whole := range []bool{true, false} {
		var sender sync.WaitGroup
		sender.Go(func() {
			c, err := net.Dial("unix", l.Addr().String())
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			w := NewStreamWriter(c)
			if _, err := w.Write(b); err != nil {
				t.Error(err)
			}
			if whole {
				if err := w.Finish(); err != nil {
					t.Error(err)
				}
			}
		})
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(NewStreamReader(c))
		if !bytes.Equal(got, b) || whole != (err == nil) || !whole && !errors.Is(err, ErrStreamCut) {
			t.Fatalf("whole %v: %d bytes, %v", whole, len(got), err)
		}
		c.Close()
		sender.Wait()
	}
}

// FuzzStream: any bytes end as a file, a cut or no stream, and a file is what its chunks say.
func FuzzStream(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x00"))
	f.Add([]byte("\x00\x00\x00\x02ab\x00\x00\x00\x01c\x00\x00\x00\x00rest"))
	f.Add([]byte("\x00\x00\x00\x09ab"))
	f.Add([]byte("\xff\xff\xff\xffab"))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := io.ReadAll(NewStreamReader(bytes.NewReader(b)))
		if err != nil {
			if !errors.Is(err, ErrStreamCut) && !errors.Is(err, ErrStreamFormat) {
				t.Fatal(err)
			}
			return
		}
		again, err := io.ReadAll(NewStreamReader(bytes.NewReader(streamOf(t, got, len(got)+1))))
		if err != nil || !bytes.Equal(again, got) || len(got) > len(b)-4 {
			t.Fatalf("%d bytes, %v", len(again), err)
		}
	})
}
