package image

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ashlar/internal/block"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// wrap packs b.
func wrap(t testing.TB, wrapper Wrapper, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	var w io.WriteCloser
	var err error
	switch wrapper {
	case Gzip:
		w = gzip.NewWriter(&out)
	case XZ:
		w, err = xz.WriterConfig{DictCap: 1 << 20, BlockSize: 1 << 20}.NewWriter(&out)
	case Zstd:
		w, err = zstd.NewWriter(&out)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func wrappers() []Wrapper { return []Wrapper{Gzip, XZ, Zstd} }

// fromReader imports b through Request.Reader.
func fromReader(t *testing.T, b []byte, announced int64) (Result, []byte, error) {
	t.Helper()
	return imported(t.Context(), t, Request{Source: "reader", Reader: io.NopCloser(bytes.NewReader(b)), ReaderBytes: announced})
}

// TestWrapped: raw and qcow2, packed in each way, in one piece or several, from everywhere, end as the same disk; sums and length are of the file as received.
func TestWrapped(t *testing.T) {
	contents := map[string][]byte{"raw": append(rawSample()[:1<<20+777], make([]byte, 1<<20)...), "qcow2": goldenFiles(t)["v3-zlib"], "tiny": []byte("x")}
	for name, content := range contents {
		want := padded(content)
		if name == "qcow2" {
			dev, err := Open(t.Context(), memFile(t, content), Options{})
			if err != nil {
				t.Fatal(err)
			}
			want = contentOf(t, dev)
		}
		for _, wrapper := range wrappers() {
			half := len(content) / 2
			for pieces, file := range map[string][]byte{"one": wrap(t, wrapper, content), "two": append(wrap(t, wrapper, content[:half]), wrap(t, wrapper, content[half:])...)} {
				path := filepath.Join(t.TempDir(), "image")
				if err := os.WriteFile(path, file, 0o600); err != nil {
					t.Fatal(err)
				}
				base := serve(t, func(w http.ResponseWriter, r *http.Request) {
					http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(file))
				})
				for _, source := range []string{path, base, "reader"} {
					req := Request{Source: source, Checksum: Checksum{"sha512", sha512Hex(file)}}
					if source == "reader" {
						req.Reader, req.ReaderBytes = io.NopCloser(bytes.NewReader(file)), -1
					}
					r, got, err := imported(t.Context(), t, req)
					if err != nil {
						t.Fatalf("%s in %s (%s) from %s: %v", name, wrapper, pieces, source, err)
					}
					if !bytes.Equal(got, want) || r.FileBytes != int64(len(file)) || r.SHA512 != sha512Hex(file) {
						t.Fatalf("%s in %s (%s) from %s: %+v", name, wrapper, pieces, source, r)
					}
				}
				if _, _, err := imported(t.Context(), t, Request{Source: path, Checksum: Checksum{"sha512", sha512Hex(content)}}); !errors.Is(err, ErrChecksum) {
					t.Fatalf("the checksum of the content was taken: %v", err)
				}
				if _, got, err := imported(t.Context(), t, Request{Source: path, Format: Raw}); err != nil || !bytes.Equal(got, padded(file)) {
					t.Fatalf("asked for raw: %v", err)
				}
			}
		}
	}
}

// TestBadWrapped: cut, damaged, with something behind, wrapped twice, empty: refused by name.
func TestBadWrapped(t *testing.T) {
	content := rawSample()[:300_000]
	for _, wrapper := range wrappers() {
		good := wrap(t, wrapper, content)
		for n := range 40 { // cuts everywhere, most of them near the ends
			at := []int{len(good) - 1 - n, 7 + n, len(good) * (n + 1) / 42}[n%3]
			if _, _, err := fromReader(t, good[:at], -1); !errors.Is(err, ErrTruncated) {
				t.Errorf("%s cut at %d of %d: %v", wrapper, at, len(good), err)
			}
		}
		for n := range 40 {
			bad := bytes.Clone(good)
			bad[6+n*(len(good)-7)/40] ^= 0x10
			_, got, err := fromReader(t, bad, -1)
			if err == nil && !bytes.Equal(got, padded(content)) {
				t.Errorf("%s with a flipped bit at %d: taken", wrapper, 6+n*(len(good)-7)/40)
			} else if err != nil && !errors.Is(err, ErrFormat) && !errors.Is(err, ErrTruncated) && !errors.Is(err, ErrUnsupported) && !errors.Is(err, ErrTooLarge) {
				t.Errorf("%s with a flipped bit: %v", wrapper, err)
			}
		}
		for what, c := range map[string]struct {
			file []byte
			want error
		}{
			"something behind":  {append(bytes.Clone(good), "and more of it"...), ErrFormat},
			"wrapped twice":     {wrap(t, Gzip, good), ErrUnsupported},
			"wrapped in itself": {wrap(t, wrapper, good), ErrUnsupported},
			"nothing inside":    {wrap(t, wrapper, nil), ErrFormat},
			"VMDK inside":       {wrap(t, wrapper, []byte("KDMV and so on")), ErrUnsupported},
		} {
			if _, _, err := fromReader(t, c.file, -1); !errors.Is(err, c.want) {
				t.Errorf("%s, %s: %v", wrapper, what, err)
			}
		}
		if _, _, err := imported(t.Context(), t, Request{Source: "r", Reader: io.NopCloser(bytes.NewReader(good)), ReaderBytes: -1, Format: Qcow2}); !errors.Is(err, ErrFormat) {
			t.Errorf("%s, raw taken as qcow2: %v", wrapper, err)
		}
	}
}

// TestWrappedBombs: what a small file may become is limited, and so is the memory it takes to unpack.
func TestWrappedBombs(t *testing.T) {
	// A zstd frame with a window of 1 MiB, of blocks that each repeat a byte 128 Ki times.
	bomb := append([]byte("\x28\xb5\x2f\xfd\x00\x50"), bytes.Repeat([]byte{128<<10<<3&0xff | 2, 128 << 10 << 3 >> 8 & 0xff, 128 << 10 << 3 >> 16, 0}, 40<<20/(128<<10))...)
	s := &stream{name: "bomb", total: int64(len(bomb)), sums: newSums(Checksum{}), max: 1 << 30, read: bytes.NewReader(bomb).Read}
	u, err := newUnwrapper(s, s, Zstd, Limits{Expand: 100}.withDefaults())
	if err != nil {
		t.Fatal(err)
	}
	defer u.close()
	if u.free != 1<<30 {
		t.Errorf("%d bytes are free", u.free)
	}
	u.free = 1 << 20
	n, err := io.Copy(io.Discard, u)
	if !errors.Is(err, ErrTooLarge) {
		t.Errorf("%d bytes that became %d: %v", len(bomb), n, err)
	}
	file := wrap(t, XZ, rawSample())
	if _, _, err := imported(t.Context(), t, Request{Source: "r", Reader: io.NopCloser(bytes.NewReader(file)), ReaderBytes: -1, Limits: Limits{FileBytes: 1 << 20}}); !errors.Is(err, ErrTooLarge) {
		t.Errorf("content beyond the limit: %v", err)
	}
	// The dictionary's size is at byte 16 of the file: 12 of the header, then size, flags, filter, its length.
	at := 12 + 4
	for at = 12; file[at] != 0x21 || file[at+1] != 1; at++ {
	}
	file[at+2] = 39 // 3 GiB
	header := file[12 : 12+(int(file[12])+1)*4]
	binary.LittleEndian.PutUint32(header[len(header)-4:], crc32.ChecksumIEEE(header[:len(header)-4]))
	if _, _, err := fromReader(t, file, -1); !errors.Is(err, ErrTooLarge) {
		t.Errorf("an xz dictionary of 3 GiB: %v", err)
	}
	// A zstd frame with a window of 2 GiB: descriptor 0, window byte exponent 21.
	frame := append([]byte("\x28\xb5\x2f\xfd\x00\xa8"), "\x09\x00\x00x"...)
	if _, _, err := fromReader(t, frame, -1); !errors.Is(err, ErrTooLarge) {
		t.Errorf("a zstd window of 2 GiB: %v", err)
	}
}

// TestXZStreams: padding in fours belongs to the file, other padding does not; checks of all kinds.
func TestXZStreams(t *testing.T) {
	content := rawSample()[:100_000]
	var all []byte
	for _, check := range []byte{xz.CRC32, xz.CRC64, xz.SHA256, 0} {
		var out bytes.Buffer
		w, err := xz.WriterConfig{CheckSum: check, NoCheckSum: check == 0}.NewWriter(&out)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		all = append(all, out.Bytes()...)
		all = append(all, make([]byte, 8)...)
		if check == 0 {
			continue
		}
		bad := bytes.Clone(out.Bytes()) // its last byte before the index belongs to the check
		index := (int(binary.LittleEndian.Uint32(bad[len(bad)-8:])) + 1) * 4
		bad[len(bad)-12-index-1] ^= 1
		if _, err := io.ReadAll(newXZReader(bytes.NewReader(bad))); !errors.Is(err, ErrFormat) {
			t.Errorf("check %d does not match: %v", check, err)
		}
	}
	got, err := io.ReadAll(newXZReader(bytes.NewReader(all)))
	if err != nil || !bytes.Equal(got, bytes.Repeat(content, 4)) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	if _, err := io.ReadAll(newXZReader(bytes.NewReader(append(all, 0, 0)))); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("two bytes of padding: %v", err)
	}
	if _, err := io.ReadAll(newXZReader(bytes.NewReader(append(make([]byte, 4), all...)))); !errors.Is(err, ErrFormat) {
		t.Errorf("padding first: %v", err)
	}
}

// TestReader: what is announced must come, no less and no more; cancelling ends a read that waits.
func TestReader(t *testing.T) {
	for name, file := range map[string][]byte{"raw": rawSample(), "qcow2": goldenFiles(t)["v3"]} {
		n := int64(len(file))
		for _, announced := range []int64{n, -1} {
			r, got, err := fromReader(t, file, announced)
			if err != nil || r.FileBytes != n || r.SHA512 != sha512Hex(file) || name == "raw" && !bytes.Equal(got, padded(file)) {
				t.Fatalf("%s, %d announced: %+v, %v", name, announced, r, err)
			}
		}
		if _, _, err := fromReader(t, file, n+512); !errors.Is(err, ErrTruncated) {
			t.Errorf("%s, less than announced: %v", name, err)
		}
		if _, _, err := fromReader(t, file, n-512); !errors.Is(err, ErrTooLarge) {
			t.Errorf("%s, more than announced: %v", name, err)
		}
	}
	broken := errors.New("broken")
	pr, pw := io.Pipe()
	pw.CloseWithError(broken)
	if _, _, err := imported(t.Context(), t, Request{Source: "r", Reader: pr, ReaderBytes: -1}); !errors.Is(err, broken) {
		t.Errorf("a reader that fails: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	pr, pw = io.Pipe()
	defer pw.Close()
	if _, _, err := imported(ctx, t, Request{Source: "r", Reader: &cancelling{pr, cancel}, ReaderBytes: 100}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// cancelling cancels when it is read, and then waits for ever.
type cancelling struct {
	io.ReadCloser
	cancel func()
}

func (c *cancelling) Read(p []byte) (int, error) { c.cancel(); return c.ReadCloser.Read(p) }

// TestDevice: a disk as a source; the sums are of all its bytes.
func TestDevice(t *testing.T) {
	dev := patchwork(t, newRand(1), 9<<20+513, 20)
	want := contentOf(t, dev)
	r, got, err := imported(t.Context(), t, Request{Source: "nbd", Device: dev, Checksum: Checksum{"sha512", sha512Hex(want)}})
	if err != nil || !bytes.Equal(got, padded(want)) || r.FileBytes != int64(len(want)) || r.SHA512 != sha512Hex(want) || r.Format != Raw {
		t.Fatalf("%+v, %v", r, err)
	}
	if _, _, err := imported(t.Context(), t, Request{Source: "nbd", Device: dev, Checksum: Checksum{"sha512", strings.Repeat("ab", 64)}}); !errors.Is(err, ErrChecksum) {
		t.Error(err)
	}
	if _, _, err := imported(t.Context(), t, Request{Source: "nbd", Device: dev, Limits: Limits{VirtualBytes: 4096}}); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
	if _, _, err := imported(t.Context(), t, Request{Source: "nbd", Device: dev, Format: Qcow2}); !errors.Is(err, ErrFormat) {
		t.Error(err)
	}
	closed := block.NewMem(1 << 20)
	closed.Close()
	if _, _, err := imported(t.Context(), t, Request{Source: "nbd", Device: closed}); !errors.Is(err, ErrSource) || !errors.Is(err, block.ErrClosed) {
		t.Error(err)
	}
}

// FuzzXZ: any bytes are unpacked within bounds, or refused; what we take, the library that packs takes too.
func FuzzXZ(f *testing.F) {
	f.Add(wrap(f, XZ, []byte("hello")))
	f.Add(append(wrap(f, XZ, bytes.Repeat([]byte("ab"), 3000)), wrap(f, XZ, nil)...))
	f.Add([]byte(xzMagic + "\x00\x04"))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := io.ReadAll(io.LimitReader(newXZReader(bytes.NewReader(b)), 1<<20))
		if err != nil || len(got) == 1<<20 {
			return
		}
		r, err := xz.NewReader(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		if want, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%d bytes, the library has %d, %v", len(got), len(want), err)
		}
	})
}

// FuzzUnwrap: any bytes imported end as an image or as a sentinel.
func FuzzUnwrap(f *testing.F) {
	for _, w := range wrappers() {
		f.Add(wrap(f, w, []byte("hello")))
		f.Add(wrap(f, w, forge(8*4096).b))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s := &stream{name: "s", total: -1, sums: newSums(Checksum{}), max: 1 << 30, read: bytes.NewReader(b).Read}
		u, err := newUnwrapper(s, s, DetectWrapper(b), Limits{FileBytes: 1 << 20}.withDefaults())
		if DetectWrapper(b) == Unwrapped {
			return
		}
		if err == nil {
			defer u.close()
			_, err = io.Copy(io.Discard, u)
		}
		if err != nil {
			wantSentinel(t, err)
		}
	})
}
