package main

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"ashlar/internal/api"
)

// print shows a value: as JSON if that was asked for, else by calling table.
func (a *app) print(v any, table func()) error {
	if a.output == "json" {
		data, err := json.MarshalIndent(v, "", "  ")
		if err != nil {
			return fmt.Errorf("print: %w", err)
		}
		fmt.Fprintf(a.out, "%s\n", data)
		return nil
	}
	table()
	return nil
}

// say prints a line for people; nothing with -o json.
func (a *app) say(format string, args ...any) {
	if a.output != "json" {
		fmt.Fprintf(a.out, format+"\n", args...)
	}
}

// table prints rows with aligned columns; the first is the heading. Columns of numbers are told by a heading that begins with '>', and are aligned to the right.
func (a *app) table(rows [][]string) {
	width := make([]int, len(rows[0]))
	right := make([]bool, len(rows[0]))
	for i, head := range rows[0] {
		rows[0][i], right[i] = strings.CutPrefix(head, ">")
	}
	for _, row := range rows {
		for i, cell := range row {
			width[i] = max(width[i], utf8.RuneCountInString(cell))
		}
	}
	for n, row := range rows {
		var line strings.Builder
		for i, cell := range row {
			gap := strings.Repeat(" ", width[i]-utf8.RuneCountInString(cell))
			shown := cell
			if n > 0 {
				shown = a.colour(cell)
			}
			switch {
			case right[i]:
				line.WriteString(gap + shown)
			case i < len(row)-1:
				line.WriteString(shown + gap)
			default:
				line.WriteString(shown)
			}
			if i < len(row)-1 {
				line.WriteString("  ")
			}
		}
		text := line.String()
		if n == 0 && a.terminal {
			text = "\x1b[1m" + text + "\x1b[0m"
		}
		fmt.Fprintln(a.out, text)
	}
}

// fields prints names and values, aligned.
func (a *app) fields(pairs ...string) {
	width := 0
	for i := 0; i < len(pairs); i += 2 {
		width = max(width, len(pairs[i]))
	}
	for i := 0; i < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			fmt.Fprintf(a.out, "%-*s  %s\n", width+1, pairs[i]+":", a.colour(pairs[i+1]))
		}
	}
}

// colour paints states, on a terminal only.
func (a *app) colour(s string) string {
	if !a.terminal {
		return s
	}
	paint := ""
	switch s {
	case "healthy", "ready", "attached", "True":
		paint = "32"
	case "degraded", "attaching", "detaching", "creating", "pending", "starting":
		paint = "33"
	case "faulted", "failed", "not ready":
		paint = "31"
	}
	if paint == "" {
		return s
	}
	return "\x1b[" + paint + "m" + s + "\x1b[0m"
}

// size shows bytes for people: at most one decimal.
func size(n int64) string {
	short, _, _ := strings.Cut(api.FormatSize(n), " (")
	return short
}

// sizeOf shows a decimal string of bytes for people.
func sizeOf(s string) string {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return s
	}
	return size(n)
}

// ago shows how long ago a time on the wire was.
func (a *app) ago(stamp string) string {
	t, err := time.Parse(time.RFC3339, stamp)
	if err != nil {
		return stamp
	}
	d := a.now().Sub(t)
	switch {
	case d < 2*time.Second:
		return "just now"
	case d < 2*time.Minute:
		return fmt.Sprintf("%d s ago", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min ago", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h ago", int(d.Hours()))
	}
	return fmt.Sprintf("%d days ago", int(d.Hours()/24))
}

// dash stands for nothing in a table.
func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
