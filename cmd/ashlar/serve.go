package main

import "github.com/spf13/cobra"

func (a *app) serveCommands() []*cobra.Command { return nil }
