package api

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"time"

	"ashlar/internal/catalog"
)

// This file passes on what only another node can answer: the bytes of images and volumes, differences, a node's counters, and its end. Everything else any node answers from
// the records.

// HeaderForwarded names the node that passed a request on. One that bears it is answered here or not at all.
const HeaderForwarded = "Ashlar-Forwarded"

type fromNodeKey struct{}

// FromNode marks a request as another node's, which has admitted it already: it may do everything, as over the unix socket. Whoever calls it has checked that node's certificate.
func FromNode(r *http.Request) *http.Request {
	return r.WithContext(context.WithValue(r.Context(), fromNodeKey{}, true))
}

func isFromNode(r *http.Request) bool {
	from, _ := r.Context().Value(fromNodeKey{}).(bool)
	return from
}

// elsewhere tells whether a call is to be answered by another node, as far as the records say. One that another node passed on is tried here: that node has asked its agent, or read
// records that are newer than ours.
func (h *Handler) elsewhere(r *http.Request, node string) bool {
	return node != "" && node != h.cfg.Node && r.Header.Get(HeaderForwarded) == ""
}

// forward has another node answer a call, unread and whole. Without a cluster, and for a request that was passed on already, it is a refusal that names the node.
func (h *Handler) forward(c *call, node, what string) (any, error) {
	if from := c.r.Header.Get(HeaderForwarded); from != "" {
		return nil, Failure(CodeUnreachable, "%s: node %s asked node %s, and only node %s can answer; it may just have moved: try again", what, quote(from), h.cfg.Node, node)
	}
	if h.cfg.Forward == nil {
		return nil, Failure(CodeNotBuilt, "%s: only node %s can answer that, and this is node %s", what, node, h.cfg.Node)
	}
	to, err := h.cfg.Forward(c.r.Context(), node)
	if err != nil {
		return nil, Because(err, CodeUnreachable, "%s: node %s, which has it, cannot be asked: %v", what, node, err)
	}
	to.ServeHTTP(c.w, c.hop(h.cfg.Node))
	return sent{}, nil
}

// forwardBody is forward of a call whose body was read: it goes as what was understood of it.
func (h *Handler) forwardBody(c *call, node, what string, body any) (any, error) {
	data, err := json.Marshal(body)
	if err != nil {
		panic(err) // it was decoded
	}
	c.r.Body, c.r.ContentLength = io.NopCloser(bytes.NewReader(data)), int64(len(data))
	c.r.Header.Del("Content-Encoding")
	c.r.TransferEncoding = nil
	return h.forward(c, node, what)
}

// hop is the request as it goes to another node: with the links' base that this client sees, and without its credentials, which are this node's to check.
func (c *call) hop(from string) *http.Request {
	r := c.r.Clone(c.r.Context())
	for _, name := range []string{"Authorization", "Cookie", "Origin", "Sec-Fetch-Site", "Sec-Fetch-Mode", "Sec-Fetch-Dest", "X-Forwarded-For", "X-Forwarded-Port"} {
		r.Header.Del(name)
	}
	r.Header.Set(HeaderForwarded, from)
	if base, err := url.Parse(c.base); err == nil { // we made it
		r.Header.Set("X-Forwarded-Proto", base.Scheme)
		r.Header.Set("X-Forwarded-Host", base.Host)
	}
	return r
}

// orForward is what to do with an error of Extra: one that says which node has what was asked for is answered there, if nothing of the request or the answer was spent yet.
func (h *Handler) orForward(c *call, err error, what string) (any, error) {
	if node := h.nodeOf(err); node != "" {
		return h.forward(c, node, what)
	}
	return nil, err
}

// nodeOf is the other node that an error of Extra names; "" if it names none.
func (h *Handler) nodeOf(err error) string {
	if err == nil || h.cfg.NodeOf == nil {
		return ""
	}
	if node := h.cfg.NodeOf(err); node != h.cfg.Node {
		return node
	}
	return ""
}

// nodeSet are the nodes, and which of them live.
type nodeSet struct {
	listed[catalog.NodeWanted, catalog.NodeObserved]
	alive  map[string]catalog.Alive
	silent map[string]time.Time // since when those that are down are, if loadNodesSince looked
	leader string               // who plans for all, if loadNodesSince looked; "": nobody, at the moment
}

func (h *Handler) loadNodes(ctx context.Context) (nodeSet, error) {
	n := nodeSet{}
	var err error
	if n.listed, err = list[catalog.NodeWanted, catalog.NodeObserved](ctx, h, catalog.KindNode); err != nil {
		return n, err
	}
	lives, err := list[struct{}, catalog.Alive](ctx, h, catalog.KindAlive)
	n.alive = lives.observed
	return n, err
}

// loadNodesSince is loadNodes, and looks for who leads, and among the events for when those that are down fell silent.
func (h *Handler) loadNodesSince(ctx context.Context) (nodeSet, error) {
	n, err := h.loadNodes(ctx)
	if err != nil {
		return n, err
	}
	leader, _, err := find[catalog.Leader](ctx, h.cfg.Catalog, catalog.LeaderKey())
	n.leader = leader.Node
	if err != nil || !slices.ContainsFunc(n.names(), n.down) {
		return n, err
	}
	events, err := list[catalog.EventRecord, struct{}](ctx, h, catalog.KindEvent)
	n.silent = map[string]time.Time{}
	for _, e := range events.wanted {
		if e.Kind == catalog.KindNode && e.Reason == catalog.ReasonNodeDown && e.Time.After(n.silent[e.Name]) {
			n.silent[e.Name] = e.Time
		}
	}
	return n, err
}

// down tells that nothing was heard of a node of the cluster for so long that others may take over what they are asked to. One that is not known is down too.
func (n nodeSet) down(node string) bool {
	if _, ok := n.wanted[node]; !ok {
		return true
	}
	_, lives := n.alive[node]
	return n.observed[node].Port != 0 && !lives
}

// up tells whether a node can be counted on now, as plan.View.Up does.
func (n nodeSet) up(node string) bool { return !n.down(node) && n.observed[node].Ready }

// diskNodes are the nodes by the ids of their disks.
func (n nodeSet) diskNodes() map[string]string {
	out := map[string]string{}
	for name, o := range n.observed {
		for _, d := range o.Disks {
			if d.DiskID != "" {
				out[d.DiskID] = name
			}
		}
	}
	return out
}

// nodeWithCopy is a node that has an image in a state: this one if it has, else the first that is up; "" if none is.
func (h *Handler) nodeWithCopy(ctx context.Context, v imageView, state string) (string, error) {
	nodes, err := h.loadNodes(ctx)
	if err != nil {
		return "", err
	}
	of := nodes.diskNodes()
	var have []string
	for disk, d := range v.observed.Disks {
		if node := of[disk]; d.State == state && node != "" {
			have = append(have, node)
		}
	}
	slices.Sort(have)
	if len(have) == 0 || slices.Contains(have, h.cfg.Node) {
		return h.cfg.Node, nil
	}
	if i := slices.IndexFunc(have, nodes.up); i >= 0 {
		return have[i], nil
	}
	return have[0], nil
}

// nodeOfVolume is the node that has a volume open, or that would open it: where it is attached or wanted, else where its first copy is. "" if nobody has it.
func (v *volumeView) nodeOfVolume() string {
	switch o := v.observed; {
	case v.attached() || o.State == catalog.VolumeDetaching && v.nodes.up(o.Node):
		return o.Node
	case len(v.wanted.Tickets) > 0:
		return v.wanted.Tickets[0].Node
	case o.Node != "" && v.nodes.up(o.Node):
		return o.Node
	case len(v.wanted.Replicas) > 0:
		return v.wanted.Replicas[0].Node
	}
	return ""
}

// PassTo returns a handler that passes requests on to one other node over rt, whole, with trailers, and unread until that node wants the body: for Config.Forward. base is where
// that node listens (https://HOST:PORT); rt asks for its certificate, and should have an ExpectContinueTimeout. A node that does not answer is CodeUnreachable: it may have done what
// was asked.
func PassTo(base *url.URL, rt http.RoundTripper) http.Handler {
	return &httputil.ReverseProxy{
		Transport:     rt,
		FlushInterval: -1,
		Rewrite: func(pr *httputil.ProxyRequest) {
			pr.SetURL(base)
			for _, name := range []string{"X-Forwarded-Proto", "X-Forwarded-Host"} { // ours: they were taken out
				pr.Out.Header[name] = pr.In.Header[name]
			}
		},
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			if r.Context().Err() != nil {
				panic(http.ErrAbortHandler) // nobody waits for an answer
			}
			e := Because(err, CodeUnreachable, "the node at %s did not answer, and may have done what was asked: %v", base.Host, err)
			write(w, e.Status, errorBody(r, e))
		},
		ErrorLog: log.New(io.Discard, "", 0), // what goes wrong is answered
	}
}
