package agent_test

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/dataplane/client"
)

// This file is what fake processes of several nodes do with each other.

// fabric is what a host knows of the others. The zero value is alone.
type fabric struct {
	name    string
	others  []*host
	salt    int             // of its disks' ids
	off     bool            // its data process reaches nobody and nobody reaches it
	given   map[string]bool // volumes that it had open when its node was given up: others may open them
	cluster client.Cluster
}

// reaches tells whether h's data process can use what o's has.
func (h *host) reaches(o *host) bool {
	known := func(a, b *host) bool {
		return slices.ContainsFunc(a.cluster.Peers, func(p client.Peer) bool { return p.Node == b.name })
	}
	return !h.off && !o.off && o.proc != nil && !o.proc.dead && known(h, o) && known(o, h)
}

// connect cuts a host off or brings it back, and has everybody see that.
func (h *host) connect(on bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.off = !on
	for _, o := range append([]*host{h}, h.others...) {
		if o.proc != nil {
			o.proc.touch()
		}
	}
}

// writes tells whether a guest's write on this host is acknowledged.
func (h *host) writes(volumeID string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := h.proc.volumes[volumeID]
	if v == nil || v.State != "open" {
		return false
	}
	r, _ := h.replica(v.ReplicaID)
	return r != nil && r.fence == v.Epoch
}

// soleOpener tells when a volume is opened while a node that can be asked has it open. Called with the lock held.
func (h *host) soleOpener(a client.OpenVolume) {
	for _, o := range h.others {
		if o.proc == nil || o.proc.dead {
			continue
		}
		if v := o.proc.volumes[a.VolumeID]; v != nil && v.State == "open" && !o.given[a.VolumeID] {
			h.wrong("volume %s opened on node %s while it was open on %s", a.Volume, h.name, o.name)
		}
	}
}

// served tells whether another host's process has a volume open on the replica. Called with the lock held.
func (h *host) served(r *fakeReplica) bool {
	for _, o := range h.others {
		if o.proc == nil || o.proc.dead || !o.reaches(h) {
			continue
		}
		if v := o.proc.volumes[r.VolumeID]; v != nil && v.ReplicaID == r.ReplicaID && v.Epoch >= r.fence {
			return true
		}
	}
	return false
}

// mayDrop tells whether the records let a replica of a volume go that is not deleted.
func (h *host) mayDrop(w catalog.VolumeWanted, replicaID string) bool {
	m, _, err := catalog.Read[catalog.Membership](context.Background(), h.truth, catalog.MembershipKey(w.ID))
	return err == nil && slices.ContainsFunc(w.Dropped, func(p catalog.Placement) bool { return p.ReplicaID == replicaID }) &&
		!slices.ContainsFunc(m.Members, func(x catalog.MembershipMember) bool { return x.ReplicaID == replicaID })
}

func (p *process) SetCluster(ctx context.Context, a client.Cluster) error {
	return p.verb(ctx, "set-cluster", func() error {
		p.h.cluster = a
		return nil
	})
}

// fetch copies an image from another host. Called with the lock held.
func (p *process) fetch(j *client.Job, a client.ImportImage) {
	name, disk, _ := strings.Cut(strings.TrimPrefix(a.Source, "peer://"), "/")
	for _, o := range append([]*host{p.h}, p.h.others...) {
		if d := o.disk(disk); o.name == name && d != nil && (o == p.h || p.h.reaches(o)) {
			if img, ok := d.images[a.ImageID]; ok {
				p.h.disk(a.DiskID).images[a.ImageID] = img
				j.State = "done"
				return
			}
		}
	}
	j.State, j.Code, j.Error = "failed", client.CodeSource, "no such copy"
}

// CopyReplica takes two seconds: it claims the next epoch at once and swaps the record at the end.
func (p *process) CopyReplica(ctx context.Context, a client.CopyReplica) (job client.Job, err error) {
	p.h.mu.Lock()
	if j := p.jobs[a.ReplicaID]; j != nil {
		defer p.h.mu.Unlock()
		return *j, nil
	}
	ledger := p.h.ledger
	from, _ := p.h.replica(a.From)
	p.h.mu.Unlock()
	if from == nil {
		return job, fmt.Errorf("replica %s: %w", a.From, client.ErrUnreachable)
	}
	e, m, err := claim(ctx, ledger, a.VolumeID, a.Node)
	if err != nil {
		return job, err
	}
	err = p.verb(ctx, "copy-replica", func() error {
		if from.fence >= m.Epoch {
			return client.ErrFenced
		}
		p.h.soleOpener(client.OpenVolume{VolumeID: a.VolumeID, Volume: a.Volume})
		from.fence = m.Epoch
		j := &client.Job{ID: a.ReplicaID, Kind: "copy", DiskID: a.DiskID, State: "running"}
		p.jobs[a.ReplicaID] = j
		p.timers = append(p.timers, time.AfterFunc(2*time.Second, func() { p.endCopy(j, a, m, e) }))
		job = *j
		return nil
	})
	return job, err
}

func claim(ctx context.Context, ledger client.Ledger, volumeID, node string) (rev int64, m catalog.Membership, err error) {
	e, err := ledger.Read(ctx, volumeID)
	if err != nil {
		return 0, m, err
	}
	if err := json.Unmarshal(e.Record, &m); err != nil {
		return 0, m, err
	}
	m.Epoch, m.Generation, m.WriterNode = m.Epoch+1, m.Generation+1, node
	rec, _ := json.Marshal(m)
	rev, err = ledger.Swap(ctx, client.MembershipSwap{VolumeID: volumeID, Record: rec, Was: e.Rev})
	return rev, m, err
}

func (p *process) endCopy(j *client.Job, a client.CopyReplica, m catalog.Membership, rev int64) {
	p.h.mu.Lock()
	from, _ := p.h.replica(a.From)
	over := p.dead || j.State != "running" || p.jobs[a.ReplicaID] != j
	ledger := p.h.ledger
	p.h.mu.Unlock()
	if over {
		return
	}
	err := client.ErrUnreachable
	if from != nil {
		m.Members = []catalog.MembershipMember{{ReplicaID: a.ReplicaID, Node: a.Node, InSync: true}}
		m.Generation++
		rec, _ := json.Marshal(m)
		_, err = ledger.Swap(context.Background(), client.MembershipSwap{VolumeID: a.VolumeID, Record: rec, Was: rev})
	}
	p.h.mu.Lock()
	defer p.h.mu.Unlock()
	if err != nil {
		j.State, j.Code, j.Error = "failed", client.CodeOf(err), "copy failed"
		p.touch()
		return
	}
	d := p.h.disk(a.DiskID)
	d.replicas[a.ReplicaID] = &fakeReplica{
		CreateReplica: client.CreateReplica{DiskID: a.DiskID, ReplicaID: a.ReplicaID, VolumeID: a.VolumeID, Volume: a.Volume, ImageID: a.ImageID},
		layers:        slices.Clone(from.layers), fence: m.Epoch,
	}
	j.State = "done"
	p.touch()
}
