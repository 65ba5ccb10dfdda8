package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"ashlar/internal/api"
	"ashlar/internal/api/client"
)

// status is what `ashlar status -o json` prints: everything. The table is made of the overview alone, whose size does not grow with the number of volumes.
type status struct {
	About    api.About           `json:"about"`
	Ready    bool                `json:"ready"`
	Nodes    []api.Node          `json:"nodes"`
	Volumes  []api.Volume        `json:"volumes"`
	Images   []api.BackingImage  `json:"images"`
	Events   []api.Event         `json:"events"` // the last warnings
	Problems []api.ObjectProblem `json:"problems"`
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
				if a.output == "json" {
					s, err := readStatus(cmd.Context(), c)
					if err != nil {
						return err
					}
					return a.print(s, nil)
				}
				o, err := c.Overview(cmd.Context())
				if err != nil {
					return err
				}
				a.showStatus(o)
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&attached, "until-attached", false, "first wait until every volume that is to be attached can be reached here")
	cmd.Flags().DurationVar(&a.timeout, "timeout", time.Minute, "wait at most this long; 0: for ever")
	return cmd
}

// readStatus asks for everything, side by side.
func readStatus(ctx context.Context, c *client.Client) (s status, err error) {
	if s.About, err = c.About(ctx); err != nil {
		return s, err
	}
	var wg sync.WaitGroup
	var o api.Overview
	var failed [3]error
	wg.Go(func() { o, failed[0] = c.Overview(ctx) })
	wg.Go(func() { s.Volumes, failed[1] = c.Volumes(ctx) })
	wg.Go(func() { s.Images, failed[2] = c.Images(ctx) })
	wg.Wait()
	s.Ready, s.Events, s.Problems, s.Nodes = o.Ready, o.Events, o.Problems, []api.Node{}
	for _, n := range o.Nodes {
		s.Nodes = append(s.Nodes, n.Node)
	}
	for _, err := range failed { // of several the first: mostly they fail for one reason
		if err != nil {
			return s, err
		}
	}
	return s, nil
}

// showStatus prints what needs attention first, then what there is.
func (a *app) showStatus(o api.Overview) {
	ready := "ready"
	if !o.Ready {
		ready = "not ready"
	}
	clustered := len(o.Nodes) > 1 || len(o.Nodes) == 1 && o.Nodes[0].Port != 0
	look := a.attention(o)
	if clustered && look != "" {
		a.say("%s\n", look)
	}
	a.fields("Node", o.Node+" (ashlar "+o.Version+")", "State", ready, "Nodes", countNodes(o.Nodes), "Volumes", countStates(o.Volumes), "Images", fmt.Sprint(o.Images))
	a.say("")
	if clustered {
		a.nodeTable(o.Nodes)
		return
	}
	rows := [][]string{{"NODE", "STATE", "DATA PROCESS", "DISK", ">SIZE", ">FREE", ">SCHEDULED", "PATH"}}
	for _, n := range o.Nodes {
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
	if look != "" {
		a.say("\n%s", look)
	}
}

// countNodes says how many nodes there are and how they are; "" for one alone.
func countNodes(nodes []api.NodeOverview) string {
	if len(nodes) == 1 {
		return ""
	}
	states, voters, members := map[string]int{}, 0, 0
	for _, n := range nodes {
		states[n.State]++
		if n.Voter {
			voters++
			if n.State != api.NodeDown && n.Member == "voter" {
				members++
			}
		}
	}
	said := countStates(states)
	if voters > 0 {
		said += fmt.Sprintf("; %d of %d members of the catalogue vote", members, voters)
	}
	for _, n := range nodes {
		if n.Leads {
			said += "; " + n.Name + " leads"
		}
	}
	return said
}

// attention lists what a person should look at; "" if there is nothing.
func (a *app) attention(o api.Overview) string {
	var lines []string
	for _, p := range o.Problems {
		lines = append(lines, fmt.Sprintf("%s %s: %s", p.Kind, p.Name, p.Message))
	}
	if o.More > 0 {
		lines = append(lines, fmt.Sprintf("and %d more; `ashlar volume list`, `ashlar image list`", o.More))
	}
	for _, e := range o.Events {
		lines = append(lines, fmt.Sprintf("%s: %s %s: %s", a.ago(e.Time), e.ObjectKind, e.ObjectName, e.Message))
	}
	if len(lines) == 0 {
		return ""
	}
	return "Look at:\n  " + strings.Join(lines, "\n  ")
}

// countVolumes counts volumes by state.
func countVolumes(list []api.Volume) string {
	count := map[string]int{}
	for _, v := range list {
		count[v.State]++
	}
	return countStates(count)
}

// countStates says how many there are, and in which state.
func countStates(count map[string]int) string {
	var parts []string
	sum := 0
	for _, state := range slices.Sorted(maps.Keys(count)) {
		parts = append(parts, fmt.Sprintf("%d %s", count[state], state))
		sum += count[state]
	}
	if sum == 0 {
		return "0"
	}
	return fmt.Sprintf("%d (%s)", sum, strings.Join(parts, ", "))
}
