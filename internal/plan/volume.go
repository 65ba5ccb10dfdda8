package plan

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"ashlar/internal/catalog"
)

// ClusterInput is the leader's picture.
type ClusterInput struct {
	View  *View
	Now   time.Time
	NewID func() string // 32 random hex digits; chance is an input too
}

// Cluster says what the leader writes next, in this order.
func Cluster(in ClusterInput) []Write {
	var out []Write
	p := newPlacer(in.View)
	for _, name := range sorted(in.View.Volumes) {
		out = append(out, clusterVolume(in, p, name)...)
	}
	for _, name := range sorted(in.View.Images) {
		out = append(out, clusterImage(in, p, name)...)
	}
	out = append(out, oldOperations(in)...)
	return append(out, oldEvents(in)...)
}

func clusterVolume(in ClusterInput, p *placer, name string) []Write {
	vol := in.View.Volumes[name]
	group := "volume/" + name
	switch {
	case !vol.Wanted.Is(): // somebody was late with what it saw
		return []Write{{Group: group, Key: catalog.VolumeKey(catalog.Observed, name), Was: vol.Observed.Rev}}
	case vol.Wanted.Value.Deleted != nil:
		if !replicasGone(vol) {
			return nil
		}
		return endVolume(in, name)
	}
	var out []Write
	w, why := placeVolume(in, p, vol.Wanted.Value)
	if len(w.Replicas) > len(vol.Wanted.Value.Replicas) {
		out = append(out, Write{Group: group, Key: catalog.VolumeKey(catalog.Wanted, name), Value: w, Was: vol.Wanted.Rev})
	}
	if m, ok := firstMembership(in, vol, w); ok {
		out = append(out, Write{Group: group, Key: catalog.MembershipKey(w.ID), Value: m})
	}
	return append(out, scheduled(in, vol, w, why)...)
}

// placeVolume places the copies that have no disk yet. Once a volume has a membership record only the engine adds members to it.
func placeVolume(in ClusterInput, p *placer, w catalog.VolumeWanted) (catalog.VolumeWanted, []string) {
	w.Replicas = slices.Clone(w.Replicas)
	taken := map[string]bool{}
	for _, r := range w.Replicas {
		taken[r.Node] = true
	}
	for len(w.Replicas) < w.Copies && !in.View.Memberships[w.ID].Is() {
		s, why, ok := p.place(want{sizeBytes: w.SizeBytes, notNodes: taken, imageID: w.ImageID})
		if !ok {
			return w, why
		}
		w.Replicas = append(w.Replicas, catalog.Placement{ReplicaID: in.NewID(), Node: s.node, DiskID: s.diskID})
		taken[s.node] = true
		p.scheduled[s.diskID] += w.SizeBytes
	}
	if len(w.Replicas) < w.Copies {
		return w, []string{"a volume that is in use gets no further copies in this version"}
	}
	return w, nil
}

// firstMembership is the record a volume begins with: epoch 0, nothing was ever written. It is not made again for a volume that was open before: its replicas
// know better, and ashlar recover asks them.
func firstMembership(in ClusterInput, vol Volume, w catalog.VolumeWanted) (catalog.Membership, bool) {
	o := vol.Observed.Value
	if len(w.Replicas) == 0 || in.View.Memberships[w.ID].Is() || o.ID == w.ID && o.Epoch > 0 {
		return catalog.Membership{}, false
	}
	m := catalog.Membership{VolumeID: w.ID, Generation: 1, LastChange: in.Now.UTC()}
	m.Chain = catalog.MembershipChain{Generation: 1, SizeBytes: w.SizeBytes, Layers: []string{w.Replicas[0].ReplicaID}, Base: w.ImageID}
	for _, r := range w.Replicas {
		m.Members = append(m.Members, catalog.MembershipMember{ReplicaID: r.ReplicaID, Node: r.Node, InSync: true})
	}
	return m, true
}

// scheduled says why copies have no disk. That all have one is said by the agent (observeVolume), which writes anyhow.
func scheduled(in ClusterInput, vol Volume, w catalog.VolumeWanted, why []string) []Write {
	if len(why) == 0 {
		return nil
	}
	o := freshObserved(vol.Observed.Value, w)
	was := o.Conditions[catalog.ConditionScheduled]
	c := catalog.Condition{
		Status: catalog.ConditionFalse, Reason: catalog.ReasonSchedulingFailure,
		Message: fmt.Sprintf("%d of %d copies have a disk; %s", len(w.Replicas), w.Copies, strings.Join(why, "; ")),
	}
	if vol.Observed.Is() && vol.Observed.Value.ID == w.ID && was.Status == c.Status && was.Message == c.Message {
		return nil
	}
	setCondition(o.Conditions, catalog.ConditionScheduled, c, in.Now)
	write := Write{Group: "volume/" + w.Name, Key: catalog.VolumeKey(catalog.Observed, w.Name), Value: o, Was: vol.Observed.Rev}
	if was.Status != c.Status {
		ev := note(in.Now, catalog.Warning, catalog.KindVolume, w.Name, catalog.ReasonSchedulingFailure)
		ev.Message = c.Message
		write.Notes = append(write.Notes, ev)
	}
	return []Write{write}
}

// freshObserved is a copy of what was observed of this very volume, or the beginning of it.
func freshObserved(o catalog.VolumeObserved, w catalog.VolumeWanted) catalog.VolumeObserved {
	if o.ID != w.ID {
		o = catalog.VolumeObserved{Name: w.Name, ID: w.ID, State: catalog.VolumeCreating, Robustness: catalog.RobustnessUnknown, SizeBytes: w.SizeBytes}
	}
	conditions := map[string]catalog.Condition{}
	for name, c := range o.Conditions {
		conditions[name] = c
	}
	o.Conditions = conditions
	if o.Replicas == nil {
		o.Replicas = []catalog.ReplicaObserved{}
	}
	if o.Snapshots == nil {
		o.Snapshots = []catalog.SnapshotObserved{}
	}
	return o
}

// replicasGone tells whether the agents have said of every replica of a tombstoned volume that it is not there any more.
func replicasGone(vol Volume) bool {
	w, o := vol.Wanted.Value, vol.Observed.Value
	if len(w.Replicas) == 0 {
		return true
	}
	if o.ID != w.ID || o.State != catalog.VolumeDeleting {
		return false
	}
	for _, p := range w.Replicas {
		i := slices.IndexFunc(o.Replicas, func(r catalog.ReplicaObserved) bool { return r.ReplicaID == p.ReplicaID })
		if i < 0 || o.Replicas[i].Created {
			return false
		}
	}
	return true
}

// endVolume removes a volume's records. The observed one, which says that all is gone, outlives the one that names the volume: after a crash in between it
// belongs to nobody, and is removed as such.
func endVolume(in ClusterInput, name string) []Write {
	vol := in.View.Volumes[name]
	group := "volume/" + name
	var out []Write
	for _, id := range sorted(in.View.Operations[name]) {
		out = append(out, Write{Group: group, Key: catalog.OperationKey(name, id), Was: in.View.Operations[name][id].Rev})
	}
	if m := in.View.Memberships[vol.Wanted.Value.ID]; m.Is() {
		out = append(out, Write{Group: group, Key: catalog.MembershipKey(vol.Wanted.Value.ID), Was: m.Rev})
	}
	ev := note(in.Now, catalog.Normal, catalog.KindVolume, name, "Deleted")
	out = append(out, Write{Group: group, Key: catalog.VolumeKey(catalog.Wanted, name), Was: vol.Wanted.Rev, Notes: []catalog.EventRecord{ev}})
	if vol.Observed.Is() {
		out = append(out, Write{Group: group, Key: catalog.VolumeKey(catalog.Observed, name), Was: vol.Observed.Rev})
	}
	return out
}
