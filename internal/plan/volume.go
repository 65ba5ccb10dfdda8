package plan

import (
	"cmp"
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
	API   Window        // what this build speaks between nodes; zero: not compared
}

// Cluster says what the leader writes next, in this order: what does something stands before what only tells why something is not done, however many volumes that is told of. No record
// is written twice.
func Cluster(in ClusterInput) []Write {
	c := newLeader(in)
	var out []Write
	for _, name := range c.volumes {
		out = append(out, c.volume(name)...)
	}
	for _, name := range sorted(in.View.Images) {
		out = append(out, c.image(name)...)
	}
	out = append(out, c.nodes()...)
	out = append(out, oldMemberships(in)...)
	out = append(out, oldOperations(in)...)
	out = append(out, oldJoins(in)...)
	out = append(out, liveness(in)...)
	out = append(out, oldEvents(in)...)
	slices.SortStableFunc(out, func(a, b Write) int { return cmp.Compare(a.For, b.For) })
	return out
}

// leader makes one plan of the cluster: the picture, with indexes of what is asked of it over and over.
type leader struct {
	in ClusterInput
	v  *View
	p  *placer

	volumes []string                   // names, sorted
	known   map[string]bool            // ids of volumes
	disks   map[string]diskName        // disk id -> whose
	unsure  bool                       // of some disk the id is not known yet
	stands  map[string]map[string]bool // image id -> disk ids with a replica that stands on it, also one that is to go
	stay    map[[2]string]bool         // image and disk id: of those, with a replica that stays
	users   map[string]int             // image id -> volumes
	readers map[string]string          // volume name -> an image that is being made from it
	moves   moves
	left    map[string]*left // node -> what lies on it
	named   map[string]bool  // ids of disks that some record has something on

	complaints int // events that say of a volume that it has no place: those there are, and those of this plan
}

// diskName is a disk as people know it.
type diskName struct {
	node, disk string
}

func newLeader(in ClusterInput) *leader {
	c := &leader{
		in: in, v: in.View, p: newPlacer(in.View), volumes: sorted(in.View.Volumes), known: make(map[string]bool, len(in.View.Volumes)), disks: map[string]diskName{},
		stands: map[string]map[string]bool{}, stay: map[[2]string]bool{}, users: map[string]int{}, readers: map[string]string{}, moves: newMoves(), left: map[string]*left{}, named: map[string]bool{},
	}
	c.p.api = in.API
	for name, n := range c.v.Nodes {
		c.left[name] = &left{}
		for disk, d := range n.Observed.Value.Disks {
			if _, twice := c.disks[d.DiskID]; d.DiskID != "" && !(twice && n.Wanted.Value.Disks[disk].Lost) {
				c.disks[d.DiskID] = diskName{name, disk}
			}
		}
		for disk, d := range n.Wanted.Value.Disks {
			c.unsure = c.unsure || n.Observed.Value.Disks[disk].DiskID == "" && !n.Wanted.Value.Lost && !d.Lost
		}
	}
	for _, name := range c.volumes {
		c.index(name)
	}
	for name, img := range c.v.Images {
		if w := img.Wanted.Value; w.SourceType == catalog.SourceVolume && w.Deleted == nil && coming(img) {
			c.readers[w.Parameters["volume-name"]] = name
		}
	}
	for _, ev := range c.v.Events {
		if ev.Value.Reason == catalog.ReasonSchedulingFailure {
			c.complaints++
		}
	}
	return c
}

// index takes note of what a volume stands on, and lies on.
func (c *leader) index(name string) {
	vol := c.v.Volumes[name]
	w := &vol.Wanted.Value
	if !vol.Wanted.Is() {
		return
	}
	c.known[w.ID] = true
	if w.ImageID != "" {
		c.users[w.ImageID]++
	}
	for _, r := range w.Replicas {
		c.lies(r, w)
		if w.ImageID != "" && w.Deleted == nil {
			c.stay[[2]string{w.ImageID, r.DiskID}] = true
		}
		if r.CopyOf != "" && len(w.Tickets) == 0 && w.Deleted == nil { // one that waits for its volume to be at rest keeps nobody waiting
			c.moves.begin(c.spotOf(r.CopyOf, w), spot{r.Node, r.DiskID})
		}
	}
	for _, r := range w.Dropped {
		c.lies(r, w)
		c.moves.disks[r.DiskID]++
	}
	for _, t := range w.Tickets {
		if l := c.left[t.Node]; l != nil && w.Deleted == nil {
			l.tickets = append(l.tickets, name)
		}
	}
}

func (c *leader) lies(r catalog.Placement, w *catalog.VolumeWanted) {
	c.named[r.DiskID] = true
	if l := c.left[r.Node]; l != nil {
		l.replicas = append(l.replicas, w.Name)
	}
	if w.ImageID == "" {
		return
	}
	on := c.stands[w.ImageID]
	if on == nil {
		on = map[string]bool{}
		c.stands[w.ImageID] = on
	}
	on[r.DiskID] = true
}

// spotOf is where a replica of a volume is placed.
func (c *leader) spotOf(replicaID string, w *catalog.VolumeWanted) spot {
	for _, r := range w.Replicas {
		if r.ReplicaID == replicaID {
			return spot{r.Node, r.DiskID}
		}
	}
	return spot{}
}

// gone tells whether a node was removed, or a disk of it, or either was given up, so that nobody will ever say what lies there.
func (c *leader) gone(s spot) bool {
	n := c.v.Nodes[s.node]
	if c.abandoned(s) {
		return true
	}
	for disk, d := range n.Wanted.Value.Disks {
		if d.Lost {
			continue
		}
		if id := n.Observed.Value.Disks[disk].DiskID; id == "" || id == s.diskID {
			return false
		}
	}
	return n.Observed.Is()
}

// diskGone is gone for a disk whose node is not recorded.
func (c *leader) diskGone(diskID string) bool {
	d, ok := c.disks[diskID]
	if ok {
		return c.gone(spot{d.node, diskID})
	}
	return !c.unsure
}

// volumeNow is a volume while it is planned.
type volumeNow struct {
	vol     Volume
	w       catalog.VolumeWanted // as it is to be
	m       Half[catalog.Membership]
	changed bool
	why     []string           // why a copy has no disk
	evict   *catalog.Condition // nil: nobody wants it elsewhere
	notes   []catalog.EventRecord
}

func (c *leader) volume(name string) []Write {
	vol := c.v.Volumes[name]
	group := "volume/" + name
	switch {
	case !vol.Wanted.Is(): // somebody was late with what it saw
		return []Write{{Group: group, Key: catalog.VolumeKey(catalog.Observed, name), Was: vol.Observed.Rev}}
	case vol.Wanted.Value.Deleted != nil:
		if !c.replicasGone(vol) {
			return nil
		}
		return endVolume(c.in, name)
	}
	s := &volumeNow{vol: vol, w: vol.Wanted.Value, m: c.v.Memberships[vol.Wanted.Value.ID]}
	c.settle(s)
	c.forget(s)
	c.placeVolume(s)
	c.nameNodes(s)
	if w := &s.w; w.DataLocality == localityBestEffort && len(w.Tickets) > 0 && w.Tickets[0].Node != w.LastNode {
		w.LastNode, s.changed = w.Tickets[0].Node, true
	}
	c.move(s)
	var out []Write
	if s.changed {
		out = append(out, Write{Group: group, Key: catalog.VolumeKey(catalog.Wanted, name), Value: s.w, Was: vol.Wanted.Rev, Notes: s.notes})
	}
	if m, ok := firstMembership(c.in, s); ok {
		out = append(out, Write{Group: group, Key: catalog.MembershipKey(s.w.ID), Value: m})
	}
	return append(out, c.observe(s)...)
}

// nameNodes notes of copies which node they are on, by its id, where that is not noted yet, and where another node of the name has brought the disk.
func (c *leader) nameNodes(s *volumeNow) {
	for i, r := range s.w.Replicas {
		id := c.v.Nodes[r.Node].Wanted.Value.ID
		if r.NodeID == id || id == "" || r.NodeID != "" && c.disks[r.DiskID].node != r.Node {
			continue
		}
		s.w.Replicas, s.changed = slices.Clone(s.w.Replicas), true
		s.w.Replicas[i].NodeID = id
	}
}

// placeVolume places the first copy; more the engine does not keep yet. Once a volume has a membership record only the engine adds members to it.
func (c *leader) placeVolume(s *volumeNow) {
	for copies(s.w) < min(s.w.Copies, oneCopy) && !s.m.Is() {
		w := c.wantFor(s.w)
		at, why, ok := c.p.place(w)
		if !ok {
			s.why = why
			return
		}
		s.w.Replicas = append(slices.Clone(s.w.Replicas), catalog.Placement{ReplicaID: c.in.NewID(), Node: at.node, DiskID: at.diskID})
		s.changed = true
		c.p.promise(at, w)
	}
	switch n := copies(s.w); {
	case n < min(s.w.Copies, oneCopy):
		s.why = []string{"a volume that was in use is placed by nobody; ashlar recover asks the disks"}
	case n < s.w.Copies:
		s.why = []string{"this version keeps one copy of a volume"}
	}
}

// wantFor is what a copy of a volume asks of a place: the volume's selectors and its image's.
func (c *leader) wantFor(w catalog.VolumeWanted) want {
	out := want{sizeBytes: w.SizeBytes, imageID: w.ImageID, nodeTags: w.NodeSelector, diskTags: w.DiskSelector}
	if name, ok := c.p.images[w.ImageID]; ok && w.ImageID != "" {
		img := c.v.Images[name].Wanted.Value
		out.nodeTags = slices.Concat(out.nodeTags, img.NodeSelector)
		out.diskTags = slices.Concat(out.diskTags, img.DiskSelector)
	}
	for _, r := range w.Replicas {
		out.have = append(out.have, spot{r.Node, r.DiskID})
	}
	return out
}

// firstMembership is the record a volume begins with: epoch 0, nothing was ever written. It is not made again for a volume that was open before: its replicas
// know better, and ashlar recover asks them.
func firstMembership(in ClusterInput, s *volumeNow) (catalog.Membership, bool) {
	o, w := &s.vol.Observed.Value, &s.w
	if s.m.Is() || len(w.Replicas) == 0 || o.ID == w.ID && o.Epoch > 0 {
		return catalog.Membership{}, false
	}
	m := catalog.Membership{VolumeID: w.ID, Generation: 1, LastChange: in.Now.UTC()}
	m.Chain = catalog.MembershipChain{Generation: 1, SizeBytes: w.SizeBytes, Layers: []string{w.Replicas[0].ReplicaID}, Base: w.ImageID}
	for _, r := range w.Replicas {
		if r.CopyOf == "" {
			m.Members = append(m.Members, catalog.MembershipMember{ReplicaID: r.ReplicaID, Node: r.Node, InSync: true})
		}
	}
	return m, len(m.Members) > 0
}

// observe says of a volume what the leader alone knows: why copies have no disk, or cannot go elsewhere, and that the only copy was given up. That all have a disk is
// said by the agent (observeVolume), which writes anyhow.
func (c *leader) observe(s *volumeNow) []Write {
	was := s.vol.Observed.Value
	if was.ID != s.w.ID {
		was = catalog.VolumeObserved{}
	}
	lost := c.lost(s)
	var scheduled *catalog.Condition
	if len(s.why) > 0 {
		scheduled = &catalog.Condition{
			Status: catalog.ConditionFalse, Reason: catalog.ReasonSchedulingFailure,
			Message: fmt.Sprintf("%d of %d copies have a disk; %s", copies(s.w), s.w.Copies, strings.Join(s.why, "; ")),
		}
	}
	says := func(name string, c *catalog.Condition) bool {
		is, ok := was.Conditions[name]
		return ok && c != nil && is.Status == c.Status && is.Message == c.Message
	}
	_, hadEvict := was.Conditions[catalog.ConditionEvicting]
	if (scheduled == nil || says(catalog.ConditionScheduled, scheduled)) && (s.evict == nil && !hadEvict || says(catalog.ConditionEvicting, s.evict)) &&
		(lost == "" || was.Error == lost && was.Robustness == catalog.RobustnessFaulted) {
		return nil
	}
	o := freshObserved(s.vol.Observed.Value, s.w)
	write := Write{Group: "volume/" + s.w.Name, Key: catalog.VolumeKey(catalog.Observed, s.w.Name), Was: s.vol.Observed.Rev, For: Retell}
	tell := func(reason, message string) {
		ev := note(c.in.Now, catalog.Warning, catalog.KindVolume, s.w.Name, reason)
		ev.Message = message
		write.Notes = append(write.Notes, ev)
	}
	if scheduled != nil {
		setCondition(o.Conditions, catalog.ConditionScheduled, *scheduled, c.in.Now)
		if was.Conditions[catalog.ConditionScheduled].Status != scheduled.Status {
			write.For = Tells
			if c.complaints++; c.complaints <= maxComplaints {
				tell(catalog.ReasonSchedulingFailure, scheduled.Message)
			}
		}
	}
	if hadEvict != (s.evict != nil) || s.evict != nil && was.Conditions[catalog.ConditionEvicting].Status != s.evict.Status {
		write.For = Tells
	}
	if delete(o.Conditions, catalog.ConditionEvicting); s.evict != nil {
		evict := *s.evict
		evict.LastTransitionTime = c.in.Now.UTC().Truncate(time.Second)
		if is := was.Conditions[catalog.ConditionEvicting]; is.Status == evict.Status {
			evict.LastTransitionTime = is.LastTransitionTime
		}
		o.Conditions[catalog.ConditionEvicting] = evict
	}
	if lost != "" {
		write.For = Tells
		if was.Robustness != catalog.RobustnessFaulted || was.Error != lost {
			tell("Faulted", lost)
		}
		o.State, o.Robustness, o.Error, o.Node, o.Endpoint, o.TCPEndpoint = catalog.VolumeDetached, catalog.RobustnessFaulted, lost, "", "", ""
	}
	write.Value = o
	return []Write{write}
}

// lost says that the only copy of a volume was on what was given up, when no node is left to say so itself; "": it was not.
func (c *leader) lost(s *volumeNow) string {
	if len(s.w.Replicas) == 0 {
		return ""
	}
	for _, r := range s.w.Replicas {
		if !c.abandoned(spotAt(r)) && !c.v.replaced(r) {
			return ""
		}
	}
	if !c.noNode(c.v.home(s.vol)) {
		return "" // its home says what it sees
	}
	if r := s.w.Replicas[0]; !c.noNode(r.Node) {
		return c.v.lostText(r, s.w.Name)
	}
	return fmt.Sprintf("its only copy was on node %s, which was given up; `ashlar volume delete %s` forgets it", s.w.Replicas[0].Node, s.w.Name)
}

// abandoned tells whether nothing will come from a disk, or its node: there is no such node, or what lies there was given up.
func (c *leader) abandoned(at spot) bool { return c.noNode(at.node) || c.v.lostDisk(at) }

// noNode tells whether there is no such node, or none that will come back.
func (c *leader) noNode(node string) bool {
	n := c.v.Nodes[node]
	return !n.Wanted.Is() || n.Wanted.Value.Lost
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

// replicasGone tells whether all replicas of a tombstoned volume are gone, those that were to be copies and those that were dropped included: their agents have said so, or their
// nodes and disks were removed. On a node that lives a volume may be open although its disk is lost: then that node has closed it first.
func (c *leader) replicasGone(vol Volume) bool {
	w, o := vol.Wanted.Value, vol.Observed.Value
	said := o.ID == w.ID && o.State == catalog.VolumeDeleting
	for _, p := range slices.Concat(w.Replicas, w.Dropped) {
		if !c.noNode(p.Node) && c.v.lostDisk(spotAt(p)) && (!said || o.Node != "") {
			return false
		}
		if c.gone(spot{p.Node, p.DiskID}) {
			continue
		}
		i := slices.IndexFunc(o.Replicas, func(r catalog.ReplicaObserved) bool { return r.ReplicaID == p.ReplicaID })
		if !said || i < 0 || o.Replicas[i].Created {
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

// oldMemberships deletes first records of volumes that are not there: a leader that was slow put them after the volume was forgotten. Nothing was ever written to those. Others are left
// alone: ashlar recover may need them.
func oldMemberships(in ClusterInput) []Write {
	known := map[string]bool{}
	var out []Write
	for id, m := range in.View.Memberships {
		if m.Value.Epoch > 0 {
			continue
		}
		if len(known) == 0 {
			known[""] = true
			for _, v := range in.View.Volumes {
				known[v.Wanted.Value.ID] = true
			}
		}
		if !known[id] {
			out = append(out, Write{Key: catalog.MembershipKey(id), Was: m.Rev})
		}
	}
	slices.SortFunc(out, func(a, b Write) int { return strings.Compare(a.Key.Name, b.Key.Name) })
	return out
}
