package agent

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"reflect"
	"slices"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/plan"
)

// written is how a write ended.
type written struct {
	write plan.Write
	entry catalog.Entry
	err   error
}

// put begins a write, one at a time per record. It returns when to come back for one that has to wait by the clock.
func (l *loop) put(ctx context.Context, w plan.Write) (later time.Time) {
	now := l.now()
	if until, ok := l.held[w.Key]; ok && now.Before(until) {
		return until
	}
	if l.writing[w.Key] {
		return time.Time{} // its end is an event
	}
	if until := l.throttled(w, now); now.Before(until) {
		return until
	}
	value, err := json.Marshal(w.Value)
	if err != nil {
		l.a.cfg.Log.Error("record cannot be written", "key", w.Key.String(), "error", err)
		return time.Time{}
	}
	l.writing[w.Key] = true
	l.calm[w.Key] = now
	l.a.wg.Go(func() {
		rev, err := l.a.cfg.Catalog.Put(ctx, w.Key, value, w.Was)
		_ = send(ctx, l.inbox, written{w, catalog.Entry{Key: w.Key, Value: value, Rev: rev}, err})
	})
	return time.Time{}
}

func (l *loop) takeWritten(w written) {
	delete(l.writing, w.write.Key)
	l.changed.add(w.write.Key)
	if w.err != nil {
		// Somebody was faster, most likely; the watch will show it.
		l.held[w.write.Key] = l.now().Add(holdWrite)
		if !errors.Is(w.err, catalog.ErrConflict) {
			l.a.cfg.Log.Warn("record not written", "key", w.write.Key.String(), "error", w.err)
		}
		return
	}
	l.applyOwn(w.entry)
	l.a.note(w.write.Notes...)
}

// How often what changes all the time is written.
const (
	progressEvery = time.Second
	spaceEvery    = 5 * time.Second
)

// throttled says until when a write waits because only numbers that change all the time differ.
func (l *loop) throttled(w plan.Write, now time.Time) time.Time {
	last, ok := l.calm[w.Key]
	if !ok {
		return now
	}
	switch v := w.Value.(type) {
	case catalog.ImageObserved:
		if reflect.DeepEqual(withoutProgress(v), withoutProgress(l.view.Images[w.Key.Name].Observed.Value)) {
			return last.Add(progressEvery)
		}
	case catalog.NodeObserved:
		if reflect.DeepEqual(withoutSpace(v), withoutSpace(l.view.Nodes[w.Key.Name].Observed.Value)) {
			return last.Add(spaceEvery)
		}
	case catalog.VolumeObserved:
		// Whoever waits for the end of an operation waits for this record.
		if len(l.finished) == 0 && reflect.DeepEqual(withoutSizes(v), withoutSizes(l.view.Volumes[w.Key.Name].Observed.Value)) {
			return last.Add(spaceEvery)
		}
	case catalog.Operation:
		if v.State == catalog.OperationRunning {
			return last.Add(progressEvery)
		}
	}
	return now
}

// withoutSizes leaves out what guests change by writing.
func withoutSizes(o catalog.VolumeObserved) catalog.VolumeObserved {
	o.Space = catalog.Space{}
	o.Snapshots = slices.Clone(o.Snapshots)
	for i := range o.Snapshots {
		o.Snapshots[i].SizeBytes, o.Snapshots[i].Space = 0, catalog.Space{}
	}
	o.Replicas = slices.Clone(o.Replicas)
	for i := range o.Replicas {
		o.Replicas[i].AllocatedBytes = 0
	}
	return o
}

func withoutProgress(o catalog.ImageObserved) catalog.ImageObserved {
	o.Disks = maps.Clone(o.Disks)
	for id, d := range o.Disks {
		d.Progress = 0
		o.Disks[id] = d
	}
	return o
}

func withoutSpace(o catalog.NodeObserved) catalog.NodeObserved {
	o.Disks = maps.Clone(o.Disks)
	for name, d := range o.Disks {
		d.FreeBytes, d.Images, d.ScheduledBytes = 0, nil, 0
		d.Conditions = maps.Clone(d.Conditions)
		for c, v := range d.Conditions {
			v.Message = ""
			d.Conditions[c] = v
		}
		o.Disks[name] = d
	}
	return o
}
