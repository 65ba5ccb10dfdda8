package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ashlar/internal/api"
	"ashlar/internal/api/client"
)

// status is what `ashlar status -o json` prints.
type status struct {
	About   api.About          `json:"about"`
	Ready   bool               `json:"ready"`
	Nodes   []api.Node         `json:"nodes"`
	Volumes []api.Volume       `json:"volumes"`
	Images  []api.BackingImage `json:"images"`
	Events  []api.Event        `json:"events"` // the last warnings
}

func (a *app) statusCommand() *cobra.Command {
	var attached bool
	cmd := &cobra.Command{
		Use:     "status",
		Short:   "Show nodes, disks, and what needs attention",
		Example: "  ashlar status\n  ashlar status -o json | jq '.nodes[].disks'\n  ashlar status --until-attached --timeout 90s   # at boot, before guests start",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withNode(func(c *client.Client) error {
				if attached {
					short, cancel := a.bounded(cmd.Context())
					defer cancel()
					if err := untilAttached(short, c); err != nil {
						return stillGoing(err, "not every volume that is to be attached can be reached yet")
					}
				}
				s, err := readStatus(cmd.Context(), c)
				if err != nil {
					return err
				}
				return a.print(s, func() { a.showStatus(s) })
			})
		},
	}
	cmd.Flags().BoolVar(&attached, "until-attached", false, "first wait until every volume that is to be attached can be reached here")
	cmd.Flags().DurationVar(&a.timeout, "timeout", time.Minute, "wait at most this long; 0: for ever")
	return cmd
}

func readStatus(ctx context.Context, c *client.Client) (s status, err error) {
	if s.About, err = c.About(ctx); err != nil {
		return s, err
	}
	s.Ready = c.Ready(ctx) == nil
	if s.Nodes, err = c.Nodes(ctx); err != nil {
		return s, err
	}
	if s.Volumes, err = c.Volumes(ctx); err != nil {
		return s, err
	}
	if s.Images, err = c.Images(ctx); err != nil {
		return s, err
	}
	events, err := c.Events(ctx)
	s.Events = slices.DeleteFunc(events, func(e api.Event) bool { return e.EventType == "Normal" })
	s.Events = s.Events[max(0, len(s.Events)-5):]
	return s, err
}

func (a *app) showStatus(s status) {
	ready := "ready"
	if !s.Ready {
		ready = "not ready"
	}
	a.fields("Node", s.About.Node+" (ashlar "+s.About.Version+")", "State", ready, "Volumes", countVolumes(s.Volumes), "Images", fmt.Sprint(len(s.Images)))
	a.say("")
	rows := [][]string{{"NODE", "STATE", "DATA PROCESS", "DISK", ">SIZE", ">FREE", ">SCHEDULED", "PATH"}}
	for _, n := range s.Nodes {
		state := "ready"
		if c := n.Conditions["Ready"]; c.Status != "True" {
			state = "not ready"
		}
		data := "none"
		if n.DataVersion != "" {
			data = fmt.Sprintf("%s, pid %d", n.DataVersion, n.DataPID)
		}
		for i, name := range slices.Sorted(maps.Keys(n.Disks)) {
			d := n.Disks[name]
			row := []string{n.Name, state, data, name, size(d.StorageMaximum), size(d.StorageAvailable), size(d.StorageScheduled), d.Path}
			if i > 0 {
				row[0], row[1], row[2] = "", "", ""
			}
			rows = append(rows, row)
		}
		if len(n.Disks) == 0 {
			rows = append(rows, []string{n.Name, state, data, "-", "-", "-", "-", "-"})
		}
	}
	a.table(rows)
	a.attention(s)
}

// attention lists what a person should look at.
func (a *app) attention(s status) {
	var lines []string
	for _, n := range s.Nodes {
		for _, name := range slices.Sorted(maps.Keys(n.Conditions)) {
			if c := n.Conditions[name]; c.Status == "False" && c.Message != "" {
				lines = append(lines, fmt.Sprintf("node %s: not %s: %s", n.Name, name, c.Message))
			}
		}
	}
	for _, v := range s.Volumes {
		switch {
		case v.Error != "":
			lines = append(lines, fmt.Sprintf("volume %s: %s", v.Name, v.Error))
		case v.Robustness == "faulted":
			lines = append(lines, fmt.Sprintf("volume %s: faulted; `ashlar volume show %s`", v.Name, v.Name))
		}
	}
	for _, i := range s.Images {
		if state := imageState(i); state.failed {
			lines = append(lines, fmt.Sprintf("image %s: failed: %s", i.Name, state.message))
		}
	}
	for _, e := range s.Events {
		lines = append(lines, fmt.Sprintf("%s: %s %s: %s", a.ago(e.Time), e.ObjectKind, e.ObjectName, e.Message))
	}
	if len(lines) > 0 {
		a.say("\nLook at:\n  %s", strings.Join(lines, "\n  "))
	}
}

func countVolumes(list []api.Volume) string {
	if len(list) == 0 {
		return "0"
	}
	count := map[string]int{}
	for _, v := range list {
		count[v.State]++
	}
	var parts []string
	for _, state := range slices.Sorted(maps.Keys(count)) {
		parts = append(parts, fmt.Sprintf("%d %s", count[state], state))
	}
	return fmt.Sprintf("%d (%s)", len(list), strings.Join(parts, ", "))
}
