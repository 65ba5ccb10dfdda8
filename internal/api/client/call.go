package client

import (
	"context"
	"net/http"

	"ashlar/internal/api"
)

// Every call below returns *api.Error as call says. Calls that ask for a change return when it is recorded; where that is not the same as done, a Wait
// method is named.

// About says who answers.
func (c *Client) About(ctx context.Context) (api.About, error) {
	return one[api.About](ctx, c, http.MethodGet, "/v1/about", nil)
}

// Ready tells whether the node is ready; if not, CodeInternal with what it lacks, or CodeUnreachable.
func (c *Client) Ready(ctx context.Context) error {
	return c.call(ctx, http.MethodGet, "/readyz", nil, nil)
}

// Nodes lists the nodes by name.
func (c *Client) Nodes(ctx context.Context) ([]api.Node, error) {
	return list[api.Node](ctx, c, http.MethodGet, "/v1/nodes")
}

// Node gets a node.
func (c *Client) Node(ctx context.Context, name string) (api.Node, error) {
	return one[api.Node](ctx, c, http.MethodGet, at("nodes", name, ""), nil)
}

// Shutdown stops the node that answers, which must be the named one. CodeInUse while volumes are attached to it, unless Force.
func (c *Client) Shutdown(ctx context.Context, node string, o ShutdownOptions) error {
	return c.call(ctx, http.MethodPost, at("nodes", node, "shutdown"), o, nil)
}

// ShutdownOptions are what can be said about it.
type ShutdownOptions struct {
	Force bool `json:"force,omitempty"`
}

// Events lists what happened, oldest first.
func (c *Client) Events(ctx context.Context) ([]api.Event, error) {
	return list[api.Event](ctx, c, http.MethodGet, "/v1/events")
}

// Settings lists the settings by name.
func (c *Client) Settings(ctx context.Context) ([]api.Setting, error) {
	return list[api.Setting](ctx, c, http.MethodGet, "/v1/settings")
}

// SetSetting changes a setting.
func (c *Client) SetSetting(ctx context.Context, name, value string) (api.Setting, error) {
	return one[api.Setting](ctx, c, http.MethodPut, at("settings", name, ""), map[string]string{"value": value})
}

// Images lists the images by name.
func (c *Client) Images(ctx context.Context) ([]api.BackingImage, error) {
	return list[api.BackingImage](ctx, c, http.MethodGet, "/v1/backingimages")
}

// Image gets an image.
func (c *Client) Image(ctx context.Context, name string) (api.BackingImage, error) {
	return one[api.BackingImage](ctx, c, http.MethodGet, at("backingimages", name, ""), nil)
}

// NewImage is an image to be imported.
type NewImage struct {
	Name             string
	URL              string // one of URL and Path
	Path             string // on the node that answers; only over its unix socket
	ExpectedChecksum string // "" or sha512:HEX or sha256:HEX
	Copies           int    // 0: the setting's
}

// ImportImage begins an import; WaitImage tells how it goes.
func (c *Client) ImportImage(ctx context.Context, n NewImage) (api.BackingImage, error) {
	body := map[string]any{"name": n.Name, "sourceType": "download", "parameters": map[string]string{"url": n.URL}, "expectedChecksum": n.ExpectedChecksum}
	if n.Path != "" {
		body["sourceType"], body["parameters"] = "file", map[string]string{"path": n.Path}
	}
	if n.Copies > 0 {
		body["minNumberOfCopies"] = n.Copies
	}
	return one[api.BackingImage](ctx, c, http.MethodPost, "/v1/backingimages", body)
}

// DeleteImage asks for an image's end; WaitImageGone. CodeInUse while volumes stand on it.
func (c *Client) DeleteImage(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodDelete, at("backingimages", name, ""), nil, nil)
}

// Volumes lists the volumes by name.
func (c *Client) Volumes(ctx context.Context) ([]api.Volume, error) {
	return list[api.Volume](ctx, c, http.MethodGet, "/v1/volumes")
}

// Volume gets a volume.
func (c *Client) Volume(ctx context.Context, name string) (api.Volume, error) {
	return one[api.Volume](ctx, c, http.MethodGet, at("volumes", name, ""), nil)
}

// NewVolume is a volume to be created.
type NewVolume struct {
	Name   string
	Size   string // bytes or a quantity; "" with an image: the image's
	Image  string // "" for an empty disk
	Copies int    // 0: the setting's
}

// CreateVolume creates a volume; WaitVolume until it is no longer creating.
func (c *Client) CreateVolume(ctx context.Context, n NewVolume) (api.Volume, error) {
	body := map[string]any{"name": n.Name, "size": n.Size, "backingImage": n.Image, "frontend": "nbd"}
	if n.Copies > 0 {
		body["numberOfReplicas"] = n.Copies
	}
	return one[api.Volume](ctx, c, http.MethodPost, "/v1/volumes", body)
}

// DeleteVolume asks for a volume's end; WaitVolumeGone.
func (c *Client) DeleteVolume(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodDelete, at("volumes", name, ""), nil, nil)
}

// Attachment says where and how a volume shall be attached.
type Attachment struct {
	Node            string `json:"hostId"`
	DisableFrontend bool   `json:"disableFrontend,omitempty"` // nobody can use it: for reverts
	ID              string `json:"attachmentID,omitempty"`    // of the holder; "" is everybody's
}

// Attach asks for a volume to be attached; WaitVolume until it is.
func (c *Client) Attach(ctx context.Context, name string, a Attachment) (api.Volume, error) {
	return one[api.Volume](ctx, c, http.MethodPost, at("volumes", name, "attach"), a)
}

// Detachment says which attachment ends.
type Detachment struct {
	ID    string `json:"attachmentID,omitempty"`
	Force bool   `json:"forceDetach,omitempty"` // all of them
}

// Detach takes an attachment back; WaitVolume until the volume is detached, which it is when none is left.
func (c *Client) Detach(ctx context.Context, name string, d Detachment) (api.Volume, error) {
	return one[api.Volume](ctx, c, http.MethodPost, at("volumes", name, "detach"), d)
}

// Expand makes a volume larger, and returns when it is. CodeTimeout: it goes on.
func (c *Client) Expand(ctx context.Context, name, size string) (api.Volume, error) {
	return one[api.Volume](ctx, c, http.MethodPost, at("volumes", name, "expand"), map[string]string{"size": size})
}

// Salvage records the decision to open a faulted volume from what is left.
func (c *Client) Salvage(ctx context.Context, name string) (api.Volume, error) {
	return one[api.Volume](ctx, c, http.MethodPost, at("volumes", name, "salvage"), struct{}{})
}

// Check reads all metadata of an attached volume.
func (c *Client) Check(ctx context.Context, name string) (api.CheckReport, error) {
	return one[api.CheckReport](ctx, c, http.MethodPost, at("volumes", name, "check"), struct{}{})
}

// Snapshots lists an attached volume's snapshots with the present, "volume-head", among them.
func (c *Client) Snapshots(ctx context.Context, volume string) ([]api.Snapshot, error) {
	return list[api.Snapshot](ctx, c, http.MethodPost, at("volumes", volume, "snapshotList"))
}

// SnapshotRecords lists a volume's snapshots, attached or not, without the present.
func (c *Client) SnapshotRecords(ctx context.Context, volume string) ([]api.SnapshotCR, error) {
	return list[api.SnapshotCR](ctx, c, http.MethodPost, at("volumes", volume, "snapshotCRList"))
}

// SnapshotRecord gets one of them.
func (c *Client) SnapshotRecord(ctx context.Context, volume, name string) (api.SnapshotCR, error) {
	return one[api.SnapshotCR](ctx, c, http.MethodPost, at("volumes", volume, "snapshotCRGet"), map[string]string{"name": name})
}

// NewSnapshot is a snapshot to be taken.
type NewSnapshot struct {
	Name   string            `json:"name,omitempty"` // "": one is made up
	Labels map[string]string `json:"labels,omitempty"`
}

// CreateSnapshot takes a snapshot of an attached volume. CodeTimeout: it goes on.
func (c *Client) CreateSnapshot(ctx context.Context, volume string, n NewSnapshot) (api.Snapshot, error) {
	return one[api.Snapshot](ctx, c, http.MethodPost, at("volumes", volume, "snapshotCreate"), n)
}

// DeleteSnapshot marks a snapshot removed; its space returns with Purge.
func (c *Client) DeleteSnapshot(ctx context.Context, volume, name string) error {
	return c.call(ctx, http.MethodPost, at("volumes", volume, "snapshotDelete"), map[string]string{"name": name}, nil)
}

// Revert makes a snapshot's content the present. CodeFrontend unless the volume is attached with its frontend disabled.
func (c *Client) Revert(ctx context.Context, volume, name string) error {
	return c.call(ctx, http.MethodPost, at("volumes", volume, "snapshotRevert"), map[string]string{"name": name}, nil)
}

// Purge begins to free what removed snapshots hold; the volume's PurgeStatus tells how it goes.
func (c *Client) Purge(ctx context.Context, volume string) (api.Volume, error) {
	return one[api.Volume](ctx, c, http.MethodPost, at("volumes", volume, "snapshotPurge"), struct{}{})
}
