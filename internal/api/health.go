package api

import (
	"context"
	"errors"
	"net/http"
	"time"

	"ashlar/internal/catalog"
)

// readyTimeout bounds how long /readyz waits for the catalogue.
const readyTimeout = 2 * time.Second

// healthz tells that this process answers.
func (h *Handler) healthz(*http.Request) (int, any) {
	return http.StatusOK, Health{Type: "health", Status: "ok", Checks: map[string]string{"api": "ok"}}
}

// readyz tells whether requests can be served: the catalogue answers, this node is ready and, in a cluster, known to live, and its data process answers.
func (h *Handler) readyz(r *http.Request) (int, any) {
	ctx, cancel := context.WithTimeout(r.Context(), readyTimeout)
	defer cancel()
	health := Health{Type: "health", Status: "ok", Checks: map[string]string{"api": "ok", "catalogue": "ok", "node": "ok", "data": "ok"}}
	status := http.StatusOK
	bad := func(check, what string) {
		health.Status, status = "not ready", http.StatusServiceUnavailable
		health.Checks[check] = what
	}
	o, _, err := catalog.Read[catalog.NodeObserved](ctx, h.cfg.Catalog, catalog.NodeKey(catalog.Observed, h.cfg.Node))
	switch {
	case errors.Is(err, catalog.ErrNotFound):
		bad("node", "has not reported yet")
	case err != nil:
		bad("catalogue", err.Error())
		bad("node", "not known")
	case !o.Ready:
		bad("node", "not ready: "+o.Conditions[catalog.ConditionReady].Message)
	case o.Port != 0:
		if _, lives, err := find[catalog.Alive](ctx, h.cfg.Catalog, catalog.AliveKey(h.cfg.Node)); err != nil {
			bad("catalogue", err.Error())
		} else if !lives {
			bad("node", "its lease ran out: the other nodes take it for dead")
		}
	}
	if h.cfg.Extra != nil {
		// Asking for its counters is the least that the data process can be asked.
		if err := h.cfg.Extra.VolumeCounters(ctx, func(string, map[string]uint64) {}); err != nil {
			bad("data", "the data process does not answer: "+err.Error())
		}
	}
	return status, health
}
