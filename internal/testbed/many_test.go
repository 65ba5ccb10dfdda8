//go:build integration

package testbed_test

import (
	"bytes"
	"context"
	"fmt"
	"strconv"
	"sync"
	"testing"
	"time"

	"ashlar/internal/testbed"
)

// TestScale is the short form of `go run ./bench -only scale`: 30 attached volumes, half of them on an image, the death of the data process under them, 120 snapshots, 10 imports at once of
// which only a few have a process at one time; when all is deleted, goroutines, descriptors and space are back where they were.
func TestScale(t *testing.T) {
	t.Setenv("ASHLAR_PPROF", "1")
	b := newBed(t)
	const volumes, snapshots, imports, atOnce = 30, 4, 10, 4
	golden := b.raw("golden.raw", 8*mib, 1)
	b.cli("image", "import", "golden", golden)
	b.cli("image", "delete", "golden") // what stays for good is there now
	empty := b.onDisk(b.disk())
	before := b.inside()

	start := time.Now()
	b.cli("image", "import", "golden", golden)
	var names []string
	for i := range volumes {
		name := "v" + strconv.Itoa(i)
		names = append(names, name)
		image := ""
		if i%2 == 1 {
			image = "golden"
		}
		b.ask("/v1/volumes", fmt.Sprintf(`{"name":%q,"size":"%d","backingImage":%q,"frontend":"nbd"}`, name, 64*mib, image))
	}
	for i, name := range names {
		b.eventually(name, "detached")
		b.ask("/v1/volumes/"+name+"?action=attach", `{"hostId":"node1"}`)
		b.eventually(name, "attached")
		c := b.dial(name)
		if err := c.write(32*mib, bytes.Repeat([]byte{byte(i + 1)}, 64*kib)); err != nil {
			t.Fatal(err)
		}
		c.close()
	}
	t.Logf("%d volumes created, attached and written in %.1f s; data has %d MiB resident", volumes, time.Since(start).Seconds(), b.resident("data")/mib)

	start = time.Now()
	b.kill("data")
	for i, name := range names {
		c, got := b.dial(name), make([]byte, 64*kib)
		if err := c.read(32*mib, got); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{byte(i + 1)}, 64*kib)) {
			t.Errorf("volume %s after the kill: wrong content, %v", name, err)
		}
		c.close()
	}
	t.Logf("data killed: all %d read what was written after %d ms", volumes, time.Since(start).Milliseconds())

	start = time.Now()
	for s := range snapshots {
		for _, name := range names {
			b.ask("/v1/volumes/"+name+"?action=snapshotCreate", fmt.Sprintf(`{"name":"s%d"}`, s))
		}
	}
	t.Logf("%d snapshots in %.1f s; data has %d MiB resident", snapshots*volumes, time.Since(start).Seconds(), b.resident("data")/mib)

	most := b.importsAtOnce(imports)
	if most > atOnce || most == 0 {
		t.Errorf("%d work processes at a time, want 1 to %d", most, atOnce)
	}

	start = time.Now()
	for _, name := range names {
		b.ask("/v1/volumes/"+name+"?action=detach", `{}`)
	}
	for _, name := range names {
		b.eventually(name, "detached")
	}
	b.cli(append([]string{"volume", "delete"}, names...)...)
	b.cli("image", "delete", "golden")
	t.Logf("all deleted in %.1f s", time.Since(start).Seconds())
	if now := b.onDisk(b.disk()); now > empty+mib {
		t.Errorf("%d KiB are on the disk, %d were before", now/kib, empty/kib)
	}
	b.back(before)
}

// ask sends a POST that must succeed.
func (b *bed) ask(path, body string) {
	b.Helper()
	if code, got := b.rest("POST", path, body); code/100 != 2 {
		b.Fatalf("POST %s: %d %v", path, code, got)
	}
}

// eventually waits for a volume's state.
func (b *bed) eventually(volume, state string) {
	b.Helper()
	b.until(30*time.Second, "volume "+volume+" is "+state, func() bool {
		_, got := b.rest("GET", "/v1/volumes/"+volume, "")
		return got["state"] == state
	})
}

// importsAtOnce imports files at once, wants all to be ready, deletes them, and returns how many work processes there were at a time.
func (b *bed) importsAtOnce(n int) (most int) {
	b.Helper()
	ctx, cancel := context.WithCancel(b.ctx)
	var watching, importing sync.WaitGroup
	watching.Go(func() {
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for ctx.Err() == nil {
			most = max(most, len(b.p.Workers()))
			<-tick.C
		}
	})
	start := time.Now()
	names, errs := make([]string, n), make([]error, n)
	for i := range n {
		names[i] = "i" + strconv.Itoa(i)
		path := b.raw(names[i]+".raw", 16*mib, uint64(100+i))
		importing.Go(func() { errs[i] = b.p.Run(b.ctx, nil, "image", "import", names[i], path) })
	}
	importing.Wait()
	cancel()
	watching.Wait()
	for i, err := range errs {
		if err != nil {
			b.Errorf("import %d: %v", i, err)
		}
	}
	digests := map[string]bool{}
	var list []imageView
	b.json(&list, "image", "list")
	for _, i := range list {
		digests[i.Digest] = true
	}
	if len(list) != n+1 || len(digests) != n+1 {
		b.Errorf("%d images with %d digests, want %d", len(list), len(digests), n+1)
	}
	b.Logf("%d imports of 16 MiB at once in %.1f s, at most %d work processes at a time", n, time.Since(start).Seconds(), most)
	b.cli(append([]string{"image", "delete"}, names...)...)
	return most
}

// inside is what serve and data need now, as they say themselves.
func (b *bed) inside() map[string]testbed.Vitals {
	b.Helper()
	out := map[string]testbed.Vitals{}
	for _, sub := range []string{"serve", "data"} {
		v, err := b.p.Inside(b.ctx, sub)
		if err != nil {
			b.Fatal(err)
		}
		out[sub] = v
	}
	return out
}

// back wants serve and data to need no more goroutines and descriptors than before, but for a few that come and go with connections.
func (b *bed) back(before map[string]testbed.Vitals) {
	b.Helper()
	var now map[string]testbed.Vitals
	err := testbed.Until(b.ctx, 40*time.Second, func() (bool, error) {
		now = b.inside()
		for sub, was := range before {
			if now[sub].Files > was.Files+2 || now[sub].Goroutines > was.Goroutines+5 {
				return false, nil
			}
		}
		return true, nil
	})
	b.Logf("before %+v", before)
	b.Logf("after  %+v", now)
	if err != nil {
		b.Errorf("goroutines or descriptors were left over: %v", err)
	}
}
