package api

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "record the exchanges in testdata anew")

// TestExchanges plays the recorded exchanges. A file is a story: lines that begin with "> " are requests ("> METHOD PATH BODY"; "~ " sends it over the unix socket),
// below each stands what was answered, as it was when somebody last looked at it and agreed; lines with "#" explain.
func TestExchanges(t *testing.T) {
	files, err := filepath.Glob("testdata/exchanges/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no exchanges", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			recorded, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var played string
			inBubble(t, func(x *fixture) { played = x.play(string(recorded)) })
			if *update {
				if err := os.WriteFile(file, []byte(played), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if played != string(recorded) {
				t.Errorf("%s has changed; if that is right, run go test -update and read the difference.\n%s", file, firstDifference(string(recorded), played))
			}
		})
	}
}

// play sends the requests of a story and returns it with today's answers.
func (x *fixture) play(story string) string {
	var out bytes.Buffer
	for line := range strings.Lines(story) {
		line = strings.TrimRight(line, "\n")
		if strings.HasPrefix(line, "#") {
			fmt.Fprintln(&out, line)
			continue
		}
		request, socket := strings.CutPrefix(line, "~ ")
		if !socket {
			var ok bool
			if request, ok = strings.CutPrefix(line, "> "); !ok {
				continue
			}
		}
		method, rest, _ := strings.Cut(request, " ")
		path, body, _ := strings.Cut(rest, " ")
		send := x.send
		if socket {
			send = x.sendSocket
		}
		a := send(method, path, body)
		x.settle()
		fmt.Fprintf(&out, "%s\n< %d\n", line, a.status)
		if len(a.raw) > 0 {
			if err := json.Indent(&out, bytes.TrimSpace(a.raw), "", "  "); err != nil {
				x.t.Errorf("%s: %v", line, err)
			}
			out.WriteString("\n")
		}
	}
	return out.String()
}

func firstDifference(a, b string) string {
	as, bs := strings.Split(a, "\n"), strings.Split(b, "\n")
	for i := range as {
		if i >= len(bs) || as[i] != bs[i] {
			got := "(nothing)"
			if i < len(bs) {
				got = bs[i]
			}
			return fmt.Sprintf("line %d: recorded %q, now %q", i+1, as[i], got)
		}
	}
	return fmt.Sprintf("line %d: recorded nothing more, now %q", len(as)+1, bs[len(as)])
}
