package main

import (
	"fmt"
	"strings"
)

// progress shows how far long work is, on standard error: a bar that moves on a terminal, a line for every ten per cent elsewhere.
type progress struct {
	a     *app
	label string
	shown int // per cent; -1: nothing yet
	drawn bool
}

func (a *app) progress(label string) *progress { return &progress{a: a, label: label, shown: -1} }

// at shows a percentage and a state.
func (p *progress) at(percent int, state string) {
	percent = min(max(percent, 0), 100)
	if p.a.output == "json" {
		return
	}
	if p.a.live {
		const width = 30
		full := percent * width / 100
		fmt.Fprintf(p.a.err, "\r\x1b[K%s [%s%s] %3d %% %s", p.label, strings.Repeat("#", full), strings.Repeat("-", width-full), percent, state)
		p.drawn = true
		return
	}
	if p.shown < 0 || percent/10 > p.shown/10 {
		fmt.Fprintf(p.a.err, "%s: %d %% %s\n", p.label, percent, state)
		p.shown = percent
	}
}

// end leaves the bar's line.
func (p *progress) end() {
	if p.drawn {
		fmt.Fprintln(p.a.err)
		p.drawn = false
	}
}
