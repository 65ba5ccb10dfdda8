package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"ashlar/internal/api"
	"ashlar/internal/api/client"
	"ashlar/internal/catalog"
)

// TestCertificates: doctor tells of those that end soon, ended, begin later, or are none.
func TestCertificates(t *testing.T) {
	now := time.Date(2030, 1, 10, 12, 0, 0, 0, time.UTC)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	day := 24 * time.Hour
	for name, c := range map[string]struct {
		from, to time.Duration
		level    string
		word     string
	}{
		"good":        {-day, 80 * day, levelOK, "until 2030-03-31"},
		"not renewed": {-80 * day, 10 * day, levelProblem, "should have been renewed"},
		"ended":       {-80 * day, -day, levelProblem, "ended on 2030-01-09"},
		"from later":  {day, 80 * day, levelProblem, "clock is behind"},
		"none":        {0, 0, levelProblem, "no certificate in PEM"},
	} {
		dir := t.TempDir()
		file := filepath.Join(dir, "cluster", "node.pem")
		text := []byte("nothing")
		if c.to != 0 {
			tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: now.Add(c.from), NotAfter: now.Add(c.to)}
			der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
			if err != nil {
				t.Fatal(err)
			}
			text = append([]byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
		}
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
		a := newApp(nil, nil, func(name string) string { return map[string]string{"ASHLAR_DATA_DIR": dir}[name] })
		a.now = func() time.Time { return now }
		found := a.lookAtCertificates()
		// That of the authority is missing.
		if len(found) != 2 || found[0].Level != levelProblem || !strings.Contains(found[0].What, "ca.crt") {
			t.Errorf("%s: %+v", name, found)
			continue
		}
		if found[1].Level != c.level || !strings.Contains(found[1].What, c.word) {
			t.Errorf("%s: %+v, want %s with %q", name, found[1], c.level, c.word)
		}
	}
	if found := newApp(nil, nil, func(string) string { return "" }).lookAtCertificates(); len(found) != 0 {
		t.Errorf("a node alone: %+v", found)
	}
}

// TestMembers: doctor counts who keeps the catalogue, and what may still fail.
func TestMembers(t *testing.T) {
	for said, want := range map[string]string{
		"":                        "",
		"voter":                   levelOK + " 1 of 1",
		"voter voter":             levelNote + " two nodes",
		"voter voter voter":       levelOK + " 3 of 3",
		"voter voter down":        levelProblem + " 2 of 3",
		"voter down down":         levelProblem + " only 1 of 3",
		"voter voter learner":     levelProblem + " 2 of 3",
		"voter voter no-space":    levelProblem + " 2 of 3",
		"voter voter voter - - -": levelOK + " 3 of 3",
	} {
		var nodes []api.Node
		for _, m := range strings.Fields(said) {
			n := api.Node{Name: "n", State: api.NodeUp, Voter: m != "-", Member: m}
			if m == "down" {
				n.State, n.Member = api.NodeDown, "voter"
			}
			nodes = append(nodes, n)
		}
		got := ""
		if found := lookAtMembers(nodes); len(found) > 0 {
			last := found[len(found)-1]
			got = last.Level + " " + last.What
		}
		if !strings.HasPrefix(got, want) || want == "" && got != "" {
			t.Errorf("%q: %s, want %s", said, got, want)
		}
	}
	mixed := []api.Node{{Name: "a", Version: "1"}, {Name: "b", Version: "2"}, {Name: "c", Version: "1"}}
	if f := lookAtVersions(mixed); len(f) != 1 || !strings.Contains(f[0].What, "1 on a, c; 2 on b") {
		t.Errorf("%+v", f)
	}
	if f := lookAtVersions(mixed[:1]); len(f) != 0 {
		t.Errorf("%+v", f)
	}
}

// TestDoctorWithoutCatalogue: doctor tells a node whose catalogue is away from one that does not run, and says the reason once.
func TestDoctorWithoutCatalogue(t *testing.T) {
	dir := t.TempDir()
	a := newApp(nil, nil, func(string) string { return "" })
	a.server, a.output = "unix://"+client.Socket(dir), "table"
	looks := func() finding {
		t.Helper()
		found := a.lookAtNode(t.Context())
		if len(found) != 1 || found[0].Level != levelProblem {
			t.Fatalf("%+v", found)
		}
		return found[0]
	}
	if f := looks(); !strings.HasPrefix(f.What, "the node does not answer") || !strings.Contains(f.Do, "systemctl start ashlar") {
		t.Errorf("nobody listens: %+v", f)
	}
	l, err := net.Listen("unix", client.Socket(dir))
	if err != nil {
		t.Fatal(err)
	}
	mem := catalog.NewMem()
	mem.Close()
	srv := &http.Server{Handler: api.New(api.Config{Catalog: mem, Node: "n1", Version: version, Extra: &extra{}, OperationTimeout: time.Second})}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer srv.Close()
	wg.Go(func() { _ = srv.Serve(l) })
	f := looks()
	if !strings.HasPrefix(f.What, "node n1 answers, and the catalogue does not: ") || strings.Contains(f.Do, "start") || !strings.Contains(f.Do, "majority") {
		t.Errorf("the catalogue is away: %+v", f)
	}
	if n := strings.Count(f.What, "the catalogue did not answer"); n != 1 {
		t.Errorf("the reason is said %d times: %s", n, f.What)
	}
}

// TestGivenCertificates: those that the configuration names are looked at, and which setting names them is said.
func TestGivenCertificates(t *testing.T) {
	now := time.Date(2030, 1, 10, 12, 0, 0, 0, time.UTC)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	day := 24 * time.Hour
	for name, c := range map[string]struct {
		from, to time.Duration
		level    string
		word     string
	}{
		"good":       {-day, 80 * day, levelOK, "until 2030-03-31"},
		"ends soon":  {-80 * day, 3 * day, levelNote, "ends on 2030-01-13"},
		"ended":      {-80 * day, -day, levelProblem, "to 2030-01-09, not now"},
		"from later": {day, 80 * day, levelProblem, "not now"},
		"none":       {0, 0, levelProblem, "no certificate in PEM"},
		"no file":    {0, 1, levelProblem, "no such file"},
	} {
		file := filepath.Join(t.TempDir(), "server.crt")
		text := []byte("nothing")
		if c.from != 0 {
			tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: now.Add(c.from), NotAfter: now.Add(c.to)}
			der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
			if err != nil {
				t.Fatal(err)
			}
			text = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
		}
		if c.to != 1 {
			if err := os.WriteFile(file, text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		a := newApp(nil, nil, func(name string) string { return map[string]string{"ASHLAR_NBD_CERTIFICATE": file}[name] })
		a.now = func() time.Time { return now }
		found := a.lookAtGivenCertificates()
		if len(found) != 1 || found[0].Level != c.level || !strings.Contains(found[0].What, c.word) || !strings.Contains(found[0].What, "nbd.certificate") {
			t.Errorf("%s: %+v", name, found)
		}
	}
}
