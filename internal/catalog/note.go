package catalog

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
)

// The types of an EventRecord.
const (
	Normal  = "Normal"
	Warning = "Warning"
)

// Note records that something happened. The same thing again (type, kind, name, reason, message) is counted in the same record, so that what happens
// over and over takes no more room; control deletes old ones. ID, Count and the older Time are Note's to fill. ErrUnreachable.
func Note(ctx context.Context, c Catalog, ev EventRecord) error {
	sum := sha256.New()
	for _, s := range []string{ev.Type, string(ev.Kind), ev.Name, ev.Reason, ev.Message} {
		sum.Write([]byte(s))
		sum.Write([]byte{0})
	}
	ev.ID = hex.EncodeToString(sum.Sum(nil)[:16])
	_, _, err := Upsert(ctx, c, EventKey(ev.ID), func(was *EventRecord) error {
		ev.Count = was.Count + 1
		if was.Time.After(ev.Time) {
			ev.Time = was.Time
		}
		*was = ev
		return nil
	})
	return err
}
