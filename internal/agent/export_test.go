package agent

import (
	"context"

	"ashlar/internal/plan"
)

// PlanAll plans everything as of now, in the running loop, and does nothing of it.
func (a *Agent) PlanAll(ctx context.Context) plan.NodePlan {
	out := make(chan plan.NodePlan, 1)
	a.tell(ctx, func(l *loop) {
		out <- plan.OnNode(plan.NodeInput{
			Node: a.cfg.Node, Address: a.cfg.Address, Now: l.now(), View: l.view, Found: l.found, Busy: l.busy, Failures: l.failures, Finished: l.finished,
			Background: l.background, Network: plan.Network(a.cfg.Network), Joined: a.joined(), Silent: l.silent, Downloads: a.downloads.byVolume(), Uploads: l.uploads,
		})
	})
	return <-out
}
