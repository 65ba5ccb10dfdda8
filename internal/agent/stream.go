package agent

import (
	"context"
	"errors"
	"io"
)

// This file is bytes that go through this node and are no record: uploads, downloads and differences.

// errUnbuilt answers what this build does not have.
var errUnbuilt = errors.New("this build does not have it")

// Upload takes the bytes of an image.
func (a *Agent) Upload(context.Context, string, int64, io.Reader) error { return errUnbuilt }

// Download returns the bytes of an image file.
func (a *Agent) Download(_ context.Context, _, _, _, _ string) (io.ReadCloser, int64, error) {
	return nil, 0, errUnbuilt
}

// Diff tells what changed.
func (a *Agent) Diff(context.Context, struct {
	Volume, From, To string
	Off              int64
}, func(off, n int64, zero bool)) (int64, int64, error) {
	return 0, 0, errUnbuilt
}
