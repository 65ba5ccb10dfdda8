package blocktest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"

	"ashlar/internal/block"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// recorder is a testing.TB that keeps failures to itself.
type recorder struct {
	testing.TB

	mu       sync.Mutex // guards what follows
	failures []string
	cleanups []func()
}

func (r *recorder) Helper()             {}
func (r *recorder) Logf(string, ...any) {}

func (r *recorder) Errorf(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failures = append(r.failures, fmt.Sprintf(format, args...))
}

func (r *recorder) Error(args ...any) { r.Errorf("%s", fmt.Sprint(args...)) }
func (r *recorder) Fatal(args ...any) { r.Fatalf("%s", fmt.Sprint(args...)) }

func (r *recorder) Fatalf(format string, args ...any) {
	r.Errorf(format, args...)
	runtime.Goexit()
}

func (r *recorder) Cleanup(f func()) { r.cleanups = append(r.cleanups, f) }

// failures runs one check against devices made by c and returns what it found.
func failures(t *testing.T, run func(testing.TB)) []string {
	r := &recorder{TB: t}
	var wg sync.WaitGroup
	wg.Go(func() { run(r) })
	wg.Wait()
	wg.Go(func() {
		for _, f := range slices.Backward(r.cleanups) {
			f()
		}
	})
	wg.Wait()
	return r.failures
}

// broken is a device with one method replaced.
type broken struct {
	*block.Mem
	readAt  func(p []byte, off int64) (int, error)
	writeAt func(p []byte, off int64) (int, error)
	zero    func(off, n int64) error
	extents func(off, n int64) ([]block.Extent, error)
	flush   func() error
	close   func() error
}

func (b *broken) ReadAt(p []byte, off int64) (int, error) {
	if b.readAt != nil {
		return b.readAt(p, off)
	}
	return b.Mem.ReadAt(p, off)
}

func (b *broken) WriteAt(p []byte, off int64) (int, error) {
	if b.writeAt != nil {
		return b.writeAt(p, off)
	}
	return b.Mem.WriteAt(p, off)
}

func (b *broken) Zero(off, n int64) error {
	if b.zero != nil {
		return b.zero(off, n)
	}
	return b.Mem.Zero(off, n)
}

func (b *broken) Extents(off, n int64) ([]block.Extent, error) {
	if b.extents != nil {
		return b.extents(off, n)
	}
	return b.Mem.Extents(off, n)
}

func (b *broken) Flush() error {
	if b.flush != nil {
		return b.flush()
	}
	return b.Mem.Flush()
}

func (b *broken) Close() error {
	if b.close != nil {
		return b.close()
	}
	return b.Mem.Close()
}

// breakage is a way to be wrong, and a check that must notice.
type breakage struct {
	name, check string
	breaks      func(b *broken)
	align       int64
}

func TestSuiteNoticesBrokenDevices(t *testing.T) {
	for _, list := range [][]breakage{readBreakages(), writeBreakages(), zeroBreakages(), extentBreakages(), callBreakages()} {
		for _, br := range list {
			t.Run(br.name, func(t *testing.T) {
				config := Config{AlignBytes: br.align, HugeBytes: 1 << 40, New: func(_ testing.TB, n int64) block.Device {
					b := &broken{Mem: block.NewMem(n)}
					br.breaks(b)
					return b
				}}
				for _, k := range checks() {
					if k.name != br.check {
						continue
					}
					found := failures(t, func(t testing.TB) { k.run(t, config) })
					if len(found) == 0 {
						t.Fatalf("check %s did not notice", br.check)
					}
					t.Logf("%s", found[0])
					return
				}
				t.Fatalf("there is no check %s", br.check)
			})
		}
	}
}

func readBreakages() []breakage {
	return []breakage{
		{name: "short read without an error", check: "ReadBack", breaks: func(b *broken) {
			b.readAt = func(p []byte, off int64) (int, error) { n, err := b.Mem.ReadAt(p, off); return n / 2, err }
		}},
		{name: "io.EOF at the end", check: "ReadBack", breaks: func(b *broken) {
			b.readAt = func(p []byte, off int64) (int, error) {
				n, err := b.Mem.ReadAt(p, off)
				if err == nil && off+int64(n) == b.Size() {
					err = io.EOF
				}
				return n, err
			}
		}},
		{name: "io.EOF instead of ErrRange", check: "Ranges", breaks: func(b *broken) {
			b.readAt = func(p []byte, off int64) (int, error) {
				if off >= 0 && off+int64(len(p)) > b.Size() {
					return 0, io.EOF
				}
				return b.Mem.ReadAt(p, off)
			}
		}},
		{name: "reads whole units only", check: "ReadAnywhere", breaks: func(b *broken) {
			b.readAt = func(p []byte, off int64) (int, error) {
				if (off|int64(len(p)))%block.UnitBytes != 0 {
					return 0, block.ErrAlign
				}
				return b.Mem.ReadAt(p, off)
			}
		}},
		{name: "read does not clear where nothing was written", check: "Fresh", breaks: func(b *broken) {
			b.readAt = func(p []byte, off int64) (int, error) {
				e, err := b.Mem.Extents(off, int64(len(p)))
				if err != nil || len(e) > 0 && e[0].State == block.Absent {
					return len(p), err
				}
				return b.Mem.ReadAt(p, off)
			}
		}},
		{name: "read uses the buffer's whole capacity", check: "Buffers", breaks: func(b *broken) {
			b.readAt = func(p []byte, off int64) (int, error) {
				n, err := b.Mem.ReadAt(p, off)
				return n + 1, err
			}
		}},
	}
}

func writeBreakages() []breakage {
	var held struct {
		sync.Mutex
		p   []byte
		off int64
	}
	return []breakage{
		{name: "write loses its last sector", check: "ReadBack", breaks: func(b *broken) {
			b.writeAt = func(p []byte, off int64) (int, error) {
				_, err := b.Mem.WriteAt(p[:max(0, len(p)-512)], off)
				return len(p), err
			}
		}},
		{name: "write beyond the end is cut off", check: "Ranges", breaks: func(b *broken) {
			b.writeAt = func(p []byte, off int64) (int, error) {
				if off >= 0 && off < b.Size() {
					p = p[:min(int64(len(p)), b.Size()-off)]
				}
				return b.Mem.WriteAt(p, off)
			}
		}},
		{name: "refused write changes something", check: "Ranges", breaks: func(b *broken) {
			b.writeAt = func(p []byte, off int64) (int, error) {
				if off >= 0 && off < b.Size() && off+int64(len(p)) > b.Size() {
					_, _ = b.Mem.WriteAt(p[:1], off)
				}
				return b.Mem.WriteAt(p, off)
			}
		}},
		{name: "empty write is refused", check: "ZeroLength", breaks: func(b *broken) {
			b.writeAt = func(p []byte, off int64) (int, error) {
				if len(p) == 0 {
					return 0, block.ErrRange
				}
				return b.Mem.WriteAt(p, off)
			}
		}},
		{name: "unaligned write is taken", check: "Align", align: block.UnitBytes, breaks: func(*broken) {}},
		{name: "unaligned write is rounded", check: "Align", breaks: func(b *broken) {
			b.writeAt = func(p []byte, off int64) (int, error) {
				return b.Mem.WriteAt(p, off/block.UnitBytes*block.UnitBytes)
			}
		}},
		{name: "write changes the caller's buffer", check: "Buffers", breaks: func(b *broken) {
			b.writeAt = func(p []byte, off int64) (int, error) {
				n, err := b.Mem.WriteAt(p, off)
				clear(p)
				return n, err
			}
		}},
		{name: "write keeps the caller's buffer until flush", check: "Buffers", breaks: func(b *broken) {
			b.writeAt = func(p []byte, off int64) (int, error) {
				held.Lock()
				defer held.Unlock()
				held.p, held.off = p, off
				return len(p), nil
			}
			b.flush = func() error { _, err := b.Mem.WriteAt(held.p, held.off); return err }
		}},
		{name: "two writes mix within a unit", check: "SameUnits", breaks: func(b *broken) {
			b.writeAt = func(p []byte, off int64) (int, error) {
				last := (len(p) - 1) / 512 * 512
				for i := 0; i <= last; i += 512 {
					at := i
					if len(p) > 0 && p[0]%2 == 0 { // some the other way round, so that they meet in the middle
						at = last - i
					}
					if _, err := b.Mem.WriteAt(p[at:min(at+512, len(p))], off+int64(at)); err != nil {
						return 0, err
					}
					runtime.Gosched()
				}
				return len(p), nil
			}
		}},
		{name: "part of a unit is read, changed and written without a lock", check: "SharedUnits", breaks: func(b *broken) {
			b.writeAt = func(p []byte, off int64) (int, error) {
				unit := make([]byte, block.UnitBytes)
				base := off / block.UnitBytes * block.UnitBytes
				if _, err := b.Mem.ReadAt(unit, base); err != nil || len(p) > block.UnitBytes {
					return b.Mem.WriteAt(p, off)
				}
				runtime.Gosched()
				copy(unit[off-base:], p)
				_, err := b.Mem.WriteAt(unit, base)
				return len(p), err
			}
		}},
	}
}

func zeroBreakages() []breakage {
	return []breakage{
		{name: "zero does nothing", check: "Zero", breaks: func(b *broken) {
			b.zero = func(off, n int64) error { return block.CheckRange(off, n, b.Size()) }
		}},
		{name: "zero leaves the edges", check: "Align", breaks: func(b *broken) {
			b.zero = func(off, n int64) error {
				first := (off + block.UnitBytes - 1) / block.UnitBytes * block.UnitBytes
				return b.Mem.Zero(first, max(0, (off+n)/block.UnitBytes*block.UnitBytes-first))
			}
		}},
		{name: "zero takes the whole unit", check: "Align", breaks: func(b *broken) {
			b.zero = func(off, n int64) error {
				first := off / block.UnitBytes * block.UnitBytes
				last := min(b.Size(), (off+n+block.UnitBytes-1)/block.UnitBytes*block.UnitBytes)
				return b.Mem.Zero(first, last-first)
			}
		}},
		{name: "zero of a negative length is a no-op", check: "Ranges", breaks: func(b *broken) {
			b.zero = func(off, n int64) error {
				if n < 0 {
					return nil
				}
				return b.Mem.Zero(off, n)
			}
		}},
		{name: "what was zeroed comes back with the next small write", check: "Zero", breaks: resurrect},
	}
}

// resurrect makes a device that zeroes a unit by forgetting that it has data, and remembers when a part of it is written.
func resurrect(b *broken) {
	old := map[int64][]byte{}
	b.zero = func(off, n int64) error {
		for at := off; at < off+n && n < 1<<30; at += block.UnitBytes {
			unit := make([]byte, block.UnitBytes)
			if _, err := b.Mem.ReadAt(unit, at); err == nil {
				old[at] = unit
			}
		}
		return b.Mem.Zero(off, n)
	}
	b.writeAt = func(p []byte, off int64) (int, error) {
		base := off / block.UnitBytes * block.UnitBytes
		if unit := old[base]; unit != nil && len(p) < block.UnitBytes {
			if _, err := b.Mem.WriteAt(unit, base); err != nil {
				return 0, err
			}
		}
		return b.Mem.WriteAt(p, off)
	}
}

func extentBreakages() []breakage {
	change := func(f func(e []block.Extent, off, n int64) []block.Extent) func(*broken) {
		return func(b *broken) {
			b.extents = func(off, n int64) ([]block.Extent, error) {
				e, err := b.Mem.Extents(off, n)
				if err != nil || len(e) == 0 {
					return e, err
				}
				return f(e, off, n), nil
			}
		}
	}
	return []breakage{
		{name: "no extents", check: "Extents", breaks: change(func([]block.Extent, int64, int64) []block.Extent { return nil })},
		{name: "extents with a gap", check: "Extents", breaks: change(func(e []block.Extent, _, _ int64) []block.Extent {
			if len(e) > 2 {
				return append(e[:1:1], e[2:]...)
			}
			return e
		})},
		{name: "extents begin at the unit", check: "Extents", breaks: change(func(e []block.Extent, _, _ int64) []block.Extent {
			e[0].N += e[0].Off % block.UnitBytes
			e[0].Off -= e[0].Off % block.UnitBytes
			return e
		})},
		{name: "extents are not clipped", check: "Extents", breaks: change(func(e []block.Extent, _, _ int64) []block.Extent {
			last := &e[len(e)-1]
			last.N = (last.N + block.UnitBytes) / block.UnitBytes * block.UnitBytes
			return e
		})},
		{name: "an extent of no length", check: "Extents", breaks: change(func(e []block.Extent, off, _ int64) []block.Extent {
			return append([]block.Extent{{Off: off, State: block.Zero}}, e...)
		})},
		{name: "data is called a hole", check: "Extents", breaks: change(func(e []block.Extent, _, _ int64) []block.Extent {
			for i := range e {
				if e[i].N == block.UnitBytes {
					e[i].State = block.Absent
				}
			}
			return e
		})},
		{name: "a state of its own", check: "Extents", breaks: change(func(e []block.Extent, _, _ int64) []block.Extent {
			e[0].State = 7
			return e
		})},
		{name: "an extent for nothing", check: "ZeroLength", breaks: func(b *broken) {
			b.extents = func(off, n int64) ([]block.Extent, error) {
				if n == 0 {
					return []block.Extent{{Off: off}}, nil
				}
				return b.Mem.Extents(off, n)
			}
		}},
		{name: "extents outside", check: "Ranges", breaks: func(b *broken) {
			b.extents = func(off, n int64) ([]block.Extent, error) {
				if block.CheckRange(off, n, b.Size()) != nil {
					return []block.Extent{{Off: off, N: n}}, nil
				}
				return b.Mem.Extents(off, n)
			}
		}},
		{name: "everything is data", check: "Huge", breaks: change(func(_ []block.Extent, off, n int64) []block.Extent {
			return []block.Extent{{Off: off, N: n, State: block.Data}}
		})},
	}
}

func callBreakages() []breakage {
	mine := errors.New("mine")
	return []breakage{
		{name: "a size of its own", check: "Fresh", breaks: func(b *broken) { b.Mem = block.NewMem(b.Size() + 512) }},
		{name: "content of an earlier life", check: "Fresh", breaks: func(b *broken) { _, _ = b.Mem.WriteAt([]byte{1}, b.Size()-1) }},
		{name: "flush fails", check: "Flush", breaks: func(b *broken) { b.flush = func() error { return mine } }},
		{name: "flush loses what came after the one before", check: "Flush", breaks: func(b *broken) {
			var flushes atomic.Int64
			b.flush = func() error {
				if flushes.Add(1)%16 == 0 {
					_, _ = b.Mem.WriteAt(make([]byte, 4096), 0)
				}
				return nil
			}
		}},
		{name: "works after Close", check: "Closed", breaks: func(b *broken) { b.close = func() error { return nil } }},
		{name: "an error of its own after Close", check: "Closed", breaks: func(b *broken) {
			b.readAt = func(p []byte, off int64) (int, error) {
				if n, err := b.Mem.ReadAt(p, off); err == nil {
					return n, nil
				}
				return 0, io.ErrClosedPipe
			}
		}},
		{name: "an error of its own while closing", check: "CloseRace", breaks: func(b *broken) {
			b.writeAt = func(p []byte, off int64) (int, error) {
				if n, err := b.Mem.WriteAt(p, off); err == nil {
					return n, nil
				}
				return 0, io.ErrClosedPipe
			}
		}},
		{name: "one write in a hundred goes to the neighbour", check: "Model", breaks: func(b *broken) {
			writes := 0
			b.writeAt = func(p []byte, off int64) (int, error) {
				if writes++; writes%100 == 0 && off >= block.UnitBytes {
					off -= block.UnitBytes
				}
				return b.Mem.WriteAt(p, off)
			}
		}},
		{name: "a worker's write is lost now and then", check: "Disjoint", breaks: func(b *broken) {
			var writes atomic.Int64
			b.writeAt = func(p []byte, off int64) (int, error) {
				if writes.Add(1)%100 == 0 {
					return len(p), nil
				}
				return b.Mem.WriteAt(p, off)
			}
		}},
	}
}

// TestSuiteNoticesLostFlush reopens a device that forgets what it has flushed, or that brings back what was zeroed.
func TestSuiteNoticesLostFlush(t *testing.T) {
	for name, lose := range map[string]func(d block.Device){
		"a flushed write": func(d block.Device) { _ = d.Zero(1<<20, 4096) },
		"a flushed zero":  func(d block.Device) { _, _ = d.WriteAt(bytes.Repeat([]byte{9}, 4096), 64<<10) },
	} {
		t.Run(name, func(t *testing.T) {
			c := Config{
				New: func(_ testing.TB, n int64) block.Device { return block.NewMem(n) },
				Reopen: func(t testing.TB, d block.Device) block.Device {
					e := block.NewMem(d.Size())
					if _, err := block.Copy(t.Context(), e, d, block.CopyOptions{}); err != nil {
						t.Fatalf("%v", err)
					}
					lose(e)
					return e
				},
			}
			if found := failures(t, func(t testing.TB) { checkReopen(t, c) }); len(found) == 0 {
				t.Error("not noticed")
			}
		})
	}
}

// frozen is a good read-only device.
type frozen struct {
	*block.Mem
}

func (frozen) WriteAt(p []byte, _ int64) (int, error) { return 0, block.ErrReadOnly }
func (frozen) Zero(int64, int64) error                { return block.ErrReadOnly }

func freeze(t testing.TB, content []byte) *block.Mem {
	m := block.NewMem(int64(len(content)))
	write(t, m, content, 0)
	return m
}

func TestReadOnly(t *testing.T) {
	RunReadOnly(t, ReadOnlyConfig{New: func(t testing.TB, content []byte) block.Device { return frozen{freeze(t, content)} }})
}

// short is a read-only device that is off by one byte, somewhere.
type short struct{ frozen }

func (s short) ReadAt(p []byte, off int64) (int, error) {
	n, err := s.Mem.ReadAt(p, off)
	if i := 777777 - off; err == nil && i >= 0 && i < int64(n) {
		p[i]++
	}
	return n, err
}

// seeking is a read-only device whose reads share a position.
type seeking struct {
	frozen
	pos atomic.Int64
}

func (s *seeking) ReadAt(p []byte, off int64) (int, error) {
	s.pos.Store(off)
	runtime.Gosched()
	return s.Mem.ReadAt(p, min(s.pos.Load(), s.Size()-int64(len(p))))
}

func TestReadOnlySuiteNoticesBrokenDevices(t *testing.T) {
	content := contents(t)["mixed"]
	for check, newDevice := range map[string]func(t testing.TB) block.Device{
		"Content":    func(t testing.TB) block.Device { return short{frozen{freeze(t, content)}} },
		"Concurrent": func(t testing.TB) block.Device { return &seeking{frozen: frozen{freeze(t, content)}} },
		"Refused":    func(t testing.TB) block.Device { return freeze(t, content) },
		"Ranges":     func(t testing.TB) block.Device { return frozen{freeze(t, append(content, content...))} },
		"Closed": func(t testing.TB) block.Device {
			return &broken{Mem: freeze(t, content), close: func() error { return nil }}
		},
	} {
		for _, k := range readOnlyChecks() {
			if k.name != check {
				continue
			}
			if found := failures(t, func(t testing.TB) { k.run(t, newDevice(t), content) }); len(found) == 0 {
				t.Errorf("check %s did not notice", check)
			}
		}
	}
}

// TestNoise: the suite tells holes from data by zeros, so its data must have none.
func TestNoise(t *testing.T) {
	b := make([]byte, 10001)
	noise(rand.New(rand.NewPCG(1, 2)), b)
	if bytes.IndexByte(b, 0) >= 0 {
		t.Error("noise has zeros")
	}
}
