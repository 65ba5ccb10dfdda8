package plan

import "ashlar/internal/catalog"

// Wish is what PlaceCopies seeks places for.
type Wish struct {
	Copies               int
	SizeBytes, NeedBytes int64
	ImageID              string
	NodeTags, DiskTags   []string
	API                  Window
}

// PlaceCopies places copies of something one after another, as the next version will: node/disk id of each, and why not more.
func PlaceCopies(v *View, wish Wish) (at, why []string) {
	p := newPlacer(v)
	p.api = wish.API
	w := want{sizeBytes: wish.SizeBytes, needBytes: wish.NeedBytes, imageID: wish.ImageID, nodeTags: wish.NodeTags, diskTags: wish.DiskTags}
	for range wish.Copies {
		s, reasons, ok := p.place(w)
		if !ok {
			return at, reasons
		}
		at = append(at, s.node+"/"+s.diskID)
		w.have = append(w.have, s)
		p.promise(s, w)
	}
	return at, nil
}

// ImageSource is where a copy of an image is fetched from.
func ImageSource(v *View, img, diskID string) string { return v.imageSource(img, diskID) }

// PromisedTo is what a disk is promised.
func PromisedTo(v *View, diskID string) int64 { return newPlacer(v).promised[diskID] }

// OneMember is a membership record with one member.
func OneMember(volumeID, replicaID, node string, epoch uint64) catalog.Membership {
	return catalog.Membership{VolumeID: volumeID, Epoch: epoch, Members: []catalog.MembershipMember{{ReplicaID: replicaID, Node: node, InSync: true}}}
}
