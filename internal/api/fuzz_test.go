package api

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"ashlar/internal/catalog"
)

func newRecorder() *httptest.ResponseRecorder { return httptest.NewRecorder() }

// onLoopback makes a request one that came over plain TCP on loopback.
func onLoopback(r *http.Request) *http.Request {
	return r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, net.Addr(&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9500})))
}

// FuzzRequest throws anything at a Handler: it must not panic, and must always answer what clients can read.
func FuzzRequest(f *testing.F) {
	for _, s := range [][3]string{
		{"GET", "/v1/schemas", ""}, {"GET", "/v1/volumes/db1", ""}, {"POST", "/v1/volumes", `{"name":"db2","size":"1Gi","backingImage":"debian"}`},
		{"POST", "/v1/volumes/db1?action=attach", `{"hostId":"n1"}`}, {"POST", "/v1/volumes/db1?action=snapshotCreate", `{"name":"s","labels":{"a":"b"}}`},
		{"POST", "/v1/volumes/db1?action=expand", `{"size":"1e9"}`}, {"PUT", "/v1/nodes/n1", `{"tags":["a"]}`}, {"DELETE", "/v1/nodes/n1?force=true", ""}, {"POST", "/v1/nodes/n1?action=change", `{"placementZone":"a"}`}, {"POST", "/v1/nodes/n1?action=diskChange", `{"disk":"a","path":"/y","tags":[]}`}, {"GET", "/v1/nodes/n1/contents", ""}, {"GET", "/v1/overview", ""}, {"GET", "/v1/nodes/n2/metrics", ""}, {"POST", "/v1/volumes/db1?action=updateDataLocality", `{"dataLocality":"best-effort"}`}, {"PUT", "/v1/settings/default-replica-count", `{"value":"{\"v1\":\"2\"}"}`},
		{"POST", "/v1/nodes/n1?action=diskUpdate", `{"disks":{"a":{"path":"/x","tags":null}}}`}, {"DELETE", "/v1/backingimages/debian", ""},
		{"POST", "/v1/backingimages", `{"name":"i","sourceType":"download","parameters":{"url":"http://[::1]/%zz"}}`}, {"GET", "/v1/volumes/%2e%2e%2f", ""},
		{"PATCH", "//v1//", "\x00"}, {"GET", "/v1/backuptargets/default", ""}, {"POST", "/v1/volumes/db1?action=salvage", `{"names":[null]}`}, {"GET", "/readyz", ""},
		{"POST", "/v1/volumes/db1?action=updateLimits", `{"iops":5,"burstIOPS":"1k"}`}, {"POST", "/v1/volumes/db1?action=snapshotDiff", `{"from":"s1"}`}, {"GET", "/v1/ws/5s/volumes", ""},
		{"POST", "/v1/backingimages/debian?action=upload&size=512", "x"}, {"POST", "/v1/tokens", `{"name":"t"}`}, {"GET", "/v1/operations/a/b", ""}, {"GET", "/v1/volumes?access_token=x", ""},
	} {
		f.Add(s[0], s[1], s[2])
	}
	mem := catalog.NewMem()
	for k, v := range map[catalog.Key]any{
		catalog.NodeKey(catalog.Wanted, "n1"):      catalog.NodeWanted{Name: "n1", Disks: map[string]catalog.DiskWanted{"disk1": {Path: "/d"}}},
		catalog.NodeKey(catalog.Observed, "n1"):    catalog.NodeObserved{Name: "n1", Ready: true},
		catalog.ImageKey(catalog.Wanted, "debian"): catalog.ImageWanted{Name: "debian", ID: strings.Repeat("0", 32)},
		catalog.VolumeKey(catalog.Wanted, "db1"): catalog.VolumeWanted{Name: "db1", ID: strings.Repeat("1", 32), SizeBytes: 1 << 30, Copies: 1,
			Tickets: []catalog.Ticket{{Node: "n1", Kind: catalog.TicketAPI}}},
		catalog.VolumeKey(catalog.Observed, "db1"): catalog.VolumeObserved{Name: "db1", ID: strings.Repeat("1", 32), State: catalog.VolumeAttached,
			Snapshots: []catalog.SnapshotObserved{{Name: "s1"}, {Name: headName}}},
	} {
		if _, err := catalog.Write(context.Background(), mem, k, v, 0); err != nil {
			f.Fatal(err)
		}
	}
	// Nothing carries operations out here, so no request waits for one.
	h := New(Config{Catalog: mem, Node: "n1", Version: "v0", OperationTimeout: 1})
	f.Fuzz(func(t *testing.T, method, target, body string) {
		u, err := url.ParseRequestURI(target)
		if err != nil || u.Path == "/metrics" || u.Query().Get("action") == "check" {
			return // text, and a wait without a bound
		}
		if u.Query().Get("follow") != "" || strings.HasSuffix(u.Path, "/download") {
			return // a stream has no end, and a download is no JSON
		}
		r := &http.Request{Method: method, URL: u, Host: "h", Header: http.Header{}, Body: http.NoBody}
		if body != "" {
			r.Body = httptest.NewRequest("POST", "/", strings.NewReader(body)).Body
		}
		r = onLoopback(r)
		w := newRecorder()
		h.ServeHTTP(w, r)
		if w.Code == http.StatusInternalServerError {
			t.Errorf("%q %q %q: %s", method, target, body, w.Body)
		}
		if problems := checkAnswer(w.Code, w.Header(), w.Body.Bytes()); len(problems) > 0 {
			t.Errorf("%q %q %q: %v\n%s", method, target, body, problems, w.Body)
		}
	})
}

// FuzzParseSize wants every size that is taken to be within the limits.
func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"10Gi", "1.5G", "1e9", "-1", "0", "99999999999999999999Ei", "1E", "0.00001k"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if n, err := ParseSize(s); err == nil && (n < 1 || n > MaxSize || RoundSize(n) < n || RoundSize(n)%SizeStep != 0 || RoundSize(n) > MaxSize) {
			t.Errorf("ParseSize(%q) is %d", s, n)
		}
	})
}

// TestMetrics has Prometheus's own parser read what /metrics says.
func TestMetrics(t *testing.T) {
	inBubble(t, func(x *fixture) {
		x.attached("db1")
		x.want(200, "POST", "/v1/backingimages", `{"name":"debian","sourceType":"download","parameters":{"url":"http://h/debian"}}`)
		w := newRecorder()
		x.h.ServeHTTP(w, onLoopback(httptest.NewRequest("GET", "/metrics", nil)))
		parser := expfmt.NewTextParser(model.UTF8Validation)
		families, err := parser.TextToMetricFamilies(w.Body)
		if err != nil || w.Code != 200 {
			t.Fatal(w.Code, err)
		}
		for name, want := range map[string]float64{"ashlar_volume_size_bytes": 1 << 30, "ashlar_volume_read_ops_total": 3, "ashlar_node_ready": 1, "ashlar_images": 1, "ashlar_disk_free_bytes": 900 * 64 << 20,
			"ashlar_disk_ready": 1} {
			f := families[name]
			if f == nil || len(f.Metric) != 1 {
				t.Errorf("%s: %v", name, f)
				continue
			}
			if got := f.Metric[0].GetGauge().GetValue() + f.Metric[0].GetCounter().GetValue(); got != want {
				t.Errorf("%s is %v, want %v", name, got, want)
			}
		}
		for _, m := range families["ashlar_volumes"].GetMetric() {
			want := 0.0
			if m.Label[0].GetValue() == "attached" {
				want = 1
			}
			if m.GetGauge().GetValue() != want {
				t.Errorf("ashlar_volumes{%v} is %v", m.Label, m.GetGauge().GetValue())
			}
		}
	})
	e := &exposition{}
	e.sample("x", 1, "label", "a\"b\\c\nd")
	if got := e.text.String(); got != "x{label=\"a\\\"b\\\\c\\nd\"} 1\n" {
		t.Errorf("escaped: %q", got)
	}
}
