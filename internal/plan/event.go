package plan

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"ashlar/internal/catalog"
)

// What is kept of events, of operations that ended, and of join tokens that are good no more.
const (
	keepEvents     = 24 * time.Hour
	maxEvents      = 1000
	maxComplaints  = 200 // events that a volume has no place: every volume says so itself, and the events of a thousand would push out all others
	keepOperations = time.Hour
	keepJoins      = 24 * time.Hour
)

// oldJoins deletes join tokens a day after they expired: until then they tell who used them.
func oldJoins(in ClusterInput) []Write {
	var out []Write
	for _, name := range sorted(in.View.Joins) {
		if j := in.View.Joins[name]; in.Now.Sub(j.Value.Expires) >= keepJoins {
			out = append(out, Write{Key: catalog.JoinKey(name), Was: j.Rev})
		}
	}
	return out
}

// oldEvents deletes events after a day, and the oldest above a thousand. That a node is down is kept while it is so: it tells that it was said.
func oldEvents(in ClusterInput) []Write {
	ids := make([]string, 0, len(in.View.Events))
	over := len(in.View.Events) > maxEvents
	for id, ev := range in.View.Events {
		if over || in.Now.Sub(ev.Value.Time) >= keepEvents {
			ids = append(ids, id)
		}
	}
	slices.SortFunc(ids, func(a, b string) int {
		return cmp.Or(in.View.Events[a].Value.Time.Compare(in.View.Events[b].Value.Time), strings.Compare(a, b))
	})
	var out []Write
	for i, id := range ids {
		ev := in.View.Events[id]
		if over && len(ids)-i <= maxEvents && in.Now.Sub(ev.Value.Time) < keepEvents || ev.Value.Reason == catalog.ReasonNodeDown && in.View.down(ev.Value.Name) {
			continue
		}
		out = append(out, Write{Key: catalog.EventKey(id), Was: ev.Rev})
	}
	return out
}

// down tells whether a node that is in a cluster is silent.
func (v *View) down(node string) bool {
	n := v.Nodes[node]
	return n.Wanted.Is() && n.Wanted.Value.Deleted == nil && n.Observed.Value.Port != 0 && !v.Alive[node].Is()
}

// nodeDownID is the id of the event that a node is silent. Its time is when that was noticed.
func nodeDownID(node string) string { return DeriveID("event", catalog.ReasonNodeDown, node) }

// liveness tells people that a node has become silent, and that it is heard again: once each, because the last event says what was said last.
func liveness(in ClusterInput) []Write {
	var out []Write
	for _, name := range sorted(in.View.Nodes) {
		if in.View.Nodes[name].Observed.Value.Port == 0 {
			continue
		}
		downID, upID := nodeDownID(name), DeriveID("event", catalog.ReasonNodeUp, name)
		down, up := in.View.Events[downID], in.View.Events[upID]
		saidDown := down.Is() && (!up.Is() || down.Rev > up.Rev)
		switch isDown := in.View.down(name); {
		case isDown && !saidDown:
			ev := note(in.Now, catalog.Warning, catalog.KindNode, name, catalog.ReasonNodeDown)
			ev.ID, ev.Count, ev.Message = downID, down.Value.Count+1, "nothing is heard of it; volumes that are open there go on if only its serve is away"
			out = append(out, Write{Key: catalog.EventKey(downID), Value: ev, Was: down.Rev})
		case !isDown && saidDown && in.View.Alive[name].Is():
			ev := note(in.Now, catalog.Normal, catalog.KindNode, name, catalog.ReasonNodeUp)
			ev.ID, ev.Count, ev.Message = upID, up.Value.Count+1, "it is heard again"
			out = append(out, Write{Key: catalog.EventKey(upID), Value: ev, Was: up.Rev})
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
