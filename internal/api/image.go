package api

import (
	"context"
	"errors"
	"maps"
	"net/url"
	"slices"
	"strings"

	"ashlar/internal/catalog"
)

// imageView is everything an image's resource is made of.
type imageView struct {
	wanted   catalog.ImageWanted
	observed catalog.ImageObserved
}

// onDisks are the ids of the disks that are to have a copy, or may still have one.
func (v imageView) onDisks() []string {
	out := slices.Clone(v.wanted.Disks)
	for disk, d := range v.observed.Disks {
		if d.State != catalog.ImageGone && !slices.Contains(out, disk) {
			out = append(out, disk)
		}
	}
	return out
}

// hide corrects the copies of nodes that are down, and cannot say themselves that nobody knows how they are.
func (v *imageView) hide(of map[string]string, nodes nodeSet) {
	var disks map[string]catalog.ImageOnDisk
	for disk, d := range v.observed.Disks {
		node, known := of[disk]
		if !known || !nodes.down(node) || d.State == catalog.ImageUnknown || d.State == catalog.ImageGone {
			continue
		}
		if disks == nil {
			disks = maps.Clone(v.observed.Disks)
		}
		d.State, d.Message = catalog.ImageUnknown, "node "+node+" is down"
		disks[disk] = d
	}
	if disks != nil {
		v.observed.Disks = disks
	}
}

func (h *Handler) loadImage(ctx context.Context, name string) (imageView, error) {
	var v imageView
	w, ok, err := find[catalog.ImageWanted](ctx, h.cfg.Catalog, catalog.ImageKey(catalog.Wanted, name))
	if err != nil {
		return v, err
	}
	if !ok {
		return v, Failure(CodeNotFound, "image %s: there is no such image", quote(name))
	}
	o, _, err := find[catalog.ImageObserved](ctx, h.cfg.Catalog, catalog.ImageKey(catalog.Observed, name))
	if err != nil {
		return v, err
	}
	nodes, err := h.loadNodes(ctx)
	v = newImageView(w, o)
	v.hide(nodes.diskNodes(), nodes)
	return v, err
}

func newImageView(w catalog.ImageWanted, o catalog.ImageObserved) imageView {
	v := imageView{wanted: w}
	// A record of an earlier image of this name says nothing of this one.
	if o.ID == w.ID {
		v.observed = o
	}
	return v
}

func (h *Handler) imageList(c *call) (any, error) {
	l, err := list[catalog.ImageWanted, catalog.ImageObserved](c.r.Context(), h, catalog.KindImage)
	if err != nil {
		return nil, err
	}
	nodes, err := h.loadNodes(c.r.Context())
	if err != nil {
		return nil, err
	}
	of := nodes.diskNodes()
	data := make([]BackingImage, 0, len(l.wanted))
	for _, name := range l.names() {
		v := newImageView(l.wanted[name], l.observed[name])
		v.hide(of, nodes)
		data = append(data, h.image(c, v))
	}
	return collect(c, c.noun.schema, data), nil
}

func (h *Handler) imageGet(c *call) (any, error) {
	v, err := h.loadImage(c.r.Context(), c.id)
	if err != nil {
		return nil, err
	}
	return h.image(c, v), nil
}

// image makes the resource.
func (h *Handler) image(c *call, v imageView) BackingImage {
	w, o := v.wanted, v.observed
	res := BackingImage{
		Resource: c.resource(w.Name, "backingImageCleanup", "updateMinNumberOfCopies"), Name: w.Name, UUID: w.ID, SourceType: w.SourceType,
		Parameters: map[string]string{}, ExpectedChecksum: strings.TrimPrefix(w.ExpectedChecksum, "sha512:"), CurrentChecksum: o.CurrentChecksum,
		MinNumberOfCopies: w.MinCopies, NodeSelector: tags(w.NodeSelector), DiskSelector: tags(w.DiskSelector), DataEngine: "v1", DiskFileStatusMap: map[string]DiskFile{},
		Size: o.SizeBytes, VirtualSize: o.VirtualSizeBytes, Created: stamp(w.Created), Format: o.Format, Digest: o.Digest, Error: o.Error,
	}
	maps.Copy(res.Parameters, w.Parameters)
	var total catalog.Space
	if w.Deleted != nil {
		res.DeletionTimestamp = stamp(*w.Deleted)
	}
	for _, disk := range w.Disks {
		res.DiskFileStatusMap[disk] = DiskFile{Message: "File processing is not started", DataEngine: "v1"}
	}
	for disk, d := range o.Disks {
		res.DiskFileStatusMap[disk] = DiskFile{
			State: d.State, Progress: d.Progress, Message: d.Message, LastStateTransitionTime: stamp(d.LastTransitionTime), DataEngine: "v1",
			AllocatedBytes: d.AllocatedBytes,
		}
		total.ExclusiveBytes += d.AllocatedBytes
	}
	res.Space = space(total)
	if w.SourceType == catalog.SourceUpload && o.CurrentChecksum == "" {
		res.Actions["upload"] = res.Links["self"] + "?action=upload"
	}
	if v.in(catalog.ImageReady) {
		res.Links["download"] = res.Links["self"] + "/download"
	}
	return res
}

type imageInput struct {
	Name              string            `json:"name"`
	SourceType        string            `json:"sourceType"`
	Parameters        map[string]string `json:"parameters"`
	ExpectedChecksum  string            `json:"expectedChecksum"`
	MinNumberOfCopies int               `json:"minNumberOfCopies"`
	DataEngine        string            `json:"dataEngine"`
	Secret            string            `json:"secret"`
	NodeSelector      []string          `json:"nodeSelector"`
	DiskSelector      []string          `json:"diskSelector"`
}

func (h *Handler) imageCreate(c *call) (any, error) {
	var in imageInput
	if err := c.body(&in); err != nil {
		return nil, err
	}
	if err := checkName("image", in.Name); err != nil {
		return nil, err
	}
	if err := in.check(); err != nil {
		return nil, err
	}
	source, err := h.source(c, &in)
	if err != nil {
		return nil, err
	}
	sum, err := checksum(in.Name, in.ExpectedChecksum)
	if err != nil {
		return nil, err
	}
	ctx := c.r.Context()
	w := catalog.ImageWanted{
		Name: in.Name, SourceType: in.SourceType, Parameters: source, ExpectedChecksum: sum, MinCopies: in.MinNumberOfCopies, Created: h.cfg.Now().UTC(),
		NodeSelector: selector(in.NodeSelector), DiskSelector: selector(in.DiskSelector),
	}
	if w.MinCopies == 0 {
		if w.MinCopies, err = h.settingNumber(ctx, settingImageCopies); err != nil {
			return nil, err
		}
	}
	if w.ID, err = h.newID(); err != nil {
		return nil, err
	}
	_, err = catalog.Write(ctx, h.cfg.Catalog, catalog.ImageKey(catalog.Wanted, w.Name), w, 0)
	if errors.Is(err, catalog.ErrConflict) {
		return nil, Failure(CodeExists, "image %s exists already, or is being deleted; choose another name, or delete it first", w.Name)
	}
	if err != nil {
		return nil, err
	}
	c.id = w.Name
	return h.imageGet(c)
}

// check refuses what this build does not do, rather than to ignore it.
func (in *imageInput) check() error {
	refuse := func(what string) error { return Failure(CodeNotBuilt, "image %s: %s: not built yet", in.Name, what) }
	switch {
	case in.MinNumberOfCopies < 0 || in.MinNumberOfCopies > 20:
		return Failure(CodeInvalid, "image %s: minNumberOfCopies is %d; 1 to 20 are allowed", in.Name, in.MinNumberOfCopies)
	case in.DataEngine != "" && in.DataEngine != "v1":
		return Failure(CodeNotSupported, "image %s: %s backing image is not supported", in.Name, quote(in.DataEngine))
	case in.Secret != "":
		return refuse("encryption")
	}
	if err := checkSelectors("image "+in.Name, in.NodeSelector, in.DiskSelector); err != nil {
		return err
	}
	switch in.SourceType {
	case catalog.SourceDownload, catalog.SourceFile, catalog.SourceUpload, catalog.SourceVolume:
		return nil
	case "restore", "clone":
		return refuse("source type " + in.SourceType)
	}
	return Failure(CodeInvalid, "image %s: there is no source type %s; use %q with a url, %q, %q, or %q with a path", in.Name, quote(in.SourceType),
		catalog.SourceDownload, catalog.SourceUpload, catalog.SourceVolume, catalog.SourceFile)
}

// source checks where the image comes from and returns the parameters that are kept.
func (h *Handler) source(c *call, in *imageInput) (map[string]string, error) {
	switch in.SourceType {
	case catalog.SourceFile:
		p := in.Parameters["path"]
		if err := checkPath(c, "image "+in.Name, p, "use `ashlar image import` on the node, upload the file, or serve it over http"); err != nil {
			return nil, err
		}
		return map[string]string{"path": p}, h.oneNode(c, in.Name)
	case catalog.SourceUpload:
		return map[string]string{}, nil
	case catalog.SourceVolume:
		return h.volumeSource(c, in)
	}
	if strings.HasPrefix(in.Parameters["url"], "nbd+unix:") {
		if err := h.oneNode(c, in.Name); err != nil {
			return nil, err
		}
	}
	return downloadSource(c, in)
}

// oneNode refuses a path as a source where there are several nodes: a path is one node's, and the image goes to any.
func (h *Handler) oneNode(c *call, image string) error {
	nodes, err := h.loadNodes(c.r.Context())
	if err == nil && len(nodes.wanted) > 1 {
		err = Failure(CodeConflict, "image %s: there are %d nodes, and a path is of one of them: upload the file (`ashlar image import` does), or serve it over http or nbd", image, len(nodes.wanted))
	}
	return err
}

// downloadSource checks a URL: http and https, and ours: an NBD export, which over a unix socket is a path on the node.
func downloadSource(c *call, in *imageInput) (map[string]string, error) {
	bad := func(format string, args ...any) error {
		return Failure(CodeInvalid, "image "+in.Name+": "+format, args...)
	}
	raw := in.Parameters["url"]
	if raw == "" {
		return nil, bad("parameters.url is missing")
	}
	u, err := url.Parse(raw)
	if err != nil || len(raw) > 4096 {
		return nil, bad("url %s cannot be read", quote(raw))
	}
	switch u.Scheme {
	case "http", "https", "nbd", "nbds":
		if u.Hostname() == "" {
			return nil, bad("url %s names no host", quote(raw))
		}
		// A directory on the node, with a key that the node is to use.
		if q := u.RawQuery; strings.HasPrefix(u.Scheme, "nbd") && q != "" {
			values, err := url.ParseQuery(q)
			if err != nil || u.Scheme != "nbds" || len(values) != 1 || len(values["tls-certificates"]) != 1 {
				return nil, bad("url %s: the only parameter is tls-certificates=DIR, of nbds", quote(raw))
			}
			if err := checkPath(c, "image "+in.Name, values.Get("tls-certificates"), "use `ashlar image import` on the node"); err != nil {
				return nil, err
			}
		}
	case "nbd+unix":
		if err := checkPath(c, "image "+in.Name, u.Query().Get("socket"), "use `ashlar image import` on the node"); err != nil {
			return nil, err
		}
	default:
		return nil, bad("url %s must begin with http://, https:// or nbd://", quote(raw))
	}
	if u.User != nil {
		return nil, bad("a url with a password in it would be shown to everybody who can list images; use one without")
	}
	return map[string]string{"url": raw}, nil
}

// volumeSource checks an export from a volume: one that is there, and can be read.
func (h *Handler) volumeSource(c *call, in *imageInput) (map[string]string, error) {
	name, snapshot, format := in.Parameters["volume-name"], in.Parameters["snapshot-name"], in.Parameters["export-type"]
	if name == "" {
		return nil, Failure(CodeInvalid, "image %s: parameters.volume-name is missing", in.Name)
	}
	if format == "" {
		format = formatRaw
	}
	if format != formatRaw && format != formatQcow2 {
		return nil, Failure(CodeInvalid, "image %s: there is no export-type %s; use raw or qcow2", in.Name, quote(format))
	}
	v, err := h.loadVolume(c.r.Context(), name)
	switch {
	case CodeOf(err) == CodeNotFound:
		return nil, Failure(CodeInvalid, "image %s: there is no volume %s to export", in.Name, quote(name))
	case err != nil:
		return nil, err
	case v.wanted.Deleted != nil:
		return nil, Failure(CodeConflict, "image %s: volume %s is being deleted", in.Name, name)
	case v.observed.Robustness == catalog.RobustnessFaulted:
		return nil, Failure(CodeSalvage, "image %s: volume %s is faulted; salvage it first", in.Name, name)
	}
	out := map[string]string{"volume-name": name, "export-type": format}
	if snapshot == headName {
		snapshot = ""
	}
	if snapshot != "" {
		if err := wantSnapshot(v, snapshot); err != nil {
			return nil, Because(err, CodeInvalid, "image %s: %v", in.Name, err)
		}
		out["snapshot-name"] = snapshot
	}
	return out, nil
}

// checksum reads an expected checksum: the dialect's bare SHA-512, or sha512:HEX or sha256:HEX. It returns the record's form.
func checksum(image, s string) (string, error) {
	if s == "" {
		return "", nil
	}
	kind, sum, ok := strings.Cut(s, ":")
	if !ok {
		kind, sum = "sha512", s
	}
	sum = strings.ToLower(sum)
	digits := map[string]int{"sha512": 128, "sha256": 64}[kind]
	if digits == 0 || len(sum) != digits || strings.Trim(sum, "0123456789abcdef") != "" {
		return "", Failure(CodeInvalid, "image %s: checksum %s must be sha512: and 128 hex digits, or sha256: and 64", image, quote(s))
	}
	return kind + ":" + sum, nil
}

// users names the volumes that stand on an image, also those that are being deleted.
func users(volumes listed[catalog.VolumeWanted, catalog.VolumeObserved], imageID string) []string {
	var out []string
	for _, name := range volumes.names() {
		v := volumes.wanted[name]
		if v.ImageID != imageID {
			continue
		}
		if v.Deleted != nil {
			name += " (being deleted)"
		}
		out = append(out, name)
	}
	return out
}

// imageDelete asks for the image's end and returns at once. Refused while volumes stand on it. Asking again is no error.
func (h *Handler) imageDelete(c *call) (any, error) {
	ctx := c.r.Context()
	v, err := h.loadImage(ctx, c.id)
	if err != nil {
		return nil, err
	}
	volumes, err := list[catalog.VolumeWanted, catalog.VolumeObserved](ctx, h, catalog.KindVolume)
	if err != nil {
		return nil, err
	}
	if in := users(volumes, v.wanted.ID); len(in) > 0 {
		return nil, Failure(CodeInUse, "image %s is in use by %s; delete them first", c.id, volumeWord(in))
	}
	_, _, err = catalog.Update(ctx, h.cfg.Catalog, catalog.ImageKey(catalog.Wanted, c.id), func(w *catalog.ImageWanted) error {
		if w.Deleted == nil && w.ID == v.wanted.ID {
			now := h.cfg.Now().UTC()
			w.Deleted = &now
		}
		return nil
	})
	return nil, h.gone(c, err)
}

func volumeWord(names []string) string {
	if len(names) == 1 {
		return "volume " + names[0]
	}
	return "volumes " + strings.Join(names, ", ")
}

func (h *Handler) imageActions() map[string]verb {
	return map[string]verb{
		"backingImageCleanup":      {do: h.imageCleanup, in: cleanupInput{}, out: BackingImage{}},
		"updateMinNumberOfCopies":  {do: h.imageCopies, in: copiesInput{}, out: BackingImage{}},
		"upload":                   {do: h.imageUpload, in: rawBody{}, out: BackingImage{}},
		"backupBackingImageCreate": unbuilt("backupBackingImageCreate (backups)"),
	}
}

type copiesInput struct {
	MinNumberOfCopies int `json:"minNumberOfCopies"`
}

func (h *Handler) imageCopies(c *call) (any, error) {
	var in copiesInput
	if err := c.body(&in); err != nil {
		return nil, err
	}
	if in.MinNumberOfCopies < 1 || in.MinNumberOfCopies > 20 {
		return nil, Failure(CodeInvalid, "image %s: minNumberOfCopies is %d; 1 to 20 are allowed", quote(c.id), in.MinNumberOfCopies)
	}
	_, _, err := catalog.Update(c.r.Context(), h.cfg.Catalog, catalog.ImageKey(catalog.Wanted, c.id), func(w *catalog.ImageWanted) error {
		w.MinCopies = in.MinNumberOfCopies
		return nil
	})
	if err != nil {
		return nil, h.gone(c, err)
	}
	return h.imageGet(c)
}

type cleanupInput struct {
	Disks []string `json:"disks"`
}

// imageCleanup gives up the copies on some disks: refused where a volume stands on one, or where too few ready copies would be left. Disks without a copy are
// ignored.
func (h *Handler) imageCleanup(c *call) (any, error) {
	var in cleanupInput
	if err := c.body(&in); err != nil {
		return nil, err
	}
	ctx := c.r.Context()
	v, err := h.loadImage(ctx, c.id)
	if err != nil {
		return nil, err
	}
	volumes, err := list[catalog.VolumeWanted, catalog.VolumeObserved](ctx, h, catalog.KindVolume)
	if err != nil {
		return nil, err
	}
	for _, name := range volumes.names() {
		w := volumes.wanted[name]
		for _, r := range slices.Concat(w.Replicas, w.Dropped) {
			if w.ImageID == v.wanted.ID && slices.Contains(in.Disks, r.DiskID) {
				return nil, Failure(CodeInUse, "image %s: its copy on disk %s is in use by volume %s", c.id, r.DiskID, name)
			}
		}
	}
	left, going := 0, slices.ContainsFunc(v.wanted.Disks, func(disk string) bool { return slices.Contains(in.Disks, disk) })
	for disk, d := range v.observed.Disks {
		if d.State == catalog.ImageReady && !slices.Contains(in.Disks, disk) {
			left++
		}
	}
	if going && left < max(1, v.wanted.MinCopies) {
		if v.observed.CurrentChecksum == "" {
			return nil, Failure(CodeConflict, "image %s: no copy is ready yet, and one of these may become the first; delete the image to give it up", c.id)
		}
		return nil, Failure(CodeConflict, "image %s: %d ready copies would be left, fewer than the %d wanted", c.id, left, max(1, v.wanted.MinCopies))
	}
	_, _, err = catalog.Update(ctx, h.cfg.Catalog, catalog.ImageKey(catalog.Wanted, c.id), func(w *catalog.ImageWanted) error {
		if w.ID == v.wanted.ID && going {
			w.Disks = slices.DeleteFunc(w.Disks, func(d string) bool { return slices.Contains(in.Disks, d) })
		}
		return nil
	})
	if err != nil {
		return nil, h.gone(c, err)
	}
	return h.imageGet(c)
}
