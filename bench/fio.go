package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
)

// load is one row of a table: what fio is told to do.
type load struct {
	name    string
	rw      string
	bs      string
	depth   int
	fsync   int  // a flush after every so many writes; 0 none
	byBytes bool // compared by MB/s, not by IOPS
}

var loads = []load{
	{name: "4 KiB random read, depth 1", rw: "randread", bs: "4k", depth: 1},
	{name: "4 KiB random write, depth 1", rw: "randwrite", bs: "4k", depth: 1},
	{name: "4 KiB random read, depth 32", rw: "randread", bs: "4k", depth: 32},
	{name: "4 KiB random write, depth 32", rw: "randwrite", bs: "4k", depth: 32},
	{name: "1 MiB read, depth 4", rw: "read", bs: "1M", depth: 4, byBytes: true},
	{name: "1 MiB write, depth 4", rw: "write", bs: "1M", depth: 4, byBytes: true},
}

var flushLoads = []load{
	{name: "4 KiB write + flush every time, depth 1", rw: "randwrite", bs: "4k", depth: 1, fsync: 1},
	{name: "4 KiB write, flush every 32, depth 1", rw: "randwrite", bs: "4k", depth: 1, fsync: 32},
}

// measure is what one run of fio said.
type measure struct {
	iops   float64
	mbps   float64
	cpuUS  float64 // server CPU per I/O, microseconds
	maxMS  float64 // slowest completion
	p99US  float64
	totalN float64
}

func (m measure) value(l load) float64 {
	if l.byBytes {
		return m.mbps
	}
	return m.iops
}

// fioReport is the part of fio's JSON that is read.
type fioReport struct {
	Jobs []struct {
		Error int     `json:"error"`
		Read  fioSide `json:"read"`
		Write fioSide `json:"write"`
	} `json:"jobs"`
}

type fioSide struct {
	IOPS   float64 `json:"iops"`
	BW     float64 `json:"bw_bytes"`
	Total  float64 `json:"total_ios"`
	ClatNS struct {
		Max        float64            `json:"max"`
		Percentile map[string]float64 `json:"percentile"`
	} `json:"clat_ns"`
}

// working is the working set: the first 512 MiB of the disk, read once before anything is measured.
const working = "512M"

// onto is what makes fio reach an NBD URI, or a block device.
func onto(uri string) []string {
	if strings.HasPrefix(uri, "/dev/") {
		return []string{"--ioengine=io_uring", "--direct=1", "--filename=" + uri}
	}
	return []string{"--ioengine=nbd", "--uri=" + uri}
}

// fio runs one load against an NBD URI or a block device for some seconds and charges the CPU time of the server's process.
func fio(ctx context.Context, uri string, pid int, l load, seconds int) (measure, error) {
	args := append([]string{"--name=bench"}, onto(uri)...)
	args = append(args, "--rw="+l.rw, "--bs="+l.bs, "--iodepth="+strconv.Itoa(l.depth),
		"--size="+working, "--time_based", "--runtime="+strconv.Itoa(seconds), "--norandommap", "--randrepeat=0", "--output-format=json")
	if l.fsync > 0 {
		args = append(args, "--fsync="+strconv.Itoa(l.fsync))
	}
	before, err := cpuSeconds(pid)
	if err != nil {
		return measure{}, err
	}
	out, err := exec.CommandContext(ctx, "fio", args...).Output()
	if err != nil {
		return measure{}, fmt.Errorf("fio %s on %s: %w: %s", l.name, uri, err, out)
	}
	after, err := cpuSeconds(pid)
	if err != nil {
		return measure{}, err
	}
	var r fioReport
	if at := bytes.IndexByte(out, '{'); at >= 0 {
		out = out[at:]
	}
	if err := json.Unmarshal(out, &r); err != nil {
		return measure{}, fmt.Errorf("fio's JSON: %w", err)
	}
	if len(r.Jobs) != 1 || r.Jobs[0].Error != 0 {
		return measure{}, fmt.Errorf("fio %s on %s: %w", l.name, uri, errBench)
	}
	side := r.Jobs[0].Read
	if strings.Contains(l.rw, "write") {
		side = r.Jobs[0].Write
	}
	return measure{iops: side.IOPS, mbps: side.BW / 1e6, cpuUS: (after - before) * 1e6 / max(1, side.Total),
		maxMS: side.ClatNS.Max / 1e6, p99US: side.ClatNS.Percentile["99.000000"] / 1e3, totalN: side.Total}, nil
}

// prefill writes the working set with bytes that do not compress and reads it once.
func prefill(ctx context.Context, uri string) error {
	for _, rw := range []string{"write", "read"} {
		out, err := exec.CommandContext(ctx, "fio", append(onto(uri), "--name=fill", "--rw="+rw, "--bs=1M", "--iodepth=4", "--size="+working, "--end_fsync=1")...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("fio fill %s: %w: %s", uri, err, out)
		}
	}
	return nil
}

// cpuSeconds is the CPU time a process has used, user and system.
func cpuSeconds(pid int) (float64, error) {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	user, err := strconv.ParseFloat(fields[11], 64)
	if err != nil {
		return 0, err
	}
	system, err := strconv.ParseFloat(fields[12], 64)
	return (user + system) / 100, err // USER_HZ is 100 on Linux
}

// rssBytes is a process's resident memory.
func rssBytes(pid int) (int64, error) {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "statm"))
	if err != nil {
		return 0, err
	}
	pages, err := strconv.ParseInt(strings.Fields(string(text))[1], 10, 64)
	return pages * int64(os.Getpagesize()), err
}

func median(v []float64) float64 {
	s := append([]float64{}, v...)
	sort.Float64s(s)
	return s[len(s)/2]
}
