package dataplane

import (
	"context"
	"fmt"
	"time"

	"ashlar/internal/dataplane/client"
	"ashlar/internal/image"
	"ashlar/internal/job"
)

// kindExport is the Kind of a Job that writes an image file.
const kindExport = "export"

// ExportImage implements client.Service.
func (p *Process) ExportImage(_ context.Context, a client.ExportImage) (client.Job, error) {
	j, err := p.exportImage(a)
	if err != nil {
		return client.Job{}, forWire(fmt.Errorf("export to %s: %w", a.To, err))
	}
	p.board.bump()
	return j, nil
}

func (p *Process) exportImage(a client.ExportImage) (client.Job, error) {
	if !validID(a.ID) {
		return client.Job{}, fmt.Errorf("%w: id %.40q is not 32 hex digits", client.ErrInvalid, a.ID)
	}
	// One at a time, and none beside an import: of two that ask for the same, the second finds the first's job.
	p.importing.Lock()
	defer p.importing.Unlock()
	p.mu.Lock()
	was := p.jobByID[a.ID]
	p.mu.Unlock()
	if was != nil {
		if was.export == nil || *was.export != a {
			return client.Job{}, fmt.Errorf("%w: job %s is another", client.ErrExists, a.ID)
		}
		if j := p.describeJob(was); j.State != jobFailed {
			return j, nil
		}
	}
	run, err := job.Start(p.life, p.cfg.Job, job.Spec{Kind: job.KindExport, Export: &job.Export{Source: a.Source, Format: a.Format, Compress: a.Compress, To: a.To}})
	if err != nil {
		return client.Job{}, err
	}
	j := &importJob{export: &a, run: run}
	p.mu.Lock()
	p.jobByID[a.ID] = j
	p.mu.Unlock()
	p.wg.Go(func() { p.finishExport(j) })
	return p.describeJob(j), nil
}

// finishExport waits for an export; the work process has given the file its name, or left nothing.
func (p *Process) finishExport(j *importJob) {
	p.reportProgress(j)
	_, err := j.run.Wait()
	if err != nil {
		p.log.Warn("export failed", "source", image.DisplaySource(j.export.Source), "to", j.export.To, "error", err)
	}
	p.mu.Lock()
	j.ended, j.err = time.Now(), err
	p.mu.Unlock()
	p.forgetOldJobs()
	p.board.bump()
}
