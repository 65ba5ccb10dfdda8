// Command bench measures Ashlar beside its peers in one run on one machine, prints the tables, and appends one JSON object a line to bench/results.jsonl:
// what, ours, peer, peer_name, ratio, target, holds. Servers take turns, round by round; the median counts, and of it the ratio.
//
// `make bench` calls it; `-only REGEXP` picks sections. It judges nothing: a missed target is printed as missed and the exit code stays 0. Only `-only soak`, a long run under a mixed
// load, fails when something grows without bound.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"syscall"
	"time"

	"ashlar/internal/testbed"
)

var errBench = errors.New("measurement failed")

// result is a line of results.jsonl.
type result struct {
	What     string  `json:"what"`
	Ours     float64 `json:"ours"`
	Peer     float64 `json:"peer"`
	PeerName string  `json:"peer_name"`
	Ratio    float64 `json:"ratio"`
	Target   string  `json:"target"`
	Holds    bool    `json:"holds"`
}

type bench struct {
	dir     string
	bin     string
	node    *testbed.Process
	rounds  int
	seconds int
	soakFor time.Duration
	results []result
}

type section struct {
	name string
	run  func(context.Context) error
	long bool // only when it is picked
}

func main() {
	b := &bench{}
	flag.StringVar(&b.bin, "ashlar", "", "the program to measure; default: what this tree builds")
	flag.IntVar(&b.rounds, "rounds", 3, "interleaved rounds; the median counts")
	flag.IntVar(&b.seconds, "seconds", 3, "seconds a run")
	flag.DurationVar(&b.soakFor, "soak", 10*time.Minute, "how long the section soak runs, which only -only picks")
	only := flag.String("only", "", "run only the sections whose name matches")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := b.run(ctx, *only); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func (b *bench) run(ctx context.Context, only string) (err error) {
	pick, err := regexp.Compile(only)
	if err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp("", "abench"); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	if b.bin == "" { // never what an earlier build left in bin
		b.bin = filepath.Join(b.dir, "ashlar")
		if err := command(ctx, "go", "build", "-trimpath", "-o", b.bin, "./cmd/ashlar"); err != nil {
			return err
		}
	}
	if b.bin, err = filepath.Abs(b.bin); err != nil {
		return err
	}
	if b.node, err = testbed.StartProcess(ctx, b.bin, b.dir); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.node.Stop(context.WithoutCancel(ctx))) }()
	sections := []section{{name: "idle", run: b.idle}, {name: "create", run: b.create}, {name: "cache", run: b.cache}, {name: "direct", run: b.direct}, {name: "flush", run: b.flush},
		{name: "snapshot", run: b.snapshot}, {name: "depth", run: b.depth}, {name: "memory", run: b.memory}, {name: "image", run: b.images}, {name: "scale", run: b.scale},
		{name: "blockdev", run: b.blockdev}, {name: "handover", run: b.handover},
		{name: "remote", run: b.remote}, {name: "cluster", run: b.cluster},
		{name: "soak", run: b.soak, long: true}}
	for _, s := range sections {
		if !pick.MatchString(s.name) || s.long && only == "" {
			continue
		}
		if err := s.run(ctx); err != nil {
			return errors.Join(fmt.Errorf("%s: %w", s.name, err), b.write())
		}
	}
	return b.write()
}

// note keeps a result and prints its verdict.
func (b *bench) note(r result) {
	b.results = append(b.results, r)
}

// write appends the results and prints the verdicts in one table.
func (b *bench) write() error {
	f, err := os.OpenFile("bench/results.jsonl", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	fmt.Printf("\n%-58s %10s %10s %-24s %7s  %-28s\n", "what", "ours", "peer", "peer's name", "ratio", "target")
	for _, r := range b.results {
		line, err := json.Marshal(r)
		if err != nil {
			return err
		}
		if _, err := f.Write(append(line, '\n')); err != nil {
			return err
		}
		verdict := "holds"
		if !r.Holds {
			verdict = "MISSED"
		}
		fmt.Printf("%-58s %10.4g %10.4g %-24s %7.2f  %-28s %s\n", r.What, r.Ours, r.Peer, r.PeerName, r.Ratio, r.Target, verdict)
	}
	return nil
}
