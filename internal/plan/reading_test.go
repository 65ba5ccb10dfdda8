package plan_test

import (
	"strings"
	"testing"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/plan"
)

func blockdev(w *catalog.VolumeWanted) { w.Frontend = catalog.FrontendBlockdev }
func limited(w *catalog.VolumeWanted)  { w.Limits.IOPS = 100 }

// layers gives the open volume a head above the layers named.
func (s *scene) layers(ls ...plan.FoundLayer) *scene {
	v := &s.in.Found.Volumes[0]
	v.Layers = append(ls, plan.FoundLayer{ID: "head", Head: true})
	return s
}

func (s *scene) export(state, snapshot string) *scene {
	s.put(catalog.OperationKey("v", exportID), catalog.Operation{
		ID: exportID, Volume: "v", VolumeID: "id-v", Verb: catalog.VerbExport, State: state, Snapshot: snapshot, Path: "/x", Format: "raw",
	})
	return s
}

func (s *scene) exportJob(state, code string) *scene {
	s.in.Found.Jobs = append(s.in.Found.Jobs, plan.FoundJob{ID: exportID, Export: true, State: state, Code: code, Error: code, Percent: 42})
	return s
}

func (s *scene) failed(a plan.Action, f plan.Failure) *scene {
	f.Rev, f.Next = a.Because(), now.Add(time.Second)
	s.in.Failures[plan.FailureID(a)] = f
	return s
}

const exportID = "0123456789abcdef0123456789abcdef"

// temporary is the snapshot that the export of exportID takes.
func temporary(removed bool) plan.FoundLayer {
	return plan.FoundLayer{ID: "tmp", Snapshot: "export-01234567", Removed: removed, Labels: map[string]string{catalog.LabelReading: exportID}}
}

// recorded has written down what a node says of its volume.
func recorded(s *scene) *scene {
	if o := volumeOf(plan.OnNode(s.in)); o.Name != "" {
		s.put(catalog.VolumeKey(catalog.Observed, "v"), o)
	}
	return s
}

// TestReadingVolumes: exports, downloads, leftovers, limits and devices that are mounted: the next step and what is shown.
func TestReadingVolumes(t *testing.T) {
	const (
		open     = plan.FoundOpen
		detached = catalog.VolumeDetached + " " + catalog.RobustnessUnknown
		attached = catalog.VolumeAttached + " " + catalog.RobustnessHealthy
	)
	at := func(s *scene, change ...func(*catalog.VolumeWanted)) *scene {
		return s.want(append([]func(*catalog.VolumeWanted){ticket}, change...)...).epoch(1).replica().open(open, "nbd", "")
	}
	offline := func(s *scene) *scene { return s.want().epoch(1).replica() }
	full := func(s *scene) *scene { s.in.Found.Disks[0].FreeBytes = gib; return s }
	observe := func(s *scene, o catalog.VolumeObserved) *scene {
		s.put(catalog.VolumeKey(catalog.Observed, "v"), o)
		return s
	}
	wasAttached := func(s *scene) *scene { return observe(s, observed("v", catalog.VolumeAttached, true)) }
	for _, c := range []struct {
		name  string
		scene func(*scene) *scene
		do    string
		shows string // state and robustness
		error string
		op    string // how an operation ends, or its progress
	}{
		{"block device", func(s *scene) *scene { return s.want(ticket, blockdev).epoch(1).replica() }, "open-volume(blockdev)", catalog.VolumeAttaching + " " + catalog.RobustnessUnknown, "", ""},
		{"block device, open", func(s *scene) *scene {
			return s.want(ticket, blockdev).epoch(1).replica().open(open, "blockdev", "")
		}, "", attached, "", ""},
		{"from nbd to block device", func(s *scene) *scene { return wasAttached(at(s, blockdev)) }, "close-volume", catalog.VolumeDetaching + " " + catalog.RobustnessUnknown, "", ""},
		{"mounted", func(s *scene) *scene {
			s = wasAttached(s.want(blockdev).epoch(1).replica().open(open, "blockdev", ""))
			s.in.Found.Volumes[0].Endpoint = "/dev/ashlar/v"
			return s.failed(plan.OnNode(s.in).Actions[0], plan.Failure{InUse: true, Message: "busy"})
		}, "", catalog.VolumeDetaching + " " + catalog.RobustnessUnknown, "/dev/ashlar/v is mounted or open; unmount it", ""},
		{"mounted, deleted", func(s *scene) *scene {
			s = s.want(blockdev, tombstone).epoch(1).replica().open(open, "blockdev", "")
			return s.failed(plan.OnNode(s.in).Actions[0], plan.Failure{InUse: true})
		}, "", catalog.VolumeDeleting + " " + catalog.RobustnessUnknown, "unmount it", ""},
		{"mounted, but wanted again", func(s *scene) *scene {
			s = at(s)
			return s.failed(plan.CloseVolume{VolumeID: "id-v"}, plan.Failure{InUse: true})
		}, "", attached, "", ""},
		{"new limits", func(s *scene) *scene { return at(s, limited) }, "set-limits", attached, "", ""},
		{"new limits while something takes long", func(s *scene) *scene { s.in.Busy[plan.VolumeKey("id-v")] = true; return at(s, limited) }, "set-limits", attached, "", ""},
		{"limits in force", func(s *scene) *scene { s = at(s, limited); s.in.Found.Volumes[0].Limits.IOPS = 100; return s }, "", attached, "", ""},
		{"limits refused", func(s *scene) *scene {
			s = at(s, limited)
			return s.failed(plan.OnNode(s.in).Actions[0], plan.Failure{Message: "no"})
		}, "", attached, "limits are not in force: no", ""},
		{"disk away under an open volume", func(s *scene) *scene {
			s = at(s)
			s.in.Found.Disks[0].TotalBytes, s.in.Found.Disks[0].Error = 0, "input/output error"
			return s
		}, "adopt-disk", catalog.VolumeAttached + " " + catalog.RobustnessFaulted, "input/output error", ""},
		{"disk that is not adopted", func(s *scene) *scene {
			s.want(ticket).epoch(1)
			n := s.v.Nodes["n1"].Observed.Value
			n.Disks = map[string]catalog.DiskObserved{"d": {DiskID: "n1-d"}}
			s.put(catalog.NodeKey(catalog.Observed, "n1"), n)
			s.in.Found.Disks = nil
			return s.failed(plan.OnNode(s.in).Actions[0], plan.Failure{Message: "nothing is mounted there"})
		}, "", catalog.VolumeAttaching + " " + catalog.RobustnessUnknown, "nothing is mounted there", ""},

		{"export of a detached volume", func(s *scene) *scene { return offline(s).export(catalog.OperationPending, "") }, "open-volume()", detached, "", ""},
		{"export of a detached volume, opened", func(s *scene) *scene { return offline(s).open(open, "", "").export(catalog.OperationPending, "") }, "start-export", detached, "", ""},
		{"export", func(s *scene) *scene { return at(s).export(catalog.OperationPending, "") }, "start-export", attached, "", ""},
		{"export, serve was started again", func(s *scene) *scene { return at(s).export(catalog.OperationRunning, "") }, "start-export", attached, "", ""},
		{"export under way", func(s *scene) *scene {
			return at(s).layers(temporary(false)).export(catalog.OperationRunning, "").exportJob(plan.JobRunning, "")
		}, "", attached, "", "running 42"},
		{"snapshot beside an export", func(s *scene) *scene {
			return at(s).op(catalog.VerbSnapshot, catalog.OperationPending).export(catalog.OperationRunning, "").exportJob(plan.JobRunning, "")
		}, "operate", attached, "", "running 42"},
		{"attached under an export", func(s *scene) *scene {
			return s.want(ticket).epoch(1).replica().open(open, "", "").export(catalog.OperationRunning, "").exportJob(plan.JobRunning, "")
		}, "close-volume", detached, "", "running 42"},
		{"detached under an export", func(s *scene) *scene {
			return wasAttached(s.want().epoch(1).replica().open(open, "nbd", "")).export(catalog.OperationRunning, "").exportJob(plan.JobRunning, "")
		}, "close-volume", catalog.VolumeDetaching + " " + catalog.RobustnessUnknown, "", "running 42"},
		{"export over", func(s *scene) *scene {
			return at(s).layers(temporary(false)).export(catalog.OperationRunning, "").exportJob(plan.JobDone, "")
		}, "end-export", attached, "", "running 42"},
		{"export over, snapshot dropped", func(s *scene) *scene {
			s = at(s).layers(temporary(true)).export(catalog.OperationRunning, "").exportJob(plan.JobDone, "")
			s.in.Finished[exportID] = plan.Result{Code: catalog.CodeNoSpace}
			return s
		}, "", attached, "", "failed no-space"},
		{"export recorded", func(s *scene) *scene {
			return at(s).layers(temporary(true)).export(catalog.OperationDone, "").exportJob(plan.JobDone, "")
		}, "forget-job", attached, "", ""},
		{"export on a full disk", func(s *scene) *scene { return full(at(s).export(catalog.OperationPending, "")) }, "", attached, "", "failed no-space"},
		{"export of a snapshot on a full disk", func(s *scene) *scene { return full(at(s).export(catalog.OperationPending, "s1")) }, "start-export", attached, "", ""},
		{"export going on while the disk fills", func(s *scene) *scene {
			return full(at(s).layers(temporary(false)).export(catalog.OperationRunning, ""))
		}, "start-export", attached, "", ""},
		{"snapshot on a full disk", func(s *scene) *scene { return full(at(s).op(catalog.VerbSnapshot, catalog.OperationPending)) }, "", attached, "", "failed no-space"},
		{"expand on a full disk", func(s *scene) *scene { return full(offline(s).op(catalog.VerbExpand, catalog.OperationPending)) }, "", detached, "", "failed no-space"},
		{"purge on a full disk", func(s *scene) *scene { return full(at(s).op(catalog.VerbPurge, catalog.OperationPending)) }, "operate", attached, "", ""},

		{"leftover", func(s *scene) *scene { return at(s).layers(temporary(false)) }, "drop-reading", attached, "", ""},
		{"leftover that was removed", func(s *scene) *scene { return at(s).layers(temporary(true)) }, "", attached, "", ""},
		{"a person's snapshot with that label", func(s *scene) *scene {
			l := temporary(false)
			l.UserCreated = true
			return at(s).layers(l)
		}, "", attached, "", ""},
		{"leftover of a detached volume", func(s *scene) *scene {
			o := observed("v", catalog.VolumeDetached, true)
			o.Snapshots = []catalog.SnapshotObserved{{Name: "export-01234567", Labels: temporary(false).Labels}}
			return observe(offline(s), o)
		}, "open-volume()", detached, "", ""},
		{"leftover of a detached volume, opened", func(s *scene) *scene { return offline(s).open(open, "", "").layers(temporary(false)) }, "drop-reading", detached, "", ""},
		{"leftover of a detached volume, removed", func(s *scene) *scene {
			return recorded(offline(s).open(open, "", "").layers(temporary(true)))
		}, "close-volume", detached, "", ""},
		{"snapshot of a volume that is open for an export only", func(s *scene) *scene {
			return offline(s).open(open, "", "").export(catalog.OperationRunning, "").exportJob(plan.JobRunning, "").op(catalog.VerbSnapshot, catalog.OperationPending)
		}, "", detached, "", "failed not-attached, running 42"},
		{"download of a detached volume", func(s *scene) *scene {
			s.in.Downloads = map[string][]string{"id-v": {exportID}}
			return offline(s)
		}, "open-volume()", detached, "", ""},
		{"download under way", func(s *scene) *scene {
			s.in.Downloads = map[string][]string{"id-v": {exportID}}
			return offline(s).open(open, "", "").layers(temporary(false)).exportJob(plan.JobDone, "")
		}, "", detached, "", ""},
		{"deleted under an export", func(s *scene) *scene {
			return s.want(tombstone).epoch(1).replica().open(open, "nbd", "").export(catalog.OperationRunning, "").exportJob(plan.JobRunning, "")
		}, "close-volume", catalog.VolumeDeleting + " " + catalog.RobustnessUnknown, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := c.scene(newScene(t))
			p := plan.OnNode(s.in)
			if got := verbs(p.Actions); got != c.do {
				t.Errorf("does %q, want %q", got, c.do)
			}
			o := volumeOf(p)
			if o.Name == "" {
				o = s.v.Volumes["v"].Observed.Value
			}
			if got := o.State + " " + o.Robustness; got != c.shows {
				t.Errorf("shows %q, want %q", got, c.shows)
			}
			if (c.error == "") != (o.Error == "") || !strings.Contains(o.Error, c.error) {
				t.Errorf("error %q, want %q", o.Error, c.error)
			}
			if got := records(p); got != c.op {
				t.Errorf("records %q, want %q", got, c.op)
			}
		})
	}
}

// records is what is written of operations.
func records(p plan.NodePlan) string {
	var out []string
	for _, w := range p.Writes {
		if op, ok := w.Value.(catalog.Operation); ok {
			switch {
			case op.State == catalog.OperationRunning:
				out = append(out, op.State+" "+strings.Repeat("42", op.Progress/42))
			default:
				out = append(out, strings.TrimSuffix(op.State+" "+op.Code, " "))
			}
		}
	}
	return strings.Join(out, ", ")
}

// TestImagesFromElsewhere: copies made from a volume, and those that a client brings.
func TestImagesFromElsewhere(t *testing.T) {
	const volume, upload = catalog.SourceVolume, catalog.SourceUpload
	is := func(state string, attempts int) catalog.ImageOnDisk {
		return catalog.ImageOnDisk{State: state, Attempts: attempts, LastTransitionTime: now.Add(-time.Minute)}
	}
	id := plan.DeriveID("image", "id-i", "n1-d", "0")
	job := func(state string) *plan.FoundJob {
		return &plan.FoundJob{ID: "id-i", DiskID: "n1-d", State: state, DoneBytes: 7, Percent: 7, Error: "because"}
	}
	open := func(s *scene) { s.want(ticket).epoch(1).replica().open(plan.FoundOpen, "nbd", "") }
	closed := func(s *scene) { s.want().epoch(1).replica() }
	ended := func(s *scene) { open(s); s.in.Finished[id] = plan.Result{} }
	up := func(u plan.Upload) func(*scene) {
		return func(s *scene) { s.in.Uploads = map[string]plan.Upload{"id-i": u} }
	}
	file := func(next func(*scene)) func(*scene) { return func(s *scene) { next(s); s.file("sum") } }
	other := func(s *scene) { // another disk has one
		s.put(catalog.ImageKey(catalog.Observed, "i"), catalog.ImageObserved{Name: "i", ID: "id-i", Disks: map[string]catalog.ImageOnDisk{"n2-d": is(catalog.ImageReady, 0)}})
	}
	for _, c := range []struct {
		name   string
		source string
		was    catalog.ImageOnDisk
		scene  func(*scene)
		job    *plan.FoundJob
		do     string
		want   string // state, attempts, message
	}{
		{"no such volume", volume, is(catalog.ImagePending, 0), nil, nil, "", "failed 1 there is no volume v"},
		{"volume detached", volume, is(catalog.ImagePending, 0), closed, nil, "open-volume()", "pending 0 waiting for volume v"},
		{"volume open", volume, is(catalog.ImagePending, 0), open, nil, "import-image", ""},
		{"again after a crash", volume, is(catalog.ImageStarting, 0), open, nil, "import-image", ""},
		{"volume detached under it", volume, is(catalog.ImageStarting, 0), closed, nil, "open-volume()", ""},
		{"moving", volume, is(catalog.ImageStarting, 0), open, job(plan.JobRunning), "", "in-progress 0 "},
		{"there, not ended", volume, is(catalog.ImageInProgress, 0), file(open), job(plan.JobDone), "end-reading", ""},
		{"there, ended", volume, is(catalog.ImageInProgress, 0), file(ended), job(plan.JobDone), "", "ready 0 "},
		{"failed, not ended", volume, is(catalog.ImageInProgress, 0), open, job(plan.JobFailed), "end-reading", ""},
		{"failed, ended", volume, is(catalog.ImageInProgress, 0), ended, job(plan.JobFailed), "", "failed 1 because (attempt 1; tried again after 1m0s)"},
		{"another disk has it", volume, is(catalog.ImagePending, 0), func(s *scene) { other(s); closed(s) }, nil, "", "pending 0 its source gives one copy"},

		{"upload, new", upload, catalog.ImageOnDisk{}, nil, nil, "", "pending 0 waiting for the upload"},
		{"upload begun", upload, is(catalog.ImageStarting, 0), up(plan.Upload{}), nil, "", ""},
		{"upload moving", upload, is(catalog.ImageStarting, 0), up(plan.Upload{}), job(plan.JobRunning), "", "in-progress 0 "},
		{"upload broke off, its client not heard yet", upload, is(catalog.ImageInProgress, 0), up(plan.Upload{}), job(plan.JobFailed), "", ""},
		{"upload broke off", upload, is(catalog.ImageInProgress, 0), up(plan.Upload{Failed: "the client went away"}), job(plan.JobFailed), "", "failed 1 the client went away (not tried again"},
		{"upload refused", upload, is(catalog.ImageInProgress, 0), up(plan.Upload{Taken: true}), job(plan.JobFailed), "", "failed 1 because (not tried again"},
		{"upload taken, then the data process ended", upload, is(catalog.ImageInProgress, 0), up(plan.Upload{Taken: true}), nil, "", "failed 1 the upload was interrupted"},
		{"upload, serve was started again", upload, is(catalog.ImageStarting, 0), nil, nil, "", "failed 1 the upload was interrupted"},
		{"upload, serve was started again, job failed", upload, is(catalog.ImageInProgress, 0), nil, job(plan.JobFailed), "", "failed 1 the upload was interrupted"},
		{"upload, serve was started again, all was taken", upload, is(catalog.ImageInProgress, 0), nil, job(plan.JobRunning), "", "in-progress 0 "},
		{"upload failed, import goes on", upload, is(catalog.ImageFailed, 1), up(plan.Upload{Failed: "x"}), job(plan.JobRunning), "cancel-import", ""},
		{"upload failed", upload, is(catalog.ImageFailed, 1), nil, nil, "", ""},
		{"upload there", upload, is(catalog.ImageInProgress, 0), file(up(plan.Upload{Taken: true})), job(plan.JobDone), "", "ready 0 "},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newScene(t)
			s.put(catalog.ImageKey(catalog.Wanted, "i"), catalog.ImageWanted{
				Name: "i", ID: "id-i", SourceType: c.source, Parameters: map[string]string{"volume-name": "v"}, Disks: []string{"n1-d", "n2-d"},
			})
			if c.scene != nil {
				c.scene(s)
			}
			if c.was.State != "" {
				o := s.v.Images["i"].Observed.Value
				if o.Disks == nil {
					o = catalog.ImageObserved{Name: "i", ID: "id-i", Disks: map[string]catalog.ImageOnDisk{}}
				}
				o.Disks["n1-d"] = c.was
				s.put(catalog.ImageKey(catalog.Observed, "i"), o)
			}
			if c.job != nil {
				s.in.Found.Jobs = []plan.FoundJob{*c.job}
			}
			p := plan.OnNode(s.in)
			if got := verbs(p.Actions); got != c.do {
				t.Errorf("does %q, want %q", got, c.do)
			}
			got := ""
			if o, ok := find[catalog.ImageObserved](p.Writes); ok {
				d := o.Disks["n1-d"]
				got = d.State + " " + string(rune('0'+d.Attempts)) + " " + d.Message
				if strings.Contains(got, "failed") && (c.source == upload) != d.NextTry.IsZero() {
					t.Errorf("tried again at %v", d.NextTry)
				}
			}
			if !strings.HasPrefix(got, c.want) || (c.want == "") != (got == "") {
				t.Errorf("records %q, want %q", got, c.want)
			}
			for _, a := range p.Actions {
				if i, ok := a.(plan.ImportImage); ok && (i.Reading == nil || i.Reading.ID != id || i.Reading.Snapshot != "i-"+id[:8] || i.Reading.Labels[catalog.LabelImageExport] != "i") {
					t.Errorf("reads %+v", i.Reading)
				}
			}
		})
	}
}

// TestBackground: the data process is told once what the node's own work may move, and whenever the setting changes.
func TestBackground(t *testing.T) {
	s := newScene(t)
	s.in.Background = nil
	if got := verbs(plan.OnNode(s.in).Actions); got != "set-background" {
		t.Errorf("to a new data process: %q", got)
	}
	s.in.Background = new(int64)
	s.put(catalog.SettingKey(catalog.SettingBackgroundRate), catalog.Setting{Name: catalog.SettingBackgroundRate, Value: "5"})
	as := plan.OnNode(s.in).Actions
	if a, ok := as[0].(plan.SetBackground); !ok || a.BytesPerSecond != 5<<20 {
		t.Errorf("after a change: %+v", as)
	}
	*s.in.Background = 5 << 20
	if got := verbs(plan.OnNode(s.in).Actions); got != "" {
		t.Errorf("said twice: %q", got)
	}
}

// TestDiskWarnings: a disk that fills is warned of once before it takes nothing more; one that goes away and comes back is said to.
func TestDiskWarnings(t *testing.T) {
	s := newScene(t)
	look := func() (d catalog.DiskObserved, reasons string) {
		for _, w := range plan.OnNode(s.in).Writes {
			if o, ok := w.Value.(catalog.NodeObserved); ok {
				s.put(w.Key, o)
				for _, n := range w.Notes {
					reasons += n.Reason + " "
				}
			}
		}
		return s.v.Nodes["n1"].Observed.Value.Disks["d"], reasons
	}
	disk := &s.in.Found.Disks[0]
	for _, c := range []struct {
		free   int64
		error  string
		full   string
		sched  string
		ready  string
		events string
	}{
		{50 * gib, "", catalog.ConditionFalse, catalog.ConditionTrue, catalog.ConditionTrue, ""},
		{14 * gib, "", catalog.ConditionTrue, catalog.ConditionTrue, catalog.ConditionTrue, catalog.ReasonNearlyFull + " "},
		{15*gib + 1, "", catalog.ConditionTrue, catalog.ConditionTrue, catalog.ConditionTrue, ""},
		{4 * gib, "", catalog.ConditionTrue, catalog.ConditionFalse, catalog.ConditionTrue, ""},
		{17 * gib, "", catalog.ConditionFalse, catalog.ConditionTrue, catalog.ConditionTrue, ""},
		{17 * gib, "gone", catalog.ConditionFalse, catalog.ConditionFalse, catalog.ConditionFalse, catalog.ReasonDiskAway + " "},
		{17 * gib, "", catalog.ConditionFalse, catalog.ConditionTrue, catalog.ConditionTrue, catalog.ReasonDiskBack + " "},
	} {
		disk.FreeBytes, disk.Error, disk.TotalBytes = c.free, c.error, 100*gib
		if c.error != "" {
			disk.TotalBytes = 0
		}
		d, events := look()
		if got := d.Conditions; got[catalog.ConditionNearlyFull].Status != c.full || got[catalog.ConditionSchedulable].Status != c.sched || got[catalog.ConditionReady].Status != c.ready || events != c.events {
			t.Errorf("%d free, error %q: %+v, events %q, want %+v", c.free, c.error, got, events, c)
		}
		if _, events := look(); events != "" {
			t.Errorf("said twice: %s", events)
		}
	}
}

// TestDetachedWhileRead: a volume that was detached while it is read is open for that alone; whoever waits for its detachment does not wait for the reader, also if nobody saw it closed in between.
func TestDetachedWhileRead(t *testing.T) {
	s := newScene(t).replica()
	s.want().epoch(1).open(plan.FoundOpen, "", "")
	s.put(catalog.OperationKey("v", "o"), catalog.Operation{ID: "o", Volume: "v", VolumeID: "id-v", Verb: catalog.VerbExport, State: catalog.OperationRunning})
	s.put(catalog.VolumeKey(catalog.Observed, "v"), observed("v", catalog.VolumeDetaching, true))
	if o := volumeOf(plan.OnNode(s.in)); o.State != catalog.VolumeDetached {
		t.Errorf("it is %s", o.State)
	}
	s.in.Found.Volumes[0].Frontend = catalog.FrontendNBD
	if o := volumeOf(plan.OnNode(s.in)); o.State == catalog.VolumeDetached {
		t.Error("it is detached with its frontend")
	}
}

// TestShownBeforeClosed: a volume whose layers changed is closed once its record shows them, because nobody looks into a closed one; who has lost the volume does not wait for that.
func TestShownBeforeClosed(t *testing.T) {
	s := newScene(t).replica()
	s.want().epoch(1).open(plan.FoundOpen, "", "").layers(temporary(false))
	recorded(s)
	s.layers(temporary(true)) // it was the last reader's
	p := plan.OnNode(s.in)
	if o := volumeOf(p); verbs(p.Actions) != "" || len(o.Snapshots) != 2 || !o.Snapshots[1].Removed && !o.Snapshots[0].Removed {
		t.Errorf("does %q and records %+v, want the record alone", verbs(p.Actions), o.Snapshots)
	}
	if got := verbs(plan.OnNode(recorded(s).in).Actions); got != "close-volume" {
		t.Errorf("when it is recorded: does %q", got)
	}
	s.layers()
	s.epoch(2) // another has it
	if got := verbs(plan.OnNode(s.in).Actions); got != "close-volume" {
		t.Errorf("who lost it: does %q", got)
	}
}

// TestReadingBegun: while an import is being begun its volume stays open although the image is wanted no more: the temporary snapshot may be taken this moment, and nobody would see it in a closed volume.
func TestReadingBegun(t *testing.T) {
	s := newScene(t).replica()
	s.want().epoch(1).open(plan.FoundOpen, "", "")
	s.put(catalog.ImageKey(catalog.Wanted, "i"), catalog.ImageWanted{
		Name: "i", ID: "id-i", SourceType: catalog.SourceVolume, Parameters: map[string]string{"volume-name": "v"}, Disks: []string{"n1-d"}, Deleted: new(now),
	})
	s.put(catalog.ImageKey(catalog.Observed, "i"), catalog.ImageObserved{Name: "i", ID: "id-i", Disks: map[string]catalog.ImageOnDisk{"n1-d": {State: catalog.ImageStarting}}})
	s.in.Busy[plan.ImageKey("id-i", "n1-d")] = true
	if got := verbs(plan.OnNode(s.in).Actions); got != "" {
		t.Errorf("while it is being begun: does %q", got)
	}
	clear(s.in.Busy)
	if got := verbs(plan.OnNode(s.in).Actions); got != "close-volume" {
		t.Errorf("when it is not: does %q", got)
	}
}
