package client

import (
	"context"
	"fmt"
	"io"
	"net/http"
)

// maxMetricsBytes bounds what is read of a node's metrics.
const maxMetricsBytes = 64 << 20

// Metrics returns the node's metrics as Prometheus would read them.
func (c *Client) Metrics(ctx context.Context) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+"/metrics", http.NoBody)
	if err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	res, err := c.http.Do(req)
	if err != nil {
		return nil, c.unreachable(ctx, err)
	}
	defer res.Body.Close()
	data, err := io.ReadAll(io.LimitReader(res.Body, maxMetricsBytes))
	if err != nil {
		return nil, c.unreachable(ctx, err)
	}
	if res.StatusCode != http.StatusOK {
		return nil, failure(res.StatusCode, data)
	}
	return data, nil
}
