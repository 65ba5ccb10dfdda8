package api

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"

	"ashlar/internal/catalog"
)

// exposition builds Prometheus's text format.
type exposition struct {
	text strings.Builder
}

// metric begins a metric; kind is gauge or counter.
func (e *exposition) metric(name, kind, help string) {
	fmt.Fprintf(&e.text, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

// sample adds a value; labels come in pairs.
func (e *exposition) sample(name string, value float64, labels ...string) {
	var pairs []string
	for i := 0; i+1 < len(labels); i += 2 {
		value := strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`).Replace(labels[i+1])
		pairs = append(pairs, labels[i]+`="`+value+`"`)
	}
	set := ""
	if len(pairs) > 0 {
		set = "{" + strings.Join(pairs, ",") + "}"
	}
	fmt.Fprintf(&e.text, "%s%s %v\n", name, set, value)
}

// metrics answers /metrics: gauges read from the records now, and the frontends' counters of this node. docs/rest.md lists them.
func (h *Handler) metrics(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		h.fail(w, r, wrongMethod(w, r, []string{http.MethodGet}))
		return
	}
	e := &exposition{}
	e.metric("ashlar_build_info", "gauge", "This build; always 1.")
	e.sample("ashlar_build_info", 1, "version", h.cfg.Version, "node", h.cfg.Node)
	for _, part := range []func(*exposition, *http.Request) error{h.volumeMetrics, h.diskMetrics, h.imageMetrics, h.counterMetrics} {
		if err := part(e, r); err != nil {
			h.fail(w, r, err)
			return
		}
	}
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	// A scraper that went away is nobody's error.
	_, _ = w.Write([]byte(e.text.String()))
}

// nodeMetrics answers /v1/nodes/NAME/metrics: /metrics of that node.
func (h *Handler) nodeMetrics(c *call) (any, error) {
	if h.elsewhere(c.r, c.id) {
		if _, err := h.nodeGet(c); err != nil {
			return nil, err
		}
		return h.forward(c, c.id, "the metrics of node "+c.id)
	}
	if c.id != h.cfg.Node {
		return nil, Failure(CodeNotFound, "the metrics of node %s: this is node %s", quote(c.id), h.cfg.Node)
	}
	h.metrics(c.w, c.r)
	return sent{}, nil
}

func (h *Handler) volumeMetrics(e *exposition, r *http.Request) error {
	l, err := list[catalog.VolumeWanted, catalog.VolumeObserved](r.Context(), h, catalog.KindVolume)
	if err != nil {
		return err
	}
	count := map[string]int{}
	for _, state := range []string{catalog.VolumeCreating, catalog.VolumeDetached, catalog.VolumeAttaching, catalog.VolumeAttached, catalog.VolumeDetaching, catalog.VolumeDeleting} {
		count[state] = 0
	}
	nodes, err := h.loadNodes(r.Context())
	if err != nil {
		return err
	}
	views := map[string]*volumeView{}
	for name, w := range l.wanted {
		views[name] = side{nodes: nodes}.view(w, l.observed[name])
		count[views[name].state()]++
	}
	e.metric("ashlar_volumes", "gauge", "Volumes by state.")
	for _, state := range slices.Sorted(maps.Keys(count)) {
		e.sample("ashlar_volumes", float64(count[state]), "state", state)
	}
	for _, m := range []struct {
		name, help string
		value      func(*volumeView) float64
	}{
		{"ashlar_volume_size_bytes", "Size of a volume.", func(v *volumeView) float64 { return float64(v.sizeBytes()) }},
		{"ashlar_volume_allocated_bytes", "Bytes of a volume's replicas on disk, snapshots included.", func(v *volumeView) float64 {
			var n int64
			for _, r := range v.observed.Replicas {
				n += r.AllocatedBytes
			}
			return float64(n)
		}},
		{"ashlar_volume_snapshots", "Snapshots of a volume, the present not counted.", func(v *volumeView) float64 {
			return float64(max(0, len(v.observed.Snapshots)-1))
		}},
		{"ashlar_volume_faulted", "1 if a volume has no usable copy.", func(v *volumeView) float64 {
			if v.observed.Robustness == catalog.RobustnessFaulted {
				return 1
			}
			return 0
		}},
	} {
		e.metric(m.name, "gauge", m.help)
		for _, name := range l.names() {
			e.sample(m.name, m.value(views[name]), "volume", name)
		}
	}
	return nil
}

func (h *Handler) diskMetrics(e *exposition, r *http.Request) error {
	l, err := h.loadNodes(r.Context())
	if err != nil {
		return err
	}
	for _, m := range []struct {
		name, help string
		holds      func(node string) bool
	}{
		{"ashlar_node_ready", "1 if a node is ready and lives.", l.up},
		{"ashlar_node_alive", "1 if a node lives.", func(node string) bool { return !l.down(node) }},
		{"ashlar_node_schedulable", "1 if a node may take new copies.", func(node string) bool { return l.wanted[node].AllowScheduling }},
		{"ashlar_node_voter", "1 if a node is to keep a member of the catalogue.", func(node string) bool { return l.wanted[node].Voter }},
		{"ashlar_node_member_healthy", "1 if a node's member of the catalogue votes.", func(node string) bool { return !l.down(node) && l.observed[node].Member == memberVoter }},
	} {
		e.metric(m.name, "gauge", m.help)
		for _, name := range l.names() {
			value := 0.0
			if m.holds(name) {
				value = 1
			}
			e.sample(m.name, value, "node", name)
		}
	}
	for _, m := range []struct {
		name, help string
		value      func(node string, d catalog.DiskObserved) int64
	}{
		{"ashlar_disk_ready", "1 if a disk can be used, and its node lives.", func(node string, d catalog.DiskObserved) int64 {
			if l.down(node) || d.Conditions[catalog.ConditionReady].Status != catalog.ConditionTrue {
				return 0
			}
			return 1
		}},
		{"ashlar_disk_size_bytes", "Size of a disk.", func(_ string, d catalog.DiskObserved) int64 { return d.TotalBytes }},
		{"ashlar_disk_free_bytes", "Free space of a disk.", func(_ string, d catalog.DiskObserved) int64 { return d.FreeBytes }},
		{"ashlar_disk_scheduled_bytes", "Sizes of the replicas on a disk, added up.", func(_ string, d catalog.DiskObserved) int64 { return d.ScheduledBytes }},
	} {
		e.metric(m.name, "gauge", m.help)
		for _, name := range l.names() {
			disks := l.observed[name].Disks
			for _, disk := range slices.Sorted(maps.Keys(disks)) {
				e.sample(m.name, float64(m.value(name, disks[disk])), "node", name, "disk", disk)
			}
		}
	}
	return nil
}

func (h *Handler) imageMetrics(e *exposition, r *http.Request) error {
	l, err := list[catalog.ImageWanted, catalog.ImageObserved](r.Context(), h, catalog.KindImage)
	if err != nil {
		return err
	}
	e.metric("ashlar_images", "gauge", "Images.")
	e.sample("ashlar_images", float64(len(l.wanted)))
	count := map[string]int{}
	for _, state := range []string{catalog.ImagePending, catalog.ImageStarting, catalog.ImageInProgress, catalog.ImageReady, catalog.ImageFailed, catalog.ImageUnknown} {
		count[state] = 0
	}
	for name, w := range l.wanted {
		for _, d := range newImageView(w, l.observed[name]).observed.Disks {
			count[d.State]++
		}
	}
	e.metric("ashlar_image_copies", "gauge", "Copies of images by state.")
	for _, state := range slices.Sorted(maps.Keys(count)) {
		e.sample("ashlar_image_copies", float64(count[state]), "state", state)
	}
	return nil
}

// memberVoter is what a node says of a member of the catalogue that is as it should be.
const memberVoter = "voter"

// counterMetrics adds what the frontends of this node count.
func (h *Handler) counterMetrics(e *exposition, r *http.Request) error {
	if h.cfg.Extra == nil {
		return nil
	}
	volumes := map[string]map[string]uint64{}
	err := h.cfg.Extra.VolumeCounters(r.Context(), func(volume string, counters map[string]uint64) { volumes[volume] = counters })
	if err != nil {
		// The data process may be starting again; the gauges are still worth having.
		h.cfg.Log.Warn("no counters for /metrics", "error", err)
		return nil
	}
	for _, m := range []struct{ counter, name, kind, help string }{
		{"readOps", "ashlar_volume_read_ops_total", "counter", "Reads since the volume was opened."},
		{"writeOps", "ashlar_volume_write_ops_total", "counter", "Writes since the volume was opened."},
		{"flushOps", "ashlar_volume_flush_ops_total", "counter", "Flushes since the volume was opened."},
		{"zeroOps", "ashlar_volume_zero_ops_total", "counter", "Trims and writes of zeroes since the volume was opened."},
		{"readBytes", "ashlar_volume_read_bytes_total", "counter", "Bytes read since the volume was opened."},
		{"writeBytes", "ashlar_volume_write_bytes_total", "counter", "Bytes written since the volume was opened."},
		{"errors", "ashlar_volume_errors_total", "counter", "Failed requests since the volume was opened."},
		{"clients", "ashlar_volume_clients", "gauge", "Connections to the volume's frontend."},
	} {
		e.metric(m.name, m.kind, m.help)
		for _, volume := range slices.Sorted(maps.Keys(volumes)) {
			if v, ok := volumes[volume][m.counter]; ok {
				e.sample(m.name, float64(v), "volume", volume)
			}
		}
	}
	return nil
}
