package plan

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"ashlar/internal/catalog"
)

// NodeInput is one node's picture.
type NodeInput struct {
	Node    string // its name
	Address string
	Now     time.Time
	View    *View
	Found   Found
	// Busy holds the Keys of actions under way: nothing else is begun for them.
	Busy map[string]bool
	// Failures holds what failed, by Failure ID.
	Failures map[string]Failure
	// Finished holds the operations that were carried out, and the readings that were ended, and are not recorded yet, by id.
	Finished map[string]Result
	// Background is what the data process was told last that the node's own work may move, in bytes per second; nil: it was not told.
	Background *int64
	// Network is where volumes are to be offered over TCP.
	Network Network
	// Joined is what the node is in its cluster; nil: in none that listens.
	Joined *Joined
	// Silent says since when nodes are not alive, of those that this node saw go.
	Silent map[string]time.Time
	// Only says what changed since the last plan; nil: everything is planned. What is not planned was at rest, or waits (NodePlan.Wakes).
	Only *Changed
	// Downloads holds the ids of the readings of volumes under way for clients, by volume id.
	Downloads map[string][]string
	// Uploads holds the uploads this agent has seen, by image id.
	Uploads map[string]Upload
}

// Joined is what a node that is in a cluster says of itself, to its data process and in its record.
type Joined struct {
	ClusterID, NodeID         string
	Host                      string
	Port                      int    // the first of its ports
	CertFile, KeyFile, CAFile string // paths
	APIMin, APICurrent        int    // the window of versions it speaks to other nodes
	Member                    string // of the catalogue's own cluster
}

// Changed is what of a node's picture may lead to another plan than the last: volumes by name, and the node's own record.
type Changed struct {
	Volumes map[string]bool
	Node    bool
}

// Failure is how an action ended the last time.
type Failure struct {
	Code    string      // one of catalog's codes; "" if it may well succeed the next time
	Message string      // for people
	Rev     catalog.Rev // of the wanted record the action followed from; when that changes it is tried at once
	Next    time.Time   // not before
	InUse   bool        // somebody else uses it; nothing was done
}

// NodePlan is what a node does now: actions, each in its own time, and records to write. If nothing changes until Wake, plan again then.
type NodePlan struct {
	Actions []Action
	Writes  []Write
	Wake    time.Time
	// Wakes are the parts of Wake that are single volumes', by name: only these have to be planned then.
	Wakes map[string]time.Time
	// Volumes says of actions, by Key, which volume they are of, by name.
	Volumes map[string]string
	// Reading are the names of the volumes that somebody wants to read: they are planned again when one does no more.
	Reading map[string]bool
	// Readings holds the ids of the readings that somebody wants: an entry in Finished is of use as long as it is here, or its operation has not ended.
	Readings map[string]bool
}

// Action is one thing to be done on a node. Actions with the same Key are done one at a time.
type Action interface {
	Key() string
	Verb() string
	// Because is the revision of the wanted record it follows from.
	Because() catalog.Rev
}

// FailureID names an action among failures.
func FailureID(a Action) string { return a.Verb() + " " + a.Key() }

// follows is what every action has.
type follows struct {
	Rev catalog.Rev
}

// Because implements Action.
func (f follows) Because() catalog.Rev { return f.Rev }

// AdoptDisk asks the data process to use a directory.
type AdoptDisk struct {
	follows
	Path, ClusterID string
	DiskID          string // the disk that was there before; "" if none was
}

// Key implements Action.
func (a AdoptDisk) Key() string { return "disk/" + a.Path }

// Verb implements Action.
func (AdoptDisk) Verb() string { return "adopt-disk" }

// planner makes one NodePlan.
type planner struct {
	in  NodeInput
	out NodePlan
	// found is an index of in.Found.
	found *index
	// readings are those that somebody wants, by volume id.
	readings map[string][]Reading
	minFree  int64  // per cent
	current  string // the name of the volume that is being planned
}

// OnNode says what the node does now.
func OnNode(in NodeInput) NodePlan {
	in.Found.Index()
	p := &planner{in: in, found: in.Found.x, readings: map[string][]Reading{}}
	p.minFree = in.View.number(catalog.SettingMinimalFree, catalog.SettingMinimalFreeDefault)
	p.out = NodePlan{Readings: map[string]bool{}, Reading: map[string]bool{}, Wakes: map[string]time.Time{}, Volumes: map[string]string{}}
	p.disks()
	p.background()
	p.network()
	p.cluster()
	p.findReadings()
	for _, name := range sorted(in.View.Images) {
		p.image(name)
	}
	if in.Only == nil {
		for _, name := range sorted(in.View.Volumes) {
			p.volume(name)
		}
	} else {
		some := maps.Clone(in.Only.Volumes)
		if some == nil {
			some = map[string]bool{}
		}
		maps.Copy(some, p.out.Reading)
		for _, name := range sorted(some) {
			p.volume(name)
		}
	}
	p.forgetJobs()
	if in.Only == nil || in.Only.Node {
		p.observeNode()
	}
	return p.out
}

// begin begins an action unless its key is busy or it failed lately.
func (p *planner) begin(a Action) {
	if a == nil || p.in.Busy[a.Key()] {
		return
	}
	if f, ok := p.in.Failures[FailureID(a)]; ok && f.Rev == a.Because() && p.in.Now.Before(f.Next) {
		p.wake(f.Next)
		return
	}
	p.out.Actions = append(p.out.Actions, a)
	if p.current != "" {
		p.out.Volumes[a.Key()] = p.current
	}
}

// wake asks to be called at t.
func (p *planner) wake(t time.Time) {
	if was, ok := p.out.Wakes[p.current]; p.current != "" && (!ok || t.Before(was)) {
		p.out.Wakes[p.current] = t
	}
	if p.out.Wake.IsZero() || t.Before(p.out.Wake) {
		p.out.Wake = t
	}
}

// failure is the last failure of an action, if it followed from the same record.
func (p *planner) failure(a Action) (Failure, bool) {
	if len(p.in.Failures) == 0 { // mostly; a name is not made for nothing
		return Failure{}, false
	}
	f, ok := p.in.Failures[FailureID(a)]
	return f, ok && f.Rev == a.Because()
}

// disks adopts the wanted disks the data process does not have.
func (p *planner) disks() {
	node := p.in.View.Nodes[p.in.Node]
	n := node.Wanted
	if !p.in.Found.Known || !p.in.View.Cluster.Is() {
		return
	}
	for _, name := range sorted(n.Value.Disks) {
		path := n.Value.Disks[name].Path
		if n.Value.Disks[name].Lost { // its directory may be another disk's by now
			continue
		}
		if d, ok := p.in.Found.diskAt(path); !ok || !d.usable() { // one that is away is asked for until it is back
			p.begin(AdoptDisk{follows{n.Rev}, path, p.in.View.Cluster.Value.ID, node.Observed.Value.Disks[name].DiskID})
		}
	}
}

// SetBackground bounds the node's own work.
type SetBackground struct {
	follows
	BytesPerSecond int64
}

// Key implements Action.
func (SetBackground) Key() string { return "background" }

// Verb implements Action.
func (SetBackground) Verb() string { return "set-background" }

// SetNetwork begins, changes or ends the offer of volumes over TCP.
type SetNetwork struct {
	follows
	Network Network
}

// Key implements Action.
func (SetNetwork) Key() string { return "network" }

// Verb implements Action.
func (SetNetwork) Verb() string { return "set-network" }

// network keeps the offer over TCP as it is configured.
func (p *planner) network() {
	if p.in.Found.Known && p.in.Found.Network != p.in.Network {
		p.begin(SetNetwork{Network: p.in.Network})
	}
}

// SetCluster tells the data process which cluster its node is in, and who else is.
type SetCluster struct {
	follows
	Cluster Neighbours
}

// Key implements Action.
func (SetCluster) Key() string { return "cluster" }

// Verb implements Action.
func (SetCluster) Verb() string { return "set-cluster" }

// cluster keeps the data process's list of other nodes as the catalogue has it: who is not on it any more is not let in from then on.
func (p *planner) cluster() {
	if want := p.neighbours(); p.in.Found.Known && p.in.Found.API >= APICluster && !p.in.Found.Cluster.Same(want) {
		p.begin(SetCluster{Cluster: want})
	}
}

// neighbours is what the data process is to know of the cluster: every other node that listens and is not to be forgotten, sorted by name.
func (p *planner) neighbours() Neighbours {
	j := p.in.Joined
	if j == nil {
		return Neighbours{}
	}
	out := Neighbours{
		ClusterID: j.ClusterID, Node: p.in.Node, Listen: hostPort(j.Host, j.Port+catalog.PortData), CertFile: j.CertFile, KeyFile: j.KeyFile, CAFile: j.CAFile,
	}
	for _, name := range sorted(p.in.View.Nodes) {
		n := p.in.View.Nodes[name]
		w, o := n.Wanted.Value, n.Observed.Value
		if name == p.in.Node || !n.Wanted.Is() || w.Deleted != nil || w.ID == "" || o.Port == 0 {
			continue
		}
		out.Peers = append(out.Peers, Neighbour{
			Node: name, NodeID: w.ID, Data: hostPort(o.Address, o.Port+catalog.PortData), Ledger: hostPort(o.Address, o.Port+catalog.PortNode),
		})
	}
	return out
}

func hostPort(host string, port int) string {
	if strings.Contains(host, ":") { // an IPv6 address
		host = "[" + host + "]"
	}
	return host + ":" + strconv.Itoa(port)
}

// offered tells how the offer over TCP is.
func (p *planner) offered() catalog.Condition {
	f, failed := p.failure(SetNetwork{})
	switch {
	case p.in.Found.Network == p.in.Network:
		return catalog.Condition{Status: catalog.ConditionTrue, Message: p.in.Network.Address}
	case failed:
		return catalog.Condition{Status: catalog.ConditionFalse, Reason: "NotOffered", Message: f.Message}
	}
	return catalog.Condition{Status: catalog.ConditionFalse, Reason: "NotOffered", Message: "not offered yet"}
}

// background says to every data process once, and whenever the setting changes, what the node's own work may move.
func (p *planner) background() {
	rate := p.in.View.number(catalog.SettingBackgroundRate, catalog.SettingBackgroundRateDefault) << 20
	if p.in.Found.Known && (p.in.Background == nil || *p.in.Background != rate) {
		p.begin(SetBackground{BytesPerSecond: rate})
	}
}

// observeNode writes what the node is.
func (p *planner) observeNode() {
	node := p.in.View.Nodes[p.in.Node]
	if !node.Wanted.Is() {
		return
	}
	was := node.Observed.Value
	o := catalog.NodeObserved{
		Name: p.in.Node, Address: p.in.Address, BootID: was.BootID, Version: was.Version, Ready: p.in.Found.Known, Data: was.Data,
		Conditions: copyConditions(was.Conditions), Disks: map[string]catalog.DiskObserved{}, Unrecorded: was.Unrecorded,
	}
	if j := p.in.Joined; j != nil {
		o.Address, o.Port, o.APIMin, o.APICurrent, o.Member = j.Host, j.Port, j.APIMin, j.APICurrent, j.Member
	}
	if f := p.in.Found; f.Known {
		o.BootID, o.Version = f.BootID, f.Version
		o.Data = catalog.DataObserved{Version: f.Version, PID: f.PID, Started: f.Started}
		o.Unrecorded = p.unrecorded()
	}
	ready := catalog.Condition{Status: catalog.ConditionTrue}
	if !o.Ready {
		ready = catalog.Condition{Status: catalog.ConditionFalse, Reason: "DataProcessAway", Message: "the data process does not answer"}
	}
	setCondition(o.Conditions, catalog.ConditionReady, ready, p.in.Now)
	schedulable := catalog.Condition{Status: catalog.ConditionTrue}
	if !node.Wanted.Value.AllowScheduling {
		schedulable = catalog.Condition{Status: catalog.ConditionFalse, Reason: "SchedulingDisabled"}
	}
	setCondition(o.Conditions, catalog.ConditionSchedulable, schedulable, p.in.Now)
	delete(o.Conditions, catalog.ConditionNetwork)
	if p.in.Network != (Network{}) && p.in.Found.Known {
		c := p.offered()
		c.LastTransitionTime = p.in.Now.UTC().Truncate(time.Second)
		if last := was.Conditions[catalog.ConditionNetwork]; last.Status == c.Status {
			c.LastTransitionTime = last.LastTransitionTime
		}
		o.Conditions[catalog.ConditionNetwork] = c
	}
	pl := &placer{v: p.in.View, minFree: p.minFree} // for a copy of no size: nothing else is looked at
	placed := p.placed()
	w := Write{Key: catalog.NodeKey(catalog.Observed, p.in.Node), Was: node.Observed.Rev}
	for _, name := range sorted(node.Wanted.Value.Disks) {
		d := p.observeDisk(node.Wanted.Value.Disks[name], was.Disks[name])
		p.loadDisk(&d, placed)
		p.schedulable(pl, node.Wanted.Value.Disks[name], &d)
		o.Disks[name] = d
		w.Notes = append(w.Notes, p.diskNotes(name, was.Disks[name], o.Disks[name])...)
	}
	w.Value = o
	for _, u := range o.Unrecorded {
		if !slices.ContainsFunc(was.Unrecorded, func(x catalog.Unrecorded) bool { return x.Kind == u.Kind && x.ID == u.ID }) {
			ev := note(p.in.Now, catalog.Warning, catalog.KindNode, p.in.Node, "Unrecorded")
			ev.Message = fmt.Sprintf("%s %s (%q) is named by no record; it is left as it is", u.Kind, u.ID, u.Name)
			w.Notes = append(w.Notes, ev)
		}
	}
	p.write(w, was)
}

// placed are the replicas that are wanted on this node, those included that are to be destroyed, by disk id.
func (p *planner) placed() map[string]map[string]int64 {
	out := map[string]map[string]int64{}
	add := func(w catalog.VolumeWanted, places []catalog.Placement) {
		for _, r := range places {
			if r.Node != p.in.Node {
				continue
			}
			if out[r.DiskID] == nil {
				out[r.DiskID] = map[string]int64{}
			}
			out[r.DiskID][r.ReplicaID] = w.SizeBytes
		}
	}
	for _, vol := range p.in.View.Volumes {
		add(vol.Wanted.Value, vol.Wanted.Value.Replicas)
		add(vol.Wanted.Value, vol.Wanted.Value.Dropped)
	}
	return out
}

// loadDisk adds what lies, or is to lie, on a disk.
func (p *planner) loadDisk(d *catalog.DiskObserved, placed map[string]map[string]int64) {
	d.Replicas, d.Images, d.ScheduledBytes = map[string]int64{}, map[string]int64{}, 0
	if d.DiskID == "" {
		return
	}
	for id, bytes := range placed[d.DiskID] {
		d.Replicas[id] = bytes
		d.ScheduledBytes += bytes
	}
	found, _ := p.in.Found.disk(d.DiskID)
	for _, img := range found.Images {
		d.Images[img.ImageID] = img.AllocatedBytes
		d.ScheduledBytes += img.AllocatedBytes
	}
}

// schedulable says whether a disk takes something more.
func (p *planner) schedulable(pl *placer, dw catalog.DiskWanted, d *catalog.DiskObserved) {
	schedulable := catalog.Condition{Status: catalog.ConditionTrue}
	if reason := pl.refuseDisk(dw, *d, want{}); reason != "" {
		schedulable = catalog.Condition{Status: catalog.ConditionFalse, Reason: "NotSchedulable", Message: reason}
	}
	setCondition(d.Conditions, catalog.ConditionSchedulable, schedulable, p.in.Now)
}

func (p *planner) observeDisk(dw catalog.DiskWanted, was catalog.DiskObserved) catalog.DiskObserved {
	d := was
	d.Conditions = copyConditions(was.Conditions)
	found, ok := p.in.Found.diskAt(dw.Path)
	ok = ok && !dw.Lost
	ready := catalog.Condition{Status: catalog.ConditionTrue}
	switch f, failed := p.in.Failures[FailureID(AdoptDisk{Path: dw.Path})]; {
	case dw.Lost:
		ready = catalog.Condition{Status: catalog.ConditionFalse, Reason: "Lost", Message: "it was given up; it is forgotten when the volumes whose only copy it had are deleted"}
	case ok && !found.usable():
		ready = catalog.Condition{Status: catalog.ConditionFalse, Reason: "DiskError", Message: found.Error}
	case ok && found.Error != "": // something on it is damaged; the rest goes on
		ready.Reason, ready.Message = "Damage", found.Error
	case ok:
	case !p.in.Found.Known:
		ready = catalog.Condition{Status: catalog.ConditionUnknown, Reason: "DataProcessAway"}
	case failed:
		ready = catalog.Condition{Status: catalog.ConditionFalse, Reason: "NotAdopted", Message: f.Message}
	default:
		ready = catalog.Condition{Status: catalog.ConditionFalse, Reason: catalog.ReasonNotAdoptedYet, Message: "not in use yet"}
	}
	setCondition(d.Conditions, catalog.ConditionReady, ready, p.in.Now)
	if ok {
		d.DiskID, d.TotalBytes, d.FreeBytes = found.DiskID, found.TotalBytes, found.FreeBytes
	}
	if ok && found.TotalBytes > 0 {
		warn := p.in.View.number(catalog.SettingWarningFree, catalog.SettingWarningFreeDefault)
		setCondition(d.Conditions, catalog.ConditionNearlyFull, nearlyFull(warn, d), p.in.Now)
	}
	return d
}

// nearlyFull warns before a disk takes nothing more. What was warned of stays until there is a little more room than that, so that it is not said again and again.
func nearlyFull(warn int64, d catalog.DiskObserved) catalog.Condition {
	limit := d.TotalBytes / 100 * warn
	if d.Conditions[catalog.ConditionNearlyFull].Status == catalog.ConditionTrue {
		limit += d.TotalBytes / 100
	}
	if warn == 0 || d.FreeBytes >= limit {
		return catalog.Condition{Status: catalog.ConditionFalse}
	}
	return catalog.Condition{
		Status: catalog.ConditionTrue, Reason: catalog.ReasonNearlyFull,
		Message: fmt.Sprintf("%s of %s free, less than %d %%; delete volumes, snapshots (and purge) or images, or add a disk", size(d.FreeBytes), size(d.TotalBytes), warn),
	}
}

// diskNotes tells people what changed. The messages hold no figures: the same event again is counted.
func (p *planner) diskNotes(name string, was, d catalog.DiskObserved) []catalog.EventRecord {
	var out []catalog.EventRecord
	add := func(typ, reason, message string) {
		ev := note(p.in.Now, typ, catalog.KindNode, p.in.Node, reason)
		ev.Message = "disk " + name + message
		out = append(out, ev)
	}
	changed := func(condition, from, to string) bool {
		return was.Conditions[condition].Status == from && d.Conditions[condition].Status == to
	}
	if d.Conditions[catalog.ConditionNearlyFull].Status == catalog.ConditionTrue && was.Conditions[catalog.ConditionNearlyFull].Status != catalog.ConditionTrue {
		add(catalog.Warning, catalog.ReasonNearlyFull, " is nearly full")
	}
	if was.DiskID != "" && changed(catalog.ConditionReady, catalog.ConditionTrue, catalog.ConditionFalse) {
		add(catalog.Warning, catalog.ReasonDiskAway, " cannot be used: "+d.Conditions[catalog.ConditionReady].Message)
	}
	if was.DiskID != "" && changed(catalog.ConditionReady, catalog.ConditionFalse, catalog.ConditionTrue) {
		add(catalog.Normal, catalog.ReasonDiskBack, " can be used again")
	}
	return out
}

// unrecorded lists what no record names.
func (p *planner) unrecorded() []catalog.Unrecorded {
	images := map[string]bool{}
	for _, i := range p.in.View.Images {
		images[i.Wanted.Value.ID] = true
	}
	var out []catalog.Unrecorded
	for _, d := range p.in.Found.Disks {
		for _, r := range d.Replicas {
			if v := p.in.View.VolumeName(r.VolumeID); v == "" || !names(p.in.View.Volumes[v].Wanted.Value, r.ReplicaID) {
				out = append(out, catalog.Unrecorded{Kind: "replica", ID: r.ReplicaID, Name: r.Volume, DiskID: d.DiskID, Bytes: r.AllocatedBytes})
			}
		}
		for _, i := range d.Images {
			if !images[i.ImageID] {
				out = append(out, catalog.Unrecorded{Kind: "image", ID: i.ImageID, Name: i.Name, DiskID: d.DiskID, Bytes: i.AllocatedBytes})
			}
		}
	}
	for _, v := range p.in.Found.Volumes {
		if p.in.View.VolumeName(v.VolumeID) == "" {
			out = append(out, catalog.Unrecorded{Kind: "volume", ID: v.VolumeID, Name: v.Volume, DiskID: v.DiskID})
		}
	}
	return out
}

func copyConditions(m map[string]catalog.Condition) map[string]catalog.Condition {
	out := make(map[string]catalog.Condition, len(m))
	for k, v := range m {
		out[k] = v
	}
	return out
}
