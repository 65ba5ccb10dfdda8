package api

import (
	"cmp"
	"slices"

	"ashlar/internal/catalog"
)

// eventList lists what happened, oldest first.
func (h *Handler) eventList(c *call) (any, error) {
	if c.r.URL.Query().Has("watch") {
		return nil, missing("events as a stream")
	}
	l, err := list[catalog.EventRecord, struct{}](c.r.Context(), h, catalog.KindEvent)
	if err != nil {
		return nil, err
	}
	var records []catalog.EventRecord
	for _, name := range l.names() {
		records = append(records, l.wanted[name])
	}
	slices.SortStableFunc(records, func(a, b catalog.EventRecord) int { return cmp.Or(a.Time.Compare(b.Time), cmp.Compare(a.ID, b.ID)) })
	var data []Event
	for _, r := range records {
		data = append(data, Event{
			Resource: c.resource(r.ID), EventType: r.Type, ObjectKind: string(r.Kind), ObjectName: r.Name, Reason: r.Reason, Message: r.Message,
			Count: r.Count, Time: stamp(r.Time),
		})
	}
	return collect(c, c.noun.schema, data), nil
}
