package plan

import (
	"fmt"
	"hash/fnv"
	"slices"
	"strings"
	"time"

	"ashlar/internal/catalog"
)

// hopelessFor is how long a copy that failed for good stays as it is, so that people see why, before it makes room for a fresh one from another copy.
const hopelessFor = 5 * time.Minute

func (c *leader) image(name string) []Write {
	img := c.v.Images[name]
	group := "image/" + name
	switch {
	case !img.Wanted.Is():
		return []Write{{Group: group, Key: catalog.ImageKey(catalog.Observed, name), Was: img.Observed.Rev}}
	case img.Wanted.Value.Deleted != nil:
		c.liesImage(img)
		if c.users[img.Wanted.Value.ID] > 0 || !c.copiesGone(img) {
			return nil
		}
		ev := note(c.in.Now, catalog.Normal, catalog.KindImage, name, "Deleted")
		out := []Write{{Group: group, Key: catalog.ImageKey(catalog.Wanted, name), Was: img.Wanted.Rev, Notes: []catalog.EventRecord{ev}}}
		if img.Observed.Is() {
			out = append(out, Write{Group: group, Key: catalog.ImageKey(catalog.Observed, name), Was: img.Observed.Rev})
		}
		return out
	}
	s := c.newImageNow(img)
	s.forgetGone()
	s.follow()
	s.first()
	s.replenish()
	s.evict()
	s.giveUp()
	s.cleanUp()
	c.liesImage(Image{Wanted: Half[catalog.ImageWanted]{Value: s.w}, Observed: img.Observed})
	var out []Write
	if s.changed {
		out = append(out, Write{Group: group, Key: catalog.ImageKey(catalog.Wanted, name), Value: s.w, Was: img.Wanted.Rev, Notes: s.notes})
	}
	return append(out, s.observe()...)
}

// liesImage takes note of the disks an image lies on, also those it is to leave.
func (c *leader) liesImage(img Image) {
	on := map[string]bool{}
	for _, disk := range img.Wanted.Value.Disks {
		on[disk] = true
	}
	for disk, d := range img.Observed.Value.Disks {
		on[disk] = on[disk] || d.State != catalog.ImageGone
	}
	for disk, is := range on {
		c.named[disk] = c.named[disk] || is
		if l := c.left[c.disks[disk].node]; l != nil && is {
			l.images = append(l.images, imageOn{img.Wanted.Value.Name, disk})
		}
	}
}

// imageNow is an image while it is planned.
type imageNow struct {
	c       *leader
	img     Image
	w       catalog.ImageWanted // as it is to be
	o       catalog.ImageObserved
	least   int
	changed bool
	text    string // why it is on no disk, or cannot leave one
	blocked bool   // it cannot leave one
	notes   []catalog.EventRecord
}

func (c *leader) newImageNow(img Image) *imageNow {
	s := &imageNow{c: c, img: img, w: img.Wanted.Value, o: img.Observed.Value, least: max(1, img.Wanted.Value.MinCopies)}
	if s.o.ID != s.w.ID {
		s.o = catalog.ImageObserved{}
	}
	return s
}

func (s *imageNow) add(disk string) {
	if !slices.Contains(s.w.Disks, disk) {
		s.w.Disks, s.changed = append(slices.Clone(s.w.Disks), disk), true
	}
}

func (s *imageNow) remove(disk string) {
	s.w.Disks, s.changed = slices.DeleteFunc(slices.Clone(s.w.Disks), func(d string) bool { return d == disk }), true
	s.used(disk)
}

// used takes back that a disk's copy is unused.
func (s *imageNow) used(disk string) {
	if _, ok := s.w.UnusedSince[disk]; !ok {
		return
	}
	since := map[string]time.Time{}
	for d, t := range s.w.UnusedSince {
		if d != disk {
			since[d] = t
		}
	}
	s.w.UnusedSince, s.changed = since, true
}

func (s *imageNow) state(disk string) string { return s.o.Disks[disk].State }

// stands tells whether a replica on the disk stands on the image, also one that is to go.
func (s *imageNow) stands(disk string) bool { return s.c.stands[s.w.ID][disk] }

func (s *imageNow) at(disk string) spot { return spot{s.c.disks[disk].node, disk} }

func (s *imageNow) evicting(disk string) bool { return s.c.evicting(s.at(disk)) != "" }

// good tells whether a copy counts as one to rely on: ready, on a node that is up, and not to go.
func (s *imageNow) good(disk string) bool {
	return s.state(disk) == catalog.ImageReady && !s.evicting(disk) && s.c.v.Up(s.at(disk).node)
}

// goodBut counts the copies to rely on, one disk's apart.
func (s *imageNow) goodBut(but string) int {
	n := 0
	for _, d := range s.w.Disks {
		if d != but && s.good(d) {
			n++
		}
	}
	return n
}

// forgetGone takes out disks that were removed.
func (s *imageNow) forgetGone() {
	for _, d := range s.img.Wanted.Value.Disks {
		if s.c.diskGone(d) {
			s.remove(d)
		}
	}
}

// follow adds the disks where replicas of volumes from the image are, or are to be.
func (s *imageNow) follow() {
	for _, d := range sorted(s.c.stands[s.w.ID]) {
		if !s.c.diskGone(d) && s.c.needs(s.w.ID, d) {
			s.add(d)
		}
	}
}

// needs tells whether a replica that stays needs the image on the disk. (A dropped one needs it too, but not a new copy of it.)
func (c *leader) needs(imageID, disk string) bool { return c.stay[[2]string{imageID, disk}] }

// first finds the disk for the first copy. One that was not begun and is to leave its disk is no first copy.
func (s *imageNow) first() {
	for _, d := range slices.Clone(s.w.Disks) {
		idle := s.state(d) == "" || s.state(d) == catalog.ImagePending || s.state(d) == catalog.ImageFailed
		if idle && (s.evicting(d) || s.elsewhere(d)) && !s.stands(d) && s.goodBut(d) == 0 && s.o.CurrentChecksum == "" {
			if _, _, ok := s.c.p.place(s.firstWant()); ok {
				s.remove(d)
			}
		}
	}
	if len(s.w.Disks) > 0 {
		return
	}
	w := s.firstWant()
	at, why, ok := s.c.p.place(w)
	if !ok {
		s.text = strings.Join(why, "; ")
		return
	}
	s.add(at.diskID)
	s.c.p.promise(at, w)
}

// firstWant is what the first copy asks of a place: one that is made from a volume is made where that is open, or would be.
func (s *imageNow) firstWant() want {
	w := s.want(nil)
	w.only = s.volumeHome()
	return w
}

// volumeHome is the home of the volume that the image is made from; "" if it is made from none.
func (s *imageNow) volumeHome() string {
	if s.w.SourceType != catalog.SourceVolume {
		return ""
	}
	return s.c.v.Home(s.w.Parameters["volume-name"])
}

// elsewhere tells whether the volume that the image is made from is on another node than the disk.
func (s *imageNow) elsewhere(disk string) bool {
	home := s.volumeHome()
	return home != "" && home != s.at(disk).node
}

// want is what a copy beside others asks of a place.
func (s *imageNow) want(have []spot) want {
	w := want{have: have, not: map[string]bool{}, nodeTags: s.w.NodeSelector, diskTags: s.w.DiskSelector}
	w.sizeBytes = imageBytes(s.img)
	w.needBytes = w.sizeBytes
	for _, d := range s.w.Disks {
		w.not[d] = true
	}
	return w
}

// replenish adds one copy, once the first is ready and no other is on its way, while there are fewer than wanted. Those that failed or are to go do not count, but
// nothing is put beside them. As many as there are nodes will do.
func (s *imageNow) replenish() {
	count, ready, way := 0, false, false
	var have []spot
	for _, d := range s.w.Disks {
		st := s.state(d)
		ready = ready || st == catalog.ImageReady && s.c.v.Up(s.at(d).node)
		way = way || st == "" || st == catalog.ImagePending || st == catalog.ImageStarting || st == catalog.ImageInProgress
		if !s.evicting(d) {
			have = append(have, s.at(d))
			if st != catalog.ImageFailed {
				count++
			}
		}
	}
	if !ready || way || count >= s.least || s.c.v.number(catalog.SettingReplenish, catalog.SettingReplenishDefault) == 0 {
		return
	}
	w := s.want(have)
	if at, _, ok := s.c.p.place(w); ok {
		s.add(at.diskID)
		s.c.p.promise(at, w)
	}
}

// evict takes copies off disks that are to be emptied, once there is another to rely on and no replica stands on them.
func (s *imageNow) evict() {
	for _, d := range slices.Clone(s.w.Disks) {
		if !s.evicting(d) {
			continue
		}
		text := ""
		switch {
		case s.stands(d):
			text = "a volume's copy there stands on it"
		case s.goodBut(d) == 0:
			text = "there is no other good copy"
			s.blocked = true
			s.text = fmt.Sprintf("Failed to evict backing image copy on disk %s for now since there is no other healthy backing image copy", d)
		default:
			s.remove(d)
		}
		if l := s.c.left[s.at(d).node]; l != nil && text != "" {
			l.waits = append(l.waits, wait{d, "image", "image " + s.w.Name + ": " + text})
		}
	}
}

// giveUp takes copies away that failed for good, while there is a good one to make them from again.
func (s *imageNow) giveUp() {
	for _, d := range slices.Clone(s.w.Disks) {
		x := s.o.Disks[d]
		if x.State == catalog.ImageFailed && x.NextTry.IsZero() && s.c.in.Now.Sub(x.LastTransitionTime) >= hopelessFor && !s.stands(d) && s.goodBut(d) > 0 {
			s.remove(d)
		}
	}
}

// cleanUp takes copies away that no replica has stood on for a while, beyond those that are wanted.
func (s *imageNow) cleanUp() {
	after := time.Duration(s.c.v.number(catalog.SettingImageCleanup, catalog.SettingImageCleanupDefault)) * time.Minute
	now := s.c.in.Now.UTC().Truncate(time.Second)
	for _, d := range s.w.Disks {
		_, marked := s.w.UnusedSince[d]
		switch stands := s.stands(d); {
		case stands:
			s.used(d)
		case !marked && s.state(d) != "":
			since := map[string]time.Time{d: now}
			for d, t := range s.w.UnusedSince {
				since[d] = t
			}
			s.w.UnusedSince, s.changed = since, true
		}
	}
	for _, d := range s.oldestUnused() {
		if s.c.in.Now.Sub(s.w.UnusedSince[d]) >= after && s.goodBut(d) >= s.least {
			s.remove(d)
		}
	}
}

// oldestUnused lists the disks whose copies nobody uses: those that are not ready first, then by how long.
func (s *imageNow) oldestUnused() []string {
	var out []string
	for _, d := range s.w.Disks {
		if _, ok := s.w.UnusedSince[d]; ok && s.state(d) != catalog.ImageUnknown {
			out = append(out, d)
		}
	}
	slices.SortStableFunc(out, func(a, b string) int {
		if ra, rb := s.state(a) == catalog.ImageReady, s.state(b) == catalog.ImageReady; ra != rb {
			if rb {
				return -1
			}
			return 1
		}
		return s.w.UnusedSince[a].Compare(s.w.UnusedSince[b])
	})
	return out
}

// observe says why an image is on no disk at all, or cannot leave one, and forgets what was seen on disks that were removed.
func (s *imageNow) observe() []Write {
	var stale []string
	for d := range s.o.Disks {
		if !slices.Contains(s.w.Disks, d) && s.c.diskGone(d) {
			stale = append(stale, d)
		}
	}
	if s.o.Error == s.text && len(stale) == 0 {
		return nil
	}
	o := freshImage(s.img.Observed.Value, s.w)
	write := Write{Group: "image/" + s.w.Name, Key: catalog.ImageKey(catalog.Observed, s.w.Name), Was: s.img.Observed.Rev}
	if len(stale) == 0 {
		write.For = Tells
		if o.Error != "" && s.text != "" {
			write.For = Retell
		}
	}
	if s.blocked && s.text != o.Error {
		ev := note(s.c.in.Now, catalog.Normal, catalog.KindImage, s.w.Name, catalog.ReasonFailedDeleting)
		ev.Message = s.text
		write.Notes = append(write.Notes, ev)
	}
	o.Error = s.text
	for _, d := range stale {
		delete(o.Disks, d)
	}
	write.Value = o
	return []Write{write}
}

// imageSource is where the data process is to fetch a new copy of an image from: a copy that is ready on a node that is up, as peer://NODE/DISKID, not always the same one; "": from
// the image's own source. img is the image's name, diskID the disk that is to get the copy.
func (v *View) imageSource(img, diskID string) string {
	i := v.Images[img]
	var from []string
	for _, name := range sorted(v.Nodes) {
		n := v.Nodes[name].Observed.Value
		for _, disk := range sorted(n.Disks) {
			d := n.Disks[disk]
			ready := i.Observed.Value.ID == i.Wanted.Value.ID && i.Observed.Value.Disks[d.DiskID].State == catalog.ImageReady
			if ready && d.DiskID != diskID && v.Up(name) && d.Conditions[catalog.ConditionReady].Status == catalog.ConditionTrue {
				from = append(from, "peer://"+name+"/"+d.DiskID)
			}
		}
	}
	if len(from) == 0 {
		return ""
	}
	h := fnv.New32a()
	_, _ = h.Write([]byte(diskID)) // it cannot fail
	return from[int(h.Sum32()%uint32(len(from)))]
}

// coming tells whether a copy of an image is on its way.
func coming(img Image) bool {
	for _, d := range img.Wanted.Value.Disks {
		switch img.Observed.Value.Disks[d].State {
		case "", catalog.ImagePending, catalog.ImageStarting, catalog.ImageInProgress:
			return true
		}
	}
	return false
}

// freshImage is a copy of what was observed of this very image, or the beginning of it.
func freshImage(o catalog.ImageObserved, w catalog.ImageWanted) catalog.ImageObserved {
	if o.ID != w.ID {
		o = catalog.ImageObserved{Name: w.Name, ID: w.ID}
	}
	disks := map[string]catalog.ImageOnDisk{}
	for id, d := range o.Disks {
		disks[id] = d
	}
	o.Disks = disks
	return o
}

// copiesGone tells whether all copies of a tombstoned image are gone: their agents have said so, or the disks were removed.
func (c *leader) copiesGone(img Image) bool {
	w, o := img.Wanted.Value, img.Observed.Value
	for _, disk := range w.Disks {
		if c.diskGone(disk) {
			continue
		}
		if o.ID != w.ID || o.Disks[disk].State != catalog.ImageGone {
			return false
		}
	}
	return true
}
