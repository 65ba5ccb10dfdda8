package api

import (
	"encoding/json"
	"strconv"
	"strings"

	"ashlar/internal/catalog"
)

// The largest limits that make sense; above them is a mistake of a factor.
const (
	maxIOPS         = 100_000_000
	maxBandwidth    = 1 << 40
	maxBurstSeconds = 3600
)

// number is a whole number that a client may send as a number, a string of digits, or a quantity such as 100Mi; zero is allowed.
type number struct {
	text string
}

// UnmarshalJSON keeps the text, so that it can be checked with the object's name at hand.
func (n *number) UnmarshalJSON(data []byte) error {
	if strings.HasPrefix(string(data), `"`) {
		return json.Unmarshal(data, &n.text)
	}
	n.text = string(data)
	return nil
}

// limitsInput changes what it has; "0" ends a limit.
type limitsInput struct {
	IOPS                *number `json:"iops"`                // requests per second
	BytesPerSecond      *number `json:"bytesPerSecond"`      // a number or a quantity such as 100Mi
	BurstIOPS           *number `json:"burstIOPS"`           // for burstSeconds; at least iops
	BurstBytesPerSecond *number `json:"burstBytesPerSecond"` // at least bytesPerSecond
	BurstSeconds        *number `json:"burstSeconds"`        // 1 to 3600
}

// apply puts the changes into limits and checks the whole.
func (in *limitsInput) apply(volume string, l *catalog.Limits) error {
	for _, f := range []struct {
		name string
		in   *number
		to   *int64
		max  int64
	}{
		{"iops", in.IOPS, &l.IOPS, maxIOPS},
		{"bytesPerSecond", in.BytesPerSecond, &l.BytesPerSecond, maxBandwidth},
		{"burstIOPS", in.BurstIOPS, &l.BurstIOPS, maxIOPS},
		{"burstBytesPerSecond", in.BurstBytesPerSecond, &l.BurstBytesPerSecond, maxBandwidth},
		{"burstSeconds", in.BurstSeconds, &l.BurstSeconds, maxBurstSeconds},
	} {
		if f.in == nil {
			continue
		}
		n, err := parseLimit(f.in.text)
		if err != nil || n > f.max {
			return Failure(CodeInvalid, "volume %s: limit %s is %s; 0 (no limit) to %d are allowed", volume, f.name, quote(f.in.text), f.max)
		}
		*f.to = n
	}
	bad := func(format string, args ...any) error {
		return Failure(CodeInvalid, "volume %s: "+format, append([]any{volume}, args...)...)
	}
	switch {
	case l.BurstIOPS > 0 && l.BurstIOPS < l.IOPS:
		return bad("burstIOPS %d is less than iops %d", l.BurstIOPS, l.IOPS)
	case l.BurstBytesPerSecond > 0 && l.BurstBytesPerSecond < l.BytesPerSecond:
		return bad("burstBytesPerSecond %d is less than bytesPerSecond %d", l.BurstBytesPerSecond, l.BytesPerSecond)
	case l.BurstIOPS > 0 && l.IOPS == 0:
		return bad("burstIOPS needs iops")
	case l.BurstBytesPerSecond > 0 && l.BytesPerSecond == 0:
		return bad("burstBytesPerSecond needs bytesPerSecond")
	case l.BurstSeconds > 0 && l.BurstIOPS == 0 && l.BurstBytesPerSecond == 0:
		return bad("burstSeconds needs burstIOPS or burstBytesPerSecond")
	case l.BytesPerSecond > 0 && l.BytesPerSecond < 4096:
		return bad("bytesPerSecond %d would not pass one unit of 4096 bytes in a second", l.BytesPerSecond)
	}
	return nil
}

// parseLimit is ParseSize with zero allowed.
func parseLimit(text string) (int64, error) {
	if text != "" && strings.Trim(text, "0") == "" {
		return 0, nil
	}
	return ParseSize(text)
}

func limits(l catalog.Limits) Limits {
	return Limits{
		IOPS: l.IOPS, BytesPerSecond: strconv.FormatInt(l.BytesPerSecond, 10), BurstIOPS: l.BurstIOPS,
		BurstBytesPerSecond: strconv.FormatInt(l.BurstBytesPerSecond, 10), BurstSeconds: l.BurstSeconds,
	}
}

// updateLimits changes a volume's limits, attached or not. Those that are not named stay as they are. It returns when the change is recorded; an open volume follows at
// once.
func (h *Handler) updateLimits(c *call) (any, error) {
	var in limitsInput
	if err := c.body(&in); err != nil {
		return nil, err
	}
	_, _, err := catalog.Update(c.r.Context(), h.cfg.Catalog, catalog.VolumeKey(catalog.Wanted, c.id), func(w *catalog.VolumeWanted) error {
		if w.Deleted != nil {
			return Failure(CodeConflict, "volume %s is being deleted", w.Name)
		}
		return in.apply(w.Name, &w.Limits)
	})
	if err != nil {
		return nil, h.gone(c, err)
	}
	return h.volumeGet(c)
}

// space is what a volume takes. One that was not open yet since it was made, or since its records were rebuilt, has not been counted: then it is what the file system says of its copies,
// which are nobody else's.
func (v *volumeView) space() catalog.Space {
	s := v.observed.Space
	if s == (catalog.Space{}) {
		for _, r := range v.observed.Replicas {
			s.ExclusiveBytes += r.AllocatedBytes
		}
	}
	return s
}

func space(s catalog.Space) Space {
	return Space{
		Exclusive: strconv.FormatInt(s.ExclusiveBytes, 10), Shared: strconv.FormatInt(s.SharedBytes, 10), Reclaimable: strconv.FormatInt(s.ReclaimableBytes, 10),
	}
}
