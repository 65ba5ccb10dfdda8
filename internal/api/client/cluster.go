package client

import (
	"context"
	"net/http"
	"time"

	"ashlar/internal/api"
)

// Cluster says which cluster the node that is asked is in, and who it is there.
func (c *Client) Cluster(ctx context.Context) (api.ClusterInfo, error) {
	return one[api.ClusterInfo](ctx, c, http.MethodGet, at("clusters", "this", ""), nil)
}

// InitCluster opens the node's cluster of one at an address, HOST or HOST:PORT. The node is then built anew: WaitCluster. CodeConflict if it is in one, CodeInvalid.
func (c *Client) InitCluster(ctx context.Context, address string) (api.ClusterInfo, error) {
	return one[api.ClusterInfo](ctx, c, http.MethodPost, at("clusters", "this", "init"), map[string]any{"address": address})
}

// NewMember is a node that is to join a cluster.
type NewMember struct {
	To      string // HOST or HOST:PORT of any node of the cluster
	Token   string // a join token
	Address string // HOST or HOST:PORT by which others reach this node
}

// JoinCluster makes the node that is asked one of another's cluster. It is then built anew: WaitCluster. CodeInUse if there is something on it, CodeConflict, CodeExists, CodeNotFound,
// CodeInvalid, CodeVersion, CodeUnreachable.
func (c *Client) JoinCluster(ctx context.Context, n NewMember) (api.ClusterInfo, error) {
	return one[api.ClusterInfo](ctx, c, http.MethodPost, at("clusters", "this", "join"), map[string]any{"to": n.To, "token": n.Token, "address": n.Address})
}

// Readdress changes where the node that is asked is reached by others. It is then built anew: WaitCluster.
func (c *Client) Readdress(ctx context.Context, address string) (api.ClusterInfo, error) {
	return one[api.ClusterInfo](ctx, c, http.MethodPost, at("clusters", "this", "readdress"), map[string]any{"address": address})
}

// clusterTick is how often WaitCluster asks.
const clusterTick = 20 * time.Millisecond

// WaitCluster waits until the node, built anew, answers in its cluster with an address other than was (as Cluster said before), and is ready.
func (c *Client) WaitCluster(ctx context.Context, was string) (api.ClusterInfo, error) {
	tick := time.NewTicker(clusterTick)
	defer tick.Stop()
	for {
		info, err := c.Cluster(ctx)
		if err == nil && info.Address != was && c.Ready(ctx) == nil {
			return info, nil
		}
		select {
		case <-ctx.Done():
			return info, ctx.Err()
		case <-tick.C:
		}
	}
}

// CreateJoinToken makes a token that lets one machine join within a time (0: an hour); it is in the answer's Token, and nowhere else.
func (c *Client) CreateJoinToken(ctx context.Context, life time.Duration) (api.JoinToken, error) {
	body := map[string]any{}
	if life != 0 {
		body["life"] = life.String()
	}
	return one[api.JoinToken](ctx, c, http.MethodPost, "/v1/jointokens", body)
}

// JoinTokens lists the join tokens, without what they are.
func (c *Client) JoinTokens(ctx context.Context) ([]api.JoinToken, error) {
	return list[api.JoinToken](ctx, c, http.MethodGet, "/v1/jointokens")
}

// DeleteJoinToken makes a join token invalid.
func (c *Client) DeleteJoinToken(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodDelete, at("jointokens", name, ""), nil, nil)
}
