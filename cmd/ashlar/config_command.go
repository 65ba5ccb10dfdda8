package main

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/spf13/cobra"
)

// checked is a configuration file that is in order.
type checked struct {
	File   string `json:"file"`
	Exists bool   `json:"exists"` // false: there is none, and defaults hold
}

// configCommand shows, explains and checks the configuration.
func (a *app) configCommand() *cobra.Command {
	// They read the configuration themselves: a wrong one is what they are for.
	own := func(cmd *cobra.Command, _ []string) error { return nil }
	check := &cobra.Command{
		Use: "check [FILE]", Short: "Read a configuration file and name every mistake in it", Args: cobra.MaximumNArgs(1), PersistentPreRunE: own,
		Example: "  ashlar config check\n  ashlar config check ./ashlar.toml",
		RunE: func(_ *cobra.Command, args []string) error {
			path := a.configPath()
			if len(args) == 1 {
				path = args[0]
			}
			if _, err := configFile(path); errors.Is(err, fs.ErrNotExist) && path == defaultConfig {
				return a.print(checked{File: path}, func() { a.say("there is no %s: defaults hold", path) })
			} else if err != nil {
				return notThere(err)
			}
			// Everything together, as serve would see it.
			probe := newApp(a.out, a.err, a.getenv)
			probe.config = path
			serve := probe.serveCommand()
			serve.Flags().StringVar(&probe.runDir, "run-dir", optionOf("run-dir").value, "")
			if err := probe.configure(serve); err != nil {
				return err
			}
			return a.print(checked{File: path, Exists: true}, func() { a.say("%s is in order", path) })
		},
	}
	example := &cobra.Command{
		Use: "example", Short: "Print a configuration file with every setting, explained", Args: cobra.NoArgs, PersistentPreRunE: own,
		RunE: func(*cobra.Command, []string) error { fmt.Fprint(a.out, exampleConfig()); return nil },
	}
	show := &cobra.Command{
		Use: "show", Short: "Print what holds here, and where each value comes from", Args: cobra.NoArgs, PersistentPreRunE: own,
		RunE: func(*cobra.Command, []string) error { return a.showConfig() },
	}
	return group("config", "Show, explain and check the configuration", show, example, check)
}

func (a *app) configPath() string {
	if a.config != "" {
		return a.config
	}
	return a.env("ASHLAR_CONFIG", defaultConfig)
}

// notThere makes a file that cannot be read a mistake of the configuration.
func notThere(err error) error {
	if errors.Is(err, errConfig) {
		return err
	}
	return fmt.Errorf("%w: %w", errConfig, err)
}

// setting is one line of `ashlar config show`.
type setting struct {
	Key    string `json:"key"`
	Value  string `json:"value"`
	Source string `json:"source"` // file, environment, default
}

func (a *app) showConfig() error {
	file, err := configFile(a.configPath())
	if err != nil && !(errors.Is(err, fs.ErrNotExist) && a.config == "") {
		return notThere(err)
	}
	var all []setting
	for _, o := range options() {
		s := setting{o.key, o.value, "default"}
		if v, ok := file[o.key]; ok {
			s.Value, s.Source = v, a.configPath()
		}
		if v := a.getenv(o.env); v != "" {
			s.Value, s.Source = v, o.env
		}
		all = append(all, s)
	}
	return a.print(all, func() {
		rows := [][]string{{"SETTING", "VALUE", "FROM"}}
		for _, s := range all {
			rows = append(rows, []string{s.Key, dash(s.Value), s.Source})
		}
		a.table(rows)
	})
}
