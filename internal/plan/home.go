package plan

// Up tells whether a node can be counted on now: it says that it is ready and, in a cluster, its lease holds. Nothing that must be safe depends on it; epochs see to that.
func (v *View) Up(node string) bool {
	n := v.Nodes[node]
	return n.Wanted.Is() && n.Observed.Value.Ready && (n.Observed.Value.Port == 0 || v.Alive[node].Is())
}
