package image

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"testing"

	"ashlar/internal/block"
)

// sparseDevice is mostly nothing.
type sparseDevice struct {
	memDevice
	size int64
	data map[int64]byte // single bytes
}

func (s *sparseDevice) Size() int64 { return s.size }

func (s *sparseDevice) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	for at, b := range s.data {
		if at >= off && at < off+int64(len(p)) {
			p[at-off] = b
		}
	}
	return len(p), nil
}

func (s *sparseDevice) Extents(off, n int64) ([]block.Extent, error) {
	var at []int64
	for k := range s.data {
		if k := k - k%block.UnitBytes; k >= off && k < off+n {
			at = append(at, k)
		}
	}
	if len(at) == 0 {
		return []block.Extent{{Off: off, N: n}}, nil
	}
	if first := slices.Min(at); first > off {
		return []block.Extent{{Off: off, N: first - off, State: block.Zero}}, nil
	}
	return []block.Extent{{Off: off, N: block.UnitBytes, State: block.Data}}, nil
}

// TestDigestGolden holds the table of docs/formats/digest.md, which names the values.
func TestDigestGolden(t *testing.T) {
	page, err := os.ReadFile("../../docs/formats/digest.md")
	if err != nil {
		t.Fatal(err)
	}
	last := int64(3<<20 + 4095)
	for name, dev := range map[string]*sparseDevice{
		"4096 zeroes":           {size: 4096},
		"3 MiB + 4096, 2 bytes": {size: last + 1, data: map[int64]byte{0: 1, last: 2}},
		"8 TiB of zeroes":       {size: 8 << 40},
	} {
		d, err := Digest(context.Background(), dev)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(page, []byte("`"+d+"`")) {
			t.Errorf("%s: %s is not in docs/formats/digest.md", name, d)
		}
	}
}

// TestDigestDescribesContent: the same bytes give the same digest however they are described, and any other byte or size another.
func TestDigestDescribesContent(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	b := make([]byte, 5<<20+8192)
	sparse := &sparseDevice{size: int64(len(b)), data: map[int64]byte{}}
	for range 20 {
		at := rng.Int64N(int64(len(b)))
		b[at] = byte(rng.IntN(255) + 1)
		sparse.data[at] = b[at]
	}
	digest := func(dev block.Device) string {
		d, err := Digest(context.Background(), dev)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	want := digest(newMemDevice(b))
	if got := digest(sparse); got != want {
		t.Fatalf("holes change the digest: %s, %s", got, want)
	}
	if digest(newMemDevice(append(bytes.Clone(b), make([]byte, 4096)...))) == want {
		t.Fatal("the size is not in the digest")
	}
	for range 20 {
		other := bytes.Clone(b)
		other[rng.IntN(len(b))] ^= 0x40
		if digest(newMemDevice(other)) == want {
			t.Fatal("a changed byte is not in the digest")
		}
	}
	moved := append(bytes.Clone(b[1<<20:2<<20]), b[:1<<20]...)
	if digest(newMemDevice(append(moved, b[2<<20:]...))) == want {
		t.Fatal("a chunk's place is not in the digest")
	}
}

// TestConvertStops: an error of the target, and a cancelled context, end a conversion.
func TestConvertStops(t *testing.T) {
	b := bytes.Repeat([]byte{1}, 40<<20)
	dst := newMemDevice(make([]byte, len(b)))
	dst.fail = func(off int64) error {
		if off >= 5<<20 {
			return block.ErrNoSpace
		}
		return nil
	}
	if _, err := convert(context.Background(), dst, newMemDevice(b), nil); !errors.Is(err, block.ErrNoSpace) {
		t.Fatalf("got %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	dst.fail = func(off int64) error {
		if off >= 5<<20 {
			cancel()
		}
		return nil
	}
	if _, err := convert(ctx, dst, newMemDevice(b), nil); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	var last int64
	dst.fail = nil
	if _, err := convert(context.Background(), dst, newMemDevice(b), func(done int64) {
		if done < last {
			t.Errorf("progress fell from %d to %d", last, done)
		}
		last = done
	}); err != nil || last != int64(len(b)) || !bytes.Equal(dst.b, b) {
		t.Fatalf("done %d: %v", last, err)
	}
}
