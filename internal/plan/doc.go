// Package plan decides. From a complete picture (View: the records; Found: what a data process has) and a time it says what should happen next, and
// nothing else: no I/O, no clock, no goroutine, no memory. Cluster is what the leader does (control carries it out): placement, first records, the end of
// what was deleted. OnNode is what one node does and says about itself (agent carries it out). Everything they say can be done twice, and
// between any two of the things they say there may be a crash.
//
// One file per noun: volume.go (cluster) with volume_step.go (node) and volume_observe.go, image.go with image_step.go, node.go, operation.go, event.go;
// place.go is placement. view.go and found.go are the picture. Read next: control, agent.
package plan
