package agent

import (
	"maps"
	"slices"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/plan"
)

// This file keeps plans proportional to what happened: of thousands of volumes only those are planned again that something happened to. What is forgotten here is
// made up for at the next look (Config.Resync), when everything is.

// dirty is what is to be planned anew. The zero value is nothing.
type dirty struct {
	all     bool
	node    bool            // the node's own record
	volumes map[string]bool // by name
}

func (d *dirty) volume(name string) {
	if name == "" {
		return
	}
	if d.volumes == nil {
		d.volumes = map[string]bool{}
	}
	d.volumes[name] = true
}

// add marks what a record belongs to.
func (d *dirty) add(k catalog.Key) {
	switch k.Kind {
	case catalog.KindVolume:
		d.volume(k.Name)
	case catalog.KindOperation:
		for i := range k.Name {
			if k.Name[i] == '/' {
				d.volume(k.Name[:i])
			}
		}
	case catalog.KindNode:
		d.node = true
	}
}

// glance is what of a record decides about more than its own volume.
type glance struct {
	up    bool                 // of a node
	node  catalog.NodeObserved // that others depend on
	wants catalog.VolumeWanted // where a volume lies, and how large it is
}

func (l *loop) glance(ev catalog.Event) (g glance) {
	name := ev.Key.Name
	switch ev.Key.Kind {
	case catalog.KindNode, catalog.KindAlive:
		g.up, g.node = l.view.Up(name), l.view.Nodes[name].Observed.Value
	case catalog.KindVolume:
		g.wants = l.view.Volumes[name].Wanted.Value
	}
	return g
}

// markRecord marks what follows from a record's change; before is how it was.
func (l *loop) markRecord(ev catalog.Event, before glance) {
	l.changed.add(ev.Key)
	after := l.glance(ev)
	switch ev.Key.Kind {
	case catalog.KindVolume:
		a, b := before.wants, after.wants
		differs := a.ID != b.ID || a.SizeBytes != b.SizeBytes || !slices.Equal(a.Replicas, b.Replicas) || !slices.Equal(a.Dropped, b.Dropped)
		l.changed.node = l.changed.node || differs && (l.liesHere(a) || l.liesHere(b) || a.ID != b.ID && l.openHere(a.ID, b.ID))
	case catalog.KindMembership:
		l.changed.volume(l.view.VolumeName(ev.Key.Name))
	case catalog.KindImage:
		l.changed.node = l.changed.node || ev.Key.Part == catalog.Wanted // what it names is not unrecorded
		l.markWaiting(ev.Key.Name)
	case catalog.KindNode, catalog.KindAlive:
		if ev.Key.Part == catalog.Wanted || before.up != after.up || !sameDisks(before.node, after.node) {
			l.changed.all = true
		}
		if ev.Key.Kind == catalog.KindAlive {
			l.markSilent(ev)
		}
	case catalog.KindSetting, catalog.KindCluster:
		l.changed.all = true
	}
}

// liesHere tells whether this node has, or is to have, something of a volume.
func (l *loop) liesHere(w catalog.VolumeWanted) bool {
	here := func(p catalog.Placement) bool { return p.Node == l.a.cfg.Node }
	return slices.ContainsFunc(w.Replicas, here) || slices.ContainsFunc(w.Dropped, here)
}

// openHere tells whether the data process has a volume of one of these ids: whether a record names it is shown.
func (l *loop) openHere(ids ...string) bool {
	return slices.ContainsFunc(l.found.Volumes, func(v plan.FoundVolume) bool { return slices.Contains(ids, v.VolumeID) })
}

// markSilent notes when a node was given up.
func (l *loop) markSilent(ev catalog.Event) {
	if ev.Value == nil {
		l.silent[ev.Key.Name] = l.now()
	} else {
		delete(l.silent, ev.Key.Name)
	}
}

// markWaiting marks the volumes that wait for an image; "": for any.
func (l *loop) markWaiting(image string) {
	for name, v := range l.view.Volumes {
		w, o := v.Wanted.Value, v.Observed.Value
		waits := o.Conditions[catalog.ConditionWaitForImage].Status != catalog.ConditionFalse || slices.ContainsFunc(w.Replicas, func(p catalog.Placement) bool { return p.CopyOf != "" })
		if w.ImageID != "" && waits && (image == "" || w.Image == image) {
			l.changed.volume(name)
		}
	}
}

// sameDisks tells whether nothing of a node differs that other nodes' volumes depend on. Free space does not count: they look at it when they need it.
func sameDisks(a, b catalog.NodeObserved) bool {
	return a.Address == b.Address && a.Port == b.Port && maps.EqualFunc(a.Disks, b.Disks, func(x, y catalog.DiskObserved) bool {
		cx, cy := x.Conditions[catalog.ConditionReady], y.Conditions[catalog.ConditionReady]
		return x.DiskID == y.DiskID && cx.Status == cy.Status && cx.Message == cy.Message
	})
}

// markFound marks what follows from another look at the data process.
func (l *loop) markFound(c plan.Changes) {
	l.changed.all = l.changed.all || c.All
	l.changed.node = l.changed.node || c.Space || c.Images || c.Things
	for id := range c.Volumes {
		name := l.view.VolumeName(id)
		l.changed.volume(name)
		l.changed.node = l.changed.node || name == "" // what no record names is shown
	}
	if c.Images {
		l.markWaiting("")
	}
	if c.Jobs || c.Space {
		for name := range l.view.Operations {
			l.changed.volume(name)
		}
	}
	if c.Jobs {
		for name, v := range l.view.Volumes {
			if slices.ContainsFunc(v.Wanted.Value.Replicas, func(p catalog.Placement) bool { return p.CopyOf != "" }) || len(v.Wanted.Value.Dropped) > 0 {
				l.changed.volume(name)
			}
		}
	}
}

// markAction marks what an action that has ended was done to.
func (l *loop) markAction(action plan.Action) {
	volume := l.acting[action.Key()]
	delete(l.acting, action.Key())
	l.changed.volume(volume)
	l.changed.node = l.changed.node || volume == ""
}

// due is what is planned now; nil: everything.
func (l *loop) due() *plan.Changed {
	now := l.now()
	for name, t := range l.wakes {
		if !now.Before(t) {
			l.changed.volume(name)
		}
	}
	if !l.nodeAt.IsZero() && !now.Before(l.nodeAt) {
		l.changed.node = true
	}
	if l.changed.all {
		return nil
	}
	return &plan.Changed{Volumes: l.changed.volumes, Node: l.changed.node}
}

// planned notes what is planned next, whatever happens: what waits for a time, and what was read and may be no more.
func (l *loop) planned(p plan.NodePlan) {
	if l.changed.all {
		clear(l.wakes)
	}
	for name := range l.changed.volumes {
		delete(l.wakes, name)
	}
	if l.changed.all || l.changed.node {
		l.nodeAt = time.Time{}
	}
	l.changed = dirty{}
	maps.Copy(l.wakes, p.Wakes)
	for name := range p.Reading {
		l.changed.volume(name)
	}
	l.readings = p.Readings
}

// later plans a write again that has to wait.
func (l *loop) later(k catalog.Key, t time.Time) {
	switch k.Kind {
	case catalog.KindVolume:
		l.wakes[k.Name] = earlier(l.wakes[k.Name], t)
	case catalog.KindOperation:
		var d dirty
		d.add(k)
		for name := range d.volumes {
			l.wakes[name] = earlier(l.wakes[name], t)
		}
	case catalog.KindNode:
		l.nodeAt = t
	}
}

// earlier is the earlier of two times, of which zero is never.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// joined is what this node says of itself in its cluster; nil: it is in none that listens.
func (a *Agent) joined() *plan.Joined {
	c := a.cfg.Cluster
	if c == nil {
		return nil
	}
	return &plan.Joined{
		ClusterID: c.ClusterID, NodeID: c.NodeID, Host: c.Host, Port: c.Port, CertFile: c.CertFile, KeyFile: c.KeyFile, CAFile: c.CAFile,
		APIMin: c.APIMin, APICurrent: c.APICurrent, Member: a.cfg.Member(),
	}
}
