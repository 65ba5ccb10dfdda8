// Command mutants proves that the proof can fail. It reads mutants/*.json, breaks the source in one place at a time (through the build's
// overlay, so the tree itself is never touched), and runs the test that is named for it: that test must turn red. Before that it runs every named
// test unbroken, which must be green and must run at least one test.
//
// It exits with 1 if a mutant survived, does not compile, or no longer matches its source. Run it with `make mutants`; `-only REGEXP` picks some.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sort"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
)

// mutant is one breakage: in File, Old (which must occur exactly once) becomes New, and Test of Package must notice.
type mutant struct {
	Name    string `json:"name"`
	File    string `json:"file"`
	Old     string `json:"old"`
	New     string `json:"new"`
	Package string `json:"package"`
	Test    string `json:"test"`
}

// outcome is what became of a mutant.
type outcome struct {
	mutant mutant
	killed bool
	why    string // when it was not killed
	took   time.Duration
}

var errNotGreen = errors.New("a named test is not green without any breakage")

func main() {
	only := flag.String("only", "", "run only the mutants whose name matches this regexp")
	parallel := flag.Int("parallel", 2, "how many at once")
	timeout := flag.Duration("timeout", 3*time.Minute, "per test run; a test that hangs on a mutant has noticed it")
	flag.Parse()
	err := run(context.Background(), *only, *parallel, *timeout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, only string, parallel int, timeout time.Duration) error {
	list, err := load(only)
	if err != nil {
		return err
	}
	scratch, err := os.MkdirTemp("", "mutants")
	if err != nil {
		return err
	}
	defer os.RemoveAll(scratch)
	r := runner{scratch: scratch, timeout: timeout}
	if err := r.baseline(ctx, list, parallel); err != nil {
		return err
	}
	out := make([]outcome, len(list))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for i, m := range list {
		g.Go(func() error {
			out[i] = r.try(gctx, i, m)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return report(out)
}

// load reads every list, sorted, and keeps those whose name matches.
func load(only string) ([]mutant, error) {
	pick, err := regexp.Compile(only)
	if err != nil {
		return nil, err
	}
	files, err := filepath.Glob("mutants/*.json")
	if err != nil || len(files) == 0 {
		return nil, fmt.Errorf("no mutants/*.json here; run from the top of the repository: %w", os.ErrNotExist)
	}
	sort.Strings(files)
	var list []mutant
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		var some []mutant
		if err := json.Unmarshal(text, &some); err != nil {
			return nil, fmt.Errorf("%s: %w", f, err)
		}
		for _, m := range some {
			if pick.MatchString(m.Name) {
				list = append(list, m)
			}
		}
	}
	return list, nil
}

type runner struct {
	scratch string
	timeout time.Duration
}

// baseline compiles every named package once and runs every named test unbroken.
func (r runner) baseline(ctx context.Context, list []mutant, parallel int) error {
	tests := map[string]map[string]bool{}
	for _, m := range list {
		if tests[m.Package] == nil {
			tests[m.Package] = map[string]bool{}
		}
		tests[m.Package][m.Test] = true
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for pkg, names := range tests {
		g.Go(func() error {
			bin := filepath.Join(r.scratch, "base-"+strings.ReplaceAll(strings.Trim(pkg, "./"), "/", "-"))
			if text, err := r.compile(gctx, pkg, "", bin); err != nil {
				return fmt.Errorf("%s does not compile: %w\n%s", pkg, err, text)
			}
			for name := range names {
				text, err := r.test(gctx, bin, pkg, name)
				if err != nil || !bytes.Contains(text, []byte("=== RUN")) {
					return fmt.Errorf("%s -run %s: %w (%v)\n%s", pkg, name, errNotGreen, err, tail(text))
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// try applies one mutant and says what became of it.
func (r runner) try(ctx context.Context, i int, m mutant) outcome {
	start := time.Now()
	done := func(killed bool, why string) outcome {
		return outcome{mutant: m, killed: killed, why: why, took: time.Since(start)}
	}
	src, err := os.ReadFile(m.File)
	if err != nil {
		return done(false, err.Error())
	}
	if n := bytes.Count(src, []byte(m.Old)); n != 1 {
		return done(false, fmt.Sprintf("its text occurs %d times in %s, want once", n, m.File))
	}
	broken := filepath.Join(r.scratch, fmt.Sprintf("m%d.go", i))
	if err := os.WriteFile(broken, bytes.Replace(src, []byte(m.Old), []byte(m.New), 1), 0o600); err != nil {
		return done(false, err.Error())
	}
	abs, err := filepath.Abs(m.File)
	if err != nil {
		return done(false, err.Error())
	}
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{abs: broken}})
	if err != nil {
		return done(false, err.Error())
	}
	overlayFile := filepath.Join(r.scratch, fmt.Sprintf("m%d.json", i))
	if err := os.WriteFile(overlayFile, overlay, 0o600); err != nil {
		return done(false, err.Error())
	}
	bin := filepath.Join(r.scratch, fmt.Sprintf("m%d.test", i))
	defer os.Remove(bin)
	if text, err := r.compile(ctx, m.Package, overlayFile, bin); err != nil {
		return done(false, "does not compile: "+tail(text))
	}
	if _, err := r.test(ctx, bin, m.Package, m.Test); err == nil {
		return done(false, "SURVIVED: "+m.Test+" stayed green")
	}
	return done(true, "")
}

func (r runner) compile(ctx context.Context, pkg, overlay, bin string) ([]byte, error) {
	args := []string{"test", "-c", "-vet=off", "-o", bin}
	if overlay != "" {
		args = append(args, "-overlay", overlay)
	}
	return exec.CommandContext(ctx, "go", append(args, pkg)...).CombinedOutput()
}

func (r runner) test(ctx context.Context, bin, pkg, name string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	abs, err := filepath.Abs(bin)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, abs, "-test.v", "-test.count=1", "-test.failfast", "-test.run", name)
	cmd.Dir = pkg
	cmd.Env = append(os.Environ(), "ASHLAR_STEPS=2") // a quick run of random histories may miss a breakage that a run twice as long sees
	cmd.WaitDelay = time.Second
	return cmd.CombinedOutput()
}

func tail(text []byte) string {
	const keep = 1500
	return string(text[max(0, len(text)-keep):])
}

func report(out []outcome) error {
	killed := 0
	for _, o := range out {
		word := "killed "
		if !o.killed {
			word = "ALIVE  "
		} else {
			killed++
		}
		fmt.Printf("%s %6.1fs  %-60s %s %s\n", word, o.took.Seconds(), o.mutant.Name, o.mutant.Test, o.why)
	}
	fmt.Printf("mutants: %d killed, %d not\n", killed, len(out)-killed)
	if killed != len(out) {
		return errors.New("some mutants live")
	}
	return nil
}
