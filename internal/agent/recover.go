package agent

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/plan"
)

// ErrOtherCluster: the catalogue is of another cluster than the node is in, or than its disks belong to, and is not empty. Nothing was changed.
var ErrOtherCluster = errors.New("the catalogue is another cluster's")

// RecoverConfig says what to recover from, and into what.
type RecoverConfig struct {
	Node    string
	Guessed bool // nobody said Node: the name that the records have, if they agree on one, counts more
	Catalog catalog.Catalog
	Service client.Service // the data process
	Disks   []RecoverDisk
	Now     func() time.Time // nil: time.Now
}

// RecoverDisk is a disk to recover from.
type RecoverDisk struct {
	Name      string // in the node's record, if the disk is not in it yet; "": a name is made
	Path      string // absolute and clean
	ClusterID string // as the disk itself says; "": the catalogue's
}

// Recovered says what Recover did, for people.
type Recovered struct {
	Cluster   string   `json:"cluster"`
	Node      string   `json:"node"`    // whose disks they are
	Guessed   bool     `json:"guessed"` // nobody said what the node is called, and no record does
	Volumes   []string `json:"volumes"` // recovered, by name
	Images    []string `json:"images"`
	Advanced  []string `json:"advanced"`  // volumes whose membership record was older than their replicas
	Rebuilt   []string `json:"rebuilt"`   // volumes whose copy had lost its own record, which was made again from its layers
	Unchanged int      `json:"unchanged"` // what the catalogue knew already
	Conflicts []string `json:"conflicts"` // what was left as it is, or renamed, and why
}

// Recover rebuilds the records of a lost catalogue from what lies on disks, or brings an old one up to what the disks prove; it never replaces a record by an
// older one, and run again it changes nothing more. The node's agent and control should not run meanwhile. Volumes come back with their
// snapshots and sizes: attached if the data process has them open, so that no guest loses its disk, else detached. What only the catalogue knew
// (labels, tickets, operations, when they were made) is gone. ErrOtherCluster,
// and the errors of the catalogue and the data process; what was recovered until then stays.
func Recover(ctx context.Context, cfg RecoverConfig) (Recovered, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	for _, d := range cfg.Disks {
		if !filepath.IsAbs(d.Path) || filepath.Clean(d.Path) != d.Path {
			return Recovered{}, fmt.Errorf("%w: the path of a disk is %q, which is not absolute and clean", ErrConfig, d.Path)
		}
	}
	view, err := readView(ctx, cfg.Catalog)
	if err != nil {
		return Recovered{}, fmt.Errorf("recover: %w", err)
	}
	var paths []string
	for _, d := range cfg.Disks {
		if d.ClusterID == "" {
			d.ClusterID = view.Cluster.Value.ID
		}
		if _, err := cfg.Service.AdoptDisk(ctx, client.Disk{Path: d.Path, ClusterID: d.ClusterID}); err != nil {
			return Recovered{}, fmt.Errorf("recover from disk %s: %w", d.Path, err)
		}
		paths = append(paths, d.Path)
	}
	st, err := cfg.Service.State(ctx)
	if err != nil {
		return Recovered{}, fmt.Errorf("recover: %w", err)
	}
	rebuilt, kept := rebuild(ctx, cfg.Service, view, named(st, paths))
	if len(rebuilt) > 0 {
		if st, err = cfg.Service.State(ctx); err != nil {
			return Recovered{}, fmt.Errorf("recover: %w", err)
		}
	}
	writes, done, err := planRecovery(recovery{node: cfg.Node, guessed: cfg.Guessed, now: cfg.Now().UTC(), view: view, disks: named(st, paths), open: st.Volumes, named: cfg.Disks, kept: kept})
	done.Rebuilt = rebuilt
	if err != nil {
		return done, fmt.Errorf("recover: %w", err)
	}
	for _, w := range writes {
		value, ok := w.Value.(json.RawMessage)
		if !ok {
			if value, err = json.Marshal(w.Value); err != nil {
				return done, fmt.Errorf("recover: %w", err)
			}
		}
		if _, err := cfg.Catalog.Put(ctx, w.Key, value, w.Was); err != nil {
			return done, fmt.Errorf("recover: write %s: %w", w.Key, err)
		}
	}
	return done, nil
}

// named are the disks that are recovered from.
func named(st client.State, paths []string) []client.DiskStatus {
	return slices.DeleteFunc(slices.Clone(st.Disks), func(d client.DiskStatus) bool { return !slices.Contains(paths, d.Path) })
}

// rebuild has the records of replicas made again that have lost them: under the membership record, if the catalogue has one that names the replica. It returns the names of their volumes, and of those that could not
// be, by replica id, why.
func rebuild(ctx context.Context, s client.Service, view *plan.View, disks []client.DiskStatus) (names []string, kept map[string]error) {
	kept = map[string]error{}
	for _, d := range disks {
		for _, f := range d.Replicas {
			if !f.RecordLost || f.ReplicaID == "" || f.VolumeID == "" {
				continue
			}
			a := client.RebuildReplica{DiskID: d.DiskID, ReplicaID: f.ReplicaID}
			err := error(nil)
			if m := view.Memberships[f.VolumeID]; m.Is() {
				if !slices.ContainsFunc(m.Value.Members, func(m catalog.MembershipMember) bool { return m.ReplicaID == f.ReplicaID }) {
					continue // planRecovery says so
				}
				a.Record, err = json.Marshal(m.Value)
			}
			if err == nil {
				err = s.RebuildReplica(ctx, a)
			}
			if err != nil {
				kept[f.ReplicaID] = err
				continue
			}
			names = append(names, f.Volume)
		}
	}
	return names, kept
}

func readView(ctx context.Context, c catalog.Catalog) (*plan.View, error) {
	es, _, err := c.List(ctx, "")
	if err != nil {
		return nil, err
	}
	v := plan.NewView()
	for _, e := range es {
		if err := v.Apply(catalog.Event{Entry: e}); err != nil {
			return nil, err
		}
	}
	return v, nil
}

// recovery is the picture that planRecovery decides from.
type recovery struct {
	node    string
	guessed bool
	now     time.Time
	view    *plan.View
	disks   []client.DiskStatus
	open    []client.VolumeStatus
	named   []RecoverDisk
	kept    map[string]error // why a replica that has lost its record is still without one, by its id

	writes []plan.Write
	done   Recovered
	names  map[catalog.Kind]map[string]bool // taken
}

// planRecovery decides, without I/O, which records to put. Those that others refer to come first: a crash in between leaves what can be recovered again.
func planRecovery(r recovery) ([]plan.Write, Recovered, error) {
	r.names = map[catalog.Kind]map[string]bool{catalog.KindVolume: {}, catalog.KindImage: {}}
	for name := range r.view.Volumes {
		r.names[catalog.KindVolume][name] = true
	}
	for name := range r.view.Images {
		r.names[catalog.KindImage][name] = true
	}
	if err := r.cluster(); err != nil {
		return nil, r.done, err
	}
	r.nodeName()
	r.nodeRecord()
	r.images()
	r.volumes()
	slices.Sort(r.done.Conflicts)
	return r.writes, r.done, nil
}

func (r *recovery) write(k catalog.Key, v any, was catalog.Rev) {
	r.writes = append(r.writes, plan.Write{Key: k, Value: v, Was: was})
}

func (r *recovery) conflict(format string, args ...any) {
	r.done.Conflicts = append(r.done.Conflicts, fmt.Sprintf(format, args...))
}

// cluster takes the disks' cluster for the catalogue's, if the catalogue knows nothing that could belong to another.
func (r *recovery) cluster() error {
	have := r.view.Cluster
	for _, d := range r.disks {
		if d.ClusterID != r.disks[0].ClusterID {
			return fmt.Errorf("disk %s is of cluster %s, disk %s of %s: %w", r.disks[0].Path, r.disks[0].ClusterID, d.Path, d.ClusterID, ErrOtherCluster)
		}
	}
	r.done.Cluster = have.Value.ID
	if len(r.disks) == 0 || r.disks[0].ClusterID == have.Value.ID {
		return nil
	}
	r.done.Cluster = r.disks[0].ClusterID
	if have.Is() && len(r.view.Volumes)+len(r.view.Images)+len(r.view.Memberships) > 0 {
		return fmt.Errorf("the catalogue is of cluster %s, the disks are of %s: %w", have.Value.ID, r.done.Cluster, ErrOtherCluster)
	}
	r.write(catalog.ClusterKey(), catalog.Cluster{ID: r.done.Cluster, Format: catalog.Format, Created: r.now}, have.Rev)
	return nil
}

// nodeName finds out what the node is called, if nobody said it: volumes that were recovered for a name that no node has could never be used.
func (r *recovery) nodeName() {
	names := map[string]bool{}
	for name, n := range r.view.Nodes {
		if n.Wanted.Is() {
			names[name] = true
		}
	}
	for _, d := range r.disks {
		for _, f := range d.Replicas {
			var rec catalog.Membership
			if json.Unmarshal(f.Record, &rec) != nil {
				continue
			}
			for _, m := range rec.Members {
				if m.ReplicaID == f.ReplicaID {
					names[m.Node] = true
				}
			}
		}
	}
	if r.guessed && len(names) == 1 && !names[""] {
		r.node = slices.Collect(maps.Keys(names))[0]
	}
	r.done.Guessed = r.guessed && !names[r.node]
	r.done.Node = r.node
}

// nodeRecord sees to it that the disks are wanted on this node.
func (r *recovery) nodeRecord() {
	have := r.view.Nodes[r.node].Wanted
	n := have.Value
	if !have.Is() {
		n = catalog.NodeWanted{Name: r.node, AllowScheduling: true}
	}
	n.Disks = maps.Clone(n.Disks)
	if n.Disks == nil {
		n.Disks = map[string]catalog.DiskWanted{}
	}
	known := map[string]bool{}
	for _, d := range n.Disks {
		known[d.Path] = true
	}
	for _, d := range r.named {
		if known[d.Path] {
			continue
		}
		name := d.Name
		for i := 1; name == "" || n.Disks[name].Path != ""; i++ {
			name = fmt.Sprintf("recovered-%d", i)
		}
		n.Disks[name] = catalog.DiskWanted{Path: d.Path, AllowScheduling: true}
	}
	if !have.Is() || len(n.Disks) != len(have.Value.Disks) {
		r.write(catalog.NodeKey(catalog.Wanted, r.node), n, have.Rev)
	}
}

// free returns name, or if that is taken by something else one that says whose it is.
func (r *recovery) free(kind catalog.Kind, name, id string) string {
	short := id[:min(8, len(id))]
	if name == "" {
		name = "recovered-" + short
	}
	if r.names[kind][name] {
		taken := name
		name = name + "-" + short
		r.conflict("%s %s (id %s) comes back as %s: another one has its name", kind, taken, id, name)
	}
	r.names[kind][name] = true
	return name
}

func (r *recovery) images() {
	byID := map[string]plan.Image{}
	for _, img := range r.view.Images {
		byID[img.Wanted.Value.ID] = img
	}
	onDisks := map[string][]string{}
	found := map[string]client.ImageFound{}
	for _, d := range r.disks {
		for _, i := range d.Images {
			if f, ok := found[i.ImageID]; ok && f.SHA512 != i.SHA512 {
				r.conflict("image %s: its copy on disk %s differs from another one and is left alone", f.Name, d.DiskID)
				continue
			}
			found[i.ImageID] = i
			onDisks[i.ImageID] = append(onDisks[i.ImageID], d.DiskID)
		}
	}
	for _, id := range slices.SortedFunc(maps.Keys(found), func(a, b string) int { return cmp.Or(cmp.Compare(found[a].Name, found[b].Name), cmp.Compare(a, b)) }) {
		have := byID[id].Wanted
		w := have.Value
		if !have.Is() {
			w = imageFrom(found[id], r.now)
			w.Name = r.free(catalog.KindImage, w.Name, id)
		}
		before := len(w.Disks)
		w.Disks = slices.Clone(w.Disks)
		for _, disk := range onDisks[id] {
			if !slices.Contains(w.Disks, disk) {
				w.Disks = append(w.Disks, disk)
			}
		}
		if have.Is() && len(w.Disks) == before || w.Deleted != nil {
			r.done.Unchanged++
			continue
		}
		r.write(catalog.ImageKey(catalog.Wanted, w.Name), w, have.Rev)
		r.done.Images = append(r.done.Images, w.Name)
	}
}

func imageFrom(f client.ImageFound, now time.Time) catalog.ImageWanted {
	w := catalog.ImageWanted{Name: f.Name, ID: f.ImageID, SourceType: catalog.SourceFile, Parameters: map[string]string{"path": f.Source}, MinCopies: 1, Created: now}
	if strings.HasPrefix(f.Source, "http://") || strings.HasPrefix(f.Source, "https://") {
		w.SourceType, w.Parameters = catalog.SourceDownload, map[string]string{"url": f.Source}
	}
	if f.SHA512 != "" {
		w.ExpectedChecksum = "sha512:" + f.SHA512
	}
	return w
}

// copyFound is a replica on a disk, with its record decoded.
type copyFound struct {
	client.ReplicaFound
	diskID string
	rec    catalog.Membership
}

// newer compares two copies' records as the engine does.
func (c copyFound) newer(o copyFound) int {
	return cmp.Or(cmp.Compare(o.rec.Epoch, c.rec.Epoch), cmp.Compare(o.rec.Generation, c.rec.Generation), cmp.Compare(c.ReplicaID, o.ReplicaID))
}

func (r *recovery) volumes() {
	copies := map[string][]copyFound{}
	at := map[string]string{}
	for _, d := range r.disks {
		if d.Error != "" {
			r.conflict("disk %s: %s", d.Path, d.Error)
		}
		for _, f := range d.Replicas {
			c := copyFound{ReplicaFound: f, diskID: d.DiskID}
			switch other, twice := at[f.ReplicaID]; {
			case f.VolumeID == "" || f.ReplicaID == "":
				r.conflict("%s on disk %s cannot be read and is left alone", f.DataPath, d.Path)
				continue
			case r.kept[f.ReplicaID] != nil:
				r.conflict("replica %s of volume %s has lost its record, and is left alone: %v", f.ReplicaID, f.Volume, r.kept[f.ReplicaID])
				continue
			case twice:
				r.conflict("replica %s of volume %s is on disk %s and on disk %s; the second is left alone: one is a copy of the other's directory", f.ReplicaID, f.Volume, other, d.Path)
				continue
			}
			if len(f.Record) > 0 {
				if err := json.Unmarshal(f.Record, &c.rec); err != nil || c.rec.VolumeID != f.VolumeID {
					r.conflict("replica %s of volume %s keeps a record that is not its volume's; it is left alone", f.ReplicaID, f.Volume)
					continue
				}
			}
			at[f.ReplicaID] = d.Path
			copies[f.VolumeID] = append(copies[f.VolumeID], c)
		}
	}
	byID := map[string]plan.Volume{}
	for _, v := range r.view.Volumes {
		byID[v.Wanted.Value.ID] = v
	}
	for _, id := range slices.SortedFunc(maps.Keys(copies), func(a, b string) int {
		return cmp.Or(cmp.Compare(copies[a][0].Volume, copies[b][0].Volume), cmp.Compare(a, b))
	}) {
		slices.SortFunc(copies[id], copyFound.newer)
		r.volume(copies[id], byID[id].Wanted)
	}
}

// volume recovers one volume from its copies, the one with the newest record first.
func (r *recovery) volume(copies []copyFound, have plan.Half[catalog.VolumeWanted]) {
	best := copies[0]
	name := cmp.Or(have.Value.Name, best.Volume)
	rec, raw := firstRecord(best, r.node, r.now), best.Record
	if len(raw) > 0 {
		rec = best.rec
	}
	var members []copyFound
	for _, c := range copies {
		isMember := func(m catalog.MembershipMember) bool { return m.ReplicaID == c.ReplicaID }
		if slices.ContainsFunc(rec.Members, isMember) {
			members = append(members, c)
		} else {
			r.conflict("replica %s of volume %s is not in its newest record; it is left alone", c.ReplicaID, name)
		}
	}
	changed := r.membership(rec, raw, name)
	tickets := r.tickets(best.VolumeID)
	switch {
	case have.Is() && changed && len(have.Value.Tickets) == 0 && len(tickets) > 0 && have.Value.Deleted == nil:
		w := have.Value // it was attached after this old catalogue was current
		w.Tickets = tickets
		r.write(catalog.VolumeKey(catalog.Wanted, w.Name), w, have.Rev)
		return
	case have.Is() || len(members) == 0:
		if !changed {
			r.done.Unchanged++
		}
		return
	}
	w := catalog.VolumeWanted{
		Name: r.free(catalog.KindVolume, best.Volume, best.VolumeID), ID: best.VolumeID, SizeBytes: cmp.Or(rec.Chain.SizeBytes, best.SizeBytes),
		ImageID: rec.Chain.Base, Image: r.imageName(rec.Chain.Base), Copies: len(rec.Members), Frontend: catalog.FrontendNBD, Created: r.now, Tickets: tickets,
	}
	for _, c := range members {
		w.Replicas = append(w.Replicas, catalog.Placement{ReplicaID: c.ReplicaID, Node: r.node, DiskID: c.diskID})
	}
	r.write(catalog.VolumeKey(catalog.Wanted, w.Name), w, 0)
	r.done.Volumes = append(r.done.Volumes, w.Name)
}

// tickets are what a volume needs to stay attached that the data process has open.
func (r *recovery) tickets(volumeID string) []catalog.Ticket {
	for _, v := range r.open {
		if v.VolumeID == volumeID && v.State != plan.FoundClosing {
			return []catalog.Ticket{{Node: r.node, Kind: catalog.TicketAPI, DisableFrontend: v.Frontend == "", Created: r.now}}
		}
	}
	return nil
}

// membership puts the newest record that a copy keeps, byte for byte, unless the catalogue has it or a newer one: the next writer's epoch is then above
// every one there ever was (design: invariant 14).
func (r *recovery) membership(rec catalog.Membership, raw json.RawMessage, name string) (changed bool) {
	have := r.view.Memberships[rec.VolumeID]
	if have.Is() && (have.Value.Epoch > rec.Epoch || have.Value.Epoch == rec.Epoch && have.Value.Generation >= rec.Generation) {
		return false
	}
	var v any = rec
	if len(bytes.TrimSpace(raw)) > 0 {
		v = raw
	}
	r.write(catalog.MembershipKey(rec.VolumeID), v, have.Rev)
	if have.Is() {
		r.done.Advanced = append(r.done.Advanced, name)
	}
	return true
}

// firstRecord is what a volume begins with that was never open, or whose copy has lost what it knew of writers. A data process that does not say what layers there are is an older one: the head of a volume that
// was never open has the replica's id.
func firstRecord(c copyFound, node string, now time.Time) catalog.Membership {
	layers := c.Chain
	if len(layers) == 0 {
		layers = []string{c.ReplicaID}
	}
	return catalog.Membership{
		VolumeID: c.VolumeID, Generation: 1, LastChange: now,
		Members: []catalog.MembershipMember{{ReplicaID: c.ReplicaID, Node: node, InSync: true}},
		Chain:   catalog.MembershipChain{Generation: 1, SizeBytes: c.SizeBytes, Layers: layers, Base: c.Base},
	}
}

// imageName finds an image's name among the records there will be.
func (r *recovery) imageName(id string) string {
	if id == "" {
		return ""
	}
	for name, img := range r.view.Images {
		if img.Wanted.Value.ID == id {
			return name
		}
	}
	for _, w := range r.writes {
		if img, ok := w.Value.(catalog.ImageWanted); ok && img.ID == id {
			return img.Name
		}
	}
	r.conflict("image %s, which volumes stand on, is on none of the disks", id)
	return ""
}
