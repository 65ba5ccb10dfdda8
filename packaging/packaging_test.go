package main

import (
	"encoding/json"
	"os"
	"regexp"
	"strings"
	"testing"
)

func TestDebianVersion(t *testing.T) {
	for version, want := range map[string]string{
		"v1.2.3": "1.2.3", "v0.3.0-12-gabc": "0.3.0+12+gabc", "dev": "0~dev", "a1b2c3d-dirty": "0~a1b2c3d+dirty", "": "0~", "1.0~rc1": "1.0~rc1",
	} {
		if got := debianVersion(version); got != want {
			t.Errorf("%q: %q, want %q", version, got, want)
		}
	}
}

var metric = regexp.MustCompile(`ashlar_[a-z_]+[a-z]`)

// TestMetricsAreReal: every metric that an alert or the dashboard reads is one that the program prints, and every one it prints is explained.
func TestMetricsAreReal(t *testing.T) {
	read := func(name string) string {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	printed := map[string]bool{}
	for _, m := range metric.FindAllString(read("../internal/api/metric.go"), -1) {
		printed[m] = true
	}
	for _, name := range []string{"alerts.yaml", "dashboard.json"} {
		for _, m := range metric.FindAllString(read(name), -1) {
			if !printed[m] {
				t.Errorf("%s reads %s, which is not printed", name, m)
			}
		}
	}
	page := read("../docs/operate/metrics.md")
	for m := range printed {
		short := "…" + m[strings.LastIndex(strings.TrimSuffix(m, "_ops_total"), "_"):]
		if !strings.Contains(page, "`"+m+"`") && !strings.Contains(page, "`"+short+"`") {
			t.Errorf("docs/operate/metrics.md does not explain %s", m)
		}
	}
	var dashboard struct{ Panels []any }
	if err := json.Unmarshal([]byte(read("dashboard.json")), &dashboard); err != nil || len(dashboard.Panels) == 0 {
		t.Errorf("dashboard: %v", err)
	}
}
