package dataplane

import (
	"context"
	"fmt"

	"ashlar/internal/dataplane/client"
)

// errUnbuilt answers verbs whose turn has not come.
func errUnbuilt(verb string) error {
	return fmt.Errorf("%s: %w: this build does not have it", verb, client.ErrInvalid)
}

// ExportImage implements client.Service.
func (p *Process) ExportImage(context.Context, client.ExportImage) (client.Job, error) {
	return client.Job{}, errUnbuilt("export image")
}
