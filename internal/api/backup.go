package api

import (
	"bytes"
	"net/http"

	"ashlar/internal/catalog"
)

// backupWays is GET /v1/catalogue/backup: all records as one document, which `ashlar cluster restore` reads.
func (h *Handler) backupWays() []way {
	return []way{{path: "/backup", about: "All records of the catalogue, as of one instant; docs/formats/catalog.md says how.", do: h.backup, media: []string{"application/json"}}}
}

// backup sends the document. It is made whole first: a failure is then told as one, and never a file that breaks off. Records are few kilobytes for each volume.
func (h *Handler) backup(c *call) (any, error) {
	if c.access.readOnly {
		return nil, Failure(CodeForbidden, "a backup of the catalogue holds what every record does: a token that may only read is not enough")
	}
	var document bytes.Buffer
	if _, err := catalog.Export(c.r.Context(), h.cfg.Catalog, &document); err != nil {
		return nil, err
	}
	c.w.Header().Set("Content-Type", "application/json")
	c.w.WriteHeader(http.StatusOK)
	_, err := document.WriteTo(c.w)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	return sent{}, nil
}
