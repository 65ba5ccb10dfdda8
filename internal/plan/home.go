package plan

// Up tells whether a node can be counted on now: it says that it is ready and, in a cluster, its lease holds. Nothing that must be safe depends on it; epochs see to that.
func (v *View) Up(node string) bool {
	n := v.Nodes[node]
	return n.Wanted.Is() && n.Observed.Value.Ready && (n.Observed.Value.Port == 0 || v.Alive[node].Is())
}

// Home is the node whose agent opens, closes, operates on and describes a volume (docs/formats/catalog.md, section 3); "" while the volume has neither a place nor a ticket.
func (v *View) Home(volume string) string { return v.home(v.Volumes[volume]) }

func (v *View) home(vol Volume) string {
	w, o := vol.Wanted.Value, vol.Observed.Value
	wanted := ""
	if w.Deleted == nil && len(w.Tickets) > 0 {
		wanted = w.Tickets[0].Node
	}
	switch {
	case o.ID == w.ID && o.Node != "" && (o.Node == wanted || v.Up(o.Node)):
		return o.Node // it closes it before another opens it
	case wanted != "":
		return wanted
	case len(w.Replicas) == 0:
		return ""
	}
	first := w.Replicas[0].Node
	if v.Up(first) || w.Deleted == nil && len(v.Operations[w.Name]) == 0 {
		return first
	}
	for _, name := range sorted(v.Nodes) { // somebody has to say why nothing happens
		if v.Up(name) {
			return name
		}
	}
	return first
}
