package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"ashlar/internal/api"
	"ashlar/internal/api/client"
)

// The bounds that doctor measures a cluster by.
const (
	// certificateShort is how long a node's certificate should still be good: it is renewed when a third of its 90 days is left.
	certificateShort = 25 * 24 * time.Hour
	authorityShort   = 180 * 24 * time.Hour
	// skewShort is how far clocks may be apart; answers are as exact as a second. Nothing that must be safe depends on clocks.
	skewShort = 5 * time.Second
)

// lookAtCertificates reads those of a node that is in a cluster.
func (a *app) lookAtCertificates() []finding {
	dir := filepath.Join(a.dataDir(), "cluster")
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var out []finding
	for _, name := range []string{"ca.crt", "node.pem"} {
		file, short := filepath.Join(dir, name), certificateShort
		if name == "ca.crt" {
			short = authorityShort
		}
		cert, err := readCertificate(file)
		switch {
		case errors.Is(err, fs.ErrNotExist) && name == "node.pem":
		case errors.Is(err, fs.ErrPermission):
			out = append(out, note(fmt.Sprintf("the certificate %s cannot be read", file), "sudo ashlar doctor"))
		case err != nil:
			out = append(out, problem(fmt.Sprintf("the certificate %s: %v", file, err), "bring it back from a backup, or have the node join again"))
		default:
			out = append(out, judgeCertificate(file, cert, a.now(), short))
		}
	}
	return out
}

// lookAtGivenCertificates reads those that the configuration names for servers, which somebody else has to renew.
func (a *app) lookAtGivenCertificates() []finding {
	file, err := configFile(a.configPath())
	if err != nil {
		file = nil // that is said where the configuration is looked at
	}
	var out []finding
	for _, flag := range []string{"tls-certificate", "nbd-certificate", "nbd-client-ca"} {
		o := optionOf(flag)
		name := a.env(o.env, file[o.key])
		if name == "" {
			continue
		}
		what := fmt.Sprintf("%s (%s)", name, o.key)
		cert, err := readCertificate(name)
		switch {
		case errors.Is(err, fs.ErrPermission):
			out = append(out, note(fmt.Sprintf("the certificate %s cannot be read", what), "sudo ashlar doctor"))
		case err != nil:
			out = append(out, problem(fmt.Sprintf("the certificate %s: %v", what, err), "name a file with a certificate in PEM"))
		case a.now().Before(cert.NotBefore), !a.now().Before(cert.NotAfter):
			out = append(out, problem(fmt.Sprintf("the certificate %s is good from %s to %s, not now: it is refused", what, cert.NotBefore.Local().Format("2006-01-02"), cert.NotAfter.Local().Format("2006-01-02")),
				"set the clock, or put another into the file: it is read again by itself"))
		case cert.NotAfter.Sub(a.now()) < certificateShort:
			out = append(out, note(fmt.Sprintf("the certificate %s ends on %s", what, cert.NotAfter.Local().Format("2006-01-02")), "put another into the file: it is read again by itself"))
		default:
			out = append(out, ok("certificate %s until %s", what, cert.NotAfter.Local().Format("2006-01-02")))
		}
	}
	return out
}

func readCertificate(file string) (*x509.Certificate, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) { // a node's key comes first
		if block.Type == "CERTIFICATE" {
			return x509.ParseCertificate(block.Bytes)
		}
	}
	return nil, errors.New("holds no certificate in PEM")
}

// judgeCertificate compares a certificate's end with the clock.
func judgeCertificate(file string, cert *x509.Certificate, now time.Time, short time.Duration) finding {
	left := cert.NotAfter.Sub(now)
	until := cert.NotAfter.Local().Format("2006-01-02")
	switch {
	case now.Before(cert.NotBefore):
		return problem(fmt.Sprintf("the certificate %s is good from %s only: this machine's clock is behind", file, cert.NotBefore.Local().Format("2006-01-02 15:04")), "set the clock; run a time service")
	case left <= 0:
		return problem(fmt.Sprintf("the certificate %s ended on %s: no other node speaks to this one", file, until), "the runbook on certificates: docs/operate/cluster.md")
	case left < short:
		return problem(fmt.Sprintf("the certificate %s ends on %s, and should have been renewed by now", file, until), "journalctl -u ashlar says why it was not: does the node reach the others?")
	}
	return ok("certificate %s until %s", file, until)
}

// lookAtCluster looks at the other nodes, as far as the records and they themselves say.
func (a *app) lookAtCluster(ctx context.Context, c *client.Client, s status) []finding {
	if len(s.Nodes) < 2 {
		return nil
	}
	var out []finding
	up := 0
	for _, n := range s.Nodes {
		ready := n.Conditions["Ready"]
		switch n.State {
		case api.NodeUp:
			up++
			out = append(out, a.lookAtClock(ctx, c, n, s.About.Node)...)
		case api.NodeLeaving:
			out = append(out, note("node "+n.Name+" is being removed", ""))
		default:
			out = append(out, problem(fmt.Sprintf("node %s is %s: %s", n.Name, n.State, ready.Message), "see whether the machine runs and is reached, and `systemctl status ashlar` on it; its volumes of one copy cannot be used elsewhere"))
		}
	}
	out = append(out, lookAtMembers(s.Nodes)...)
	out = append(out, lookAtVersions(s.Nodes)...)
	if up == len(s.Nodes) {
		out = append(out, ok("%d nodes, all up", up))
	}
	return out
}

// lookAtClock asks a node for the time.
func (a *app) lookAtClock(ctx context.Context, c *client.Client, n api.Node, here string) []finding {
	if n.Name == here {
		return nil
	}
	before := a.now()
	at, err := c.NodeTime(ctx, n.Name)
	if err != nil {
		return []finding{problem(fmt.Sprintf("node %s lives, and node %s cannot ask it: %v", n.Name, here, err), fmt.Sprintf("does a firewall let %s and the three ports after it through?", address(n)))}
	}
	after := a.now()
	skew := max(before.Sub(at.Add(time.Second)), at.Sub(after), 0)
	if skew > skewShort {
		return []finding{problem(fmt.Sprintf("the clock of node %s differs by %s", n.Name, skew.Round(time.Second)), "run a time service on all nodes: certificates, tokens and times in records depend on it (copies and fencing do not)")}
	}
	return nil
}

// lookAtMembers looks at who keeps the catalogue.
func lookAtMembers(nodes []api.Node) []finding {
	voters, healthy := 0, 0
	var out []finding
	for _, n := range nodes {
		if !n.Voter {
			continue
		}
		voters++
		switch {
		case n.State == api.NodeDown: // said already
		case n.Member == "voter":
			healthy++
		case n.Member == "learner" || n.Member == "":
			out = append(out, note("node "+n.Name+" is becoming a member of the catalogue", "look again in a minute"))
		default:
			out = append(out, problem(fmt.Sprintf("the member of the catalogue on node %s failed: %s", n.Name, n.Member), "the runbook on a lost member of the catalogue: docs/operate/cluster.md"))
		}
	}
	spare := healthy - (voters/2 + 1)
	switch {
	case voters == 0: // an etcd from elsewhere
	case spare < 0:
		out = append(out, problem(fmt.Sprintf("only %d of %d members of the catalogue vote: nothing can be changed", healthy, voters), "the runbook on a lost majority: docs/operate/cluster.md"))
	case spare == 0 && voters > 2:
		out = append(out, problem(fmt.Sprintf("%d of %d members of the catalogue vote: if one more fails, nothing can be changed until it is back", healthy, voters), "bring the others back, or replace them"))
	case voters == 2:
		out = append(out, note("two nodes keep the catalogue: if either fails nothing can be changed until it is back", "a third node makes it survive one"))
	default:
		out = append(out, ok("%d of %d members of the catalogue vote", healthy, voters))
	}
	return out
}

// lookAtVersions tells of nodes of different versions.
func lookAtVersions(nodes []api.Node) []finding {
	by := map[string][]string{}
	for _, n := range nodes {
		if n.Version != "" {
			by[n.Version] = append(by[n.Version], n.Name)
		}
	}
	if len(by) < 2 {
		return nil
	}
	var parts []string
	for version, names := range by {
		parts = append(parts, version+" on "+few(names))
	}
	slices.Sort(parts)
	return []finding{note("nodes of different versions: "+strings.Join(parts, "; "), "upgrade the others too, one after another")}
}
