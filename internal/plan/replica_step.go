package plan

import (
	"cmp"
	"fmt"
	"slices"

	"ashlar/internal/catalog"
)

// CreateReplica makes an empty replica. It is only ever said of a volume nothing was written to.
type CreateReplica struct {
	follows
	Volume, VolumeID, DiskID, ReplicaID, Image, ImageID string
	SizeBytes                                           int64
}

// CopyReplica begins to copy a replica that is to be replaced (docs/decisions/0017).
type CopyReplica struct {
	follows
	Volume, VolumeID, DiskID, ReplicaID, From, FromNode, ImageID string
}

// EndCopy gives a copy up, or forgets one that failed with Code and Error: that is its own failure then, so that the next one waits.
type EndCopy struct {
	follows
	Volume, ReplicaID, Code, Error string
}

// DeleteReplica destroys a replica, after a linearizable read of the tombstone, or of the record that it was dropped and of the membership that does not name it.
type DeleteReplica struct {
	follows
	Volume, VolumeID, DiskID, ReplicaID string
}

// Key implements Action.
func (a CreateReplica) Key() string { return replicaKey(a.ReplicaID) }

// Verb implements Action.
func (CreateReplica) Verb() string { return "create-replica" }

// Key implements Action.
func (a CopyReplica) Key() string { return replicaKey(a.ReplicaID) }

// Verb implements Action.
func (CopyReplica) Verb() string { return "copy-replica" }

// Key implements Action.
func (a EndCopy) Key() string { return replicaKey(a.ReplicaID) }

// Verb implements Action.
func (EndCopy) Verb() string { return "end-copy" }

// Key implements Action.
func (a DeleteReplica) Key() string { return replicaKey(a.ReplicaID) }

// Verb implements Action.
func (DeleteReplica) Verb() string { return "delete-replica" }

// replicaKey is the Key of the actions on a replica: they are done one at a time, and none while one on its volume is under way here.
func replicaKey(replicaID string) string { return "replica/" + replicaID }

// replicaHere is all that this node knows of a replica that is, or is to be, on one of its disks. Its node looks after it wherever the volume's home is.
type replicaHere struct {
	vol     Volume
	w       catalog.VolumeWanted
	place   catalog.Placement
	dropped bool // another has taken its place

	diskOK  bool // the disk can be looked into
	givenUp bool // it was given up
	disk    FoundDisk
	found   FoundReplica
	there   bool // the replica is on the disk

	member Half[catalog.Membership]
	busy   bool // something is being done to it, or to its volume here
	job    *FoundJob
}

// replicasHere gathers the volume's replicas that belong to this node.
func (p *planner) replicasHere(vol Volume) []replicaHere {
	w := vol.Wanted.Value
	var out []replicaHere
	add := func(places []catalog.Placement, dropped bool) {
		for _, place := range places {
			if place.Node != p.in.Node {
				continue
			}
			r := replicaHere{vol: vol, w: w, place: place, dropped: dropped, member: p.in.View.Memberships[w.ID], job: p.found.copies[place.ReplicaID]}
			r.disk, r.diskOK = p.in.Found.disk(place.DiskID)
			r.givenUp = p.in.View.lostCopy(place)
			r.diskOK = r.diskOK && r.disk.usable() && !r.givenUp
			if f := p.found.replicas[[2]string{place.DiskID, place.ReplicaID}]; f != nil {
				r.found, r.there = *f, true
			}
			r.busy = p.in.Busy[replicaKey(place.ReplicaID)] || p.in.Busy[VolumeKey(w.ID)]
			out = append(out, r)
		}
	}
	add(w.Replicas, false)
	add(w.Dropped, true)
	return out
}

// gone tells whether the replica is to be destroyed.
func (r *replicaHere) gone() bool { return r.dropped || r.w.Deleted != nil }

// observe shows what only the replica's node can see. That one is not there is said of one that was written to and is lost, and of one that is to be destroyed, whose record ends
// with that: so not while its disk is away, nor before it is known that it is to be destroyed, because it may be made any moment, nor while something is under way that may make it.
func (r *replicaHere) observe(o *catalog.VolumeObserved) {
	here := !r.givenUp && (r.there || !r.diskOK || r.job != nil || r.gone() && r.busy)
	lost := r.member.Value.Epoch > 0 && (r.place.CopyOf == "" || named(r.member.Value, r.place.ReplicaID))
	if !here && !r.gone() && !lost {
		o.Replicas = slices.DeleteFunc(o.Replicas, func(x catalog.ReplicaObserved) bool { return x.ReplicaID == r.place.ReplicaID })
		return
	}
	i := slices.IndexFunc(o.Replicas, func(x catalog.ReplicaObserved) bool { return x.ReplicaID == r.place.ReplicaID })
	if i < 0 {
		o.Replicas = append(o.Replicas, catalog.ReplicaObserved{ReplicaID: r.place.ReplicaID})
		slices.SortFunc(o.Replicas, func(a, b catalog.ReplicaObserved) int { return cmp.Compare(a.ReplicaID, b.ReplicaID) })
		i = slices.IndexFunc(o.Replicas, func(x catalog.ReplicaObserved) bool { return x.ReplicaID == r.place.ReplicaID })
	}
	e := &o.Replicas[i]
	e.Node, e.DiskID = r.place.Node, r.place.DiskID
	e.Created = here
	if r.there {
		e.DataPath, e.AllocatedBytes = r.found.DataPath, r.found.AllocatedBytes
	}
}

// replicaStep is the one next thing to do to a replica; nil: nothing, or wait. o is what is recorded of the volume.
//
//	nothing ──create, or copy──► replica ──delete──► nothing
func (p *planner) replicaStep(r replicaHere, o catalog.VolumeObserved) Action {
	rev := follows{r.vol.Wanted.Rev}
	switch {
	case !r.diskOK || p.in.Busy[VolumeKey(r.w.ID)]:
		return nil
	case r.gone() && r.job != nil:
		return EndCopy{rev, r.w.Name, r.place.ReplicaID, "", ""}
	case r.gone():
		if !r.there || p.inUse(r, o) {
			return nil
		}
		return DeleteReplica{rev, r.w.Name, r.w.ID, r.place.DiskID, r.place.ReplicaID}
	case !r.member.Is():
		return nil
	case r.place.CopyOf != "" && !named(r.member.Value, r.place.ReplicaID):
		return p.copyStep(r, o)
	case r.job != nil && r.job.State != JobRunning: // it has taken its place
		return EndCopy{rev, r.w.Name, r.place.ReplicaID, "", ""}
	case !r.there && r.place.CopyOf == "" && p.mayCreate(r):
		return createAction(r.vol, r.place)
	}
	return nil
}

// inUse tells whether a replica that is to be destroyed is still open somewhere, or named as a member.
func (p *planner) inUse(r replicaHere, o catalog.VolumeObserved) bool {
	if r.dropped && r.w.Deleted == nil && named(r.member.Value, r.place.ReplicaID) {
		return true
	}
	if f := p.found.volumes[r.w.ID]; f != nil && (r.w.Deleted != nil || f.ReplicaID == r.place.ReplicaID) {
		return true
	}
	return r.w.Deleted != nil && o.Node != "" && o.Node != p.in.Node && p.in.View.Up(o.Node)
}

// mayCreate tells whether an empty replica may be made: nothing was ever written to the volume, and its image is there.
func (p *planner) mayCreate(r replicaHere) bool {
	if r.member.Value.Epoch > 0 {
		return false
	}
	if r.w.ImageID == "" {
		return true
	}
	img, ok := r.disk.image(r.w.ImageID)
	return ok && img.VirtualSizeBytes <= r.w.SizeBytes
}

func createAction(vol Volume, place catalog.Placement) CreateReplica {
	w := vol.Wanted.Value
	return CreateReplica{follows{vol.Wanted.Rev}, w.Name, w.ID, place.DiskID, place.ReplicaID, w.Image, w.ImageID, w.SizeBytes}
}

// copyStep copies the replica that this one is to replace, while nobody has the volume open or wants it open: whoever opened it would end the copying.
func (p *planner) copyStep(r replicaHere, o catalog.VolumeObserved) Action {
	rev := follows{r.vol.Wanted.Rev}
	i := slices.IndexFunc(r.w.Replicas, func(x catalog.Placement) bool { return x.ReplicaID == r.place.CopyOf })
	switch {
	case r.job != nil && r.job.State == JobFailed:
		return EndCopy{rev, r.w.Name, r.place.ReplicaID, cmp.Or(r.job.Code, catalog.CodeInternal), r.job.Error}
	case r.job != nil, i < 0, o.Node != "", len(r.w.Tickets) > 0, p.pending(r.w):
		return nil
	}
	from := r.w.Replicas[i]
	if from.Node != p.in.Node && p.away(from.Node) != "" {
		return nil
	}
	if _, ok := r.disk.image(r.w.ImageID); r.w.ImageID != "" && !ok {
		return nil
	}
	if f, ok := p.failure(EndCopy{follows: rev, ReplicaID: r.place.ReplicaID}); ok && p.in.Now.Before(f.Next) {
		p.wake(f.Next)
		return nil
	}
	return CopyReplica{rev, r.w.Name, r.w.ID, r.place.DiskID, r.place.ReplicaID, from.ReplicaID, from.Node, r.w.ImageID}
}

// pending tells whether the volume has operations that have not ended.
func (p *planner) pending(w catalog.VolumeWanted) bool {
	for _, op := range p.in.View.Operations[w.Name] {
		if op.Value.VolumeID == w.ID && !ended(op.Value) {
			return true
		}
	}
	return false
}

// away says why the data process of another node cannot be reached from here, as far as anybody knows; "" if it can.
func (p *planner) away(node string) string {
	switch {
	case node == p.in.Node:
		return ""
	case !p.in.View.Nodes[node].Wanted.Is():
		return fmt.Sprintf("node %s, which is no longer a member of the cluster", node)
	case !p.in.View.Up(node):
		if since, ok := p.in.Silent[node]; ok {
			return fmt.Sprintf("node %s, which does not answer since %s", node, stamp(since).Format("2006-01-02T15:04:05Z"))
		}
		return fmt.Sprintf("node %s, which does not answer", node)
	case p.in.Found.API < APICluster:
		return fmt.Sprintf("node %s, and the data process of this node is of a version that knows of no other nodes; upgrade it", node)
	case !slices.ContainsFunc(p.in.Found.Cluster.Peers, func(n Neighbour) bool { return n.Node == node }):
		return fmt.Sprintf("node %s, which the data process of this node does not know yet", node)
	}
	return ""
}
