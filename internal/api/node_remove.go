package api

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strconv"
	"strings"

	"ashlar/internal/catalog"
)

// nodeDelete has the cluster forget a node that has nothing any more: one that is stopped, or that was emptied and runs; that one gives up its member of the catalogue while there are enough to
// agree on it, and ends. With ?force=true also one that has something, if it is dead: what lay on it is given up. It answers when that is recorded; the record goes when all is done. Asking
// again is no error.
func (h *Handler) nodeDelete(c *call) (any, error) {
	force := false
	if text := c.r.URL.Query().Get("force"); text != "" {
		var err error
		if force, err = strconv.ParseBool(text); err != nil {
			return nil, Failure(CodeInvalid, "node %s: force is %s; true or false", quote(c.id), quote(text))
		}
	}
	ctx := c.r.Context()
	nodes, err := h.loadNodes(ctx)
	if err != nil {
		return nil, err
	}
	w, ok := nodes.wanted[c.id]
	if !ok {
		return nil, Failure(CodeNotFound, "node %s: there is no such node", quote(c.id))
	}
	if w.Deleted != nil && !force {
		return nil, nil
	}
	if err := nodes.mayGo(c.id); err != nil {
		return nil, err
	}
	if nodes.lives(c.id) {
		if err := h.mayGoAlive(nodes, c.id, force); err != nil {
			return nil, err
		}
	}
	if err := h.emptied(ctx, nodes, c.id, force); err != nil {
		return nil, err
	}
	now := h.cfg.Now().UTC()
	_, _, err = catalog.Update(ctx, h.cfg.Catalog, catalog.NodeKey(catalog.Wanted, c.id), func(n *catalog.NodeWanted) error {
		if n.ID != w.ID {
			return Failure(CodeConflict, "node %s was replaced by another of that name meanwhile", c.id)
		}
		n.AllowScheduling = false
		n.Lost = n.Lost || force
		if n.Deleted == nil {
			n.Deleted = &now
		}
		return nil
	})
	return nil, h.gone(c, err)
}

// lives tells whether a node's serve is there, or was a moment ago.
func (n nodeSet) lives(name string) bool {
	_, alive := n.alive[name]
	return alive || n.up(name)
}

// mayGo refuses to remove what the cluster needs: the last node, and the last member of the catalogue.
func (n nodeSet) mayGo(name string) error {
	others, members := 0, 0
	for other, w := range n.wanted {
		if other == name || w.Deleted != nil {
			continue
		}
		others++
		if w.Voter && !n.down(other) {
			members++
		}
	}
	switch {
	case others == 0:
		return Failure(CodeConflict, "node %s is the last of the cluster: it cannot be removed; to give up the cluster, shut the node down and delete its data directory", name)
	case n.wanted[name].Voter && members == 0:
		return Failure(CodeConflict, "node %s keeps the last member of the catalogue that is left: the cluster would be without one", name)
	}
	return nil
}

// mayGoAlive refuses to remove a node that runs unless it was emptied, and unless those who are left can agree without it: it is asked to give up its member itself, while it can.
func (h *Handler) mayGoAlive(nodes nodeSet, name string, force bool) error {
	w := nodes.wanted[name]
	voters, up := 0, 0
	var down []string
	for _, other := range slices.Sorted(maps.Keys(nodes.wanted)) {
		if v := nodes.wanted[other]; other == name || !v.Voter || v.Deleted != nil {
			continue
		}
		if voters++; nodes.lives(other) {
			up++
		} else {
			down = append(down, other)
		}
	}
	switch {
	case force || !w.EvictionRequested || w.AllowScheduling:
		return Failure(CodeConflict, "node %s is running; empty it (`ashlar node drain %s`), then remove it: it ends itself then, or stop it before (`ashlar shutdown --node %s`)", name, name, name)
	case name == h.cfg.Node:
		return Failure(CodeConflict, "node %s is the one that was asked, and it ends when it is removed; ask another node to remove it", name)
	case w.Voter && up <= voters/2:
		return Failure(CodeConflict, "node %s keeps a member of the catalogue, and without it too few could agree, because nodes are down: %s; start them or remove them first", name, strings.Join(down, ", "))
	}
	return nil
}

// emptied refuses to remove a node that has something. With force what it has is given up: what was to be attached there is not any more.
func (h *Handler) emptied(ctx context.Context, nodes nodeSet, name string, force bool) error {
	has, err := h.contents(ctx, nodes, name)
	if err != nil {
		return err
	}
	if force {
		return h.giveUpTickets(ctx, has.Attached, name)
	}
	var why []string
	add := func(what string, names []string) {
		if names = slices.Compact(names); len(names) > 0 {
			why = append(why, what+few(names))
		}
	}
	var copies, images []string
	for _, v := range has.Copies {
		copies = append(copies, v.Volume)
	}
	for _, i := range has.Images {
		images = append(images, i.Image)
	}
	add("attached there: ", has.Attached)
	add("copies of volumes: ", copies)
	add("copies of images: ", images)
	if len(why) == 0 {
		return nil
	}
	return Failure(CodeInUse, "node %s still has %s; empty it first (`ashlar node drain %s`), or, if it is lost for good, force it: what only it had is lost then",
		name, strings.Join(why, "; "), name)
}

// giveUpTickets ends the attachments to a node that will not come back.
func (h *Handler) giveUpTickets(ctx context.Context, volumes []string, node string) error {
	for _, volume := range volumes {
		_, _, err := catalog.Update(ctx, h.cfg.Catalog, catalog.VolumeKey(catalog.Wanted, volume), func(w *catalog.VolumeWanted) error {
			w.Tickets = slices.DeleteFunc(w.Tickets, func(t catalog.Ticket) bool { return t.Node == node })
			return nil
		})
		if err != nil && !errors.Is(err, catalog.ErrNotFound) {
			return err
		}
	}
	return nil
}

// few lists the first names of many.
func few(names []string) string {
	const most = 5
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return strings.Join(names[:most], ", ") + " and " + strconv.Itoa(len(names)-most) + " more"
}
