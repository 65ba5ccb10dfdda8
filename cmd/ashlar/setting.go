package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"ashlar/internal/api"
	"ashlar/internal/api/client"
)

// settingCommand is what the whole cluster shares; what belongs to one machine is in its configuration file.
func (a *app) settingCommand() *cobra.Command {
	list := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the cluster's settings", Example: "  ashlar setting list", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withNode(func(c *client.Client) error {
				all, err := c.Settings(cmd.Context())
				if err != nil {
					return err
				}
				return a.print(all, func() {
					rows := [][]string{{"SETTING", "VALUE", "DEFAULT", "WHAT IT IS"}}
					for _, s := range all {
						rows = append(rows, []string{s.Name, dash(s.Value), dash(s.Definition.Default), s.Definition.Description})
					}
					a.table(rows)
				})
			})
		},
	}
	set := &cobra.Command{
		Use: "set NAME VALUE", Short: "Change a setting", Example: "  ashlar setting set background-bandwidth-mib 50", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withNode(func(c *client.Client) error {
				s, err := c.SetSetting(cmd.Context(), args[0], args[1])
				if err != nil {
					return err
				}
				return a.print(s, func() { a.say("%s: %s", s.Name, s.Value) })
			})
		},
	}
	return group("setting", "Settings that the whole cluster shares", list, set)
}

func (a *app) eventsCommand() *cobra.Command {
	var follow bool
	cmd := &cobra.Command{
		Use: "events", Short: "Show what happened; with --follow, as it happens", Example: "  ashlar events\n  ashlar events --follow -o json", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withNode(func(c *client.Client) error {
				if follow {
					return c.FollowEvents(cmd.Context(), "", a.showEvent, func(err error) {
						if err != nil {
							fmt.Fprintf(a.err, "ashlar: %v; asking again\n", err)
						}
					})
				}
				events, err := c.Events(cmd.Context())
				if err != nil {
					return err
				}
				return a.print(events, func() {
					for _, e := range events {
						_ = a.showEvent(e) // it is not JSON here, and that is all that could fail
					}
				})
			})
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on until it is interrupted")
	return cmd
}

// showEvent prints one: a line, or one JSON object a line.
func (a *app) showEvent(e api.Event) error {
	if a.output == "json" {
		line, err := json.Marshal(e)
		if err != nil {
			return fmt.Errorf("print: %w", err)
		}
		fmt.Fprintf(a.out, "%s\n", line)
		return nil
	}
	at := e.Time
	if t, err := time.Parse(time.RFC3339, e.Time); err == nil {
		at = t.Local().Format("2006-01-02 15:04:05")
	}
	fmt.Fprintf(a.out, "%s  %-7s  %s %s: %s\n", at, e.EventType, e.ObjectKind, e.ObjectName, cmp.Or(e.Message, e.Reason))
	return nil
}
