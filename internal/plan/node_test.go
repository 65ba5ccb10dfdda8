package plan_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/plan"
)

// scene is one node's picture under construction: volume v with replica rep-v on disk n1-d, image i where a case wants one.
type scene struct {
	*picture
	in plan.NodeInput
}

func newScene(t *testing.T) *scene {
	s := &scene{picture: newPicture(t)}
	s.put(catalog.ClusterKey(), catalog.Cluster{ID: "c"}).node("n1")
	s.in = plan.NodeInput{
		Node: "n1", Now: now, View: s.v, Busy: map[string]bool{}, Failures: map[string]plan.Failure{}, Finished: map[string]plan.Result{}, Background: new(int64),
		Found: plan.Found{Known: true, Disks: []plan.FoundDisk{{DiskID: "n1-d", Path: "/n1", TotalBytes: 100 * gib, FreeBytes: 50 * gib}}},
	}
	return s
}

func (s *scene) replica() *scene {
	d := &s.in.Found.Disks[0]
	d.Replicas = append(d.Replicas, plan.FoundReplica{ReplicaID: "rep-v", VolumeID: "id-v", Volume: "v", SizeBytes: gib})
	return s
}

func (s *scene) file(sum string) *scene {
	d := &s.in.Found.Disks[0]
	d.Images = append(d.Images, plan.FoundImage{ImageID: "id-i", Name: "i", SHA512: sum, VirtualSizeBytes: gib})
	return s
}

func (s *scene) open(state, frontend, code string) *scene {
	s.in.Found.Volumes = append(s.in.Found.Volumes, plan.FoundVolume{
		VolumeID: "id-v", Volume: "v", ReplicaID: "rep-v", DiskID: "n1-d", State: state, Frontend: frontend, Code: code, Error: code, Epoch: 1, SizeBytes: gib,
		Endpoint: strings.Repeat("nbd://", len(frontend)/3),
	})
	return s
}

func (s *scene) want(change ...func(*catalog.VolumeWanted)) *scene {
	w := placed("v")
	w.Frontend = catalog.FrontendNBD
	for _, c := range change {
		c(&w)
	}
	s.volume(w)
	return s
}

func (s *scene) epoch(n uint64) *scene {
	s.put(catalog.MembershipKey("id-v"), membership("id-v", n))
	return s
}

func (s *scene) op(verb, state string) *scene {
	s.put(catalog.OperationKey("v", "op1"), catalog.Operation{ID: "op1", Volume: "v", VolumeID: "id-v", Verb: verb, State: state})
	return s
}

func ticket(w *catalog.VolumeWanted) {
	w.Tickets = []catalog.Ticket{{Node: "n1", Kind: catalog.TicketAPI}}
}
func noFront(w *catalog.VolumeWanted)   { w.Tickets[0].DisableFrontend = true }
func elsewhere(w *catalog.VolumeWanted) { w.Tickets[0].Node = "n2" }
func tombstone(w *catalog.VolumeWanted) { *w = deleted(*w) }
func salvage(w *catalog.VolumeWanted)   { w.Salvage = true }
func fromImage(w *catalog.VolumeWanted) { w.Image, w.ImageID = "i", "id-i" }

// verbs is what is done, with the frontend where one is opened.
func verbs(as []plan.Action) string {
	var out []string
	for _, a := range as {
		v := a.Verb()
		if o, ok := a.(plan.OpenVolume); ok {
			v += "(" + o.Frontend + ")"
			if o.Salvage {
				v += "!"
			}
		}
		out = append(out, v)
	}
	return strings.Join(out, " ")
}

func volumeOf(p plan.NodePlan) catalog.VolumeObserved {
	o, _ := find[catalog.VolumeObserved](p.Writes)
	return o
}

// TestVolumeOnNode: the next step and what is shown, by what is wanted and found.
func TestVolumeOnNode(t *testing.T) {
	const (
		open, failed = plan.FoundOpen, plan.FoundFailed
		nbd          = "nbd"
		creating     = catalog.VolumeCreating + " " + catalog.RobustnessUnknown
		detached     = catalog.VolumeDetached + " " + catalog.RobustnessUnknown
		attaching    = catalog.VolumeAttaching + " " + catalog.RobustnessUnknown
		attached     = catalog.VolumeAttached + " " + catalog.RobustnessHealthy
		detaching    = catalog.VolumeDetaching + " " + catalog.RobustnessUnknown
		deleting     = catalog.VolumeDeleting + " " + catalog.RobustnessUnknown
		faulted      = catalog.VolumeDetached + " " + catalog.RobustnessFaulted
		broken       = catalog.VolumeAttached + " " + catalog.RobustnessFaulted
	)
	wasAttached := func(s *scene) *scene {
		o := observed("v", catalog.VolumeAttached, true)
		s.put(catalog.VolumeKey(catalog.Observed, "v"), o)
		return s
	}
	for _, c := range []struct {
		name  string
		scene func(*scene) *scene
		do    string
		shows string
		error string
	}{
		{"no membership yet", func(s *scene) *scene { return s.want() }, "", creating, ""},
		{"to be made", func(s *scene) *scene { return s.want().epoch(0) }, "create-replica", creating, ""},
		{"to be made and attached", func(s *scene) *scene { return s.want(ticket).epoch(0) }, "create-replica", creating, ""},
		{"made", func(s *scene) *scene { return s.want().epoch(0).replica() }, "", detached, ""},
		{"written to, and gone", func(s *scene) *scene { return s.want(ticket).epoch(1) }, "", faulted, "not on disk"},
		{"copied here, and not yet seen", func(s *scene) *scene {
			s.in.Found.Jobs = []plan.FoundJob{{ID: "rep-v", Copy: true, State: plan.JobRunning}}
			return s.want().epoch(1)
		}, "", detached, ""},
		{"copied here, wanted, and not yet seen", func(s *scene) *scene {
			s.in.Busy["replica/rep-v"] = true
			return s.want(ticket).epoch(1)
		}, "", attaching, ""},
		{"its disk is away", func(s *scene) *scene { s.in.Found.Disks = nil; return s.want(ticket).epoch(1) }, "adopt-disk", attaching, "cannot be used"},
		{"something on its disk is damaged", func(s *scene) *scene { s.in.Found.Disks[0].Error = "rot"; return s.want(ticket).epoch(1).replica() }, "open-volume(nbd)", attaching, ""},
		{"image not there", func(s *scene) *scene { return s.want(fromImage).epoch(0) }, "", creating, ""},
		{"image there", func(s *scene) *scene { return s.want(fromImage).epoch(0).file("x") }, "create-replica", creating, ""},
		{"image larger", func(s *scene) *scene {
			return s.want(fromImage, func(w *catalog.VolumeWanted) { w.SizeBytes = gib / 2 }).epoch(0).file("x")
		}, "", creating, ""},
		{"to be attached", func(s *scene) *scene { return s.want(ticket).epoch(1).replica() }, "open-volume(nbd)", attaching, ""},
		{"to be attached without frontend", func(s *scene) *scene { return s.want(ticket, noFront).epoch(1).replica() }, "open-volume()", attaching, ""},
		{"to be attached elsewhere", func(s *scene) *scene { return s.want(ticket, elsewhere).epoch(1).replica() }, "", creating, ""}, // it is the other node's to say
		{"opening", func(s *scene) *scene { return s.want(ticket).epoch(1).replica().open(plan.FoundOpening, nbd, "") }, "", attaching, ""},
		{"attached", func(s *scene) *scene { return s.want(ticket).epoch(1).replica().open(open, nbd, "") }, "", attached, ""},
		{"attached without frontend", func(s *scene) *scene { return s.want(ticket, noFront).epoch(1).replica().open(open, "", "") }, "", attached, ""},
		{"with the wrong frontend", func(s *scene) *scene { return s.want(ticket).epoch(1).replica().open(open, "", "") }, "close-volume", detached, ""},
		{"of three copies one", func(s *scene) *scene {
			return s.want(ticket, func(w *catalog.VolumeWanted) { w.Copies = 3 }).epoch(1).replica().open(open, nbd, "")
		}, "", catalog.VolumeAttached + " " + catalog.RobustnessDegraded, ""},
		{"to be detached", func(s *scene) *scene { return wasAttached(s.want().epoch(1).replica().open(open, nbd, "")) }, "close-volume", detaching, ""},
		{"closing", func(s *scene) *scene {
			return wasAttached(s.want().epoch(1).replica().open(plan.FoundClosing, nbd, ""))
		}, "", detaching, ""},
		{"a ticket comes while it closes", func(s *scene) *scene {
			return wasAttached(s.want(ticket).epoch(1).replica().open(plan.FoundClosing, nbd, ""))
		}, "", detaching, ""},
		{"the catalogue is older than what runs", func(s *scene) *scene { return wasAttached(s.want().epoch(0).replica().open(open, nbd, "")) }, "", detaching, ""},
		{"deleted and open", func(s *scene) *scene { return s.want(tombstone).epoch(1).replica().open(open, nbd, "") }, "close-volume", deleting, ""},
		{"deleted and closing", func(s *scene) *scene { return s.want(tombstone).epoch(1).replica().open(plan.FoundClosing, nbd, "") }, "", deleting, ""},
		{"deleted", func(s *scene) *scene { return s.want(tombstone).epoch(1).replica() }, "delete-replica", deleting, ""},
		{"deleted and gone", func(s *scene) *scene { return s.want(tombstone).epoch(1) }, "", deleting, ""},
		{"deleted, its disk away", func(s *scene) *scene { s.in.Found.Disks = nil; return s.want(tombstone).epoch(1) }, "adopt-disk", deleting, "is not there"},

		{"the last copy failed", func(s *scene) *scene {
			return s.want(ticket).epoch(1).replica().open(failed, nbd, catalog.CodeFailed)
		}, "", broken, "failed"},
		{"the last copy failed, detach", func(s *scene) *scene {
			return wasAttached(s.want().epoch(1).replica().open(failed, nbd, catalog.CodeFailed))
		}, "close-volume", catalog.VolumeDetaching + " " + catalog.RobustnessFaulted, "failed"},
		{"the last copy failed, salvage", func(s *scene) *scene {
			return s.want(ticket, salvage).epoch(1).replica().open(failed, nbd, catalog.CodeNeedsSalvage)
		}, "close-volume", broken, "needs-salvage"},
		{"salvage, closed", func(s *scene) *scene { return s.want(ticket, salvage).epoch(1).replica() }, "open-volume(nbd)!", attaching, ""},
		{"could not be reopened", func(s *scene) *scene {
			return s.want(ticket).epoch(1).replica().open(failed, nbd, catalog.CodeInternal)
		}, "open-volume(nbd)", attaching, "internal"},
		{"fenced", func(s *scene) *scene {
			return s.want(ticket).epoch(1).replica().open(failed, nbd, catalog.CodeConflict)
		}, "close-volume", attaching, "conflict"},

		{"snapshot of an open volume", func(s *scene) *scene {
			return s.want(ticket).epoch(1).replica().open(open, nbd, "").op(catalog.VerbSnapshot, catalog.OperationPending)
		}, "operate", attached, ""},
		{"again after a crash", func(s *scene) *scene {
			return s.want(ticket).epoch(1).replica().open(open, nbd, "").op(catalog.VerbSnapshot, catalog.OperationRunning)
		}, "operate", attached, ""},
		{"snapshot while it opens", func(s *scene) *scene {
			return s.want(ticket).epoch(1).replica().op(catalog.VerbSnapshot, catalog.OperationPending)
		}, "open-volume(nbd)", attaching, ""},
		{"snapshot of a detached volume", func(s *scene) *scene {
			return s.want().epoch(1).replica().op(catalog.VerbSnapshot, catalog.OperationPending)
		}, "", detached, ""},
		{"expand of a detached volume", func(s *scene) *scene {
			return s.want().epoch(1).replica().op(catalog.VerbExpand, catalog.OperationPending)
		}, "open-volume()", detached, ""},
		{"expand of a detached volume, opened", func(s *scene) *scene {
			return s.want().epoch(1).replica().open(open, "", "").op(catalog.VerbExpand, catalog.OperationPending)
		}, "operate", detached, ""},
		{"expand of a detached volume, done", func(s *scene) *scene {
			return s.want().epoch(1).replica().open(open, "", "").op(catalog.VerbExpand, catalog.OperationDone)
		}, "close-volume", detached, ""},
		{"check of a detached volume", func(s *scene) *scene {
			return s.want().epoch(1).replica().op(catalog.VerbCheck, catalog.OperationPending)
		}, "operate", detached, ""},
		{"busy", func(s *scene) *scene {
			s.in.Busy[plan.VolumeKey("id-v")] = true
			return s.want(ticket).epoch(1).replica()
		}, "", attaching, ""},
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
			if (o.Endpoint != "") != (o.State == catalog.VolumeAttached && len(s.in.Found.Volumes) > 0 && s.in.Found.Volumes[0].Frontend != "") {
				t.Errorf("endpoint %q", o.Endpoint)
			}
		})
	}
}

// TestOperationsOnNode: how the records of operations end.
func TestOperationsOnNode(t *testing.T) {
	ended := func(p plan.NodePlan) string {
		op, ok := find[catalog.Operation](p.Writes)
		if !ok {
			return ""
		}
		if op.Finished == nil || !op.Finished.Equal(now) {
			t.Errorf("finished %v", op.Finished)
		}
		return strings.TrimSuffix(op.State+" "+op.Code, " ")
	}
	show := func(s *scene, o catalog.VolumeObserved) { s.put(catalog.VolumeKey(catalog.Observed, "v"), o) }
	running := func(t *testing.T) *scene {
		s := newScene(t).want(ticket).epoch(1).replica().open(plan.FoundOpen, "nbd", "").op(catalog.VerbSnapshot, catalog.OperationRunning)
		s.in.Finished["op1"] = plan.Result{}
		return s
	}
	s := running(t)
	p := plan.OnNode(s.in)
	if got := ended(p); got != "" {
		t.Errorf("ended as %q before its effect was shown", got)
	}
	if got := verbs(p.Actions); got != "" {
		t.Errorf("does %q though it is done", got)
	}
	show(s, volumeOf(p))
	if got := ended(plan.OnNode(s.in)); got != "done" {
		t.Errorf("ended as %q", got)
	}
	s = running(t)
	s.in.Finished["op1"] = plan.Result{Code: catalog.CodeExists, Message: "there is one"}
	if got := ended(plan.OnNode(s.in)); got != "failed exists" {
		t.Errorf("ended as %q", got)
	}
	for name, c := range map[string]struct {
		scene *scene
		want  string
	}{
		"detached":   {newScene(t).want().epoch(1).replica().op(catalog.VerbSnapshot, catalog.OperationPending), "failed not-attached"},
		"creating":   {newScene(t).want(ticket).epoch(0).op(catalog.VerbSnapshot, catalog.OperationPending), "failed conflict"},
		"lost":       {newScene(t).want(ticket).epoch(1).op(catalog.VerbCheck, catalog.OperationPending), "failed failed"},
		"failed":     {newScene(t).want(ticket).epoch(1).replica().open(plan.FoundFailed, "nbd", catalog.CodeFailed).op(catalog.VerbSnapshot, catalog.OperationPending), "failed failed"},
		"deleted":    {newScene(t).want(tombstone).epoch(1).replica().op(catalog.VerbSnapshot, catalog.OperationPending), ""},
		"attaching":  {newScene(t).want(ticket).epoch(1).replica().op(catalog.VerbSnapshot, catalog.OperationPending), ""},
		"other's id": {newScene(t).want(func(w *catalog.VolumeWanted) { w.ID = "new" }).epoch(1).op(catalog.VerbSnapshot, catalog.OperationPending), ""},
	} {
		if got := ended(plan.OnNode(c.scene.in)); got != c.want {
			t.Errorf("%s: ended as %q, want %q", name, got, c.want)
		}
	}
	s = newScene(t).want().epoch(1).replica().op(catalog.VerbExpand, catalog.OperationPending)
	p = plan.OnNode(s.in)
	s.in.Failures[plan.FailureID(p.Actions[0])] = plan.Failure{Code: catalog.CodeNeedsSalvage, Rev: p.Actions[0].Because(), Next: now.Add(time.Second)}
	p = plan.OnNode(s.in)
	if got := ended(p); got != "failed needs-salvage" || verbs(p.Actions) != "" || !p.Wake.Equal(now.Add(time.Second)) {
		t.Errorf("expand of a volume that cannot be opened: %q, does %q, wakes %v", got, verbs(p.Actions), p.Wake)
	}
}

// TestOrderOfOperations: the running one, then the first that was put.
func TestOrderOfOperations(t *testing.T) {
	s := newScene(t).want(ticket).epoch(1).replica().open(plan.FoundOpen, "nbd", "")
	put := func(id, state string) {
		s.put(catalog.OperationKey("v", id), catalog.Operation{ID: id, Volume: "v", VolumeID: "id-v", Verb: catalog.VerbSnapshot, State: state})
	}
	put("c", catalog.OperationPending)
	put("a", catalog.OperationPending)
	put("b", catalog.OperationDone)
	next := func() string { return plan.OnNode(s.in).Actions[0].(plan.Operate).Operation.Value.ID }
	if got := next(); got != "c" {
		t.Errorf("next %s, want c", got)
	}
	put("a", catalog.OperationRunning)
	if got := next(); got != "a" {
		t.Errorf("next %s, want a", got)
	}
}

// TestFailuresWait: what failed waits its time, unless something else is wanted since.
func TestFailuresWait(t *testing.T) {
	s := newScene(t).want(ticket).epoch(1).replica()
	a := plan.OnNode(s.in).Actions[0]
	s.in.Failures[plan.FailureID(a)] = plan.Failure{Message: "no", Rev: a.Because(), Next: now.Add(time.Minute)}
	p := plan.OnNode(s.in)
	if verbs(p.Actions) != "" || !p.Wake.Equal(now.Add(time.Minute)) || volumeOf(p).Error != "no" {
		t.Errorf("does %q, wakes %v, error %q", verbs(p.Actions), p.Wake, volumeOf(p).Error)
	}
	s.want(ticket, noFront)
	if got := verbs(plan.OnNode(s.in).Actions); got != "open-volume()" {
		t.Errorf("something else is wanted: does %q", got)
	}
	s.want(ticket)
	s.in.Now = now.Add(time.Minute)
	if got := verbs(plan.OnNode(s.in).Actions); got != "open-volume(nbd)" {
		t.Errorf("a minute later: does %q", got)
	}
}

// TestSalvageOnce: a decision to salvage is taken back once the volume is open.
func TestSalvageOnce(t *testing.T) {
	s := newScene(t).want(ticket, salvage).epoch(1).replica().open(plan.FoundOpen, "nbd", "")
	w, ok := find[catalog.VolumeWanted](plan.OnNode(s.in).Writes)
	if !ok || w.Salvage || len(w.Tickets) != 1 {
		t.Errorf("%v %+v", ok, w)
	}
}

// TestImageOnNode: the next step and what is recorded of one copy.
func TestImageOnNode(t *testing.T) {
	wanted := catalog.ImageWanted{Name: "i", ID: "id-i", SourceType: catalog.SourceDownload, Parameters: map[string]string{"url": "http://x"}, Disks: []string{"n1-d"}}
	unwanted := wanted
	unwanted.Disks = nil
	gone := wanted
	gone.Deleted = &now
	odd := wanted
	odd.SourceType = "carrier pigeon"
	is := func(state string, attempts int) catalog.ImageOnDisk {
		return catalog.ImageOnDisk{State: state, Attempts: attempts, LastTransitionTime: now.Add(-time.Minute)}
	}
	due := is(catalog.ImageFailed, 1)
	due.NextTry = now
	later := due
	later.NextTry = now.Add(time.Second)
	job := func(state string, done int64, p plan.Patience) *plan.FoundJob {
		return &plan.FoundJob{ID: "id-i", DiskID: "n1-d", State: state, DoneBytes: done, Percent: int(done), Failure: p, Error: "because"}
	}
	for _, c := range []struct {
		name   string
		wanted catalog.ImageWanted
		was    catalog.ImageOnDisk
		file   string
		job    *plan.FoundJob
		do     string
		want   string // state, attempts, progress, and when failed after how long it is tried again
	}{
		{"new", wanted, catalog.ImageOnDisk{}, "", nil, "", "pending 0 0"},
		{"pending", wanted, is(catalog.ImagePending, 0), "", nil, "import-image", ""},
		{"starting, but nobody asked", wanted, is(catalog.ImageStarting, 0), "", nil, "import-image", ""},
		{"started", wanted, is(catalog.ImageStarting, 0), "", job(plan.JobRunning, 0, 0), "", ""},
		{"moving", wanted, is(catalog.ImageStarting, 0), "", job(plan.JobRunning, 7, 0), "", "in-progress 0 7"},
		{"done, not seen yet", wanted, is(catalog.ImageInProgress, 0), "", job(plan.JobDone, 100, 0), "", ""},
		{"ready", wanted, is(catalog.ImageInProgress, 2), "sum", job(plan.JobDone, 100, 0), "", "ready 0 100"},
		{"failed", wanted, is(catalog.ImageInProgress, 0), "", job(plan.JobFailed, 7, plan.Transient), "", "failed 1 0 1m0s"},
		{"failed a third time", wanted, is(catalog.ImageInProgress, 2), "", job(plan.JobFailed, 7, plan.Transient), "", "failed 3 0 4m0s"},
		{"failed often", wanted, is(catalog.ImageInProgress, 99), "", job(plan.JobFailed, 7, plan.Transient), "", "failed 100 0 5m0s"},
		{"wrong checksum", wanted, is(catalog.ImageInProgress, 2), "", job(plan.JobFailed, 7, plan.Limited), "", "failed 3 0 4m0s"},
		{"wrong checksum again", wanted, is(catalog.ImageInProgress, 3), "", job(plan.JobFailed, 7, plan.Limited), "", "failed 4 0 never"},
		{"refused", wanted, is(catalog.ImageInProgress, 0), "", job(plan.JobFailed, 7, plan.Final), "", "failed 1 0 never"},
		{"not yet", wanted, later, "", job(plan.JobFailed, 7, plan.Transient), "", ""},
		{"now", wanted, due, "", job(plan.JobFailed, 7, plan.Transient), "import-image", ""},
		{"never", wanted, is(catalog.ImageFailed, 1), "", job(plan.JobFailed, 7, plan.Final), "", ""},
		{"interrupted", wanted, is(catalog.ImageInProgress, 0), "", nil, "", "pending 1 0"},
		{"interrupted again", wanted, is(catalog.ImageInProgress, 1), "", nil, "", "failed 2 0 2m0s"},
		{"vanished", wanted, is(catalog.ImageReady, 0), "", nil, "", "pending 0 0"},
		{"source not known", odd, catalog.ImageOnDisk{}, "", nil, "", "failed 1 0 never"},
		{"source still not known", odd, is(catalog.ImageFailed, 1), "", nil, "", ""},
		{"deleted, there", gone, is(catalog.ImageReady, 0), "sum", nil, "delete-image", "ready 0 100"},
		{"deleted, under way", gone, is(catalog.ImageInProgress, 0), "", job(plan.JobRunning, 7, 0), "cancel-import", "in-progress 0 7"},
		{"deleted, nothing there", gone, catalog.ImageOnDisk{}, "", nil, "", "gone 0 0"},
		{"deleted, gone", gone, is(catalog.ImageGone, 0), "", nil, "", ""},
		{"not wanted here any more", unwanted, is(catalog.ImageReady, 0), "sum", nil, "delete-image", "ready 0 100"},
		{"not wanted here, gone", unwanted, is(catalog.ImageReady, 0), "", nil, "", "none"},
		{"never wanted here, but there", unwanted, catalog.ImageOnDisk{}, "sum", nil, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newScene(t)
			s.put(catalog.ImageKey(catalog.Wanted, "i"), c.wanted)
			if c.was.State != "" {
				s.put(catalog.ImageKey(catalog.Observed, "i"), catalog.ImageObserved{Name: "i", ID: "id-i", Disks: map[string]catalog.ImageOnDisk{"n1-d": c.was}})
			}
			if c.file != "" {
				s.file(c.file)
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
				d, there := o.Disks["n1-d"]
				got = fmt.Sprintf("%s %d %d", d.State, d.Attempts, d.Progress)
				if wait := d.NextTry.Sub(now); d.State == catalog.ImageFailed && !d.NextTry.IsZero() {
					got += " " + wait.String()
				} else if d.State == catalog.ImageFailed {
					got += " never"
				}
				if !there {
					got = "none"
				}
			}
			if got != c.want {
				t.Errorf("records %q, want %q", got, c.want)
			}
			if c.name == "not yet" && !p.Wake.Equal(later.NextTry) {
				t.Errorf("wakes %v", p.Wake)
			}
		})
	}
}

// TestImageInUse: a copy that a volume stands on is not destroyed, whatever is wanted.
func TestImageInUse(t *testing.T) {
	for name, w := range map[string]catalog.ImageWanted{
		"deleted":      {Name: "i", ID: "id-i", Disks: []string{"n1-d"}, Deleted: &now},
		"not wanted":   {Name: "i", ID: "id-i"},
		"deleted, too": {Name: "i", ID: "id-i", Deleted: &now},
	} {
		for _, volume := range []func(*scene){func(s *scene) { s.want(fromImage) }, func(s *scene) { s.want(fromImage, tombstone) }} {
			s := newScene(t).file("x")
			s.put(catalog.ImageKey(catalog.Wanted, "i"), w).put(catalog.ImageKey(catalog.Observed, "i"),
				catalog.ImageObserved{Name: "i", ID: "id-i", Disks: map[string]catalog.ImageOnDisk{"n1-d": {State: catalog.ImageReady}}})
			volume(s)
			s.epoch(1).replica()
			for _, a := range plan.OnNode(s.in).Actions {
				if a.Verb() == "delete-image" {
					t.Errorf("%s: destroyed under a volume", name)
				}
			}
		}
	}
}

// TestCopiesThatDiffer: what an image is, its first copy says; another one that differs is failed for good.
func TestCopiesThatDiffer(t *testing.T) {
	s := newScene(t).file("other")
	s.put(catalog.ImageKey(catalog.Wanted, "i"), catalog.ImageWanted{Name: "i", ID: "id-i", SourceType: catalog.SourceFile, Disks: []string{"n1-d", "n2-d"}})
	s.put(catalog.ImageKey(catalog.Observed, "i"), catalog.ImageObserved{Name: "i", ID: "id-i", CurrentChecksum: "sum", Disks: map[string]catalog.ImageOnDisk{"n2-d": {State: catalog.ImageReady}}})
	o, _ := find[catalog.ImageObserved](plan.OnNode(s.in).Writes)
	if d := o.Disks["n1-d"]; d.State != catalog.ImageFailed || !d.NextTry.IsZero() || o.CurrentChecksum != "sum" || o.Disks["n2-d"].State != catalog.ImageReady {
		t.Errorf("%+v", o)
	}
}

// TestNodeObserved: what a node says of itself, and that it says it once.
func TestNodeObserved(t *testing.T) {
	s := newScene(t).want().epoch(1).replica().file("x")
	s.in.Found.Disks[0].Replicas = append(s.in.Found.Disks[0].Replicas, plan.FoundReplica{ReplicaID: "stray", Volume: "lost"})
	s.in.Found.Volumes = []plan.FoundVolume{{VolumeID: "stray", Volume: "lost"}}
	s.in.Found.Version, s.in.Found.PID = "1", 7
	node := func(p plan.NodePlan) (o catalog.NodeObserved, notes int) {
		for _, w := range p.Writes {
			if v, ok := w.Value.(catalog.NodeObserved); ok {
				return v, len(w.Notes)
			}
		}
		return o, 0
	}
	o, notes := node(plan.OnNode(s.in))
	if !o.Ready || o.Data.PID != 7 || len(o.Unrecorded) != 3 || notes != 3 || o.Disks["d"].ScheduledBytes != gib || o.Disks["d"].Replicas["rep-v"] != gib ||
		o.Disks["d"].Conditions[catalog.ConditionSchedulable].Status != catalog.ConditionTrue {
		t.Errorf("%+v, %d notes", o, notes)
	}
	s.put(catalog.NodeKey(catalog.Observed, "n1"), o)
	if o, _ := node(plan.OnNode(s.in)); o.Name != "" {
		t.Errorf("said twice: %+v", o)
	}
	s.in.Found = plan.Found{}
	o, _ = node(plan.OnNode(s.in))
	if o.Ready || o.Conditions[catalog.ConditionReady].Reason != "DataProcessAway" || o.Disks["d"].Conditions[catalog.ConditionReady].Status != catalog.ConditionUnknown || len(o.Unrecorded) != 3 {
		t.Errorf("while the data process is away: %+v", o)
	}
	if p := plan.OnNode(s.in); len(p.Actions) != 0 || volumeOf(p).Name != "" {
		t.Errorf("while the data process is away it does %q", verbs(p.Actions))
	}
}
