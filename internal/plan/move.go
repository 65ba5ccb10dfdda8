package plan

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"ashlar/internal/catalog"
)

// A copy moves while nobody writes (docs/decisions/0017): control places a second replica with CopyOf; the engine there puts it in the other's place in the membership record;
// control drops the other one, its node destroys it, and control forgets it.
//
//	Replicas  old ── move ──► old, new(CopyOf old) ── membership names new ──► new
//	Dropped                        │ target unfit: new ──► new                  old ── gone ──► -

// movesPerNode is how many moves may be under way from and to one node, of volumes that are not in use.
const movesPerNode = 2

// patience is how long the target of a move may be silent, or its disk away, before the move is taken back: what was copied is lost then.
const patience = 5 * time.Minute

// localityBestEffort is the DataLocality that has a volume's copy follow it.
const localityBestEffort = "best-effort"

// moves counts what is under way.
type moves struct {
	nodes map[string]int // from or to it
	disks map[string]int // from or to it, and what is dropped there
}

func newMoves() moves { return moves{map[string]int{}, map[string]int{}} }

func (m moves) begin(from, to spot) {
	m.nodes[to.node]++
	if from.node != to.node {
		m.nodes[from.node]++
	}
	m.disks[from.diskID]++
	m.disks[to.diskID]++
}

// atRest tells whether nobody uses a volume, as far as is recorded.
func atRest(vol Volume) bool {
	w, o := &vol.Wanted.Value, &vol.Observed.Value
	return len(w.Tickets) == 0 && o.ID == w.ID && o.State == catalog.VolumeDetached
}

func named(m catalog.Membership, replicaID string) bool {
	return slices.ContainsFunc(m.Members, func(x catalog.MembershipMember) bool { return x.ReplicaID == replicaID })
}

func placedAt(list []catalog.Placement, replicaID string) int {
	return slices.IndexFunc(list, func(r catalog.Placement) bool { return r.ReplicaID == replicaID })
}

// settle follows the membership record: a replica that it names is one of the volume's, and one whose place another has taken is dropped.
func (c *leader) settle(s *volumeNow) {
	if !s.m.Is() || len(s.w.Dropped) == 0 && copies(s.w) == len(s.w.Replicas) {
		return
	}
	s.w.Replicas, s.w.Dropped = slices.Clone(s.w.Replicas), slices.Clone(s.w.Dropped)
	for _, d := range slices.Clone(s.w.Dropped) { // it was taken back just when the engine had put it in place
		if named(s.m.Value, d.ReplicaID) {
			s.w.Dropped = without(s.w.Dropped, d.ReplicaID)
			s.w.Replicas, s.changed = append(s.w.Replicas, d), true
		}
	}
	for _, r := range slices.Clone(s.w.Replicas) {
		if r.CopyOf == "" || !named(s.m.Value, r.ReplicaID) || named(s.m.Value, r.CopyOf) {
			continue
		}
		if i := placedAt(s.w.Replicas, r.CopyOf); i >= 0 {
			s.w.Dropped = append(s.w.Dropped, s.w.Replicas[i])
			s.w.Replicas = slices.Delete(s.w.Replicas, i, i+1)
		}
		s.w.Replicas[placedAt(s.w.Replicas, r.ReplicaID)].CopyOf = ""
		s.changed = true
		c.tell(s, "Moved", "its copy is on node "+r.Node+", disk "+c.diskName(r.DiskID)+" now")
	}
}

func without(list []catalog.Placement, replicaID string) []catalog.Placement {
	return slices.DeleteFunc(list, func(r catalog.Placement) bool { return r.ReplicaID == replicaID })
}

// forget takes dropped replicas out that are gone.
func (c *leader) forget(s *volumeNow) {
	for _, d := range slices.Clone(s.w.Dropped) {
		if !c.droppedGone(s, d) {
			continue
		}
		if !s.changed {
			s.w.Dropped, s.changed = slices.Clone(s.w.Dropped), true
		}
		s.w.Dropped = without(s.w.Dropped, d.ReplicaID)
	}
}

func (c *leader) droppedGone(s *volumeNow, d catalog.Placement) bool {
	o := &s.vol.Observed.Value
	i := slices.IndexFunc(o.Replicas, func(r catalog.ReplicaObserved) bool { return r.ReplicaID == d.ReplicaID })
	return c.gone(spot{d.Node, d.DiskID}) || o.ID == s.w.ID && i >= 0 && !o.Replicas[i].Created
}

// diskName is a disk's name, or its id if it has none.
func (c *leader) diskName(diskID string) string {
	if d, ok := c.disks[diskID]; ok {
		return d.disk
	}
	return diskID
}

func (c *leader) tell(s *volumeNow, reason, message string) {
	ev := note(c.in.Now, catalog.Normal, catalog.KindVolume, s.w.Name, reason)
	ev.Message = message
	s.notes = append(s.notes, ev)
}

// evicting says why what lies on a disk is to go elsewhere; "": it may stay.
func (c *leader) evicting(at spot) string {
	n := c.v.Nodes[at.node]
	switch {
	case c.abandoned(at): // nothing will come from there
		return ""
	case n.Wanted.Value.Deleted != nil:
		return "node " + at.node + " is being removed"
	case n.Wanted.Value.EvictionRequested:
		return "node " + at.node + " is being emptied"
	}
	if d, ok := c.disks[at.diskID]; ok && n.Wanted.Value.Disks[d.disk].EvictionRequested {
		return "disk " + d.disk + " of node " + at.node + " is being emptied"
	}
	return ""
}

// move begins a move, takes one back, or says why it cannot begin.
func (c *leader) move(s *volumeNow) {
	if len(s.w.Replicas) == 0 || !s.m.Is() && c.evicting(spotAt(s.w.Replicas[0])) == "" {
		return
	}
	for _, r := range s.w.Replicas {
		if r.CopyOf == "" || named(s.m.Value, r.ReplicaID) {
			continue
		}
		if why := c.unfitTarget(r); why != "" {
			s.w.Replicas, s.w.Dropped = without(slices.Clone(s.w.Replicas), r.ReplicaID), append(slices.Clone(s.w.Dropped), r)
			s.changed = true
			c.tell(s, "MoveTakenBack", "its copy does not move to node "+r.Node+": "+why)
		}
	}
	from := s.w.Replicas[0]
	why := c.evicting(spotAt(from))
	defer c.reportMove(s, spotAt(from), why)
	if i := slices.IndexFunc(s.w.Replicas, func(r catalog.Placement) bool { return r.CopyOf != "" }); i >= 0 {
		c.underWay(s, s.w.Replicas[i], why)
		return
	}
	w := c.wantFor(s.w)
	w.have, w.not, w.needBytes = nil, map[string]bool{from.DiskID: true}, allocated(s.vol.Observed.Value, from.ReplicaID)
	for _, d := range s.w.Dropped {
		w.not[d.DiskID] = true
	}
	switch {
	case why != "":
		c.beginMove(s, w, why)
	case s.w.DataLocality == localityBestEffort:
		if w.only = s.w.LastNode; w.only != "" && w.only != from.Node && c.v.Up(w.only) {
			c.beginMove(s, w, "")
		}
	default:
		c.balance(s, w)
	}
}

func spotAt(r catalog.Placement) spot { return spot{r.Node, r.DiskID} }

// underWay says how a move that was begun goes on.
func (c *leader) underWay(s *volumeNow, to catalog.Placement, why string) {
	if why == "" {
		return
	}
	text := why + "; its copy moves to node " + to.Node + ", disk " + c.diskName(to.DiskID)
	s.evict = &catalog.Condition{Status: catalog.ConditionTrue, Reason: "Moving", Message: text}
	if in := c.inUse(s); in != "" {
		s.evict = &catalog.Condition{Status: catalog.ConditionFalse, Reason: "InUse", Message: text + ", when it is at rest: " + in}
	}
}

// beginMove begins a move if it can; if not, and it must, it says why.
func (c *leader) beginMove(s *volumeNow, w want, why string) {
	from := s.w.Replicas[0]
	no := func(reason, text string) {
		if why != "" {
			s.evict = &catalog.Condition{Status: catalog.ConditionFalse, Reason: reason, Message: why + "; " + text}
		}
	}
	if in := c.inUse(s); in != "" {
		no("InUse", "its copy is moved when it is at rest: "+in)
		return
	}
	if text := c.unreadable(s, from); text != "" {
		no("Unreadable", "its copy cannot be moved: "+text)
		return
	}
	if c.moves.nodes[from.Node] >= movesPerNode {
		no("Waiting", "it waits for its turn")
		return
	}
	to, reasons, ok := c.p.place(w)
	switch {
	case !ok:
		no(catalog.ReasonSchedulingFailure, "there is no other place: "+strings.Join(reasons, "; "))
	case c.moves.nodes[to.node] >= movesPerNode:
		no("Waiting", "it waits for its turn")
	default:
		c.startMove(s, w, to, why)
	}
}

func (c *leader) startMove(s *volumeNow, w want, to spot, why string) {
	from := s.w.Replicas[0]
	r := catalog.Placement{ReplicaID: c.in.NewID(), Node: to.node, DiskID: to.diskID, NodeID: c.v.Nodes[to.node].Wanted.Value.ID, CopyOf: from.ReplicaID}
	s.w.Replicas, s.changed = append(slices.Clone(s.w.Replicas), r), true
	c.p.promise(to, w)
	c.moves.begin(spotAt(from), to)
	c.tell(s, "Moving", fmt.Sprintf("its copy moves from node %s, disk %s to node %s, disk %s", from.Node, c.diskName(from.DiskID), to.node, c.diskName(to.diskID)))
	c.underWay(s, r, why)
}

// inUse says why a volume is not at rest; "" if it is. A move claims the next epoch, so it would end whatever the volume is used for.
func (c *leader) inUse(s *volumeNow) string {
	o := &s.vol.Observed.Value
	switch {
	case len(s.w.Tickets) > 0:
		return "it is attached to node " + s.w.Tickets[0].Node + "; detach it"
	case o.ID != s.w.ID || o.State == catalog.VolumeCreating:
		return "it is still being made"
	case o.State != catalog.VolumeDetached:
		return "it is " + o.State
	}
	for _, op := range c.v.Operations[s.w.Name] {
		if op.Value.VolumeID == s.w.ID && !ended(op.Value) {
			return "its operation " + op.Value.Verb + " is not over"
		}
	}
	if image, ok := c.readers[s.w.Name]; ok {
		return "image " + image + " is being made from it"
	}
	if slices.ContainsFunc(o.Snapshots, func(x catalog.SnapshotObserved) bool { return x.Labels[catalog.LabelReading] != "" && !x.Removed }) ||
		slices.ContainsFunc(o.Replicas, func(r catalog.ReplicaObserved) bool { return r.Running }) {
		return "it is being read"
	}
	return ""
}

// unreadable says why a volume's copy cannot be read now; "" if it can.
func (c *leader) unreadable(s *volumeNow, from catalog.Placement) string {
	o, n := &s.vol.Observed.Value, c.v.Nodes[from.Node]
	ready := n.Observed.Value.Disks[c.diskName(from.DiskID)].Conditions[catalog.ConditionReady]
	switch {
	case !s.m.Is() || !named(s.m.Value, from.ReplicaID) || len(s.m.Value.Members) != 1:
		return "its membership record does not name it alone"
	case o.Robustness == catalog.RobustnessFaulted:
		return "it is faulted: " + o.Error
	case c.noNode(from.Node):
		return "node " + from.Node + ", which has it, was given up"
	case c.v.lostDisk(spotAt(from)):
		return "disk " + c.diskName(from.DiskID) + " of node " + from.Node + ", which has it, was given up"
	case !c.v.Up(from.Node):
		return "node " + from.Node + ", which has it, is not up"
	case ready.Status != catalog.ConditionTrue:
		return strings.TrimSuffix("disk "+c.diskName(from.DiskID)+" of node "+from.Node+" is not ready: "+ready.Message, ": ")
	}
	for _, d := range s.w.Dropped {
		if c.v.Up(d.Node) {
			return "an earlier copy on node " + d.Node + " is still being removed"
		}
	}
	return ""
}

// unfitTarget says why a move that was begun cannot end where it was to; "": it can. A node that is only not ready is waited for, and one that is silent for a while.
func (c *leader) unfitTarget(r catalog.Placement) string {
	n := c.v.Nodes[r.Node]
	d, known := c.disks[r.DiskID]
	switch {
	case c.gone(spotAt(r)):
		return "it was removed"
	case c.evicting(spotAt(r)) != "":
		return c.evicting(spotAt(r))
	case c.v.down(r.Node) && c.long(c.v.Events[nodeDownID(r.Node)].Value.Time):
		return "nothing is heard of it"
	}
	if ready := n.Observed.Value.Disks[d.disk].Conditions[catalog.ConditionReady]; known && ready.Status == catalog.ConditionFalse && c.long(ready.LastTransitionTime) {
		return "disk " + d.disk + " is not ready"
	}
	return ""
}

// long tells whether what is so since then is no passing thing. The zero time is never.
func (c *leader) long(since time.Time) bool {
	return !since.IsZero() && c.in.Now.Sub(since) >= patience
}

// reportMove takes note, for the node and the disk that are to be emptied, of what a volume waits for.
func (c *leader) reportMove(s *volumeNow, from spot, why string) {
	l := c.left[from.node]
	if why == "" || l == nil {
		return
	}
	text := ""
	if s.evict != nil && s.evict.Status == catalog.ConditionFalse {
		text = "volume " + s.w.Name + ": " + strings.TrimPrefix(s.evict.Message, why+"; ")
	}
	l.waits = append(l.waits, wait{from.diskID, "volume", text})
}
