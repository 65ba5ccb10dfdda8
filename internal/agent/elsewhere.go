package agent

import (
	"context"
	"errors"
	"slices"

	"ashlar/internal/catalog"
	"ashlar/internal/plan"
)

// cluster reads who is there, now.
func (a *Agent) cluster(ctx context.Context) (*plan.View, error) {
	v := plan.NewView()
	for _, kind := range []catalog.Kind{catalog.KindNode, catalog.KindAlive} {
		es, _, err := a.cfg.Catalog.List(ctx, kind)
		if err != nil {
			return nil, err
		}
		for _, e := range es {
			if err := v.Apply(catalog.Event{Entry: e}); err != nil {
				return nil, err
			}
		}
	}
	return v, nil
}

// volumeHere returns a volume's wanted record if its home is this node, and Elsewhere if it is another. catalog.ErrNotFound; ErrNotHere while it has no home.
func (a *Agent) volumeHere(ctx context.Context, name string) (w catalog.VolumeWanted, err error) {
	v, err := a.cluster(ctx)
	if err != nil {
		return w, err
	}
	for _, part := range []catalog.Part{catalog.Wanted, catalog.Observed} {
		e, err := a.cfg.Catalog.Get(ctx, catalog.VolumeKey(part, name))
		if errors.Is(err, catalog.ErrNotFound) && part == catalog.Observed {
			continue
		}
		if err == nil {
			err = v.Apply(catalog.Event{Entry: e})
		}
		if err != nil {
			return w, err
		}
	}
	w = v.Volumes[name].Wanted.Value
	switch home := v.Home(name); {
	case home == "" || len(w.Replicas) == 0:
		return w, ErrNotHere
	case home != a.cfg.Node:
		return w, Elsewhere{home}
	}
	return w, nil
}

// diskElsewhere names another node that is up and has a disk for which ok is true, as Elsewhere; fallback if there is none.
func (a *Agent) diskElsewhere(ctx context.Context, ok func(diskID string) bool, fallback error) error {
	v, err := a.cluster(ctx)
	if err != nil {
		return err
	}
	var nodes []string
	for name, n := range v.Nodes {
		for _, d := range n.Observed.Value.Disks {
			if name != a.cfg.Node && d.DiskID != "" && v.Up(name) && ok(d.DiskID) {
				nodes = append(nodes, name)
			}
		}
	}
	if len(nodes) == 0 {
		return fallback
	}
	return Elsewhere{slices.Min(nodes)}
}
