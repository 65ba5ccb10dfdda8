package dataplane

import (
	"context"
	"fmt"

	"ashlar/internal/dataplane/client"
)

// CopyReplica implements client.Service.
func (p *Process) CopyReplica(_ context.Context, a client.CopyReplica) (client.Job, error) {
	return client.Job{}, forWire(fmt.Errorf("copy of replica %s: %w: this build does not copy replicas", a.From, client.ErrInvalid))
}
