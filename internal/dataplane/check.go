package dataplane

import (
	"context"
	"fmt"
	"path"
	"slices"

	"ashlar/internal/dataplane/client"
	"ashlar/internal/layer"
	"ashlar/internal/replica"
	"ashlar/internal/replica/local"
)

// Check implements client.Service. It changes nothing. The head of an open volume is left out: it changes under the checker's eyes, and is checked by
// every open; detach the volume to have it looked at.
func (p *Process) Check(ctx context.Context, a client.Check) (client.Problems, error) {
	out, err := p.check(ctx, a)
	if err != nil {
		return client.Problems{}, forWire(fmt.Errorf("check: %w", err))
	}
	return out, nil
}

func (p *Process) check(ctx context.Context, a client.Check) (out client.Problems, err error) {
	open := false
	if s := p.slot(a.VolumeID); s != nil {
		// The token is held, so that the chain stays as it is meanwhile.
		if err := s.take(ctx); err != nil {
			return out, err
		}
		defer s.give()
		args, state, _ := s.look()
		if isFar(args) {
			return out, fmt.Errorf("volume %s: %w: replica %s is on node %s: ask there, by disk and replica", args.Volume, client.ErrInvalid, args.ReplicaID, args.ReplicaNode)
		}
		a.DiskID, a.ReplicaID, open = args.DiskID, args.ReplicaID, state == stateOpen
	}
	if !validID(a.ReplicaID) {
		return out, fmt.Errorf("volume %.40q is not open here, and replica %.40q is none: %w", a.VolumeID, a.ReplicaID, client.ErrNotFound)
	}
	d, err := p.disk(a.DiskID)
	if err != nil {
		return out, err
	}
	dir, err := local.Find(d.fs, a.ReplicaID)
	if err != nil {
		return out, err
	}
	f := local.Look(d.fs, dir)
	open = open || p.open.look(a.ReplicaID) != nil // by another node
	found := []client.Problem{}
	if open && len(f.Chain.Layers) > 0 {
		out.LeftOut = []string{fmt.Sprintf("the head, %s: it changes while the volume is open, and was checked when it was opened; detach the volume to have it checked too", f.Chain.Layers[0])}
	}
	if f.Err != nil {
		found = append(found, client.Problem{Object: dir, What: f.Err.Error()})
	}
	if f.RecordLost {
		found = append(found, client.Problem{Object: dir, What: "the replica's record is lost"})
	}
	for _, names := range checkOrder(f, open) {
		problems, err := layer.Check(ctx, d.fs, names)
		if err != nil {
			return out, err
		}
		for _, pr := range problems {
			what := pr.Text
			if pr.Units > 0 {
				what = fmt.Sprintf("units %d to %d: %s", pr.Unit, pr.Unit+pr.Units-1, pr.Text)
			}
			found = append(found, client.Problem{Object: pr.Name, What: what})
		}
	}
	out.Problems = found
	return out, nil
}

// checkOrder returns the layer files to check: the stack of the present, head first and the image last, and then each layer beside it alone.
func checkOrder(f local.Found, open bool) [][]string {
	var stack []string
	chain := f.Chain.Layers
	if open && len(chain) > 0 {
		chain = chain[1:]
	}
	file := func(id replica.LayerID) string { return path.Join(f.Dir, string(id)+".layer") }
	for _, id := range chain {
		stack = append(stack, file(id))
	}
	if f.BasePath != "" {
		stack = append(stack, f.BasePath)
	}
	order := [][]string{stack}
	if len(stack) == 0 {
		order = nil
	}
	for _, l := range f.Layers {
		if !slices.Contains(f.Chain.Layers, l.ID) {
			order = append(order, []string{file(l.ID)})
		}
	}
	return order
}
