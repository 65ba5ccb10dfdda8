package house

import (
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strings"
	"testing"
)

const module = "ashlar/"

// dataPath are the packages below the data process; dataplane may import each of them.
var dataPath = []string{"block", "block/limit", "disk", "nbd", "layer", "image", "replica", "replica/local", "replica/remote", "volume", "export", "export/fuse", "export/blockdev", "job"}

// mayImport is the floors table of the design: what of ours a package may import. A package that is not listed may not exist.
// Changing it takes a record in docs/decisions.
var mayImport = map[string][]string{
	"block":               {},
	"block/blocktest":     {"block"},
	"block/blockfault":    {"block"},
	"block/limit":         {"block"}, // decision 0008
	"disk":                {},
	"disk/disktest":       {"disk"},
	"nbd":                 {"block"},
	"layer":               {"block", "disk"},
	"image":               {"block", "disk"},
	"replica":             {"block"},
	"replica/replicatest": {"block", "block/blocktest", "replica"},
	"replica/local":       {"block", "disk", "image", "layer", "replica"},
	"replica/remote":      {"block", "nbd", "replica"},
	"volume":              {"block", "replica"},
	"volume/ledgertest":   {"replica", "volume"},
	"export/fuse":         {"block"},
	"export/netnbd":       {},                                               // decision 0015
	"export/blockdev":     {"block", "nbd", "export/fuse", "export/netnbd"}, // nbd, export/netnbd: decision 0015
	"export":              {"block", "nbd"},
	"job":                 {"block", "image", "nbd", "disk", "layer", "dataplane/client"}, // disk, layer: decision 0003; dataplane/client: 0013
	"dataplane/client":    {},
	"dataplane/hold":      {},
	"dataplane":           append([]string{"dataplane/client", "dataplane/hold"}, dataPath...),
	"catalog":             {},
	"catalog/catalogtest": {"catalog"},
	"catalog/etcd":        {"catalog"},
	"plan":                {"catalog"},
	"control":             {"catalog", "plan"},
	"agent":               {"dataplane/client", "catalog", "plan"},
	"identity":            {},
	"api":                 {"catalog", "identity"}, // identity: decision 0012
	"api/client":          {"api"},
	"cluster":             {"catalog", "catalog/etcd", "identity", "dataplane/client"}, // decision 0016
	"sim":                 {"*"},
	"node":                {"*"},
	"testbed":             {"*"},
	"house":               {},
}

// commandMayImport is for cmd/ashlar: wiring, the client, and what offline commands read.
var commandMayImport = []string{"node", "api", "api/client", "identity", "layer", "disk", "dataplane", "dataplane/hold", "dataplane/client", "job", "block", "image", "export/blockdev", "replica", "replica/local", "catalog", "testbed"}

// testsMayImport adds to mayImport for _test.go files: suites, twins and faults.
var testsMayImport = []string{"block", "block/blocktest", "block/blockfault", "disk", "disk/disktest", "replica/local", "replica/replicatest", "volume/ledgertest", "catalog/catalogtest", "catalog", "control", "identity", "testbed"}

// exceptions list, per rule, the file or function that breaks it and why.
var exceptions = map[string]map[string]string{
	"length":    {},
	"params":    {},
	"go":        {},
	"sleep":     {},
	"errortext": {},
}

const (
	maxLines  = 70
	maxParams = 5
)

type source struct {
	path string // slash-separated, from the module's root
	pkg  string // directory below internal/, or "cmd/ashlar"
	test bool
	file *ast.File
	fset *token.FileSet
}

func root(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func sources(t *testing.T) []source {
	t.Helper()
	top := root(t)
	var out []source
	err := filepath.WalkDir(top, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == "testdata" || strings.HasPrefix(d.Name(), ".") || d.Name() == "bin" || d.Name() == "out") {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(name, ".go") {
			return nil
		}
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, name, nil, parser.ParseComments)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(top, name)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		out = append(out, source{path: rel, pkg: strings.TrimPrefix(path.Dir(rel), "internal/"), test: strings.HasSuffix(rel, "_test.go"), file: f, fset: fset})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(out) == 0 {
		t.Fatal("no sources found")
	}
	return out
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == s || x == "*" {
			return true
		}
	}
	return false
}

// TestImports holds the floors table: imports go down, and the data path and the control plane meet only in agent and node.
func TestImports(t *testing.T) {
	for _, s := range sources(t) {
		if !strings.HasPrefix(s.path, "internal/") && !strings.HasPrefix(s.path, "cmd/ashlar/") {
			continue
		}
		allowed, known := mayImport[s.pkg]
		if s.pkg == "cmd/ashlar" {
			allowed, known = commandMayImport, true
		}
		if !known {
			t.Errorf("%s: package %s is not in the floors table", s.path, s.pkg)
			continue
		}
		for _, imp := range s.file.Imports {
			p := strings.Trim(imp.Path.Value, `"`)
			if !strings.HasPrefix(p, module) {
				continue
			}
			p = strings.TrimPrefix(strings.TrimPrefix(p, module), "internal/")
			if p == s.pkg || contains(allowed, p) {
				continue
			}
			if s.test && (contains(testsMayImport, p) || s.pkg == "cmd/ashlar") {
				continue
			}
			t.Errorf("%s imports %s, which the floors table does not allow", s.path, p)
		}
	}
}

// TestHalves proves that the two halves of the house reach each other nowhere but through agent and node, even transitively.
func TestHalves(t *testing.T) {
	graph := map[string]map[string]bool{}
	for _, s := range sources(t) {
		if s.test {
			continue
		}
		for _, imp := range s.file.Imports {
			p := strings.Trim(imp.Path.Value, `"`)
			if strings.HasPrefix(p, module+"internal/") {
				if graph[s.pkg] == nil {
					graph[s.pkg] = map[string]bool{}
				}
				graph[s.pkg][strings.TrimPrefix(p, module+"internal/")] = true
			}
		}
	}
	var reach func(from string, seen map[string]bool)
	reach = func(from string, seen map[string]bool) {
		for to := range graph[from] {
			if !seen[to] {
				seen[to] = true
				reach(to, seen)
			}
		}
	}
	control := []string{"catalog", "catalog/etcd", "plan", "control", "api", "api/client", "agent", "node"}
	for _, p := range append([]string{"dataplane"}, dataPath...) {
		seen := map[string]bool{}
		reach(p, seen)
		for _, c := range control {
			if seen[c] {
				t.Errorf("data path package %s reaches %s", p, c)
			}
		}
	}
	for _, p := range []string{"catalog", "catalog/etcd", "plan", "control", "api", "api/client", "agent"} {
		seen := map[string]bool{}
		reach(p, seen)
		for _, d := range append([]string{"dataplane"}, dataPath...) {
			if seen[d] {
				t.Errorf("control plane package %s reaches %s", p, d)
			}
		}
	}
}

// TestPackageComments wants every package to say what it is.
func TestPackageComments(t *testing.T) {
	doc := map[string]string{}
	for _, s := range sources(t) {
		if s.test {
			continue
		}
		dir := path.Dir(s.path)
		if _, ok := doc[dir]; !ok {
			doc[dir] = ""
		}
		if s.file.Doc != nil {
			doc[dir] += s.file.Doc.Text()
		}
	}
	for dir, text := range doc {
		if len(text) < 60 {
			t.Errorf("%s: no package comment that says what it is and where to read next", dir)
		}
	}
}

func funcName(s source, d *ast.FuncDecl) string {
	name := d.Name.Name
	if d.Recv != nil && len(d.Recv.List) == 1 {
		typ := d.Recv.List[0].Type
		if star, ok := typ.(*ast.StarExpr); ok {
			typ = star.X
		}
		if idx, ok := typ.(*ast.IndexExpr); ok {
			typ = idx.X
		}
		if id, ok := typ.(*ast.Ident); ok {
			name = id.Name + "." + name
		}
	}
	return s.pkg + "." + name
}

// TestFunctions holds one function to one screen and five parameters, and forbids init.
func TestFunctions(t *testing.T) {
	for _, s := range sources(t) {
		if s.test {
			continue
		}
		for _, d := range s.file.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			name := funcName(s, fn)
			if fn.Name.Name == "init" && fn.Recv == nil {
				t.Errorf("%s: init is not allowed", s.path)
			}
			lines := s.fset.Position(fn.End()).Line - s.fset.Position(fn.Pos()).Line + 1
			if lines > maxLines && exceptions["length"][name] == "" {
				t.Errorf("%s: %s has %d lines, more than %d", s.path, name, lines, maxLines)
			}
			n := 0
			for _, f := range fn.Type.Params.List {
				n += max(1, len(f.Names))
			}
			if n > maxParams && exceptions["params"][name] == "" {
				t.Errorf("%s: %s takes %d parameters, more than %d", s.path, name, n, maxParams)
			}
		}
	}
}

// isErrorText tells whether e is a call of Error() without arguments.
func isErrorText(e ast.Expr) bool {
	call, ok := e.(*ast.CallExpr)
	if !ok || len(call.Args) != 0 {
		return false
	}
	sel, ok := call.Fun.(*ast.SelectorExpr)
	return ok && sel.Sel.Name == "Error"
}

// TestStatements forbids what the style forbids inside functions: a bare go statement, a sleep, and decisions made from an error's text.
func TestStatements(t *testing.T) {
	for _, s := range sources(t) {
		ast.Inspect(s.file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.GoStmt:
				if !s.test && exceptions["go"][s.path] == "" {
					t.Errorf("%s: a bare go statement; use WaitGroup.Go or errgroup in the type whose Close waits", s.fset.Position(n.Pos()))
				}
			case *ast.CallExpr:
				checkCall(t, s, n)
			case *ast.BinaryExpr:
				if (n.Op == token.EQL || n.Op == token.NEQ) && (isErrorText(n.X) || isErrorText(n.Y)) && !s.test && exceptions["errortext"][s.path] == "" {
					t.Errorf("%s: compares an error's text", s.fset.Position(n.Pos()))
				}
			}
			return true
		})
	}
}

func checkCall(t *testing.T, s source, call *ast.CallExpr) {
	sel, ok := call.Fun.(*ast.SelectorExpr)
	if !ok {
		return
	}
	pkg, ok := sel.X.(*ast.Ident)
	if !ok {
		return
	}
	if pkg.Name == "time" && sel.Sel.Name == "Sleep" && exceptions["sleep"][s.path] == "" {
		t.Errorf("%s: time.Sleep; wait for what you wait for", s.fset.Position(call.Pos()))
	}
	if s.test || (pkg.Name != "strings" && pkg.Name != "regexp" && pkg.Name != "bytes") {
		return
	}
	for _, a := range call.Args {
		if isErrorText(a) && exceptions["errortext"][s.path] == "" {
			t.Errorf("%s: reads an error's text; errors are values", s.fset.Position(call.Pos()))
		}
	}
}

// TestExceptionsAreUsed keeps the lists of exceptions short: each must name something that exists and carry a reason.
func TestExceptionsAreUsed(t *testing.T) {
	names := map[string]bool{}
	for _, s := range sources(t) {
		names[s.path] = true
		for _, d := range s.file.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok {
				names[funcName(s, fn)] = true
			}
		}
	}
	for rule, list := range exceptions {
		for name, why := range list {
			if !names[name] || len(why) < 10 {
				t.Errorf("exception %s/%s names nothing or gives no reason", rule, name)
			}
		}
	}
}

var testName = regexp.MustCompile(`\b(Test|Fuzz|Benchmark)[A-Z][A-Za-z0-9_]*`)

// TestProof keeps docs/proof.md honest: every test it names exists, and every row names a test, a command or says "not yet".
func TestProof(t *testing.T) {
	have := map[string]bool{}
	for _, s := range sources(t) {
		for _, d := range s.file.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok {
				have[fn.Name.Name] = true
			}
		}
	}
	text, err := os.ReadFile(filepath.Join(root(t), "docs", "proof.md"))
	if err != nil {
		t.Fatal(err)
	}
	rows := 0
	for i, line := range strings.Split(string(text), "\n") {
		if !strings.HasPrefix(line, "|") || strings.HasPrefix(line, "|--") || strings.HasPrefix(line, "| claim") {
			continue
		}
		rows++
		names := testName.FindAllString(line, -1)
		for _, n := range names {
			if !have[n] {
				t.Errorf("docs/proof.md:%d names %s, which does not exist", i+1, n)
			}
		}
		if len(names) == 0 && !strings.Contains(line, "`make ") && !strings.Contains(line, "not yet") {
			t.Errorf("docs/proof.md:%d has neither a test, a make target nor \"not yet\"", i+1)
		}
		if strings.Count(line, "|") < 5 {
			t.Errorf("docs/proof.md:%d has fewer than four cells", i+1)
		}
	}
	if rows < 10 {
		t.Errorf("docs/proof.md has only %d rows", rows)
	}
}

// TestMutants keeps mutants/*.json from going stale between two runs of `make mutants`, which take long: what a mutant replaces stands in its file once, and it names a test that
// a plain `go test` of its package runs.
func TestMutants(t *testing.T) {
	tests := map[string][]string{}
	for _, s := range sources(t) {
		if s.test && !strings.Contains(buildTag(s.file), "integration") {
			for _, d := range s.file.Decls {
				if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil {
					tests["./"+path.Dir(s.path)] = append(tests["./"+path.Dir(s.path)], fn.Name.Name)
				}
			}
		}
	}
	lists, err := filepath.Glob(filepath.Join(root(t), "mutants", "*.json"))
	if err != nil || len(lists) == 0 {
		t.Fatal("no mutants found", err)
	}
	names := map[string]bool{}
	for _, list := range lists {
		text, err := os.ReadFile(list)
		if err != nil {
			t.Fatal(err)
		}
		var mutants []struct{ Name, File, Old, New, Package, Test string }
		if err := json.Unmarshal(text, &mutants); err != nil {
			t.Fatalf("%s: %v", list, err)
		}
		for _, m := range mutants {
			src, err := os.ReadFile(filepath.Join(root(t), m.File))
			if n := strings.Count(string(src), m.Old); err != nil || n != 1 || m.Old == m.New {
				t.Errorf("%s: %q: its text stands %d times in %s, want once, and another in its place (%v)", filepath.Base(list), m.Name, n, m.File, err)
			}
			top, _, _ := strings.Cut(m.Test, "/") // a case of a test is told only by running it
			pattern, err := regexp.Compile(top)
			if err != nil || m.Test == "" || !slices.ContainsFunc(tests[m.Package], pattern.MatchString) {
				t.Errorf("%s: %q: %s has no test %q (%v)", filepath.Base(list), m.Name, m.Package, m.Test, err)
			}
			if names[m.Name] {
				t.Errorf("%s: %q is there twice", filepath.Base(list), m.Name)
			}
			names[m.Name] = true
		}
	}
}

// buildTag is a file's //go:build line, or nothing.
func buildTag(f *ast.File) string {
	for _, group := range f.Comments {
		for _, c := range group.List {
			if c.Pos() < f.Package && strings.HasPrefix(c.Text, "//go:build ") {
				return c.Text
			}
		}
	}
	return ""
}

// heading is a heading of a page; anchorless is what an anchor leaves out of it.
var (
	heading    = regexp.MustCompile("(?m)^#+ +(.*)$")
	anchorless = regexp.MustCompile(`[^\p{L}\p{N} _-]`)
)

// hasAnchor tells whether a page has a heading that a link's #anchor means.
func hasAnchor(page []byte, anchor string) bool {
	for _, m := range heading.FindAllStringSubmatch(string(page), -1) {
		if "#"+strings.ReplaceAll(anchorless.ReplaceAllString(strings.ToLower(m[1]), ""), " ", "-") == anchor {
			return true
		}
	}
	return false
}

// TestLinks wants every relative link in the documentation to lead somewhere: to a file, and to a heading of it if one is named.
func TestLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#:]*)(#[^)]*)?\)`)
	top := root(t)
	var broken []string
	err := filepath.WalkDir(top, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(name, ".md") {
			return err
		}
		text, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		for _, m := range link.FindAllStringSubmatch(string(text), -1) {
			to, page := filepath.Join(filepath.Dir(name), m[1]), text
			_, err := os.Stat(to)
			if m[1] != "" && m[2] != "" && err == nil {
				page, err = os.ReadFile(to)
			}
			if err != nil || m[2] != "" && !hasAnchor(page, m[2]) {
				broken = append(broken, fmt.Sprintf("%s -> %s", strings.TrimPrefix(name, top+"/"), m[1]+m[2]))
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	sort.Strings(broken)
	for _, b := range broken {
		t.Errorf("broken link: %s", b)
	}
}
