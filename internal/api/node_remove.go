package api

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"strings"

	"ashlar/internal/catalog"
)

// nodeDelete has the cluster forget a node: one that is stopped and has nothing any more. With ?force=true also one that has, if it is dead: what lay on it is given up. It answers when that
// is recorded; the record goes when all is done. Asking again is no error.
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

// mayGo refuses to remove what the cluster needs: the last node, the last member of the catalogue, and whoever lives.
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
	_, lives := n.alive[name]
	switch {
	case others == 0:
		return Failure(CodeConflict, "node %s is the last of the cluster: it cannot be removed; to give up the cluster, shut the node down and delete its data directory", name)
	case lives || n.up(name):
		return Failure(CodeConflict, "node %s is running; empty it (`ashlar node drain %s`), stop it (`ashlar shutdown --node %s`), then remove it", name, name, name)
	case n.wanted[name].Voter && members == 0:
		return Failure(CodeConflict, "node %s keeps the last member of the catalogue that is left: the cluster would be without one", name)
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
