package api

import (
	"context"
	"slices"

	"ashlar/internal/catalog"
)

// NodeContents is what a node has, and what is in the way of emptying it.
type NodeContents struct {
	Resource
	Node     string       `json:"node"`
	Attached []string     `json:"attached"` // volumes that are, or are to be, attached there
	Copies   []CopyOnNode `json:"copies"`   // of volumes, those that are being deleted too
	Images   []ImageOn    `json:"images"`   // copies of images
}

// CopyOnNode is a volume's copy on a node.
type CopyOnNode struct {
	Volume  string `json:"volume"`
	Replica string `json:"replica"` // its name
	Disk    string `json:"disk"`    // its name; "" if the node does not know the disk any more
	Waits   string `json:"waits"`   // what it waits for before it can leave; "": nothing
}

// ImageOn is an image's copy on a node.
type ImageOn struct {
	Image string `json:"image"`
	Disk  string `json:"disk"`
	State string `json:"state"`
	Waits string `json:"waits"` // what is in the way of emptying its disk; "": nothing, or nobody asked
}

func (h *Handler) nodeWays() []way {
	return []way{
		{path: "/{name}/contents", about: "What a node has, and what is in the way of emptying it.", do: h.nodeContents, out: NodeContents{}},
		{path: "/{name}/metrics", about: "What /metrics of that node says.", do: h.nodeMetrics, head: true, media: []string{"text/plain"}},
	}
}

func (h *Handler) nodeContents(c *call) (any, error) {
	nodes, err := h.loadNodes(c.r.Context())
	if err != nil {
		return nil, err
	}
	if _, ok := nodes.wanted[c.id]; !ok {
		return nil, Failure(CodeNotFound, "node %s: there is no such node", quote(c.id))
	}
	out, err := h.contents(c.r.Context(), nodes, c.id)
	out.Resource = Resource{ID: c.id, Type: "nodeContents", Links: map[string]string{"self": c.url("nodes", c.id, "contents"), "node": c.url("nodes", c.id)}, Actions: map[string]string{}}
	return out, err
}

// contents finds what the records have on a node.
func (h *Handler) contents(ctx context.Context, nodes nodeSet, node string) (NodeContents, error) {
	out := NodeContents{Node: node, Attached: []string{}, Copies: []CopyOnNode{}, Images: []ImageOn{}}
	volumes, err := list[catalog.VolumeWanted, volumeBrief](ctx, h, catalog.KindVolume)
	if err != nil {
		return out, err
	}
	images, err := list[catalog.ImageWanted, catalog.ImageObserved](ctx, h, catalog.KindImage)
	if err != nil {
		return out, err
	}
	disks := map[string]string{} // id -> name
	for name, d := range nodes.observed[node].Disks {
		if d.DiskID != "" {
			disks[d.DiskID] = name
		}
	}
	s := side{nodes: nodes}
	for _, name := range volumes.names() {
		w := volumes.wanted[name]
		v := s.view(w, volumes.observed[name].observed())
		if wantedOn(w, node) || v.attached() && v.observed.Node == node {
			out.Attached = append(out.Attached, name)
		}
		for _, p := range slices.Concat(w.Replicas, w.Dropped) {
			if p.Node == node {
				out.Copies = append(out.Copies, CopyOnNode{Volume: name, Replica: replicaName(name, p.ReplicaID), Disk: disks[p.DiskID], Waits: v.waits()})
			}
		}
	}
	for _, name := range images.names() {
		v := newImageView(images.wanted[name], images.observed[name])
		ids := v.onDisks()
		slices.Sort(ids)
		for _, id := range ids {
			if disk, ok := disks[id]; ok {
				out.Images = append(out.Images, ImageOn{Image: name, Disk: disk, State: v.observed.Disks[id].State, Waits: inTheWay(nodes.observed[node].Disks[disk].Conditions)})
			}
		}
	}
	return out, nil
}

// inTheWay is why what is to be emptied is not.
func inTheWay(conditions map[string]catalog.Condition) string {
	if c := conditions[catalog.ConditionEvicting]; c.Status == catalog.ConditionFalse {
		return c.Message
	}
	return ""
}

// waits says what a volume's copy waits for before it can leave its place: a volume is moved while nobody uses it (docs/decisions/0017).
func (v *volumeView) waits() string {
	switch why := inTheWay(v.observed.Conditions); {
	case v.wanted.Deleted != nil:
		return ""
	case why != "":
		return why
	case len(v.wanted.Tickets) > 0:
		return "it is attached to node " + v.wanted.Tickets[0].Node + "; it moves when it is detached"
	}
	return v.trouble()
}
