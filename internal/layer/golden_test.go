package layer

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"ashlar/internal/disk"
)

// golden is what testdata/v1-golden.json says of a file testdata/v1-NAME.layer.gz. Such a file is a layer without its holes: gzip of runs, each an offset
// (u64), a length (u32) and the bytes, after the file's length (u64).
type golden struct {
	Digest   string `json:"digest"` // SHA-256 of all units that are not all zeroes, each after its number
	State    State  `json:"state"`
	Settled  bool   `json:"settled"`
	Sums     bool   `json:"sums"`
	Replayed int    `json:"replayed"` // segments of the log
}

const goldenBytes = 80 << 20 // two map pages

// pack writes a file of mem without its holes.
func pack(t testing.TB, mem *disk.Mem, name, to string) {
	t.Helper()
	f, err := mem.OpenRead(name)
	if err != nil {
		t.Fatal(err)
	}
	size, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	z := gzip.NewWriter(&buf)
	head := binary.LittleEndian.AppendUint64(nil, uint64(size))
	for at := int64(0); ; {
		off, n, err := f.NextData(at)
		if errors.Is(err, io.EOF) {
			break
		}
		b := make([]byte, n)
		if _, rerr := f.ReadAt(b, off); err != nil || rerr != nil {
			t.Fatal(err, rerr)
		}
		head = binary.LittleEndian.AppendUint64(head, uint64(off))
		head = binary.LittleEndian.AppendUint32(head, uint32(n))
		head = append(head, b...)
		at = off + n
	}
	if _, err := z.Write(head); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	file, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if errors.Is(err, fs.ErrExist) {
		t.Fatalf("%s exists: golden files are kept for ever, new ones get new names", to)
	}
	if err == nil {
		_, err = file.Write(buf.Bytes())
		err = errors.Join(err, file.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// unpack puts a packed file onto a disk in memory.
func unpack(t testing.TB, from string) *disk.Mem {
	t.Helper()
	packed, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer packed.Close()
	z, err := gzip.NewReader(packed)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	mem := disk.NewMem(disk.MemOptions{})
	f, err := mem.Create("x", int64(binary.LittleEndian.Uint64(b)))
	if err != nil {
		t.Fatal(err)
	}
	for b = b[8:]; len(b) > 0; {
		off, n := int64(binary.LittleEndian.Uint64(b)), int(binary.LittleEndian.Uint32(b[8:]))
		if _, err := f.WriteAt(b[12:12+n], off); err != nil {
			t.Fatal(err)
		}
		b = b[12+n:]
	}
	if err := errors.Join(f.Sync(), f.Close(), mem.SyncDir(".")); err != nil {
		t.Fatal(err)
	}
	return mem
}

func digest(t testing.TB, s *Stack) string {
	t.Helper()
	h := sha256.New()
	b, zeroes := make([]byte, 256*unitBytes), make([]byte, unitBytes)
	for at := int64(0); at < s.Size(); at += int64(len(b)) {
		if _, err := s.ReadAt(b, at); err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(b); i += unitBytes {
			if p := b[i : i+unitBytes]; !bytes.Equal(p, zeroes) {
				h.Write(binary.LittleEndian.AppendUint64(nil, uint64(at+int64(i))/unitBytes))
				h.Write(p)
			}
		}
	}
	return hex.EncodeToString(h.Sum(nil))
}

// makeGolden makes the files; the disk's content is the same in all.
func makeGolden(t *testing.T) map[string]golden {
	list := map[string]golden{}
	for _, name := range []string{"head-dirty", "head-two-segments", "sealed", "settled", "image"} {
		lim := limits{segmentBytes: 64 << 10, uncovered: 40, chunkUnits: 16, inline: true}
		if name == "head-two-segments" {
			lim.segmentBytes = 4 << 10
		}
		mem := disk.NewMem(disk.MemOptions{})
		m := testMeta()
		if name == "image" {
			m.Kind, m.State = KindImage, StateBuilding
			m.Image = &Image{Name: "golden", ID: "i-1", Format: "raw", Source: "https://example.com/golden.raw", FileBytes: goldenBytes, FileSHA512: "00", Digest: "a1:00"}
		}
		l, err := Create(mem, "x", m, goldenBytes, Options{BootID: testBoot, limits: lim})
		if err != nil {
			t.Fatal(err)
		}
		s := ownedStack(t, []*Layer{l.Retain()}, StackOptions{})
		fillGolden(t, s, name == "head-two-segments", mem)
		g := golden{Digest: digest(t, s), State: StateHead}
		if name == "sealed" || name == "settled" || name == "image" {
			g.State = StateSealed
			if err := s.Seal(sealMeta); err != nil {
				t.Fatal(err)
			}
		}
		if name == "settled" || name == "image" {
			g.Settled, g.Sums = true, true
			if err := l.Settle(context.Background()); err != nil {
				t.Fatal(err)
			}
		}
		g.Replayed = replayed(t, mem)
		list[name] = g
		pack(t, mem, "x", filepath.Join("testdata", "v1-"+name+".layer.gz"))
	}
	return list
}

// fillGolden writes so that the log holds every kind of record, covered and not, and every state occurs. With full it goes on until both segments
// are needed.
func fillGolden(t *testing.T, s *Stack, full bool, mem *disk.Mem) {
	t.Helper()
	rnd := rand.New(rand.NewPCG(1, 1))
	b := make([]byte, 8*unitBytes)
	for i := 0; i < 160 || full; i++ {
		n := 1 + rnd.Int64N(8)
		unit := rnd.Int64N(goldenBytes/unitBytes - n)
		for k := range b {
			b[k] = byte(unit) + byte(k>>9)
		}
		var err error
		switch rnd.IntN(6) {
		case 0:
			err = s.Zero(unit*unitBytes, n*unitBytes)
		case 1:
			err = s.Flush()
		default:
			_, err = s.WriteAt(b[:n*unitBytes], unit*unitBytes)
		}
		if err != nil {
			t.Fatal(err)
		}
		if full && i > 60 && s.view.Load().writer.log.pos.tail > 600 {
			// As if the process had died right after it began a new segment.
			if err := s.Flush(); err != nil {
				t.Fatal(err)
			}
			g := s.view.Load().writer.log
			if err := g.switchHalf(); err != nil {
				t.Fatal(err)
			}
			if err := s.Flush(); err != nil {
				t.Fatal(err)
			}
			break
		}
	}
}

// replayed counts the segments that opening the file of mem would replay.
func replayed(t testing.TB, mem *disk.Mem) int {
	t.Helper()
	f, err := mem.OpenRead("x")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sb, m, err := readHeader(f)
	if err != nil {
		t.Fatal(err)
	}
	if m.Settled {
		return 0
	}
	r := &recovery{l: &Layer{f: f, sb: sb}}
	if err := r.read(); err != nil {
		t.Fatal(err)
	}
	return len(r.replay)
}

// TestGolden opens what earlier versions wrote, in every way, and compares. ASHLAR_MAKE_GOLDEN=1 makes files that do not exist yet.
func TestGolden(t *testing.T) {
	index := filepath.Join("testdata", "v1-golden.json")
	if os.Getenv("ASHLAR_MAKE_GOLDEN") != "" {
		b, err := json.MarshalIndent(makeGolden(t), "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(index, append(b, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(index)
	if err != nil {
		t.Fatal(err)
	}
	var list map[string]golden
	if err := json.Unmarshal(b, &list); err != nil {
		t.Fatal(err)
	}
	if len(list) < 5 {
		t.Fatalf("only %d golden files", len(list))
	}
	for name, want := range list {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join("testdata", "v1-"+name+".layer.gz")
			for how, o := range map[string]Options{
				"same boot": {BootID: testBoot}, "another boot": {BootID: BootID{9}}, "reading only": {ReadOnly: true},
			} {
				mem := unpack(t, path)
				if got := replayed(t, mem); got != want.Replayed {
					t.Errorf("%d segments to replay, want %d", got, want.Replayed)
				}
				l, err := Open(mem, "x", o)
				if err != nil {
					t.Fatalf("%s: %v", how, err)
				}
				if m := l.Meta(); m.State != want.State || m.Settled != want.Settled || m.Sums != want.Sums {
					t.Errorf("%s: header %+v, want %+v", how, m, want)
				}
				s := ownedStack(t, []*Layer{l}, StackOptions{})
				if got := digest(t, s); got != want.Digest {
					t.Errorf("%s: digest %s, want %s", how, got, want.Digest)
				}
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
				problems, err := Check(context.Background(), mem, []string{"x"})
				if err != nil || len(problems) > 0 {
					t.Errorf("%s: check: %v %v", how, problems, err)
				}
			}
		})
	}
}
