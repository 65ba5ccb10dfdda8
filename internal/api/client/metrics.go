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
	req, err := c.request(ctx, http.MethodGet, "/metrics", http.NoBody)
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

// Backup writes all records of the catalogue, one JSON document, to w. After an error w may hold a part of it, which no restoration takes.
func (c *Client) Backup(ctx context.Context, w io.Writer) error {
	req, err := c.request(ctx, http.MethodGet, "/v1/catalogue/backup", http.NoBody)
	if err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	res, err := c.http.Do(req)
	if err != nil {
		return c.unreachable(ctx, err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		data, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
		if err != nil {
			return c.unreachable(ctx, err)
		}
		return failure(res.StatusCode, data)
	}
	if _, err := io.Copy(w, res.Body); err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	return nil
}
