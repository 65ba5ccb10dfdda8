package disk_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"

	"ashlar/internal/disk"
)

// steps is how often a random loop runs: n times, or ASHLAR_STEPS times as often.
func steps(t testing.TB, n int) int {
	t.Helper()
	if s := os.Getenv("ASHLAR_STEPS"); s != "" {
		more, err := strconv.Atoi(s)
		if err != nil {
			t.Fatalf("ASHLAR_STEPS: %v", err)
		}
		return n * max(1, more)
	}
	return n
}

// must fails the test on an error.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newFile makes a durable file of n bytes.
func newFile(t testing.TB, m *disk.Mem, name string, n int64) disk.File {
	t.Helper()
	f, err := m.Create(name, n)
	must(t, err)
	must(t, f.Sync())
	must(t, m.SyncDir("."))
	return f
}

func open(t testing.TB, m *disk.Mem, name string) disk.File {
	t.Helper()
	f, err := m.Open(name)
	must(t, err)
	return f
}

const slotsOff, slotBytes = 8192, 8192

// outcomes calls f with every way a crash of m can go, as CrashOptions.Pick answers, and returns how many there were.
func outcomes(m *disk.Mem, f func(*disk.Mem)) int {
	var path, width []int
	for count := 1; ; count++ {
		at := 0
		f(m.CrashClone(disk.CrashOptions{Pick: func(n int) int {
			if at == len(path) {
				path, width = append(path, 0), append(width, n)
			}
			at++
			return path[at-1]
		}}))
		for len(path) > 0 && path[len(path)-1] == width[len(path)-1]-1 {
			path, width = path[:len(path)-1], width[:len(path)-1]
		}
		if len(path) == 0 {
			return count
		}
		path[len(path)-1]++
	}
}

func TestSlotsStoreLoad(t *testing.T) {
	m := disk.NewMem(disk.MemOptions{})
	f := newFile(t, m, "f", slotsOff+2*slotBytes)
	s := disk.OpenSlots(f, slotsOff, slotBytes)
	if _, _, err := s.Load(); !errors.Is(err, disk.ErrNoRecord) {
		t.Fatalf("Load of nothing: %v", err)
	}
	for i := range 5 {
		payload := bytes.Repeat([]byte{byte(i)}, i*s.MaxPayload()/4)
		must(t, s.Store(payload))
		for _, s := range []*disk.Slots{s, disk.OpenSlots(f, slotsOff, slotBytes)} {
			got, seq, err := s.Load()
			if err != nil || seq != uint64(i+1) || !bytes.Equal(got, payload) {
				t.Fatalf("Load after %d stores: %d bytes, seq %d, %v", i+1, len(got), seq, err)
			}
		}
	}
	if err := s.Store(make([]byte, s.MaxPayload()+1)); !errors.Is(err, disk.ErrTooLarge) {
		t.Errorf("Store of too much: %v", err)
	}
	if got, _, err := s.Load(); err != nil || len(got) != s.MaxPayload() {
		t.Errorf("after a refused Store: %d bytes, %v", len(got), err)
	}
	if n, err := f.ReadAt(make([]byte, slotsOff), 0); n != slotsOff || err != nil {
		t.Fatal(n, err)
	}
}

// TestSlotsEverySectorSubset cuts the power in every way a Store can be torn, and stores again afterwards.
func TestSlotsEverySectorSubset(t *testing.T) {
	record := func(i int) []byte { return bytes.Repeat([]byte(fmt.Sprintf("record %d ", i)), 160) } // three sectors
	total := 0
	for _, withSync := range []bool{true, false} {
		m := disk.NewMem(disk.MemOptions{})
		f := newFile(t, m, "f", slotsOff+2*slotBytes)
		s := disk.OpenSlots(f, slotsOff, slotBytes)
		stored := 0 // the newest record that a Sync made durable
		for i := 1; i <= 4; i++ {
			m.OnOp(func(op disk.Op) {
				if op.Kind != disk.OpSync {
					return
				}
				total += outcomes(m, func(c *disk.Mem) { checkRecord(t, c, stored, i, record) })
			})
			seq, err := s.Write(record(i))
			must(t, err)
			if !withSync {
				_, err = s.Write(record(i)) // once more into the same slot
				must(t, err)
			}
			must(t, f.Sync())
			if withSync {
				s.Synced(seq)
			} else {
				s = disk.OpenSlots(f, slotsOff, slotBytes) // the process died before it knew
			}
			stored = i
		}
	}
	t.Logf("%d outcomes", total)
	if total < 4*256 {
		t.Errorf("only %d outcomes: nothing was torn", total)
	}
}

// checkRecord checks that c holds one of the records from low to high, whole, and takes another.
func checkRecord(t *testing.T, c *disk.Mem, low, high int, record func(int) []byte) {
	t.Helper()
	s := disk.OpenSlots(open(t, c, "f"), slotsOff, slotBytes)
	got, _, err := s.Load()
	ok := low == 0 && errors.Is(err, disk.ErrNoRecord)
	for i := max(low, 1); i <= high; i++ {
		ok = ok || err == nil && bytes.Equal(got, record(i))
	}
	if !ok {
		t.Fatalf("after a crash between records %d and %d: %.12q, %v", low, high, got, err)
	}
	must(t, s.Store([]byte("after")))
	if got, _, err := s.Load(); err != nil || string(got) != "after" {
		t.Fatalf("a Store after the crash: %q, %v", got, err)
	}
}

// TestSlotsCrashHistories stores records with deaths of the process and failing writes in between, and crashes at every change.
func TestSlotsCrashHistories(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	points := 0
	for range steps(t, 40) {
		m := disk.NewMem(disk.MemOptions{Seed: r.Uint64()})
		f := newFile(t, m, "f", slotsOff+2*slotBytes)
		s := disk.OpenSlots(f, slotsOff, slotBytes)
		durable, newest := 0, 0
		record := func(i int) []byte { return bytes.Repeat([]byte{byte(i), byte(i >> 8)}, 100+i*97%3000) }
		m.OnOp(func(disk.Op) {
			for range 4 {
				points++
				c := m.CrashClone(disk.CrashOptions{Rand: r})
				checkRecord(t, c, durable, newest, record)
			}
		})
		for range 30 {
			switch r.IntN(5) {
			case 0:
				m.KillProcess()
				f = open(t, m, "f")
				s = disk.OpenSlots(f, slotsOff, slotBytes)
			case 1:
				m.FailWrite("f", 1)
				newest++
				if _, err := s.Write(record(newest)); err == nil {
					t.Fatal("an injected failure did not show")
				}
			case 2:
				newest++
				_, err := s.Write(record(newest))
				must(t, err)
			default:
				newest++
				must(t, s.Store(record(newest)))
				durable = newest
			}
		}
	}
	t.Logf("%d crash points", points)
}

// TestSlotsFailedSync checks that a failed Sync is not repeated into success.
func TestSlotsFailedSync(t *testing.T) {
	m := disk.NewMem(disk.MemOptions{})
	f := newFile(t, m, "f", slotsOff+2*slotBytes)
	s := disk.OpenSlots(f, slotsOff, slotBytes)
	must(t, s.Store([]byte("one")))
	m.FailSync("f", 1)
	if err := s.Store([]byte("two")); err == nil {
		t.Fatal("a failed Sync was hidden")
	}
	if err := s.Store([]byte("three")); err == nil {
		t.Fatal("Store after a failed Sync succeeded")
	}
	got, _, err := disk.OpenSlots(open(t, m.Crash(disk.CrashOptions{Keep: disk.KeepNone}), "f"), slotsOff, slotBytes).Load()
	if err != nil || string(got) != "one" && string(got) != "two" {
		t.Errorf("after a failed Sync and a crash: %q, %v", got, err)
	}
}

// TestSlotsSyncedTooLate: a Sync that began before the last Write, or follows a failed one, says nothing about it.
func TestSlotsSyncedTooLate(t *testing.T) {
	for _, fail := range []bool{false, true} {
		m := disk.NewMem(disk.MemOptions{})
		f := newFile(t, m, "f", slotsOff+2*slotBytes)
		s := disk.OpenSlots(f, slotsOff, slotBytes)
		record := func(i int) []byte { return bytes.Repeat([]byte{byte('0' + i)}, 1000) }
		must(t, s.Store(record(1)))
		seq, err := s.Write(record(2))
		must(t, err)
		if fail {
			m.FailWrite("f", 1)
			seq++
		}
		if _, err := s.Write(record(3)); (err != nil) != fail {
			t.Fatal(err)
		}
		s.Synced(seq)
		_, err = s.Write(record(4))
		must(t, err)
		r := rand.New(rand.NewPCG(1, 2))
		for range 300 {
			checkRecord(t, m.CrashClone(disk.CrashOptions{Rand: r}), 1, 4, record)
		}
	}
}

func TestSlotsReadError(t *testing.T) {
	m := disk.NewMem(disk.MemOptions{})
	f := newFile(t, m, "f", slotsOff+2*slotBytes)
	must(t, disk.OpenSlots(f, slotsOff, slotBytes).Store([]byte("one")))
	m.Fail(disk.FailOptions{Kind: disk.OpRead, Nth: 2})
	if _, _, err := disk.OpenSlots(f, slotsOff, slotBytes).Load(); err == nil || errors.Is(err, disk.ErrNoRecord) {
		t.Errorf("Load with an unreadable slot: %v", err)
	}
}

func FuzzDecodeSlot(f *testing.F) {
	f.Add([]byte{})
	f.Add(disk.EncodeSlot(nil, 1))
	f.Add(disk.EncodeSlot([]byte("payload"), 1<<63))
	long := disk.EncodeSlot(bytes.Repeat([]byte{1}, 5000), 7)
	f.Add(long)
	f.Add(long[:4096])
	f.Fuzz(func(t *testing.T, b []byte) {
		payload, seq, ok := disk.DecodeSlot(b)
		if !ok {
			return
		}
		again, seq2, ok := disk.DecodeSlot(disk.EncodeSlot(payload, seq))
		if !ok || seq2 != seq || !bytes.Equal(again, payload) {
			t.Fatalf("slot with seq %d and %d bytes does not survive encoding", seq, len(payload))
		}
	})
}

// TestSlotGolden reads a slot of version 1 as it was first written. It stays for ever.
func TestSlotGolden(t *testing.T) {
	b, err := os.ReadFile("testdata/slot-v1.bin")
	must(t, err)
	payload, seq, ok := disk.DecodeSlot(b)
	if !ok || seq != 42 || string(payload) != "golden record" {
		t.Errorf("DecodeSlot = %q, %d, %v", payload, seq, ok)
	}
	if !bytes.Equal(disk.EncodeSlot([]byte("golden record"), 42), b) {
		t.Error("EncodeSlot writes other bytes now")
	}
	for i := range 32 + len("golden record") { // every byte counts
		c := bytes.Clone(b)
		c[i] ^= 0x10
		if _, _, ok := disk.DecodeSlot(c); ok {
			t.Errorf("a slot with byte %d changed is taken", i)
		}
	}
}
