package image

import (
	"context"
	"fmt"

	"ashlar/internal/block"
)

// convert copies src into dst as an import does, which reads as zero everywhere and has the same size, and returns src's digest, made in the same pass.
func convert(ctx context.Context, dst, src block.Device, progress func(doneBytes int64)) (string, error) {
	c := converter{dst: dst, size: src.Size(), stride: chunkBytes, fill: fillFrom(src), progress: progress}
	if img, ok := src.(*Image); ok {
		c.stride = img.stride()
	}
	d, err := c.run(ctx, func(ctx context.Context, emit emitter) error { return feedDevice(src, c.stride, emit) })
	if err != nil {
		return "", fmt.Errorf("convert: %w", err)
	}
	return d, nil
}
