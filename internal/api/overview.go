package api

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"

	"ashlar/internal/catalog"
)

// Overview is the cluster in one answer of bounded size: what `ashlar status` shows. Volumes and images are counted, and named only where something is wrong.
type Overview struct {
	Resource
	Node     string          `json:"node"`    // which answers
	Version  string          `json:"version"` // its
	Ready    bool            `json:"ready"`   // as /readyz says
	Leader   string          `json:"leader"`  // the node whose control plans for the cluster; "": none, at the moment
	Nodes    []NodeOverview  `json:"nodes"`
	Volumes  map[string]int  `json:"volumes"` // how many, by state
	Health   map[string]int  `json:"health"`  // how many volumes, by robustness
	Images   int             `json:"images"`
	Problems []ObjectProblem `json:"problems"` // the first 100
	More     int             `json:"more"`     // problems that are not listed
	Events   []Event         `json:"events"`   // the last five warnings
}

// NodeOverview is a node and what it carries.
type NodeOverview struct {
	Node
	Attached int `json:"attached"` // volumes
	Copies   int `json:"copies"`   // of volumes
}

// ObjectProblem is something a person should look at.
type ObjectProblem struct {
	Kind    string `json:"kind"` // node, disk, volume, image
	Name    string `json:"name"` // of a disk: NODE/DISK
	Message string `json:"message"`
}

const (
	maxProblems       = 100
	maxOverviewEvents = 5
)

// volumeBrief is what an overview needs of a volume's observed half.
type volumeBrief struct {
	ID         string                       `json:"id"`
	State      string                       `json:"state"`
	Robustness string                       `json:"robustness"`
	Node       string                       `json:"node"`
	Conditions map[string]catalog.Condition `json:"conditions"`
	Error      string                       `json:"error"`
}

func (b volumeBrief) observed() catalog.VolumeObserved {
	return catalog.VolumeObserved{ID: b.ID, State: b.State, Robustness: b.Robustness, Node: b.Node, Conditions: b.Conditions, Error: b.Error}
}

// overview looks at everything once.
func (h *Handler) overview(c *call) (any, error) {
	ctx := c.r.Context()
	out := Overview{
		Resource: Resource{ID: "overview", Type: "overview", Links: map[string]string{"self": c.url("overview")}, Actions: map[string]string{}},
		Node:     h.cfg.Node, Version: h.cfg.Version, Nodes: []NodeOverview{}, Volumes: map[string]int{}, Health: map[string]int{}, Problems: []ObjectProblem{}, Events: []Event{},
	}
	status, _ := h.readyz(c.r)
	out.Ready = status == http.StatusOK
	nodes, err := h.loadNodesSince(ctx)
	if err != nil {
		return nil, err
	}
	out.Leader = nodes.leader
	h.overviewNodes(c, nodes, &out)
	if err := h.overviewVolumes(ctx, nodes, &out); err != nil {
		return nil, err
	}
	if err := h.overviewImages(ctx, nodes, &out); err != nil {
		return nil, err
	}
	events, _, err := h.events(c)
	if err != nil {
		return nil, err
	}
	events = slices.DeleteFunc(events, func(e seenEvent) bool { return e.record.Type == catalog.Normal })
	for _, e := range events[max(0, len(events)-maxOverviewEvents):] {
		ec := *c
		ec.noun = h.nouns["events"]
		out.Events = append(out.Events, h.event(&ec, e))
	}
	return out, nil
}

func (o *Overview) problem(kind, name, message string) {
	if len(o.Problems) >= maxProblems {
		o.More++
		return
	}
	o.Problems = append(o.Problems, ObjectProblem{Kind: kind, Name: name, Message: message})
}

func (h *Handler) overviewNodes(c *call, nodes nodeSet, out *Overview) {
	nc := *c
	nc.noun = h.nouns["nodes"]
	members, voters := 0, 0
	for _, name := range nodes.names() {
		n := h.node(&nc, nodes, name)
		out.Nodes = append(out.Nodes, NodeOverview{Node: n})
		ready := n.Conditions[catalog.ConditionReady]
		if ready.Status != catalog.ConditionTrue {
			out.problem("node", name, n.State+": "+ready.Message)
		}
		for _, cond := range slices.Sorted(maps.Keys(n.Conditions)) {
			s := n.Conditions[cond]
			wished := cond == catalog.ConditionReady || cond == catalog.ConditionSchedulable && s.Reason != reasonNoDisk
			if s.Status == catalog.ConditionFalse && s.Message != "" && !wished && n.State != NodeDown {
				out.problem("node", name, "not "+cond+": "+s.Message)
			}
		}
		if n.Voter {
			voters++
			switch {
			case n.State == NodeDown:
			case n.Member == memberVoter:
				members++
			case n.Member != "" && n.Member != "learner":
				out.problem("node", name, "its member of the catalogue failed: "+n.Member)
			}
		}
		for _, disk := range slices.Sorted(maps.Keys(n.Disks)) {
			d := n.Disks[disk]
			if n.State == NodeDown || ready.Reason == reasonNotSeen {
				break // said for the node
			}
			for _, cond := range []string{catalog.ConditionReady, catalog.ConditionNearlyFull} {
				if s := d.Conditions[cond]; s.Message != "" && (s.Status == catalog.ConditionTrue) == (cond == catalog.ConditionNearlyFull) {
					out.problem("disk", name+"/"+disk, s.Message)
				}
			}
		}
	}
	if left := members - voters/2; voters > 1 && left < 2 && members < voters {
		out.problem("cluster", "catalogue", fmt.Sprintf("%d of %d members vote: if one more fails, nothing can be changed until it is back", members, voters))
	}
}

func (h *Handler) overviewVolumes(ctx context.Context, nodes nodeSet, out *Overview) error {
	volumes, err := list[catalog.VolumeWanted, volumeBrief](ctx, h, catalog.KindVolume)
	if err != nil {
		return err
	}
	attached, copies := map[string]int{}, map[string]int{}
	s := side{nodes: nodes}
	for _, name := range volumes.names() {
		v := s.view(volumes.wanted[name], volumes.observed[name].observed())
		out.Volumes[v.state()]++
		out.Health[v.robustness()]++
		if v.observed.State == catalog.VolumeAttached && len(v.wanted.Tickets) > 0 {
			attached[v.observed.Node]++
		}
		for _, r := range v.wanted.Replicas {
			copies[r.Node]++
		}
		trouble := v.trouble()
		cond := v.observed.Conditions[catalog.ConditionScheduled]
		switch {
		case trouble != "":
			out.problem("volume", name, trouble)
		case v.observed.Robustness == catalog.RobustnessFaulted:
			out.problem("volume", name, "faulted; `ashlar volume show "+name+"`")
		case cond.Status == catalog.ConditionFalse && len(v.wanted.Replicas) == 0 && v.wanted.Deleted == nil:
			out.problem("volume", name, cond.Message)
		}
	}
	for i := range out.Nodes {
		out.Nodes[i].Attached, out.Nodes[i].Copies = attached[out.Nodes[i].Name], copies[out.Nodes[i].Name]
	}
	return nil
}

func (h *Handler) overviewImages(ctx context.Context, nodes nodeSet, out *Overview) error {
	images, err := list[catalog.ImageWanted, catalog.ImageObserved](ctx, h, catalog.KindImage)
	if err != nil {
		return err
	}
	out.Images = len(images.wanted)
	of := nodes.diskNodes()
	for _, name := range images.names() {
		v := newImageView(images.wanted[name], images.observed[name])
		v.hide(of, nodes)
		ready, failed := v.in(catalog.ImageReady), []string{}
		for _, d := range v.observed.Disks {
			if d.State == catalog.ImageFailed {
				failed = append(failed, d.Message)
			}
		}
		slices.Sort(failed)
		switch {
		case len(failed) > 0 && !ready:
			out.problem("image", name, "failed: "+strings.Join(slices.Compact(failed), "; "))
		case len(failed) > 0:
			out.problem("image", name, "a copy failed: "+strings.Join(slices.Compact(failed), "; "))
		case v.observed.Error != "" && v.wanted.Deleted == nil:
			out.problem("image", name, v.observed.Error)
		}
	}
	return nil
}
