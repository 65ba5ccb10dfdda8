package api

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"ashlar/internal/catalog"
)

// oneNode is a Cluster that does what it is told, and remembers it.
type oneNode struct {
	c       catalog.Catalog
	state   ClusterState
	said    []string
	refuses error
}

func (o *oneNode) Describe(context.Context) (ClusterState, error) { return o.state, nil }
func (o *oneNode) Init(_ context.Context, address string) error {
	o.said = append(o.said, "init "+address)
	return o.refuses
}
func (o *oneNode) Join(_ context.Context, to, token, address string) error {
	o.said = append(o.said, "join "+to+" "+token+" "+address)
	return o.refuses
}
func (o *oneNode) Readdress(_ context.Context, address string) error {
	o.said = append(o.said, "readdress "+address)
	return o.refuses
}
func (o *oneNode) Token(ctx context.Context, life time.Duration) (string, catalog.Join, error) {
	now := time.Now().UTC()
	j := catalog.Join{Name: "t1", SHA256: "5ec2e7", Created: now, Expires: now.Add(life)}
	_, err := catalog.Write(ctx, o.c, catalog.JoinKey(j.Name), j, 0)
	return "ashlar1.x.s3cret", j, err
}

// TestClusterActions passes on what a node is to become, says what it was, and keeps the words of a refusal.
func TestClusterActions(t *testing.T) {
	o := &oneNode{state: ClusterState{ID: "c1", Node: "n1"}}
	s := serve(t, Config{Cluster: o}, nil)
	for action, body := range map[string]string{"init": `{"address":"h:1"}`, "join": `{"to":"x","token":"t","address":"h"}`, "readdress": `{"address":"h"}`} {
		_, data := s.ask(200, s.request("POST", "/v1/clusters/this?action="+action, strings.NewReader(body)))
		var info ClusterInfo
		if err := json.Unmarshal(data, &info); err != nil || info.ClusterID != "c1" || info.Address != "" || info.Actions["join"] == "" {
			t.Errorf("%s: %s %v", action, data, err)
		}
	}
	if len(o.said) != 3 {
		t.Errorf("it was told %v", o.said)
	}
	o.refuses = Failure(CodeConflict, "this node is in a cluster already")
	if _, data := s.ask(409, s.request("POST", "/v1/clusters/this?action=init", nil)); !bytes.Contains(data, []byte("in a cluster already")) {
		t.Errorf("a refusal: %s", data)
	}
	o.state.NodeID, o.state.Address = "1", "h:9510"
	if _, data := s.ask(200, s.request("GET", "/v1/clusters/this", nil)); !bytes.Contains(data, []byte("action=readdress")) || bytes.Contains(data, []byte("action=init")) {
		t.Errorf("in a cluster: %s", data)
	}
	s.ask(404, s.request("GET", "/v1/clusters/that", nil))
	s.ask(404, s.request("POST", "/v1/clusters/that?action=init", nil))
	s.ask(501, serve(t, Config{}, nil).request("POST", "/v1/clusters/this?action=init", nil))
}

// TestJoinTokenLife makes a join token: it is shown once and kept nowhere.
func TestJoinTokenLife(t *testing.T) {
	o := &oneNode{}
	s := serve(t, Config{Cluster: o}, nil)
	o.c = s.mem
	for _, life := range []string{"x", "-1h", "0"} {
		s.ask(400, s.request("POST", "/v1/jointokens", strings.NewReader(`{"life":"`+life+`"}`)))
	}
	res, data := s.ask(200, s.request("POST", "/v1/jointokens", nil))
	var made JoinToken
	if err := json.Unmarshal(data, &made); err != nil || made.Token != "ashlar1.x.s3cret" || made.Expired || res.Header.Get("Cache-Control") != "no-store" {
		t.Fatalf("%s %v", data, err)
	}
	for _, path := range []string{"/v1/jointokens", "/v1/jointokens/t1"} {
		if _, data := s.ask(200, s.request("GET", path, nil)); bytes.Contains(data, []byte("s3cret")) || bytes.Contains(data, []byte("5ec2e7")) || !bytes.Contains(data, []byte(`"t1"`)) {
			t.Errorf("%s: %s", path, data)
		}
	}
	s.ask(200, s.request("DELETE", "/v1/jointokens/t1", nil))
	s.ask(404, s.request("DELETE", "/v1/jointokens/t1", nil))
	s.ask(404, s.request("GET", "/v1/jointokens/t1", nil))
	s.ask(501, serve(t, Config{}, nil).request("POST", "/v1/jointokens", nil))
}
