package image

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"

	"ashlar/internal/block"
)

// fenced is a file that fails the test when anybody reads outside of it.
type fenced struct {
	t *testing.T
	b []byte
}

func (f *fenced) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(p)) > int64(len(f.b)) || off+int64(len(p)) < off {
		f.t.Fatalf("read of %d bytes at %d in a file of %d", len(p), off, len(f.b))
	}
	return bytes.NewReader(f.b).ReadAt(p, off)
}

// addSeeds gives the fuzzer small honest images of every kind, and a liar; the golden ones are so large that it would spend its time on making them smaller.
func addSeeds(f *testing.F) {
	packed := deflated(f, bytes.Repeat([]byte{5}, 4096))
	for _, file := range []*forged{
		forge(8 * 4096),
		forge(8*4096).u64(l2At, dataAt|copied).u64(l2At+8, 1),
		forge(8*4096).u64(l2At, compressedEntry(dataAt, len(packed))).bytes(dataAt, packed),
		forge(8*4096).u64(72, 8).bytes(104, []byte{1}).u64(l2At, compressedEntry(dataAt, 11)).bytes(dataAt, []byte("\x28\xb5\x2f\xfd\x60\x00\x0f\x03\x80\x00\x07")),
		forge(8*16384).u64(72, 16).u32(20, 14).u64(40, 0x4000).u64(48, 0x8000).u64(0x4000, 0xc000|copied).u64(0xc000, 0x10000).u64(0xc008, 0x00000002_00000005).grown(0x14000),
		forge(8*4096).u32(4, 2),
		forge(8*4096).u64(8, 200),
		forge(8*4096).u32(112, 0x6803f857).u32(116, 80),
		forge(1<<40).u32(20, 21),
		forge(64*512).u32(20, 9).u64(40, 512).u64(48, 1024).u64(512, 1536).u64(1536, 2048),
	} {
		f.Add(file.b)
	}
}

// FuzzQcow2Header: whatever the bytes, reading a header ends with one that is within limits, or with a sentinel.
func FuzzQcow2Header(f *testing.F) {
	addSeeds(f)
	limits := Limits{VirtualBytes: 1 << 40}.withDefaults()
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := readHeader(&fenced{t, b}, int64(len(b)), limits)
		if err != nil {
			wantSentinel(t, err)
			return
		}
		if h.size <= 0 || h.size > limits.VirtualBytes || h.l1Entries <= 0 || h.l1Off+h.l1Entries*8 > int64(len(b)) || h.l1Entries*h.l2Span() < h.size {
			t.Fatalf("accepted %+v in %d bytes", h, len(b))
		}
	})
}

// FuzzQcow2Open opens arbitrary bytes and reads all they claim to be: no panic, no hang, no memory beyond the limits, no read outside of the file, and
// extents that tell the truth.
func FuzzQcow2Open(f *testing.F) {
	addSeeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		dev, err := openQcow2(context.Background(), &fenced{t, b}, int64(len(b)), openOptions{limits: Limits{VirtualBytes: 16 << 20}.withDefaults(), freeing: true})
		if err != nil {
			wantSentinel(t, err)
			return
		}
		for off := int64(0); off < dev.Size(); {
			list, err := dev.Extents(off, dev.Size()-off)
			if err != nil || len(list) == 0 {
				t.Fatalf("extents at %d: %v, %v", off, list, err)
			}
			for _, e := range list {
				if e.Off != off || e.N <= 0 {
					t.Fatalf("extent %+v at %d", e, off)
				}
				p := make([]byte, e.N)
				_, err := dev.ReadAt(p, e.Off)
				switch {
				case err != nil && !errors.Is(err, block.ErrCorrupt):
					t.Fatalf("read %+v: %v", e, err)
				case err == nil && e.State != block.Data && !allZero(p):
					t.Fatalf("extent %+v is not zero", e)
				}
				off += e.N
			}
		}
	})
}

func wantSentinel(t *testing.T, err error) {
	t.Helper()
	for _, s := range []error{ErrFormat, ErrUnsupported, ErrTooLarge, ErrTruncated} {
		if errors.Is(err, s) {
			if errors.Is(err, io.EOF) {
				t.Fatalf("io.EOF leaks: %v", err)
			}
			return
		}
	}
	t.Fatalf("no sentinel: %v", err)
}

// FuzzDetect: any head gives a format or a sentinel.
func FuzzDetect(f *testing.F) {
	for _, s := range []string{"", "QFI\xfb", "KDMV", "conectix", "\x1f\x8b\x08", " <HTML>", "vhdxfile", "\x00"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		format, err := Detect(b)
		if err != nil && format != Auto || err == nil && format != Raw && format != Qcow2 {
			t.Fatalf("%q, %v", format, err)
		}
	})
}
