package plan

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"ashlar/internal/catalog"
)

// maxVoters is how many nodes keep the catalogue.
const maxVoters = 3

// Voters is how many of n nodes are to keep the catalogue (docs/formats/catalog.md, section 8, which weighs two).
func Voters(n int) int { return min(n, maxVoters) }

// left is what lies on a node, as far as records say, and what its eviction waits for.
type left struct {
	replicas []string // volumes
	images   []imageOn
	tickets  []string // volumes
	waits    []wait
}

type imageOn struct {
	image, diskID string
}

// wait is something on a disk that is to be emptied. An empty text: it is under way.
type wait struct {
	diskID, kind, text string
}

func (l *left) none() bool { return len(l.replicas)+len(l.images)+len(l.tickets) == 0 }

// nodes writes what becomes of nodes: who keeps the catalogue, what is in the way of emptying one, and the end of one that was removed.
func (c *leader) nodes() []Write {
	var out []Write
	seats := c.seats()
	for _, name := range sorted(c.v.Nodes) {
		n := c.v.Nodes[name]
		group := "node/" + name
		if !n.Wanted.Is() {
			out = append(out, Write{Group: group, Key: catalog.NodeKey(catalog.Observed, name), Was: n.Observed.Rev})
			continue
		}
		w := n.Wanted.Value
		notes := c.forgetDisks(&w, n.Observed.Value)
		if seat, ok := seats[name]; ok {
			w.Voter = seat
			reason := "Voter"
			if !seat {
				reason = "NoVoter"
			}
			notes = append(notes, note(c.in.Now, catalog.Normal, catalog.KindNode, name, reason))
		}
		if len(notes) > 0 {
			out = append(out, Write{Group: group, Key: catalog.NodeKey(catalog.Wanted, name), Value: w, Was: n.Wanted.Rev, Notes: notes})
		} else if w.Deleted != nil && (w.Lost || c.left[name].none()) && c.others(name) > 0 && !c.sits(name) {
			ev := note(c.in.Now, catalog.Normal, catalog.KindNode, name, "Removed")
			out = append(out, Write{Group: group, Key: catalog.NodeKey(catalog.Wanted, name), Was: n.Wanted.Rev, Notes: []catalog.EventRecord{ev}})
			if n.Observed.Is() {
				out = append(out, Write{Group: group, Key: catalog.NodeKey(catalog.Observed, name), Was: n.Observed.Rev})
			}
			continue
		}
		out = append(out, c.evictingNode(name, n)...)
	}
	return out
}

// sits tells whether a node that lives still has a member of the catalogue. It gives that up itself, while it is there to agree on it; without its record it would end, and of two members the
// other could agree on nothing any more.
func (c *leader) sits(name string) bool {
	switch c.v.Nodes[name].Observed.Value.Member {
	case "", "client":
		return false
	}
	return c.v.Alive[name].Is()
}

// forgetDisks takes disks out that were given up and that no record names any more: until then the entry says what became of what lay there.
func (c *leader) forgetDisks(w *catalog.NodeWanted, o catalog.NodeObserved) (notes []catalog.EventRecord) {
	for _, disk := range sorted(w.Disks) {
		if id := o.Disks[disk].DiskID; !w.Disks[disk].Lost || c.named[id] {
			continue
		}
		w.Disks = maps.Clone(w.Disks)
		delete(w.Disks, disk)
		ev := note(c.in.Now, catalog.Normal, catalog.KindNode, w.Name, "DiskRemoved")
		ev.Message = "disk " + disk + ", which was given up, is forgotten"
		notes = append(notes, ev)
	}
	return notes
}

// others counts the nodes that stay, one apart.
func (c *leader) others(but string) int {
	n := 0
	for name, node := range c.v.Nodes {
		if name != but && node.Wanted.Is() && node.Wanted.Value.Deleted == nil {
			n++
		}
	}
	return n
}

// seats says whose seat among those that keep the catalogue is given or taken, if the cluster keeps its catalogue itself. A seat is taken only from a node that a person
// removed, never for silence: nobody can tell one that is cut off from one that is dead, and every change of seats needs the others. It is given to a node that is up. When two nodes got the last
// seat at once, one that has not taken it yet loses it.
func (c *leader) seats() map[string]bool {
	out := map[string]bool{}
	embedded, nodes, seated := false, 0, 0
	for name, n := range c.v.Nodes {
		w := &n.Wanted.Value
		embedded = embedded || w.Voter
		switch {
		case !n.Wanted.Is():
		case w.Deleted == nil:
			nodes++
			if w.Voter {
				seated++
			}
		case w.Voter && c.others(name) > 0:
			out[name] = false
		}
	}
	if !embedded {
		return nil
	}
	for _, name := range sorted(c.v.Nodes) {
		w := c.v.Nodes[name].Wanted
		if free := !w.Value.Voter && w.Value.Deleted == nil && !w.Value.EvictionRequested; w.Is() && free && seated < Voters(nodes) && c.v.Up(name) {
			out[name] = true
			seated++
		}
	}
	for _, name := range slices.Backward(sorted(c.v.Nodes)) {
		n := c.v.Nodes[name]
		if w := &n.Wanted.Value; seated > maxVoters && w.Voter && w.Deleted == nil && n.Observed.Value.Member == "" {
			out[name] = false
			seated--
		}
	}
	return out
}

// evictingNode says on a node and its disks that are to be emptied what is left, and what is in the way.
func (c *leader) evictingNode(name string, n Node) []Write {
	if !n.Observed.Is() {
		return nil
	}
	l, w := c.left[name], &n.Wanted.Value
	var all *catalog.Condition
	if w.EvictionRequested || w.Deleted != nil {
		all = l.condition("")
	}
	o := n.Observed.Value
	changed := differs(o.Conditions, all)
	if changed {
		o.Conditions = c.withEvicting(o.Conditions, all)
	}
	for _, disk := range sorted(o.Disks) {
		d := o.Disks[disk]
		var one *catalog.Condition
		if w.Disks[disk].EvictionRequested {
			one = l.condition(d.DiskID)
		}
		if !differs(d.Conditions, one) {
			continue
		}
		d.Conditions = c.withEvicting(d.Conditions, one)
		disks := make(map[string]catalog.DiskObserved, len(o.Disks))
		for k, v := range o.Disks {
			disks[k] = v
		}
		disks[disk] = d
		o.Disks, changed = disks, true
	}
	if !changed {
		return nil
	}
	return []Write{{Group: "node/" + name, Key: catalog.NodeKey(catalog.Observed, name), Value: o, Was: n.Observed.Rev}}
}

func differs(m map[string]catalog.Condition, c *catalog.Condition) bool {
	is, ok := m[catalog.ConditionEvicting]
	return ok != (c != nil) || c != nil && (is.Status != c.Status || is.Message != c.Message)
}

func (c *leader) withEvicting(m map[string]catalog.Condition, evicting *catalog.Condition) map[string]catalog.Condition {
	m = copyConditions(m)
	was, had := m[catalog.ConditionEvicting]
	if delete(m, catalog.ConditionEvicting); evicting != nil {
		if had {
			m[catalog.ConditionEvicting] = was
		}
		setCondition(m, catalog.ConditionEvicting, *evicting, c.in.Now)
	}
	return m
}

// condition says how the emptying of a node goes, or of one disk of it.
func (l *left) condition(diskID string) *catalog.Condition {
	volumes, images := 0, 0
	var texts []string
	for _, x := range l.waits {
		if diskID != "" && x.diskID != diskID {
			continue
		}
		if x.kind == "volume" {
			volumes++
		} else {
			images++
		}
		if x.text != "" {
			texts = append(texts, x.text)
		}
	}
	if diskID == "" { // with a copy that is being deleted, and one that is on its way here
		volumes, images = max(volumes, len(l.replicas)), max(images, len(l.images))
	}
	c := &catalog.Condition{Status: catalog.ConditionTrue, Reason: "UnderWay", Message: fmt.Sprintf("left: %d copies of volumes, %d of images", volumes, images)}
	if volumes+images == 0 {
		c.Reason, c.Message = "Empty", "nothing is left"
	}
	if len(texts) > 0 {
		c.Status, c.Reason = catalog.ConditionFalse, "Waiting"
		c.Message += "; " + few(texts, "; ")
	}
	return c
}

// few lists the first of many.
func few(list []string, by string) string {
	const most = 3
	if len(list) <= most {
		return strings.Join(list, by)
	}
	return strings.Join(list[:most], by) + fmt.Sprintf("%sand %d more", by, len(list)-most)
}
