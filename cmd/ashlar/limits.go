package main

import (
	"fmt"
	"strconv"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ashlar/internal/api"
	"ashlar/internal/api/client"
)

// limitFlags defines the flags of a volume's limits.
func limitFlags(flags *pflag.FlagSet, l *client.LimitChange) {
	flags.StringVar(&l.IOPS, "iops", "", "requests per second, reads and writes together; 0: no limit")
	flags.StringVar(&l.BytesPerSecond, "bandwidth", "", "bytes per second, reads and writes together (100Mi, 1G); 0: no limit")
	flags.StringVar(&l.BurstIOPS, "burst-iops", "", "requests per second for as long as --burst-seconds, after a rest")
	flags.StringVar(&l.BurstBytesPerSecond, "burst-bandwidth", "", "bytes per second for as long as --burst-seconds, after a rest")
	flags.StringVar(&l.BurstSeconds, "burst-seconds", "", "how long the burst rates hold; default 1, at most 3600")
}

func (a *app) volumeLimit() *cobra.Command {
	var l client.LimitChange
	cmd := &cobra.Command{
		Use: "limit NAME", Short: "Show or change how much a volume's clients may ask per second",
		Long: `Limit changes a volume's limits, also while a guest uses it: they hold from the next request on. What is not named stays as it is; 0 takes a limit away. Without
flags it shows them. A guest that used less than its rate may catch up: for --burst-seconds the burst rates hold instead.`,
		Example: "  ashlar volume limit db1 --iops 2000 --bandwidth 100Mi\n  ashlar volume limit db1 --burst-iops 10000 --burst-seconds 30\n  ashlar volume limit db1 --iops 0 --bandwidth 0",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withNode(func(c *client.Client) error {
				var v api.Volume
				var err error
				if l == (client.LimitChange{}) {
					v, err = c.Volume(cmd.Context(), args[0])
				} else {
					v, err = c.SetLimits(cmd.Context(), args[0], l)
				}
				if err != nil {
					return err
				}
				return a.print(v.Limits, func() { a.say("volume %s: %s", v.Name, limitsText(v.Limits)) })
			})
		},
	}
	limitFlags(cmd.Flags(), &l)
	return cmd
}

// limitsText says a volume's limits in one line.
func limitsText(l api.Limits) string {
	rate := func(n int64, unit string) string {
		if n == 0 {
			return "no limit on " + unit
		}
		return strconv.FormatInt(n, 10) + " " + unit + "/s"
	}
	text := rate(l.IOPS, "requests")
	if emptyRate(l.BytesPerSecond) {
		text += ", no limit on bytes"
	} else {
		text += ", " + sizeOf(l.BytesPerSecond) + "/s"
	}
	if l.BurstIOPS > 0 || !emptyRate(l.BurstBytesPerSecond) {
		text += fmt.Sprintf("; bursts of %d s: %s", max(1, l.BurstSeconds), rate(l.BurstIOPS, "requests"))
		if !emptyRate(l.BurstBytesPerSecond) {
			text += ", " + sizeOf(l.BurstBytesPerSecond) + "/s"
		}
	}
	return text
}

// emptyRate tells a byte rate that is no limit.
func emptyRate(rate string) bool { return rate == "" || rate == "0" }
