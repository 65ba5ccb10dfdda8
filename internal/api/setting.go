package api

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strconv"
	"strings"

	"ashlar/internal/catalog"
)

const (
	settingReplicaCount = "default-replica-count"
	settingImageCopies  = "default-min-number-of-backing-image-copies"
	settingLocality     = "default-data-locality"
)

// setting is what Ashlar knows of a setting of the dialect.
type setting struct {
	name     string
	kind     string // string, int, bool
	value    string // the default
	category string
	about    string
	min, max int      // of an int
	options  []string // of a string
	readOnly bool
	engines  []string // the keys of a value that is per data engine: {"v1":"3","v2":"3"}
	constant bool     // Ashlar has this behaviour and no other; a different value is refused
}

// settings are those that Ashlar acts on, and those that clients of the dialect ask for by name (docs/compat.md says which is which). Names sort.
func settings() map[string]setting {
	list := []setting{
		{name: settingReplicaCount, kind: "int", value: "3", min: 1, max: 20, engines: []string{"v1", "v2"}, category: "general", about: "Copies of a volume that is created without a number."},
		{name: settingImageCopies, kind: "int", value: "3", min: 1, max: 20, category: "general", about: "Copies of an image that is created without a number."},
		{name: catalog.SettingOverProvisioning, kind: "int", value: catalog.SettingOverProvisioningDefault, max: 100000, category: "scheduling", about: "The sizes of the copies on a disk may add up to this many per cent of it; 0: no limit."},
		{name: catalog.SettingMinimalFree, kind: "int", value: catalog.SettingMinimalFreeDefault, max: 100, category: "scheduling", about: "A disk with less than this per cent free takes no new copy, and no new snapshot."},
		{name: catalog.SettingWarningFree, kind: "int", value: catalog.SettingWarningFreeDefault, max: 100, category: "scheduling", about: "A disk with less than this per cent free is warned of; 0: never."},
		{name: catalog.SettingBackgroundRate, kind: "int", value: catalog.SettingBackgroundRateDefault, max: 100000, category: "general", about: "What a node does for itself (purge, merge, checksums, imports, exports) moves at most this many MiB per second; 0: no limit."},
		{name: "current-longhorn-version", kind: "string", value: "v1.9.0", readOnly: true, category: "system info", about: "The version of the dialect, not of Ashlar."},
		{name: "v1-data-engine", kind: "bool", value: "true", constant: true, category: "general", about: "Ashlar has one engine; this is its name in the dialect."},
		{name: "v2-data-engine", kind: "bool", value: "false", constant: true, category: "general", about: "There is no second engine."},
		{name: "auto-salvage", kind: "bool", value: "false", constant: true, category: "general", about: "A person decides; Ashlar never salvages by file time or size."},
		{name: "disable-revision-counter", kind: "bool", value: "true", engines: []string{"v1"}, category: "general", about: "Means nothing here: epochs take its place."},
		{name: catalog.SettingImageCleanup, kind: "int", value: catalog.SettingImageCleanupDefault, max: 100000, category: "general", about: "Minutes before a copy of an image that no volume stands on goes, if more are left than are wanted; 0: at once."},
		{name: "backing-image-recovery-wait-interval", kind: "int", value: "300", max: 100000, category: "general", about: "Seconds before an image whose copies all failed is fetched again. Not acted on yet: failed imports are tried again by their own backoff."},
		{name: catalog.SettingReplenish, kind: "int", value: catalog.SettingReplenishDefault, max: 1000, category: "general", about: "0: images get no further copies by themselves. Other numbers mean: they do, one at a time."},
		{name: catalog.SettingSoftNodes, kind: "bool", value: catalog.SettingSoftNodesDefault, category: "scheduling", about: "Two copies of a volume may be on one node when there is no other."},
		{name: catalog.SettingSoftZones, kind: "bool", value: catalog.SettingSoftZonesDefault, category: "scheduling", about: "Two copies of a volume may be in one zone when there is no other."},
		{name: catalog.SettingSoftDisks, kind: "bool", value: catalog.SettingSoftDisksDefault, category: "scheduling", about: "Two copies of a volume on one node may be on one disk."},
		{name: settingLocality, kind: "string", value: localityDisabled, options: []string{localityDisabled, localityBestEffort}, category: "general", about: "Of a volume that is created without one. best-effort: its copy is moved, when it is detached, to the node that used it last."},
		{name: catalog.SettingAutoBalance, kind: "string", value: catalog.SettingAutoBalanceDefault, options: []string{"disabled", "best-effort"}, category: "scheduling", about: "best-effort: detached volumes are moved when one disk is much fuller than another."},
		{name: "auto-cleanup-system-generated-snapshot", kind: "bool", value: "true", constant: true, category: "snapshot", about: "A purge takes system snapshots with it."},
		{name: "snapshot-max-count", kind: "int", value: "250", min: 2, max: 250, category: "snapshot", about: "Not acted on."},
		{name: "upgrade-checker", kind: "bool", value: "false", constant: true, category: "general", about: "Ashlar calls nobody."},
		{name: "allow-collecting-longhorn-usage-metrics", kind: "bool", value: "false", constant: true, category: "general", about: "Ashlar calls nobody."},
	}
	out := map[string]setting{}
	for _, s := range list {
		out[s.name] = s
	}
	return out
}

// normal is the form a value is kept and shown in: one that is per data engine becomes compact JSON with the keys in the definition's order.
func (s setting) normal(value string) (string, error) {
	if len(s.engines) == 0 {
		return value, s.check(value)
	}
	values := map[string]string{}
	if json.Unmarshal([]byte(value), &values) != nil || len(values) == 0 {
		if err := s.check(value); err != nil {
			return "", err
		}
		for _, e := range s.engines {
			values[e] = value
		}
	}
	var parts []string
	for _, e := range s.engines {
		v, ok := values[e]
		if !ok {
			v = s.value
		}
		if err := s.check(v); err != nil {
			return "", err
		}
		parts = append(parts, strconv.Quote(e)+":"+strconv.Quote(v))
		delete(values, e)
	}
	if len(values) > 0 {
		return "", Failure(CodeInvalid, "setting %s: %s is no data engine it has", s.name, quote(slices.Sorted(maps.Keys(values))[0]))
	}
	return "{" + strings.Join(parts, ",") + "}", nil
}

// check tells whether one plain value is allowed.
func (s setting) check(value string) error {
	switch s.kind {
	case "bool":
		if value != "true" && value != "false" {
			return Failure(CodeInvalid, "setting %s: %s is neither true nor false", s.name, quote(value))
		}
	case "int":
		n, err := strconv.Atoi(value)
		if err != nil || n < s.min || n > s.max || strconv.Itoa(n) != value {
			return Failure(CodeInvalid, "setting %s: %s is no number from %d to %d", s.name, quote(value), s.min, s.max)
		}
	}
	if s.options != nil && !slices.Contains(s.options, value) {
		return Failure(CodeNotSupported, "setting %s: %s is not supported; it can be %s", s.name, quote(value), strings.Join(s.options, ", "))
	}
	if s.constant && value != s.value {
		return Failure(CodeNotSupported, "setting %s: %s is not supported: %s", s.name, quote(value), s.about)
	}
	return nil
}

// standard is the default in its normal form.
func (s setting) standard() string {
	v, err := s.normal(s.value)
	if err != nil {
		panic(err) // the table contradicts itself; its test says so first
	}
	return v
}

// lookUp finds a definition. Three that the dialect once had answer with a text its clients know.
func lookUp(name string) (setting, error) {
	switch name {
	case "backup-target", "backup-target-credential-secret", "backupstore-poll-interval":
		// Not "not found": clients take that for an older server.
		return setting{}, Failure(CodeNotSupported, "setting %s is not supported", name)
	}
	s, ok := settings()[name]
	if !ok {
		return s, Failure(CodeNotFound, "setting %s: there is no such setting", quote(name))
	}
	return s, nil
}

// settingNumber reads an int setting, the value for v1 where there are several.
func (h *Handler) settingNumber(ctx context.Context, name string) (int, error) {
	s, err := lookUp(name)
	if err != nil {
		return 0, err
	}
	rec, ok, err := find[catalog.Setting](ctx, h.cfg.Catalog, catalog.SettingKey(name))
	if err != nil {
		return 0, err
	}
	value := s.value
	if ok {
		value = rec.Value
		var values map[string]string
		if len(s.engines) > 0 && json.Unmarshal([]byte(value), &values) == nil {
			value = values[s.engines[0]]
		}
	}
	n, err := strconv.Atoi(value)
	if err != nil {
		return 0, Because(err, CodeInternal, "setting %s has the unreadable value %s", name, quote(value))
	}
	return n, nil
}

func (h *Handler) settingList(c *call) (any, error) {
	l, err := list[catalog.Setting, struct{}](c.r.Context(), h, catalog.KindSetting)
	if err != nil {
		return nil, err
	}
	all := settings()
	var data []Setting
	for _, name := range slices.Sorted(maps.Keys(all)) {
		rec, ok := l.wanted[name]
		data = append(data, h.setting(c, all[name], rec, ok))
	}
	return collect(c, c.noun.schema, data), nil
}

func (h *Handler) settingGet(c *call) (any, error) {
	s, err := lookUp(c.id)
	if err != nil {
		return nil, err
	}
	rec, ok, err := find[catalog.Setting](c.r.Context(), h.cfg.Catalog, catalog.SettingKey(c.id))
	if err != nil {
		return nil, err
	}
	return h.setting(c, s, rec, ok), nil
}

// setting makes the resource.
func (h *Handler) setting(c *call, s setting, rec catalog.Setting, changed bool) Setting {
	value := s.standard()
	if changed {
		value = rec.Value
	}
	return Setting{
		Resource: c.resource(s.name), Name: s.name, Value: value, Applied: true,
		Definition: SettingDefinition{
			DisplayName: s.name, Description: s.about, Category: s.category, Type: s.kind, Required: true, ReadOnly: s.readOnly, Default: s.standard(), Options: s.options,
		},
	}
}

type settingInput struct {
	Value *string `json:"value"`
}

// settingUpdate changes a setting; one that is set to its default has no record any more.
func (h *Handler) settingUpdate(c *call) (any, error) {
	var in settingInput
	if err := c.body(&in); err != nil {
		return nil, err
	}
	s, err := lookUp(c.id)
	switch {
	case err != nil:
		return nil, err
	case in.Value == nil:
		return nil, Failure(CodeInvalid, "setting %s: value is missing", s.name)
	case s.readOnly:
		return nil, Failure(CodeInvalid, "setting %s is read-only", s.name)
	}
	value, err := s.normal(*in.Value)
	if err != nil {
		return nil, err
	}
	ctx, key := c.r.Context(), catalog.SettingKey(s.name)
	if value != s.standard() {
		_, _, err = catalog.Upsert(ctx, h.cfg.Catalog, key, func(rec *catalog.Setting) error {
			*rec = catalog.Setting{Name: s.name, Value: value}
			return nil
		})
	} else if _, rev, e := catalog.Read[catalog.Setting](ctx, h.cfg.Catalog, key); e == nil {
		err = h.cfg.Catalog.Delete(ctx, key, rev)
	} else {
		err = e
	}
	if err != nil && !errors.Is(err, catalog.ErrNotFound) {
		return nil, err
	}
	return h.settingGet(c)
}
