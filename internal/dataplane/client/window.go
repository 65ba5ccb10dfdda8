package client

import (
	"fmt"
	"strconv"
	"strings"
)

// windowHeader carries each side's Window in every request and every answer: a peer may be replaced between any two.
const windowHeader = "Ashlar-Api-Window"

// Window is the range of wire versions a side speaks, both ends included.
type Window struct {
	Min, Current int
}

// ThisBuild is the window of this build.
func ThisBuild() Window { return Window{Min: APIMin, Current: APICurrent} }

// String is the form that travels: "MIN-CURRENT".
func (w Window) String() string { return fmt.Sprintf("%d-%d", w.Min, w.Current) }

// parseWindow reads what String wrote.
func parseWindow(s string) (Window, error) {
	lo, hi, ok := strings.Cut(s, "-")
	if !ok {
		return Window{}, fmt.Errorf("%w: peer sent no version window (%q)", ErrVersion, s)
	}
	w := Window{}
	var err error
	if w.Min, err = strconv.Atoi(lo); err == nil {
		w.Current, err = strconv.Atoi(hi)
	}
	if err != nil || w.Min < 1 || w.Current < w.Min {
		return Window{}, fmt.Errorf("%w: peer sent a bad version window %q", ErrVersion, s)
	}
	return w, nil
}

// check refuses a peer whose window (as it sent it) shares no version with ours.
func (w Window) check(peer string) error {
	p, err := parseWindow(peer)
	if err != nil {
		return fmt.Errorf("%w; this side speaks %s", err, w)
	}
	if p.Current < w.Min || w.Current < p.Min {
		return fmt.Errorf("%w: this side speaks versions %s, the other side %s", ErrVersion, w, p)
	}
	return nil
}
