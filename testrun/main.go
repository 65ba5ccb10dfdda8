// Command testrun runs every test there is, in stages, and ends with one line that counts them: "N passed, N failed, N skipped". It is what `make
// test` and continuous integration call.
//
// The stages: lint (gofmt, vet, staticcheck, govulncheck), unit (every package with the race detector), steps (the random histories again, longer), integration (real
// clients, real processes, root), fuzz (20,000 inputs for every fuzz target). `-stages a,b` picks some; one more, mutants (breakages that must turn tests red), runs only when it is
// picked, because it takes as long as all the others.
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sort"
	"strconv"
	"strings"
	"time"
)

// tally counts what ran; a linter counts as one test.
type tally struct {
	passed, failed, skipped int
	notes                   []string // what failed or was skipped, and why
}

func (t *tally) add(what string, err error, output []byte) {
	if err == nil {
		t.passed++
		fmt.Printf("ok    %s\n", what)
		return
	}
	t.failed++
	t.notes = append(t.notes, "FAILED  "+what)
	fmt.Printf("FAIL  %s: %v\n%s\n", what, err, output)
}

func (t *tally) skip(what, why string) {
	t.skipped++
	t.notes = append(t.notes, "skipped "+what+": "+why)
	fmt.Printf("skip  %s: %s\n", what, why)
}

type stage struct {
	name string
	run  func(context.Context, *tally)
}

func main() {
	pick := flag.String("stages", "lint,unit,steps,integration,fuzz", "which stages to run")
	ashlar := flag.String("ashlar", "bin/ashlar", "the built program, for the integration tests")
	fuzzRuns := flag.Int("fuzz", 20_000, "how many inputs each fuzz target gets")
	flag.Parse()
	abs, err := filepath.Abs(*ashlar)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	stages := []stage{
		{"lint", lint},
		{"unit", func(ctx context.Context, t *tally) {
			goTest(ctx, t, nil, "-race", "-timeout", "15m", "./...")
		}},
		{"steps", func(ctx context.Context, t *tally) {
			goTest(ctx, t, []string{"ASHLAR_STEPS=4"}, "-timeout", "15m", "-run", "Crash|Fault|Model|Simulation|History|Histories|Concurrent|Memory|^TestCluster$",
				"./internal/layer", "./internal/volume", "./internal/replica/local", "./internal/replica/remote", "./internal/disk", "./internal/agent", "./internal/sim")
		}},
		{"integration", func(ctx context.Context, t *tally) { integration(ctx, t, abs) }},
		{"fuzz", func(ctx context.Context, t *tally) { fuzz(ctx, t, *fuzzRuns) }},
		{"mutants", mutants},
	}
	var t tally
	for _, s := range stages {
		if !strings.Contains(","+*pick+",", ","+s.name+",") {
			continue
		}
		start := time.Now()
		fmt.Printf("== %s\n", s.name)
		s.run(context.Background(), &t)
		fmt.Printf("== %s took %.0f s\n", s.name, time.Since(start).Seconds())
	}
	for _, n := range t.notes {
		fmt.Println(n)
	}
	fmt.Printf("%d passed, %d failed, %d skipped\n", t.passed, t.failed, t.skipped)
	if t.failed > 0 || t.passed == 0 {
		os.Exit(1)
	}
}

func command(ctx context.Context, name string, args ...string) ([]byte, error) {
	return exec.CommandContext(ctx, name, args...).CombinedOutput()
}

func lint(ctx context.Context, t *tally) {
	out, err := command(ctx, "gofmt", "-l", "cmd", "internal", "mutants", "testrun", "demo", "bench")
	if err == nil && len(bytes.TrimSpace(out)) > 0 {
		err = fmt.Errorf("these files are not formatted")
	}
	t.add("gofmt", err, out)
	out, err = command(ctx, "go", "vet", "./...")
	t.add("go vet", err, out)
	out, err = command(ctx, "go", "vet", "-tags", "integration", "./...")
	t.add("go vet -tags integration", err, out)
	out, err = command(ctx, "go", "tool", "-modfile=tools/go.mod", "staticcheck", "-tags", "integration", "./...")
	t.add("staticcheck", err, out)
	govulncheck(ctx, t)
}

// govulncheck needs its database from the network. Its own exit code tells a finding (3) from a database it could not reach (1).
func govulncheck(ctx context.Context, t *tally) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	out, err := command(ctx, "go", "tool", "-modfile=tools/go.mod", "govulncheck", "./...")
	if exit, ok := err.(*exec.ExitError); ok && exit.ExitCode() != 3 {
		t.skip("govulncheck", "its database cannot be reached from here")
		return
	}
	t.add("govulncheck", err, out)
}

// event is a line of `go test -json`.
type event struct {
	Action, Package, Test, Output string
}

// goTest runs `go test -json` and counts top-level tests; a package that does not build or dies counts as one failure.
func goTest(ctx context.Context, t *tally, env []string, args ...string) {
	cmd := exec.CommandContext(ctx, "go", append([]string{"test", "-json", "-count=1"}, args...)...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stderr = os.Stderr
	pipe, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.add("go test", err, nil)
		return
	}
	before := t.failed
	count(pipe, t)
	if err := cmd.Wait(); err != nil && t.failed == before {
		t.add("go test "+strings.Join(args, " "), err, nil)
	}
}

func count(r io.Reader, t *tally) {
	output := map[string][]string{}
	failedIn := map[string]bool{}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e event
		if json.Unmarshal(lines.Bytes(), &e) != nil {
			fmt.Println(lines.Text())
			continue
		}
		id := e.Package + " " + strings.SplitN(e.Test, "/", 2)[0]
		switch {
		case e.Action == "output":
			output[id] = append(output[id], e.Output)
		case e.Test == "" && e.Action == "fail" && !failedIn[e.Package]:
			t.failed++
			t.notes = append(t.notes, "FAILED  package "+e.Package)
			fmt.Printf("FAIL  %s\n%s", e.Package, strings.Join(output[id], ""))
		case e.Test == "" && e.Action == "pass":
			fmt.Printf("ok    %s\n", e.Package)
		case e.Test == "" || strings.Contains(e.Test, "/"):
		case e.Action == "pass":
			t.passed++
			delete(output, id)
		case e.Action == "skip":
			t.skip(id, strings.TrimSpace(strings.Join(output[id], " ")))
			delete(output, id)
		case e.Action == "fail":
			t.failed++
			failedIn[e.Package] = true
			t.notes = append(t.notes, "FAILED  "+id)
			fmt.Printf("FAIL  %s\n%s", id, strings.Join(output[id], ""))
		}
	}
}

// integration runs, package by package, the tests of the files that are built only with the tag; the others ran before.
func integration(ctx context.Context, t *tally, ashlar string) {
	byDir, err := functions(ctx, testFunc, "//go:build integration")
	if err != nil {
		t.add("list of integration tests", err, nil)
		return
	}
	for _, dir := range sortedKeys(byDir) {
		goTest(ctx, t, []string{"ASHLAR_BIN=" + ashlar}, "-tags", "integration", "-timeout", "15m",
			"-run", "^("+strings.Join(byDir[dir], "|")+")$", dir)
	}
}

// functions lists what re finds in the test files that contain marker, by directory.
func functions(ctx context.Context, re *regexp.Regexp, marker string) (map[string][]string, error) {
	files, err := command(ctx, "git", "ls-files", "*_test.go")
	if err != nil {
		return nil, err
	}
	out := map[string][]string{}
	for _, f := range strings.Fields(string(files)) {
		text, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		if !bytes.Contains(text, []byte(marker)) {
			continue
		}
		dir := "./" + filepath.Dir(f)
		for _, m := range re.FindAllSubmatch(text, -1) {
			out[dir] = append(out[dir], string(m[1]))
		}
	}
	return out, nil
}

func sortedKeys(m map[string][]string) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}

var testFunc = regexp.MustCompile(`(?m)^func (Test[A-Z0-9]\w*)\(`)

var fuzzFunc = regexp.MustCompile(`(?m)^func (Fuzz\w+)\(`)

// fuzz gives every fuzz target in the tree the same number of inputs. It counts inputs and not seconds, because a time limit that
// expires while a worker is answering makes the fuzzing engine itself fail with "context deadline exceeded" (golang/go issue 75804).
func fuzz(ctx context.Context, t *tally, each int) {
	byDir, err := functions(ctx, fuzzFunc, "func Fuzz")
	if err != nil {
		t.add("list of fuzz targets", err, nil)
		return
	}
	// One input of it is a whole image, written, checked and read back three ways: about 50 a second.
	slow := map[string]int{"FuzzWriteQcow2": each / 40}
	for _, dir := range sortedKeys(byDir) {
		for _, name := range byDir[dir] {
			each := cmp.Or(slow[name], each)
			out, err := command(ctx, "go", "test", "-run", "^$", "-fuzz", "^"+name+"$", "-fuzztime", strconv.Itoa(each)+"x", "-fuzzminimizetime", "5x", dir)
			t.add("fuzz "+dir+" "+name, err, out)
		}
	}
}

func mutants(ctx context.Context, t *tally) {
	out, err := command(ctx, "go", "run", "./mutants")
	fmt.Print(string(out))
	killed := regexp.MustCompile(`(?m)^killed`).FindAllIndex(out, -1)
	t.passed += len(killed)
	alive := regexp.MustCompile(`(?m)^ALIVE.*`).FindAll(out, -1)
	for _, a := range alive {
		t.failed++
		t.notes = append(t.notes, "FAILED  mutant "+string(a))
	}
	if err != nil && len(alive) == 0 {
		t.add("mutants", err, nil)
	}
}
