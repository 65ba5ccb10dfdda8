package plan

// CanPlaceTagged asks for a place with tags: selectors of volumes come with the cluster, the rule is here.
func CanPlaceTagged(v *View, tags []string) bool {
	_, _, ok := newPlacer(v).place(want{tags: tags})
	return ok
}
