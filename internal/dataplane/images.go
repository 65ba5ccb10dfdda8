package dataplane

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"ashlar/internal/dataplane/client"
	"ashlar/internal/disk"
	"ashlar/internal/image"
	"ashlar/internal/job"
	"ashlar/internal/replica"
	"ashlar/internal/replica/local"
)

// The states of an import.
const (
	jobRunning = "running"
	jobDone    = "done"
	jobFailed  = "failed"
)

// progressEvery is how often a moving import makes a new revision of the state.
const progressEvery = 500 * time.Millisecond

// maxJobs bounds how many ended imports are remembered; the oldest are forgotten first.
const maxJobs = 256

// maxWork bounds how many imports and exports have a process at one time, each with up to job.Config.MemoryBytes; the others wait, without progress. What goes over a stream does not count:
// its client waits, and what it uploads may be what another of them downloads.
const maxWork = 4

// importJob is an import or an export under way or ended. The last two fields are guarded by Process.mu.
type importJob struct {
	args   client.ImportImage
	export *client.ExportImage // nil: an import,
	copy   *client.CopyReplica // unless this is not: a copy of a replica, whose id and disk are in args
	run    running
	ended  time.Time // zero while it runs
	err    error
}

// ImportImage implements client.Service.
func (p *Process) ImportImage(_ context.Context, a client.ImportImage) (client.Job, error) {
	j, err := p.importImage(a)
	if err != nil {
		return client.Job{}, forWire(fmt.Errorf("import image %s: %w", a.Name, err))
	}
	p.board.bump()
	return j, nil
}

func (p *Process) importImage(a client.ImportImage) (client.Job, error) {
	if !validID(a.ImageID) || a.Name == "" {
		return client.Job{}, fmt.Errorf("%w: image %.40q, id %.40q", client.ErrInvalid, a.Name, a.ImageID)
	}
	d, err := p.disk(a.DiskID)
	if err != nil {
		return client.Job{}, err
	}
	// One at a time: of two that ask for the same image, the second finds the first's job.
	p.importing.Lock()
	defer p.importing.Unlock()
	if j, ok := p.job(a.ImageID); ok && j.State == jobRunning {
		if j.DiskID != a.DiskID || j.Kind != "" {
			return client.Job{}, fmt.Errorf("%w: it is being imported to disk %s", client.ErrExists, j.DiskID)
		}
		return j, nil
	}
	if i, ok := d.image(a.ImageID); ok {
		return client.Job{ID: a.ImageID, DiskID: a.DiskID, State: jobDone, DoneBytes: i.SizeBytes, TotalBytes: i.SizeBytes, Image: &i}, nil
	}
	if err := d.sweepImport(a.ImageID); err != nil {
		return client.Job{}, err
	}
	if err := d.room(); err != nil {
		return client.Job{}, err
	}
	tmp := path.Join(tmpDir, a.ImageID+"-"+newID()[:8]+".layer")
	run, err := p.startImport(d, a, tmp)
	if err != nil {
		return client.Job{}, err
	}
	j := &importJob{args: a, run: run}
	p.mu.Lock()
	p.jobByID[a.ImageID] = j
	p.mu.Unlock()
	p.wg.Go(func() { p.finishImport(d, j, tmp) })
	return p.describeJob(j), nil
}

// startImport starts what makes an image's layer at tmp: a work process, or, for an image that another disk of ours has, a copy.
func (p *Process) startImport(d *diskDir, a client.ImportImage, tmp string) (running, error) {
	if _, _, peer := peerOf(a.Source); peer {
		return p.startOwn(func(ctx context.Context, tell func(job.Progress)) error { return p.copyImage(ctx, d, a, tmp, tell) }), nil
	}
	return job.Start(p.life, p.cfg.Job, job.Spec{Kind: job.KindImport, Import: &job.Import{
		Source: a.Source, Checksum: a.Checksum, Root: d.path, Name: tmp,
		SizeBytes: a.SizeBytes, LayerID: a.ImageID, ImageID: a.ImageID, ImageName: a.Name, BootID: strings.ReplaceAll(p.boot, "-", ""),
	}})
}

// sweepImport removes what earlier imports of an image left in tmp, unless its writer still lives.
func (d *diskDir) sweepImport(imageID string) error {
	names, err := d.fs.List(tmpDir)
	if err != nil {
		return err
	}
	for _, n := range names {
		if strings.HasPrefix(n, imageID+"-") {
			if err := d.removeUnlocked(path.Join(tmpDir, n)); err != nil {
				return err
			}
		}
	}
	return nil
}

// finishImport waits for an import, and gives its layer its name: only then, whole and durable, is it an image.
func (p *Process) finishImport(d *diskDir, j *importJob, tmp string) {
	p.reportProgress(j)
	_, err := j.run.Wait()
	if err == nil {
		err = d.placeImage(j.args.ImageID, tmp)
	}
	if err != nil {
		p.log.Warn("import failed", "image", j.args.Name, "source", image.DisplaySource(j.args.Source), "error", err)
	}
	// A copy that failed may have left a file, and an orphan of a data process that was killed may have finished its layer meanwhile, for nobody.
	if err := d.sweepImport(j.args.ImageID); err != nil {
		p.log.Warn("an earlier import's file is left", "image", j.args.Name, "error", err)
	}
	p.mu.Lock()
	j.ended, j.err = time.Now(), err
	p.mu.Unlock()
	p.forgetOldJobs()
	p.board.bump()
}

// reportProgress makes revisions while an import moves, and returns when it has ended.
func (p *Process) reportProgress(j *importJob) {
	tick := time.NewTicker(progressEvery)
	defer tick.Stop()
	for last := (job.Progress{}); ; {
		select {
		case <-j.run.Done():
			return
		case <-tick.C:
			if now := j.run.Progress(); now != last {
				last = now
				p.board.bump()
			}
		}
	}
}

// placeImage moves a finished layer to where images are. Repeated after a crash in between it does the rest.
func (d *diskDir) placeImage(imageID, tmp string) error {
	d.change.Lock()
	defer d.change.Unlock()
	dir := path.Join(imagesDir, imageID)
	if err := d.fs.Mkdir(dir); err != nil {
		return err
	}
	if err := d.fs.SyncDir(imagesDir); err != nil {
		return err
	}
	if err := d.fs.Rename(tmp, imagePath(imageID)); err != nil {
		return err
	}
	if err := d.fs.SyncDir(dir); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.found.addImage(d.fs, imageID)
	return d.found.broken[imagePath(imageID)]
}

// job describes the import of an image, if there is or was one.
func (p *Process) job(imageID string) (client.Job, bool) {
	p.mu.Lock()
	j := p.jobByID[imageID]
	p.mu.Unlock()
	if j == nil {
		return client.Job{}, false
	}
	return p.describeJob(j), true
}

// jobs describes every import, by image id.
func (p *Process) jobs() []client.Job {
	p.mu.Lock()
	all := make([]*importJob, 0, len(p.jobByID))
	for _, j := range p.jobByID {
		all = append(all, j)
	}
	p.mu.Unlock()
	out := make([]client.Job, 0, len(all))
	for _, j := range all {
		out = append(out, p.describeJob(j))
	}
	sort.Slice(out, func(i, j int) bool { return out[i].ID < out[j].ID })
	return out
}

func (p *Process) describeJob(j *importJob) client.Job {
	p.mu.Lock()
	ended, err := !j.ended.IsZero(), j.err
	p.mu.Unlock()
	pr := j.run.Progress()
	out := client.Job{ID: j.args.ImageID, DiskID: j.args.DiskID, State: jobRunning, DoneBytes: pr.DoneBytes, TotalBytes: max(0, pr.TotalBytes), Percent: pr.Percent}
	if j.export != nil {
		out.ID, out.Kind = j.export.ID, kindExport
	}
	if j.copy != nil {
		out.Kind = kindCopy
	}
	switch {
	case ended && err == nil:
		out.State, out.Percent = jobDone, 100
		if d, e := p.disk(j.args.DiskID); e == nil {
			if i, ok := d.image(j.args.ImageID); ok {
				out.Image = &i
			}
		}
	case ended:
		err = forWire(err)
		out.State, out.Code, out.Error = jobFailed, client.CodeOf(err), err.Error()
	}
	return out
}

// forgetOldJobs keeps the number of ended imports bounded.
func (p *Process) forgetOldJobs() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.jobByID) > maxJobs {
		oldest := ""
		for id, j := range p.jobByID {
			if !j.ended.IsZero() && (oldest == "" || j.ended.Before(p.jobByID[oldest].ended)) {
				oldest = id
			}
		}
		if oldest == "" {
			return
		}
		delete(p.jobByID, oldest)
	}
}

// CancelImport implements client.Service.
func (p *Process) CancelImport(ctx context.Context, a client.CancelImport) error {
	p.importing.Lock()
	defer p.importing.Unlock()
	p.mu.Lock()
	j := p.jobByID[a.ImageID]
	p.mu.Unlock()
	if j == nil {
		return nil
	}
	j.run.Cancel()
	select {
	case <-j.run.Done():
	case <-ctx.Done():
		return forWire(ctx.Err())
	}
	p.mu.Lock()
	delete(p.jobByID, a.ImageID)
	p.mu.Unlock()
	p.board.bump()
	return nil
}

// DeleteImage implements client.Service.
func (p *Process) DeleteImage(_ context.Context, a client.DeleteImage) error {
	if err := p.deleteImage(a); err != nil {
		return forWire(fmt.Errorf("delete image %s: %w", a.ImageID, err))
	}
	p.board.bump()
	return nil
}

func (p *Process) deleteImage(a client.DeleteImage) error {
	if !validID(a.ImageID) {
		return fmt.Errorf("%w: ids are 32 hex digits", client.ErrInvalid)
	}
	d, err := p.disk(a.DiskID)
	if err != nil {
		return err
	}
	p.importing.Lock()
	defer p.importing.Unlock()
	if j, ok := p.job(a.ImageID); ok && j.State == jobRunning && j.DiskID == a.DiskID {
		return fmt.Errorf("%w: it is being imported", client.ErrInUse)
	}
	p.sources.mu.Lock()
	defer p.sources.mu.Unlock()
	if id, found := p.sources.ofImage(a.DiskID, a.ImageID); found {
		return fmt.Errorf("%w: source %s reads it", client.ErrInUse, id)
	}
	if err := d.deleteImage(a.ImageID); err != nil {
		return err
	}
	p.mu.Lock()
	delete(p.jobByID, a.ImageID)
	p.mu.Unlock()
	return nil
}

// deleteImage removes an image that no replica on the disk stands on. The name goes first, in one step.
func (d *diskDir) deleteImage(imageID string) error {
	d.change.Lock()
	defer d.change.Unlock()
	there, err := disk.Exists(d.fs, path.Join(imagesDir, imageID))
	if err != nil || !there {
		return err
	}
	if err := d.imageUnused(imageID); err != nil {
		return err
	}
	gone := path.Join(tmpDir, imageID+"-"+newID()[:8]+".deleted")
	if err := d.fs.Rename(path.Join(imagesDir, imageID), gone); err != nil {
		return err
	}
	if err := errors.Join(d.fs.SyncDir(imagesDir), d.fs.SyncDir(tmpDir)); err != nil {
		return err
	}
	d.mu.Lock()
	delete(d.found.images, imageID)
	delete(d.found.broken, imagePath(imageID))
	d.mu.Unlock()
	return d.removeTree(gone)
}

// imageUnused reads the headers of every replica on the disk, open or not. One that cannot be read may stand on the image, for all we know.
func (d *diskDir) imageUnused(imageID string) error {
	list, err := local.List(d.fs)
	if err != nil {
		return err
	}
	for _, f := range list {
		switch {
		case f.Chain.Base == replica.LayerID(imageID), f.BasePath == imagePath(imageID):
			return fmt.Errorf("%w: volume %s stands on it (%s)", client.ErrInUse, f.Volume, f.Dir)
		case f.Err != nil && !errors.Is(f.Err, fs.ErrNotExist):
			return fmt.Errorf("%w: %s cannot be read, and may stand on it: %w", client.ErrInUse, filepath.Base(f.Dir), f.Err)
		}
	}
	return nil
}
