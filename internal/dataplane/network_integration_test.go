//go:build integration

package dataplane

import (
	"encoding/json"
	"os/exec"
	"strings"
	"testing"

	"ashlar/internal/dataplane/client"
)

// TestRealClientsOverTCP: nbdinfo lists the volumes of a node and sees each, plain on loopback.
func TestRealClientsOverTCP(t *testing.T) {
	b := newProcs(t)
	c := b.readyProcs()
	for n := range 3 {
		b.open(c, b.volume(c, n, int64(n+1)*mib))
	}
	n := client.Network{Address: freeAddress(t)}
	if err := c.SetNetwork(t.Context(), n); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("nbdinfo", "--list", "--json", "nbd://"+n.Address).CombinedOutput()
	var list struct {
		Exports []struct {
			Name string `json:"export-name"`
			Size int64  `json:"export-size"`
		} `json:"exports"`
	}
	if err != nil || json.Unmarshal(out, &list) != nil || len(list.Exports) != 3 || list.Exports[2].Name != "vol2" || list.Exports[2].Size != 3*mib {
		t.Errorf("nbdinfo: %v, %+v\n%s", err, list, out)
	}
	// Killed, the next process serves the same address.
	pid := b.dataPID()
	b.kill(pid)
	eventually(t, "the next process offers the volumes", func() bool {
		out, err := exec.Command("nbdinfo", "--size", "nbd://"+n.Address+"/vol1").CombinedOutput()
		return err == nil && strings.TrimSpace(string(out)) == "2097152"
	})
}

// fioRate runs fio on a volume for five seconds after one of warming up, and returns requests and bytes per second.
func fioRate(t *testing.T, uri string, args ...string) (iops, bytesPerSecond float64) {
	t.Helper()
	args = append([]string{"--name=limit", "--ioengine=nbd", "--uri=" + uri, "--size=64m", "--time_based", "--ramp_time=1", "--runtime=5", "--output-format=json"}, args...)
	out, err := exec.Command("fio", args...).Output()
	var report struct {
		Jobs []struct {
			Read, Write struct {
				IOPS    float64 `json:"iops"`
				BWBytes float64 `json:"bw_bytes"`
			}
		} `json:"jobs"`
	}
	if err == nil {
		_, text, _ := strings.Cut(string(out), "{")
		err = json.Unmarshal([]byte("{"+text), &report)
	}
	if err != nil || len(report.Jobs) != 1 {
		t.Fatalf("fio: %v\n%s", err, out)
	}
	j := report.Jobs[0]
	return j.Read.IOPS + j.Write.IOPS, j.Read.BWBytes + j.Write.BWBytes
}

// TestMeasuredLimits: what fio measures is what was set, within five in a hundred, for requests and bytes, reads and writes together.
func TestMeasuredLimits(t *testing.T) {
	b := newProcs(t)
	c := b.readyProcs()
	a := b.volume(c, 1, 64*mib)
	a.Limits = client.Limits{IOPS: 1000}
	st := b.open(c, a)
	// A host that stalls makes the rate lower than it may be, and never higher: so it is measured again, but only for that.
	near := func(what string, want float64, measure func() float64) {
		t.Helper()
		for try := 1; ; try++ {
			got := measure()
			t.Logf("%s: %.0f of %.0f", what, got, want)
			if got > want*1.05 || got < want*0.95 && try == 3 {
				t.Errorf("%s: %.0f, want %.0f", what, got, want)
			}
			if got >= want*0.95 || try == 3 {
				return
			}
		}
	}
	near("requests per second, depth 16", 1000, func() float64 {
		iops, _ := fioRate(t, st.Endpoint, "--rw=randrw", "--bs=4k", "--iodepth=16")
		return iops
	})
	set := func(l client.Limits) {
		t.Helper()
		if err := c.SetLimits(t.Context(), client.SetLimits{VolumeID: a.VolumeID, Limits: l}); err != nil {
			t.Fatal(err)
		}
	}
	set(client.Limits{BytesPerSecond: 20 * mib})
	near("bytes per second", 20*mib, func() float64 {
		_, bytesPerSecond := fioRate(t, st.Endpoint, "--rw=randrw", "--bs=256k", "--iodepth=8")
		return bytesPerSecond
	})
	set(client.Limits{IOPS: 500, BytesPerSecond: 100 * mib, BurstIOPS: 2000, BurstSeconds: 1})
	near("requests per second, depth 1, after a burst", 500, func() float64 {
		iops, _ := fioRate(t, st.Endpoint, "--rw=randread", "--bs=4k", "--iodepth=1", "--ramp_time=3") // the burst is over in less
		return iops
	})
	if st, _ := status(t, c, a.VolumeID); st.Stats.Throttled == 0 {
		t.Error("nothing is told of what was held back")
	}
}
