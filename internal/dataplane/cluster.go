package dataplane

import (
	"context"
	"fmt"

	"ashlar/internal/dataplane/client"
)

// SetCluster implements client.Service.
func (p *Process) SetCluster(_ context.Context, a client.Cluster) error {
	return forWire(fmt.Errorf("cluster %s: %w: this build has no replicas on other nodes", a.ClusterID, client.ErrInvalid))
}
