package client

import (
	"context"
	"time"

	"ashlar/internal/api"
)

// The bounds of the pause between two looks: short at first, because most waits end at once.
const (
	pauseMin = 5 * time.Millisecond
	pauseMax = 500 * time.Millisecond
	// What a look costs grows with what there is (all volumes, for a node's contents): a tenth of the time is spent looking, at most, until the pauses are long.
	pauseFactor = 9
	pauseLong   = 5 * time.Second
)

// until looks again and again until look says that it has seen what it waits for, fails, or ctx ends (its error).
func until(ctx context.Context, look func() (bool, error)) error {
	for pause := pauseMin; ; pause = min(pause*3/2, pauseMax) {
		began := time.Now()
		if ok, err := look(); ok || err != nil {
			return err
		}
		timer := time.NewTimer(max(pause, min(pauseFactor*time.Since(began), pauseLong)))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		}
	}
}

// WaitVolume looks at a volume until done says so or fails, or ctx ends (its error). It returns the volume as last seen.
func (c *Client) WaitVolume(ctx context.Context, name string, done func(api.Volume) (bool, error)) (api.Volume, error) {
	var v api.Volume
	err := until(ctx, func() (bool, error) {
		seen, err := c.Volume(ctx, name)
		if err != nil {
			return false, err
		}
		v = seen
		return done(v)
	})
	return v, err
}

// WaitImage is WaitVolume for an image.
func (c *Client) WaitImage(ctx context.Context, name string, done func(api.BackingImage) (bool, error)) (api.BackingImage, error) {
	var img api.BackingImage
	err := until(ctx, func() (bool, error) {
		seen, err := c.Image(ctx, name)
		if err != nil {
			return false, err
		}
		img = seen
		return done(img)
	})
	return img, err
}

// WaitOperation looks at an operation until it is done, and tells seen how far it is whenever that changed (nil: nobody). One that failed is its error.
func (c *Client) WaitOperation(ctx context.Context, id string, seen func(api.Operation)) (api.Operation, error) {
	var op api.Operation
	err := until(ctx, func() (bool, error) {
		now, err := c.Operation(ctx, id)
		if err != nil {
			return false, err
		}
		if seen != nil && (now.State != op.State || now.Progress != op.Progress) {
			seen(now)
		}
		op = now
		if op.State == "failed" {
			return false, api.Failure(op.Reason, "volume %s: %s: %s", op.Volume, op.Verb, op.Message)
		}
		return op.State == "done", nil
	})
	return op, err
}

// WaitVolumeGone waits until there is no volume of that name.
func (c *Client) WaitVolumeGone(ctx context.Context, name string) error {
	return until(ctx, func() (bool, error) {
		_, err := c.Volume(ctx, name)
		return gone(err)
	})
}

// WaitImageGone waits until there is no image of that name.
func (c *Client) WaitImageGone(ctx context.Context, name string) error {
	return until(ctx, func() (bool, error) {
		_, err := c.Image(ctx, name)
		return gone(err)
	})
}

// WaitNodeGone waits until there is no node of that name.
func (c *Client) WaitNodeGone(ctx context.Context, name string) error {
	return until(ctx, func() (bool, error) {
		_, err := c.Node(ctx, name)
		return gone(err)
	})
}

// WaitNodeState looks at a node until done says so, or ctx ends (its error).
func (c *Client) WaitNodeState(ctx context.Context, name string, done func(api.Node) bool) error {
	return until(ctx, func() (bool, error) {
		n, err := c.Node(ctx, name)
		return err == nil && done(n), err
	})
}

// WaitNode looks at what a node has until done says so or fails, or ctx ends (its error).
func (c *Client) WaitNode(ctx context.Context, name string, done func(api.NodeContents) (bool, error)) (api.NodeContents, error) {
	var last api.NodeContents
	err := until(ctx, func() (bool, error) {
		seen, err := c.NodeContents(ctx, name)
		if err != nil {
			return false, err
		}
		last = seen
		return done(seen)
	})
	return last, err
}

func gone(err error) (bool, error) {
	if api.CodeOf(err) == api.CodeNotFound {
		return true, nil
	}
	return false, err
}
