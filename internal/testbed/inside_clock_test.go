//go:build integration

package testbed_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ashlar/internal/api"
	apiclient "ashlar/internal/api/client"
	"ashlar/internal/nbd"
)

// scribe writes and reads back without a pause. Its errors are its volume's.
type scribe struct {
	d      *nbd.Client
	rounds atomic.Int64
}

func (s *scribe) run(ctx context.Context) error {
	p, got := make([]byte, 8192), make([]byte, 8192)
	for n := int64(0); ctx.Err() == nil; n++ {
		for i := range p {
			p[i] = byte(n + int64(i))
		}
		off := n % 1000 * int64(len(p))
		if _, err := s.d.WriteAt(p, off); err != nil {
			return err
		}
		if n%16 == 0 {
			if err := s.d.Flush(); err != nil {
				return err
			}
		}
		if _, err := s.d.ReadAt(got, off); err != nil || !bytes.Equal(got, p) {
			return errors.Join(err, fmt.Errorf("round %d: what was written is not there", n))
		}
		s.rounds.Add(1)
	}
	return nil
}

// opened counts how often data processes have opened, or closed, a volume.
func (c *inside) opened() int {
	c.Helper()
	text, err := os.ReadFile(c.log)
	if err != nil {
		c.Fatal(err)
	}
	return bytes.Count(text, []byte(`msg="volume open"`)) + bytes.Count(text, []byte(`msg="volume closed"`))
}

// since is when each node's lease began, as each node sees it; nil if one is not up, or a node does not answer.
func (c *inside) since() map[string]string {
	out := map[string]string{}
	for _, n := range c.Nodes {
		list, err := n.Client.Nodes(c.ctx)
		if err != nil {
			return nil
		}
		for _, m := range list {
			if m.State != api.NodeUp {
				return nil
			}
			out[n.Name+" of "+m.Name] = m.AliveSince
		}
	}
	return out
}

// leaf is the certificate that a node has.
func (c *inside) leaf(i int) *x509.Certificate {
	c.Helper()
	file := filepath.Join(c.Nodes[i].DataDir, "cluster", "node.pem")
	pair, err := tls.LoadX509KeyPair(file, file)
	if err != nil {
		c.Fatal(err)
	}
	return pair.Leaf
}

// TestClockJumps moves the clocks of running nodes, of the volume's, its copy's, and of one that only looks on, by minutes and by more than a certificate lives. Nothing is detached, opened again, or
// taken for dead; machines whose clocks are minutes apart join, and hours apart do not; certificates that a wrong clock made are made anew when it is right again.
func TestClockJumps(t *testing.T) {
	c := startInside(t, 4) // the fourth keeps no member of the catalogue
	c.whole()
	c.stored("v1", 1)
	d := c.attach("v1", 0, 2)
	s := &scribe{d: d}
	ctx, cancel := context.WithCancel(c.ctx)
	var busy sync.WaitGroup
	var failed error
	busy.Go(func() { failed = s.run(ctx) })
	finish := sync.OnceFunc(func() {
		cancel()
		busy.Wait()
		if err := errors.Join(failed, d.Close()); err != nil {
			t.Errorf("the volume: %v", err)
		}
		t.Logf("%d rounds of I/O", s.rounds.Load())
	})
	defer finish()
	c.until(20*time.Second, "the volume is written", func() bool { return s.rounds.Load() > 50 })
	opened, since := c.opened(), c.since()
	if since == nil {
		t.Fatal("not everybody is up")
	}
	events, err := c.Nodes[0].Client.Events(c.ctx)
	if err != nil || len(events) == 0 {
		t.Fatalf("no events: %v", err)
	}

	c.Run("minutes", func(t *testing.T) {
		c := c.as(t)
		const jump = 10 * time.Minute
		for i, by := range []time.Duration{jump, jump, -jump, -jump, -2 * jump, 2 * jump} {
			c.Jump(i%4, by)
			c.works(i%4, fmt.Sprintf("m%d", i))
		}
		c.throughout(7*time.Second, "nobody is taken for dead", func() bool { // longer than a lease
			now := c.since()
			return now == nil || maps.Equal(now, since) // nil: not asked in time
		})
		if now := c.since(); !maps.Equal(now, since) {
			t.Errorf("leases: %v, were %v", now, since)
		}
		c.lost(events)
	})

	c.Run("join", func(t *testing.T) {
		c := c.as(t)
		n, err := c.Add(c.ctx)
		if err != nil {
			t.Fatal(err)
		}
		i := len(c.Nodes) - 1
		for _, by := range []time.Duration{2 * time.Hour, -4 * time.Hour} {
			c.Jump(i, by)
			err := c.Join(c.ctx, i, 2)
			if api.CodeOf(err) != api.CodeConflict {
				t.Errorf("a clock %v off: %v", by, err)
			}
			t.Logf("refused: %v", err)
		}
		c.Jump(i, 2*time.Hour+10*time.Minute)
		if err := c.Join(c.ctx, i, 2); err != nil {
			t.Fatalf("%s, whose clock is ten minutes ahead, does not join: %v", n.Name, err)
		}
		c.whole()
	})
	since = c.since()

	for _, i := range []int{0, 3} { // a voter, and one that is none
		c.Run(fmt.Sprintf("longer than a certificate, node%d", i+1), func(t *testing.T) {
			c := c.as(t)
			const jump = 100 * 24 * time.Hour
			was := c.leaf(i)
			rounds := s.rounds.Load()
			c.Jump(i, jump)
			if i == 0 {
				c.until(30*time.Second, "it signs for itself", func() bool { return c.leaf(i).NotBefore.After(time.Now()) })
				t.Logf("certificate from %s", c.leaf(i).NotBefore)
			}
			if _, err := c.Nodes[1].Client.NodeTime(c.ctx, c.Nodes[i].Name); api.CodeOf(err) != api.CodeUnreachable {
				t.Errorf("node2 asks it for the time: %v", err)
			} else {
				t.Logf("node2 is told: %v", err)
			}
			c.until(20*time.Second, "the volume is written all the same", func() bool { return s.rounds.Load() > rounds+50 })
			c.Jump(i, -jump)
			c.until(30*time.Second, "it has a certificate that is good now", func() bool {
				now := c.leaf(i)
				return now.NotBefore.Before(time.Now()) && now.NotAfter.After(was.NotBefore.Add(80*24*time.Hour))
			})
			c.until(30*time.Second, "it is believed again", func() bool {
				_, err := c.Nodes[1].Client.NodeTime(c.ctx, c.Nodes[i].Name)
				return err == nil
			})
			c.whole()
			c.works(i, fmt.Sprintf("l%d", i))
		})
	}
	if now := c.since(); !maps.Equal(now, since) {
		t.Errorf("leases: %v, were %v", now, since)
	}
	finish()
	if n := c.opened(); n != opened+2*len(c.made) { // those made meanwhile were attached and detached once
		t.Errorf("volumes were opened or closed %d times, want %d", n, opened+2*len(c.made))
	}
	c.volumeIs(3, "v1", "attached")
	c.detach("v1", 2)
	d = c.attach("v1", 2, 3)
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

// as is the same cluster for a part of a test.
func (c *inside) as(t *testing.T) *inside {
	part := *c
	part.T = t
	return &part
}

// throughout wants something to hold all the time.
func (c *inside) throughout(d time.Duration, what string, holds func() bool) {
	c.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); <-time.After(50 * time.Millisecond) {
		if !holds() {
			c.Fatalf("not all the time: %s", what)
		}
	}
}

// works has a node create a volume, attach it there, and delete it.
func (c *inside) works(i int, volume string) {
	c.Helper()
	cl := c.Nodes[i].Client
	if _, err := cl.CreateVolume(c.ctx, apiclient.NewVolume{Name: volume, Size: "1Mi"}); err != nil {
		c.Fatal(err)
	}
	c.volumeIs(i, volume, "detached")
	d := c.attach(volume, i, i)
	if _, err := d.WriteAt(make([]byte, 4096), 0); err != nil {
		c.Error(err)
	}
	if err := d.Close(); err != nil {
		c.Error(err)
	}
	c.detach(volume, i)
	if err := cl.DeleteVolume(c.ctx, volume); err != nil {
		c.Fatal(err)
	}
	c.until(30*time.Second, volume+" is gone", func() bool {
		_, err := cl.Volume(c.ctx, volume)
		return api.CodeOf(err) == api.CodeNotFound
	})
	c.made[volume] = true
}

func (c *inside) detach(volume string, through int) {
	c.Helper()
	if _, err := c.Nodes[through].Client.Detach(c.ctx, volume, apiclient.Detachment{}); err != nil {
		c.Fatal(err)
	}
	c.volumeIs(through, volume, "detached")
}

// lost wants events to be there still.
func (c *inside) lost(were []api.Event) {
	c.Helper()
	now, err := c.Nodes[1].Client.Events(c.ctx)
	if err != nil {
		c.Fatal(err)
	}
	there := map[string]bool{}
	for _, e := range now {
		there[e.ID] = true
	}
	for _, e := range were {
		if !there[e.ID] {
			c.Errorf("the event %+v is gone", e)
		}
	}
}
