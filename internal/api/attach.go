package api

import (
	"cmp"
	"errors"
	"slices"
	"strings"

	"ashlar/internal/catalog"
)

type attachInput struct {
	HostID          string `json:"hostId"`
	DisableFrontend bool   `json:"disableFrontend"`
	AttachmentID    string `json:"attachmentID"`
	Frontend        string `json:"frontend"` // ours: the volume's from now on; "": as it is
}

// attach adds a ticket: the volume shall be attached to a node, from now until detach, through whatever happens in between. It returns at once.
func (h *Handler) attach(c *call) (any, error) {
	var in attachInput
	if err := c.body(&in); err != nil {
		return nil, err
	}
	if err := checkFrontend(c.id, in.Frontend); err != nil {
		return nil, err
	}
	ctx := c.r.Context()
	v, err := h.loadVolume(ctx, c.id)
	if err != nil {
		return nil, err
	}
	if err := h.checkHost(c, v, in.HostID); err != nil {
		return nil, err
	}
	_, _, err = catalog.Update(ctx, h.cfg.Catalog, catalog.VolumeKey(catalog.Wanted, c.id), func(w *catalog.VolumeWanted) error {
		return h.addTicket(w, in)
	})
	if err != nil {
		return nil, h.gone(c, err)
	}
	return h.volumeGet(c)
}

// checkHost wants a node that is there, and a volume that can come up somewhere.
func (h *Handler) checkHost(c *call, v *volumeView, host string) error {
	nodes := v.nodes
	if host == "" {
		return Failure(CodeInvalid, "volume %s: attach needs hostId, the node to attach to; nodes: %s", c.id, nodeNames(nodes.wanted))
	}
	if _, ok := nodes.wanted[host]; !ok {
		return Failure(CodeNotFound, "volume %s: there is no node %s to attach to; nodes: %s", c.id, quote(host), nodeNames(nodes.wanted))
	}
	if w := nodes.wanted[host]; w.Deleted != nil {
		return Failure(CodeConflict, "volume %s: node %s is being removed; attach it to another", c.id, host)
	}
	if !nodes.up(host) {
		return Failure(CodeUnreachable, "volume %s: node %s is %s; `ashlar status` says why", c.id, host, nodes.state(host))
	}
	for _, t := range v.wanted.Tickets {
		if t.Node != host && t.Kind == catalog.TicketAPI && nodes.down(t.Node) {
			return Failure(CodeConflict, "volume %s is attached to node %s, which is down; to take it from there: `ashlar volume detach %s --force`, then attach it here", c.id, t.Node, c.id)
		}
	}
	if s := v.observed.Conditions[catalog.ConditionScheduled]; len(v.wanted.Replicas) == 0 && s.Status == catalog.ConditionFalse {
		return Failure(CodeConflict, "volume %s has no scheduled replicas: %s", c.id, s.Message)
	}
	return nil
}

// addTicket is the rule of attach, on the record.
func (h *Handler) addTicket(w *catalog.VolumeWanted, in attachInput) error {
	if w.Deleted != nil {
		return Failure(CodeConflict, "volume %s is being deleted", w.Name)
	}
	for _, t := range w.Tickets {
		switch {
		case t.Node != in.HostID && t.Kind == catalog.TicketAPI:
			return Failure(CodeConflict, "volume %s is attached to node %s; detach it there first", w.Name, t.Node)
		case t.Node != in.HostID:
			return Failure(CodeConflict, "volume %s is busy with an operation on node %s; try again when it is done", w.Name, t.Node)
		case t.Kind != catalog.TicketAPI:
			continue
		case t.DisableFrontend != in.DisableFrontend:
			is, not := "enabled", "disabled"
			if t.DisableFrontend {
				is, not = not, is
			}
			return Failure(CodeConflict, "volume %s is attached with its frontend %s; detach it before attaching it with the frontend %s", w.Name, is, not)
		case !t.DisableFrontend && in.Frontend != "" && in.Frontend != w.Frontend:
			return Failure(CodeConflict, "volume %s is attached with the frontend %s; detach it before attaching it with %s", w.Name, w.Frontend, in.Frontend)
		case t.ID == in.AttachmentID:
			return nil
		}
	}
	w.Frontend = cmp.Or(in.Frontend, w.Frontend)
	w.Tickets = append(w.Tickets, catalog.Ticket{
		ID: in.AttachmentID, Node: in.HostID, Kind: catalog.TicketAPI, DisableFrontend: in.DisableFrontend, Created: h.cfg.Now().UTC(),
	})
	return nil
}

type detachInput struct {
	HostID       string `json:"hostId"`
	AttachmentID string `json:"attachmentID"`
	ForceDetach  bool   `json:"forceDetach"`
}

// detach removes a ticket; forceDetach removes all of them. It returns at once, and a volume that is not attached is no error.
func (h *Handler) detach(c *call) (any, error) {
	var in detachInput
	if err := c.body(&in); err != nil {
		return nil, err
	}
	_, _, err := catalog.Update(c.r.Context(), h.cfg.Catalog, catalog.VolumeKey(catalog.Wanted, c.id), func(w *catalog.VolumeWanted) error {
		w.Tickets = slices.DeleteFunc(w.Tickets, func(t catalog.Ticket) bool {
			return in.ForceDetach || t.Kind == catalog.TicketAPI && t.ID == in.AttachmentID && (in.HostID == "" || in.HostID == t.Node)
		})
		return nil
	})
	if err != nil {
		return nil, h.gone(c, err)
	}
	return h.volumeGet(c)
}

type salvageInput struct {
	Names []string `json:"names"`
}

// salvage records a person's decision to open a faulted volume from what is left.
func (h *Handler) salvage(c *call) (any, error) {
	var in salvageInput
	if err := c.body(&in); err != nil {
		return nil, err
	}
	v, err := h.loadVolume(c.r.Context(), c.id)
	if err != nil {
		return nil, err
	}
	if v.observed.Robustness != catalog.RobustnessFaulted {
		return nil, Failure(CodeConflict, "volume %s is not faulted: there is nothing to salvage", c.id)
	}
	var known []string
	for _, r := range v.wanted.Replicas {
		known = append(known, replicaName(v.wanted.Name, r.ReplicaID))
	}
	for _, n := range in.Names {
		if !slices.Contains(known, n) {
			return nil, Failure(CodeInvalid, "volume %s has no replica %s; it has: %s", c.id, quote(n), strings.Join(known, ", "))
		}
	}
	_, _, err = catalog.Update(c.r.Context(), h.cfg.Catalog, catalog.VolumeKey(catalog.Wanted, c.id), func(w *catalog.VolumeWanted) error {
		w.Salvage = true
		return nil
	})
	if err != nil {
		return nil, h.gone(c, err)
	}
	return h.volumeGet(c)
}

// gone says a missing record in the words of the called noun.
func (h *Handler) gone(c *call, err error) error {
	if errors.Is(err, catalog.ErrNotFound) {
		return Failure(CodeNotFound, "%s %s: there is no such %s", c.noun.schema, quote(c.id), c.noun.schema)
	}
	return err
}
