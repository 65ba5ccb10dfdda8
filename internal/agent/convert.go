package agent

import (
	"context"
	"errors"

	"ashlar/internal/catalog"
	"ashlar/internal/dataplane/client"
	"ashlar/internal/plan"
)

// This file is the one place where the data process's words become the catalogue's.

// catalogCode is the catalogue's code for an error of the data process, or of the catalogue; "" if it may well succeed the next time.
func catalogCode(err error) string {
	for _, c := range []error{catalog.ErrUnreachable, catalog.ErrConflict, context.Canceled, context.DeadlineExceeded, ErrAway} {
		if errors.Is(err, c) {
			return ""
		}
	}
	return codeOfWire(client.CodeOf(err))
}

func codeOfWire(c client.Code) string {
	switch c {
	case "", client.CodeUnreachable, client.CodeCancelled, client.CodeInUse:
		return ""
	case client.CodeNotFound:
		return catalog.CodeNotFound
	case client.CodeExists:
		return catalog.CodeExists
	case client.CodeInvalid, client.CodeFormat, client.CodeVersion, client.CodeForeignDisk:
		return catalog.CodeInvalid
	case client.CodeConflict, client.CodeFenced:
		return catalog.CodeConflict
	case client.CodeNoSpace:
		return catalog.CodeNoSpace
	case client.CodeCorrupt, client.CodeChecksum:
		return catalog.CodeCorrupt
	case client.CodeFailed:
		return catalog.CodeFailed
	case client.CodeSalvage:
		return catalog.CodeNeedsSalvage
	case client.CodeStale:
		return catalog.CodeStale
	case client.CodeFrontend:
		return catalog.CodeFrontend
	}
	return catalog.CodeInternal
}

// patience says whether an import that failed so is worth another try.
func patience(c client.Code) plan.Patience {
	switch c {
	case client.CodeChecksum:
		return plan.Limited
	case client.CodeFormat, client.CodeInvalid:
		return plan.Final
	}
	return plan.Transient
}

// The kinds of a client.Job that are no imports.
const (
	jobExport = "export"
	jobCopy   = "copy"
)

// found is a data process's state as plan sees it.
func found(st client.State) plan.Found {
	f := plan.Found{Known: true, BootID: st.Hello.BootID, Version: st.Hello.Version, PID: st.Hello.PID, Started: st.Hello.Started.UTC(), Network: plan.Network(st.Network)}
	f.API, f.Cluster = st.Hello.APICurrent, neighbours(st.Cluster)
	for _, d := range st.Disks {
		f.Disks = append(f.Disks, foundDisk(d))
	}
	for _, v := range st.Volumes {
		f.Volumes = append(f.Volumes, foundVolume(v))
	}
	for _, j := range st.Jobs {
		f.Jobs = append(f.Jobs, plan.FoundJob{
			ID: j.ID, Export: j.Kind == jobExport, Copy: j.Kind == jobCopy, DiskID: j.DiskID, State: j.State, DoneBytes: j.DoneBytes, Percent: j.Percent, Failure: patience(j.Code),
			Code: codeOfWire(j.Code), Error: j.Error,
		})
	}
	return f
}

func foundDisk(d client.DiskStatus) plan.FoundDisk {
	f := plan.FoundDisk{DiskID: d.DiskID, Path: d.Path, Error: d.Error, TotalBytes: d.TotalBytes, FreeBytes: d.FreeBytes}
	for _, r := range d.Replicas {
		f.Replicas = append(f.Replicas, plan.FoundReplica{
			ReplicaID: r.ReplicaID, VolumeID: r.VolumeID, Volume: r.Volume, DataPath: r.DataPath, Failed: r.Failed,
			SizeBytes: r.SizeBytes, AllocatedBytes: r.AllocatedBytes, Open: r.Open,
		})
	}
	for _, i := range d.Images {
		f.Images = append(f.Images, plan.FoundImage{
			ImageID: i.ImageID, Name: i.Name, SHA512: i.SHA512, Digest: i.Digest, Format: i.Format,
			SizeBytes: i.SizeBytes, VirtualSizeBytes: i.VirtualSizeBytes, AllocatedBytes: i.AllocatedBytes,
		})
	}
	return f
}

func foundVolume(v client.VolumeStatus) plan.FoundVolume {
	f := plan.FoundVolume{
		VolumeID: v.VolumeID, Volume: v.Volume, ReplicaID: v.ReplicaID, DiskID: v.DiskID, Frontend: v.Frontend, Endpoint: v.Endpoint, TCPEndpoint: v.TCPEndpoint,
		SizeBytes: v.SizeBytes, Epoch: v.Epoch, State: v.State, Code: codeOfWire(v.Code), Error: v.Error,
		Space: catalog.Space(v.Space), Limits: catalog.Limits(v.Limits), Away: v.Away,
	}
	for _, l := range v.Layers {
		f.Layers = append(f.Layers, plan.FoundLayer{
			ID: l.ID, Parent: l.Parent, Snapshot: l.Snapshot, Head: l.Head, UserCreated: l.UserCreated, Removed: l.Removed, Created: l.Created,
			DataBytes: l.DataBytes, Space: catalog.Space(l.Space), Labels: l.Labels,
		})
	}
	return f
}

// neighbours is what a data process was told of its cluster, and clusterOf what it is told.
func neighbours(c client.Cluster) plan.Neighbours {
	n := plan.Neighbours{ClusterID: c.ClusterID, Node: c.Node, Listen: c.Listen, CertFile: c.CertFile, KeyFile: c.KeyFile, CAFile: c.CAFile}
	for _, p := range c.Peers {
		n.Peers = append(n.Peers, plan.Neighbour(p))
	}
	return n
}

func clusterOf(n plan.Neighbours) client.Cluster {
	c := client.Cluster{ClusterID: n.ClusterID, Node: n.Node, Listen: n.Listen, CertFile: n.CertFile, KeyFile: n.KeyFile, CAFile: n.CAFile}
	for _, p := range n.Peers {
		c.Peers = append(c.Peers, client.Peer(p))
	}
	return c
}
