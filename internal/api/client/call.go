package client

import (
	"cmp"
	"context"
	"net/http"
	"time"

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

// Overview gets what `ashlar status` shows: of bounded size, however many volumes there are.
func (c *Client) Overview(ctx context.Context) (api.Overview, error) {
	return one[api.Overview](ctx, c, http.MethodGet, "/v1/overview", nil)
}

// NodeChange changes what it has.
type NodeChange struct {
	AllowScheduling   *bool    `json:"allowScheduling,omitempty"`
	EvictionRequested *bool    `json:"evictionRequested,omitempty"`
	Tags              []string `json:"tags"` // nil: as they are; empty: none
	PlacementZone     *string  `json:"placementZone,omitempty"`
}

// ChangeNode changes a node's wishes. CodeConflict with the reasons when it is to be emptied and what lies on it has nowhere to go.
func (c *Client) ChangeNode(ctx context.Context, name string, n NodeChange) (api.Node, error) {
	return one[api.Node](ctx, c, http.MethodPost, at("nodes", name, "change"), n)
}

// RemoveNode has the cluster forget a node; WaitNodeGone. CodeConflict while it runs, CodeInUse while it has something, unless Force.
func (c *Client) RemoveNode(ctx context.Context, name string, o RemoveOptions) error {
	path := at("nodes", name, "")
	if o.Force {
		path += "?force=true"
	}
	return c.call(ctx, http.MethodDelete, path, nil, nil)
}

// RemoveOptions are what can be said about it: with Force what a dead node, or a lost disk, has is given up.
type RemoveOptions struct{ Force bool }

// NodeContents tells what a node has.
func (c *Client) NodeContents(ctx context.Context, name string) (api.NodeContents, error) {
	return one[api.NodeContents](ctx, c, http.MethodGet, at("nodes", name, "")+"/contents", nil)
}

// DiskChange changes one disk of a node, or with a Path adds it.
type DiskChange struct {
	Disk              string   `json:"disk"`
	Path              string   `json:"path,omitempty"`
	AllowScheduling   *bool    `json:"allowScheduling,omitempty"`
	EvictionRequested *bool    `json:"evictionRequested,omitempty"`
	StorageReserved   *int64   `json:"storageReserved,omitempty"`
	Tags              []string `json:"tags"` // nil: as they are; empty: none
}

// ChangeDisk changes or adds a disk; the others stay as they are.
func (c *Client) ChangeDisk(ctx context.Context, node string, d DiskChange) (api.Node, error) {
	return one[api.Node](ctx, c, http.MethodPost, at("nodes", node, "diskChange"), d)
}

// RemoveDisk takes a disk away. CodeConflict while it takes copies, CodeInUse while it has some; with Force what it has is given up, CodeConflict while it can be read.
func (c *Client) RemoveDisk(ctx context.Context, node, disk string, o RemoveOptions) (api.Node, error) {
	return one[api.Node](ctx, c, http.MethodPost, at("nodes", node, "diskRemove"), map[string]any{"disk": disk, "force": o.Force})
}

// NodeTime asks a node for its clock's time, as exact as a second. The node that answers passes the question on.
func (c *Client) NodeTime(ctx context.Context, node string) (time.Time, error) {
	path := at("nodes", node, "") + "/metrics"
	r, err := c.request(ctx, http.MethodHead, path, nil)
	if err != nil {
		return time.Time{}, err
	}
	res, err := c.http.Do(r)
	if err != nil {
		return time.Time{}, c.unreachable(ctx, err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		// Such an answer has no body, and so no reason: that comes with the same question in full.
		if err := c.call(ctx, http.MethodGet, path, nil, nil); err != nil {
			return time.Time{}, err
		}
		return time.Time{}, failure(res.StatusCode, nil)
	}
	t, err := http.ParseTime(res.Header.Get("Date"))
	if err != nil {
		return t, api.Because(err, api.CodeInternal, "node %s did not say what time it is: %v", node, err)
	}
	return t, nil
}

// Shutdown stops a node; in a cluster any may be asked. CodeInUse while volumes are attached to it, unless Force.
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

// NewImage is an image to be imported; one of URL, Path, Volume and Upload says from where.
type NewImage struct {
	Name             string
	URL              string // http, https, nbd
	Path             string // on the node that answers; only over its unix socket
	Volume           string // a volume to export,
	Snapshot         string // of which this snapshot, or the present if "",
	ExportType       string // raw or qcow2; "": raw
	Upload           bool   // the bytes come by UploadImage
	ExpectedChecksum string // "" or sha512:HEX or sha256:HEX
	Copies           int    // 0: the setting's
	// NodeSelector and DiskSelector: copies go only to nodes, and disks, with all these tags.
	NodeSelector, DiskSelector []string
}

// ImportImage begins an import; WaitImage tells how it goes.
func (c *Client) ImportImage(ctx context.Context, n NewImage) (api.BackingImage, error) {
	body := map[string]any{"name": n.Name, "sourceType": "download", "parameters": map[string]string{"url": n.URL}, "expectedChecksum": n.ExpectedChecksum,
		"nodeSelector": n.NodeSelector, "diskSelector": n.DiskSelector}
	switch {
	case n.Path != "":
		body["sourceType"], body["parameters"] = "file", map[string]string{"path": n.Path}
	case n.Volume != "":
		body["sourceType"] = "export-from-volume"
		body["parameters"] = map[string]string{"volume-name": n.Volume, "snapshot-name": n.Snapshot, "export-type": n.ExportType}
	case n.Upload:
		body["sourceType"], body["parameters"] = "upload", map[string]string{}
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
	// Frontend is nbd or blockdev; "" means nbd.
	Frontend string
	Limits   LimitChange
	// NodeSelector and DiskSelector: copies go only to nodes, and disks, with all these tags.
	NodeSelector, DiskSelector []string
	// DataLocality is disabled, or best-effort: the copy is moved, when the volume is detached, to the node that used it last; "": the setting's.
	DataLocality string
}

// LimitChange changes a volume's limits: a number or a quantity such as 100Mi, "0" for none; "" leaves a limit as it is.
type LimitChange struct {
	IOPS                string `json:"iops,omitempty"`
	BytesPerSecond      string `json:"bytesPerSecond,omitempty"`
	BurstIOPS           string `json:"burstIOPS,omitempty"`
	BurstBytesPerSecond string `json:"burstBytesPerSecond,omitempty"`
	BurstSeconds        string `json:"burstSeconds,omitempty"`
}

// SetLimits changes a volume's limits; an attached volume follows at once.
func (c *Client) SetLimits(ctx context.Context, volume string, l LimitChange) (api.Volume, error) {
	return one[api.Volume](ctx, c, http.MethodPost, at("volumes", volume, "updateLimits"), l)
}

// CreateVolume creates a volume; WaitVolume until it is no longer creating.
func (c *Client) CreateVolume(ctx context.Context, n NewVolume) (api.Volume, error) {
	body := map[string]any{"name": n.Name, "size": n.Size, "backingImage": n.Image, "frontend": cmp.Or(n.Frontend, "nbd"), "limits": n.Limits,
		"nodeSelector": n.NodeSelector, "diskSelector": n.DiskSelector, "dataLocality": n.DataLocality}
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
	Frontend        string `json:"frontend,omitempty"`        // nbd or blockdev, the volume's from now on; "" as it is
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

// NewExport is an image file to be written on the node that has the volume.
type NewExport struct {
	Path     string `json:"path"`               // a new file, absolute
	Format   string `json:"format,omitempty"`   // raw or qcow2; "": raw
	Compress string `json:"compress,omitempty"` // of qcow2: "", zlib, zstd
	Snapshot string `json:"snapshot,omitempty"` // "": the present
}

// ExportFile begins to write an image file; WaitOperation tells how it goes. CodeForbidden unless over the node's unix socket.
func (c *Client) ExportFile(ctx context.Context, volume string, n NewExport) (api.Operation, error) {
	return one[api.Operation](ctx, c, http.MethodPost, at("volumes", volume, "exportFile"), n)
}

// Operation gets one by its id, VOLUME/ID. CodeNotFound also an hour after it was done.
func (c *Client) Operation(ctx context.Context, id string) (api.Operation, error) {
	return one[api.Operation](ctx, c, http.MethodGet, "/v1/operations/"+id, nil)
}

// SnapshotDiff calls each for every range in which two snapshots of an attached volume may differ, ascending. from "" is what is below the oldest, to "" the present.
// An error of each ends it.
func (c *Client) SnapshotDiff(ctx context.Context, volume, from, to string, each func(api.DiffChunk) error) error {
	for off := int64(0); ; {
		d, err := one[api.SnapshotDiff](ctx, c, http.MethodPost, at("volumes", volume, "snapshotDiff"), map[string]any{"from": from, "to": to, "off": off})
		if err != nil {
			return err
		}
		for _, r := range d.Ranges {
			if err := each(r); err != nil {
				return err
			}
		}
		if d.NextOff >= d.Size {
			return nil
		}
		if d.NextOff <= off {
			return api.Failure(api.CodeInternal, "%s: the differences of volume %s do not go on after %d", c.address, volume, off)
		}
		off = d.NextOff
	}
}

// NewToken is a token to be made.
type NewToken struct {
	Name     string
	ReadOnly bool
	Expires  time.Time // zero: never
}

// CreateToken makes a token; its secret is in the answer's Token, and nowhere else.
func (c *Client) CreateToken(ctx context.Context, n NewToken) (api.Token, error) {
	body := map[string]any{"name": n.Name, "readOnly": n.ReadOnly}
	if !n.Expires.IsZero() {
		body["expires"] = n.Expires.UTC().Format(time.RFC3339)
	}
	return one[api.Token](ctx, c, http.MethodPost, "/v1/tokens", body)
}

// Tokens lists the tokens by name, without their secrets.
func (c *Client) Tokens(ctx context.Context) ([]api.Token, error) {
	return list[api.Token](ctx, c, http.MethodGet, "/v1/tokens")
}

// DeleteToken makes a token invalid.
func (c *Client) DeleteToken(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodDelete, at("tokens", name, ""), nil, nil)
}
