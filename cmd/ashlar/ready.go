package main

import (
	"context"
	"net"
	"net/url"
	"os"
	"time"

	"ashlar/internal/api/client"
)

// untilAttached waits until every volume that is to be attached can be reached here: what a boot waits for before it starts guests. The records may still say
// "attached" from before the boot, so the endpoints themselves are tried.
func untilAttached(ctx context.Context, c *client.Client) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		about, err := c.About(ctx)
		volumes, err2 := c.Volumes(ctx)
		waiting := err != nil || err2 != nil || c.Ready(ctx) != nil
		for _, v := range volumes {
			if v.Controllers[0].HostID != about.Node {
				continue // another node's guests wait for it
			}
			switch v.State {
			case "attaching":
				waiting = true
			case "attached":
				endpoint := v.Controllers[0].Endpoint
				waiting = waiting || endpoint != "" && !reachable(endpoint)
			}
		}
		if !waiting {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// reachable tells whether somebody listens at an endpoint: a socket in an NBD URI, or a device.
func reachable(endpoint string) bool {
	u, err := url.Parse(endpoint)
	if err != nil || u.Scheme == "" {
		_, err := os.Stat(endpoint)
		return err == nil
	}
	conn, err := net.Dial("unix", u.Query().Get("socket"))
	if err == nil {
		_ = conn.Close()
	}
	return err == nil
}
