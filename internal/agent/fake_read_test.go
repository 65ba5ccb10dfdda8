package agent_test

import (
	"context"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"ashlar/internal/dataplane/client"
)

// This file is what the fake process does with limits, sources, exports and streams.

func (p *process) SetLimits(ctx context.Context, a client.SetLimits) error {
	return p.verb(ctx, "set-limits", func() error {
		v := p.volumes[a.VolumeID]
		if v == nil {
			return fmt.Errorf("volume: %w", client.ErrNotFound)
		}
		v.Limits = a.Limits // a restarted process forgets it: open.json is older
		return nil
	})
}

func (p *process) SetBackground(_ context.Context, a client.Background) error {
	p.h.mu.Lock()
	defer p.h.mu.Unlock()
	p.background = a.BytesPerSecond
	return nil
}

func (p *process) SetNetwork(ctx context.Context, a client.Network) error {
	return p.verb(ctx, "set-network", func() error {
		p.network = a
		return nil
	})
}

func (p *process) OpenSource(ctx context.Context, a client.OpenSource) (src client.Source, err error) {
	err = p.verb(ctx, "open-source", func() error {
		if a.VolumeID != "" {
			v := p.volumes[a.VolumeID]
			if v == nil || v.State != "open" {
				return fmt.Errorf("volume: %w", client.ErrNotFound)
			}
			if err := p.snapshotOf(a); err != nil {
				return err
			}
			src.SizeBytes = v.SizeBytes
		} else if d := p.h.disk(a.DiskID); d == nil || d.images[a.ImageID].ImageID == "" {
			return fmt.Errorf("image: %w", client.ErrNotFound)
		} else {
			src.SizeBytes = d.images[a.ImageID].VirtualSizeBytes
		}
		p.sources[a.ID] = a
		src.ID, src.URI = a.ID, "nbd+unix:///"+a.ID+"?socket=/run/source/"+a.ID+".sock"
		return nil
	})
	return src, err
}

func (p *process) snapshotOf(a client.OpenSource) error {
	r, _ := p.h.replica(p.volumes[a.VolumeID].ReplicaID)
	for _, l := range r.layers {
		if l.Snapshot == a.Snapshot && !l.Head {
			return nil
		}
	}
	return fmt.Errorf("snapshot %s: %w", a.Snapshot, client.ErrNotFound)
}

func (p *process) CloseSource(ctx context.Context, a client.CloseSource) error {
	return p.verb(ctx, "close-source", func() error {
		delete(p.sources, a.ID)
		return nil
	})
}

// readable tells whether a source, if that is what the URI names, is open. Called with the host's lock held.
func (p *process) readable(uri string) error {
	id, ok := strings.CutPrefix(uri, "nbd+unix:///")
	if !ok {
		return nil
	}
	if _, ok := p.sources[id[:32]]; !ok {
		return fmt.Errorf("nobody serves %s: %w", uri, client.ErrSource)
	}
	return nil
}

// ExportImage takes two seconds into a file, and no time into a stream.
func (p *process) ExportImage(ctx context.Context, a client.ExportImage) (job client.Job, err error) {
	err = p.verb(ctx, "export-image", func() error {
		if j := p.jobs[a.ID]; j != nil {
			job = *j
			return nil
		}
		if a.Format != "raw" && a.Format != "qcow2" {
			return fmt.Errorf("format %q: %w", a.Format, client.ErrInvalid)
		}
		if err := p.readable(a.Source); err != nil {
			return err
		}
		if p.h.files[a.To] > 0 {
			return fmt.Errorf("file %s: %w", a.To, client.ErrExists)
		}
		j := &client.Job{ID: a.ID, Kind: "export", State: "running", TotalBytes: 100}
		p.jobs[a.ID] = j
		if path, ok := strings.CutPrefix(a.To, "stream+unix://"); ok {
			p.wg.Go(func() { p.transmit(j, path) })
		} else {
			p.timers = append(p.timers, time.AfterFunc(time.Second, func() { p.progress(j) }), time.AfterFunc(2*time.Second, func() { p.endExport(j, a) }))
		}
		job = *j
		return nil
	})
	return job, err
}

func (p *process) endExport(j *client.Job, a client.ExportImage) {
	p.h.mu.Lock()
	defer p.h.mu.Unlock()
	if p.dead || j.State != "running" {
		return
	}
	switch err := p.readable(a.Source); {
	case err != nil:
		j.State, j.Code, j.Error = "failed", client.CodeSource, err.Error()
	case a.To == "/full":
		j.State, j.Code, j.Error = "failed", client.CodeNoSpace, "the disk of /full is full"
	default:
		j.State = "done"
		p.h.files[a.To]++
	}
	p.touch()
}

// transmit is a work process that writes a mebibyte into a stream.
func (p *process) transmit(j *client.Job, path string) {
	err := func() error {
		conn, err := net.Dial("unix", path)
		if err != nil {
			return err
		}
		defer conn.Close()
		w := client.NewStreamWriter(conn)
		for i := range 16 {
			if _, err := w.Write([]byte(strings.Repeat(string(rune('a'+i)), 64<<10))); err != nil {
				return err
			}
			p.h.mu.Lock()
			cancelled := p.dead || j.State != "running" || p.h.cut == i+1
			p.h.mu.Unlock()
			if cancelled {
				return fmt.Errorf("cancelled: %w", client.ErrCancelled)
			}
		}
		return w.Finish()
	}()
	p.h.mu.Lock()
	defer p.h.mu.Unlock()
	if j.State = "done"; err != nil {
		j.State, j.Code, j.Error = "failed", client.CodeSource, err.Error()
	}
	p.touch()
}

// receive is a work process that reads an image from a stream.
func (p *process) receive(j *client.Job, a client.ImportImage, path string) {
	sum, n := sha512.New(), int64(0)
	err := func() error {
		conn, err := net.Dial("unix", path)
		if err != nil {
			return err
		}
		defer conn.Close()
		r := client.NewStreamReader(conn)
		buf := make([]byte, 64<<10)
		for {
			m, err := r.Read(buf)
			sum.Write(buf[:m])
			n += int64(m)
			p.h.mu.Lock()
			j.DoneBytes, j.Percent = n, 50
			refuse := p.h.refuse
			p.touch()
			p.h.mu.Unlock()
			switch {
			case refuse:
				return fmt.Errorf("a backing file: %w", client.ErrFormat)
			case err == io.EOF:
				return nil
			case err != nil:
				return err
			}
		}
	}()
	p.h.mu.Lock()
	defer p.h.mu.Unlock()
	if p.dead || j.State != "running" {
		return
	}
	if j.State = "done"; err != nil {
		j.State, j.Code, j.Error = "failed", client.CodeOf(err), err.Error()
	} else {
		p.h.disk(a.DiskID).images[a.ImageID] = client.ImageFound{
			ImageID: a.ImageID, Name: a.Name, SizeBytes: n, VirtualSizeBytes: n, SHA512: hex.EncodeToString(sum.Sum(nil)), Digest: "d", Format: "raw", Source: a.Source,
		}
	}
	p.touch()
}

func (p *process) Diff(_ context.Context, a client.Diff) (client.Changes, error) {
	p.h.mu.Lock()
	defer p.h.mu.Unlock()
	if p.volumes[a.VolumeID] == nil {
		return client.Changes{}, fmt.Errorf("volume: %w", client.ErrNotFound)
	}
	return client.Changes{Ranges: []client.Change{{Off: a.Off, N: 4096}, {Off: 8192, N: 4096, Zero: true}}, NextOff: 16384, SizeBytes: 1 << 24}, nil
}
