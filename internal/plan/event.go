package plan

import (
	"slices"
	"time"

	"ashlar/internal/catalog"
)

// What is kept of events, and of operations that ended.
const (
	keepEvents     = 24 * time.Hour
	maxEvents      = 1000
	keepOperations = time.Hour
)

// oldEvents deletes events after a day, and the oldest above a thousand.
func oldEvents(in ClusterInput) []Write {
	ids := sorted(in.View.Events)
	slices.SortStableFunc(ids, func(a, b string) int { return in.View.Events[a].Value.Time.Compare(in.View.Events[b].Value.Time) })
	var out []Write
	for i, id := range ids {
		ev := in.View.Events[id]
		if len(ids)-i > maxEvents || in.Now.Sub(ev.Value.Time) >= keepEvents {
			out = append(out, Write{Key: catalog.EventKey(id), Was: ev.Rev})
		}
	}
	return out
}

func note(now time.Time, typ string, kind catalog.Kind, name, reason string) catalog.EventRecord {
	return catalog.EventRecord{Time: now.UTC(), Type: typ, Kind: kind, Name: name, Reason: reason}
}

// setCondition changes a condition if it differs, with the time of the change of its status.
func setCondition(m map[string]catalog.Condition, name string, c catalog.Condition, now time.Time) {
	was, ok := m[name]
	c.LastTransitionTime = was.LastTransitionTime
	if !ok || was.Status != c.Status {
		c.LastTransitionTime = now.UTC().Truncate(time.Second)
	}
	m[name] = c
}
