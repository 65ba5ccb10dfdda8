package plan

import (
	"slices"
	"strings"

	"ashlar/internal/catalog"
)

func clusterImage(in ClusterInput, p *placer, name string) []Write {
	img := in.View.Images[name]
	group := "image/" + name
	switch {
	case !img.Wanted.Is():
		return []Write{{Group: group, Key: catalog.ImageKey(catalog.Observed, name), Was: img.Observed.Rev}}
	case img.Wanted.Value.Deleted != nil:
		if len(in.View.users(img.Wanted.Value.ID)) > 0 || !copiesGone(img) {
			return nil
		}
		ev := note(in.Now, catalog.Normal, catalog.KindImage, name, "Deleted")
		out := []Write{{Group: group, Key: catalog.ImageKey(catalog.Wanted, name), Was: img.Wanted.Rev, Notes: []catalog.EventRecord{ev}}}
		if img.Observed.Is() {
			out = append(out, Write{Group: group, Key: catalog.ImageKey(catalog.Observed, name), Was: img.Observed.Rev})
		}
		return out
	}
	w, why := placeImage(in, p, img.Wanted.Value)
	if len(w.Disks) > len(img.Wanted.Value.Disks) {
		return []Write{{Group: group, Key: catalog.ImageKey(catalog.Wanted, name), Value: w, Was: img.Wanted.Rev}}
	}
	return noDisk(in, img, why)
}

// placeImage adds the disks where replicas of volumes from the image are, and then disks of further nodes up to the wanted number. As many as there are will do.
func placeImage(in ClusterInput, p *placer, w catalog.ImageWanted) (catalog.ImageWanted, []string) {
	w.Disks = slices.Clone(w.Disks)
	add := func(disk string) {
		if !slices.Contains(w.Disks, disk) {
			w.Disks = append(w.Disks, disk)
		}
	}
	for _, name := range sorted(in.View.Volumes) {
		if v := in.View.Volumes[name].Wanted.Value; v.ImageID == w.ID && v.Deleted == nil {
			for _, r := range v.Replicas {
				add(r.DiskID)
			}
		}
	}
	taken := map[string]bool{}
	for name, n := range in.View.Nodes {
		for _, d := range n.Observed.Value.Disks {
			if slices.Contains(w.Disks, d.DiskID) {
				taken[name] = true
			}
		}
	}
	for len(w.Disks) < max(1, w.MinCopies) {
		s, why, ok := p.place(want{notNodes: taken})
		if !ok {
			return w, why
		}
		add(s.diskID)
		taken[s.node] = true
	}
	return w, nil
}

// noDisk says why an image is on no disk at all.
func noDisk(in ClusterInput, img Image, why []string) []Write {
	w, o := img.Wanted.Value, img.Observed.Value
	text := strings.Join(why, "; ")
	if len(w.Disks) > 0 {
		text = ""
	}
	if o.ID == w.ID && o.Error == text || o.ID != w.ID && text == "" {
		return nil
	}
	o = freshImage(o, w)
	o.Error = text
	return []Write{{Group: "image/" + w.Name, Key: catalog.ImageKey(catalog.Observed, w.Name), Value: o, Was: img.Observed.Rev}}
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

// users names the volumes that stand on an image, those included that are being deleted: their bytes are there until their record is not.
func (v *View) users(imageID string) []string {
	var out []string
	for _, name := range sorted(v.Volumes) {
		if w := v.Volumes[name].Wanted; w.Is() && w.Value.ImageID == imageID {
			out = append(out, name)
		}
	}
	return out
}

// copiesGone tells whether the agents have said of every disk of a tombstoned image that it is not there any more.
func copiesGone(img Image) bool {
	w, o := img.Wanted.Value, img.Observed.Value
	for _, disk := range w.Disks {
		if o.ID != w.ID || o.Disks[disk].State != catalog.ImageGone {
			return false
		}
	}
	return true
}
