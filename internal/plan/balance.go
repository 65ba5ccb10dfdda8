package plan

import (
	"ashlar/internal/catalog"
)

// balanceMargin is how much more a disk must have left after a move than the other had before it, in parts of ten thousand: a move is never worth undoing.
const balanceMargin = 1500

// balance moves a volume from a disk to one that is much emptier, one at a time on either, if the setting says so.
func (c *leader) balance(s *volumeNow, w want) {
	if c.v.text(catalog.SettingAutoBalance, catalog.SettingAutoBalanceDefault) != "best-effort" {
		return
	}
	from := s.w.Replicas[0]
	n, d := c.v.Nodes[from.Node], c.disks[from.DiskID]
	has := c.p.left(n.Wanted.Value.Disks[d.disk], n.Observed.Value.Disks[d.disk], want{})
	if has+balanceMargin > c.p.emptiest() || c.moves.disks[from.DiskID] > 0 || !atRest(s.vol) || d.node != from.Node || c.inUse(s) != "" || c.unreadable(s, from) != "" {
		return
	}
	for id, m := range c.moves.disks {
		if m > 0 {
			w.not[id] = true
		}
	}
	to, _, ok := c.p.choose(w)
	if !ok || to.left < has+balanceMargin {
		return
	}
	if c.moves.nodes[from.Node] < movesPerNode && c.moves.nodes[to.node] < movesPerNode {
		c.startMove(s, w, to.spot, "")
	}
}
