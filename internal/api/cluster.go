package api

import (
	"context"
	"time"

	"ashlar/internal/catalog"
)

// Cluster is what makes the node that answers one of a cluster. internal/node implements it. Whatever changes the node answers first; the node is then built anew, and does not
// answer for a moment.
type Cluster interface {
	// Describe says which cluster this is and who this node is in it.
	Describe(ctx context.Context) (ClusterState, error)
	// Init opens this node's cluster of one at an address (HOST or HOST:PORT).
	Init(ctx context.Context, address string) error
	// Join makes this node, on which there is nothing, one of the cluster that a node at to (HOST or HOST:PORT) is of. A node of that cluster whose certificate has ended gets another; address is
	// not looked at then.
	Join(ctx context.Context, to, token, address string) error
	// Readdress changes where this node is reached.
	Readdress(ctx context.Context, address string) error
	// Token makes a join token that is good for so long.
	Token(ctx context.Context, life time.Duration) (string, catalog.Join, error)
}

// ClusterState is what Cluster.Describe says; NodeID, Address and Fingerprint are empty in a cluster of one that listens nowhere.
type ClusterState struct {
	ID, Node, NodeID, Address, Fingerprint string
}

// ClusterInfo is the cluster as the node that answers is in it. There is one, called this.
type ClusterInfo struct {
	Resource
	ClusterID   string `json:"clusterID"`
	Node        string `json:"node"`        // that answers
	NodeID      string `json:"nodeID"`      // "": it is a cluster of one that listens nowhere
	Address     string `json:"address"`     // of the node, HOST:PORT
	Fingerprint string `json:"fingerprint"` // of the cluster's authority, as join tokens say it
}

// JoinToken lets one machine join the cluster.
type JoinToken struct {
	Resource
	Name    string `json:"name"`
	Created string `json:"created"`
	Expires string `json:"expires"`
	Expired bool   `json:"expired"`
	Used    string `json:"used"`            // when; "": not yet
	UsedBy  string `json:"usedBy"`          // which node
	Token   string `json:"token,omitempty"` // shown once: in the answer that made it
}

type clusterAddressInput struct {
	Address string `json:"address"` // HOST or HOST:PORT by which other machines reach this one; four ports in a row are used
}

type clusterJoinInput struct {
	To      string `json:"to"`      // HOST or HOST:PORT of any node of the cluster
	Token   string `json:"token"`   // a join token
	Address string `json:"address"` // HOST or HOST:PORT by which other machines reach this one
}

type joinTokenInput struct {
	Life string `json:"life"` // a duration, such as 1h, which it is unless something else is said
}

// thisCluster is the id of the one resource.
const thisCluster = "this"

// joinTokenLife is how long a join token is good unless something else is said.
const joinTokenLife = time.Hour

// clusterNouns are the cluster and its join tokens.
func (h *Handler) clusterNouns() []*noun {
	return []*noun{
		{schema: "cluster", plural: "clusters", one: ClusterInfo{}, list: h.clusterList, get: h.clusterGet, kinds: []catalog.Kind{catalog.KindCluster}, hidden: true,
			actions: map[string]verb{
				"init":      {do: h.clusterInit, in: clusterAddressInput{}, out: ClusterInfo{}},
				"join":      {do: h.clusterJoin, in: clusterJoinInput{}, out: ClusterInfo{}},
				"readdress": {do: h.clusterReaddress, in: clusterAddressInput{}, out: ClusterInfo{}},
			}},
		{schema: "joinToken", plural: "jointokens", one: JoinToken{}, list: h.joinTokenList, create: h.joinTokenCreate, createIn: joinTokenInput{}, get: h.joinTokenGet,
			remove: h.joinTokenDelete, kinds: []catalog.Kind{catalog.KindJoin}, hidden: true},
	}
}

func (h *Handler) clusterInfo(c *call) (ClusterInfo, error) {
	if h.cfg.Cluster == nil {
		return ClusterInfo{}, missing("clusters")
	}
	s, err := h.cfg.Cluster.Describe(c.r.Context())
	if err != nil {
		return ClusterInfo{}, err
	}
	actions := []string{"init", "join"}
	if s.NodeID != "" {
		actions = []string{"readdress"}
	}
	return ClusterInfo{
		Resource: c.resourceOf(h.nouns["clusters"], thisCluster, actions...), ClusterID: s.ID, Node: s.Node, NodeID: s.NodeID, Address: s.Address, Fingerprint: s.Fingerprint,
	}, nil
}

func (h *Handler) clusterList(c *call) (any, error) {
	info, err := h.clusterInfo(c)
	if err != nil {
		return nil, err
	}
	return collect(c, c.noun.schema, []ClusterInfo{info}), nil
}

func (h *Handler) clusterGet(c *call) (any, error) {
	if err := onlyThis(c); err != nil {
		return nil, err
	}
	return h.clusterInfo(c)
}

func onlyThis(c *call) error {
	if c.id != thisCluster {
		return Failure(CodeNotFound, "cluster %s: there is one, called %s", quote(c.id), thisCluster)
	}
	return nil
}

// change reads the input of an action that changes the node, says before the change what it is, and changes it: afterwards there may be nobody left to ask.
func (h *Handler) change(c *call, in any, do func(context.Context) error) (any, error) {
	if err := onlyThis(c); err != nil {
		return nil, err
	}
	if err := c.body(in); err != nil {
		return nil, err
	}
	info, err := h.clusterInfo(c)
	if err != nil && CodeOf(err) != CodeUnreachable {
		return nil, err
	}
	return info, do(c.r.Context())
}

func (h *Handler) clusterInit(c *call) (any, error) {
	var in clusterAddressInput
	return h.change(c, &in, func(ctx context.Context) error { return h.cfg.Cluster.Init(ctx, in.Address) })
}

func (h *Handler) clusterJoin(c *call) (any, error) {
	var in clusterJoinInput
	return h.change(c, &in, func(ctx context.Context) error { return h.cfg.Cluster.Join(ctx, in.To, in.Token, in.Address) })
}

func (h *Handler) clusterReaddress(c *call) (any, error) {
	var in clusterAddressInput
	return h.change(c, &in, func(ctx context.Context) error { return h.cfg.Cluster.Readdress(ctx, in.Address) })
}

func (h *Handler) joinToken(c *call, j catalog.Join) JoinToken {
	return JoinToken{
		Resource: c.resource(j.Name), Name: j.Name, Created: stamp(j.Created), Expires: stamp(j.Expires), Expired: !h.cfg.Now().Before(j.Expires), Used: stamp(j.Used), UsedBy: j.UsedBy,
	}
}

func (h *Handler) joinTokenList(c *call) (any, error) {
	l, err := list[catalog.Join, struct{}](c.r.Context(), h, catalog.KindJoin)
	if err != nil {
		return nil, err
	}
	data := []JoinToken{}
	for _, name := range l.names() {
		data = append(data, h.joinToken(c, l.wanted[name]))
	}
	return collect(c, c.noun.schema, data), nil
}

func (h *Handler) joinTokenGet(c *call) (any, error) {
	j, ok, err := find[catalog.Join](c.r.Context(), h.cfg.Catalog, catalog.JoinKey(c.id))
	if err == nil && !ok {
		err = Failure(CodeNotFound, "join token %s: there is no such token", quote(c.id))
	}
	if err != nil {
		return nil, err
	}
	return h.joinToken(c, j), nil
}

// joinTokenCreate makes a join token and shows it, this once.
func (h *Handler) joinTokenCreate(c *call) (any, error) {
	if h.cfg.Cluster == nil {
		return nil, missing("clusters")
	}
	var in joinTokenInput
	if err := c.body(&in); err != nil {
		return nil, err
	}
	life := joinTokenLife
	if in.Life != "" {
		d, err := time.ParseDuration(in.Life)
		if err != nil || d <= 0 {
			return nil, Failure(CodeInvalid, "join token: life is %s; a duration is wanted, such as 1h", quote(in.Life))
		}
		life = d
	}
	l, err := list[catalog.Join, struct{}](c.r.Context(), h, catalog.KindJoin)
	if err != nil {
		return nil, err
	}
	if len(l.wanted) >= maxTokens {
		return nil, Failure(CodeConflict, "there are %d join tokens already; delete some that are not used", len(l.wanted))
	}
	token, record, err := h.cfg.Cluster.Token(c.r.Context(), life)
	if err != nil {
		return nil, err
	}
	res := h.joinToken(c, record)
	res.Token = token
	c.w.Header().Set("Cache-Control", "no-store")
	return res, nil
}

func (h *Handler) joinTokenDelete(c *call) (any, error) {
	e, err := h.cfg.Catalog.Get(c.r.Context(), catalog.JoinKey(c.id))
	if err == nil {
		err = h.cfg.Catalog.Delete(c.r.Context(), e.Key, e.Rev)
	}
	return nil, h.gone(c, err)
}
