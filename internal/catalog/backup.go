package catalog

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"
)

var (
	// ErrNotEmpty: the catalogue to restore into has records that are not the backup's. Nothing was changed.
	ErrNotEmpty = errors.New("the catalogue is not empty")
	// ErrBackup: what was read is no whole backup of a catalogue. Nothing was changed.
	ErrBackup = errors.New("not a backup of a catalogue")
	// ErrNewer: the backup was made by a later version. Nothing was changed.
	ErrNewer = errors.New("made by a later version")
)

// backupFormat is the version of the document (docs/formats/catalog.md, section 6).
const backupFormat = 1

// backup is all records of a catalogue in one JSON document. Count is written after the records, so that a file that broke off is no backup.
type backup struct {
	Backup    int            `json:"ashlarCatalogueBackup"`
	Format    int            `json:"format"` // of the records
	ClusterID string         `json:"clusterID"`
	Revision  Rev            `json:"revision"`
	Time      time.Time      `json:"time"`
	Records   []backupRecord `json:"records"`
	Count     int            `json:"count"`
}

// backupRecord is one record, its value as it is stored.
type backupRecord struct {
	Key   string          `json:"key"`
	Rev   Rev             `json:"rev"`
	Value json.RawMessage `json:"value"`
}

// Backed says what a backup holds, or a restoration brought back.
type Backed struct {
	ClusterID string    `json:"clusterID"`
	Revision  Rev       `json:"revision"` // of the catalogue when the backup was made
	Time      time.Time `json:"time"`     // when
	Records   int       `json:"records"`
	// Operations are those that a restoration left out.
	Operations int `json:"operations,omitempty"`
}

// Export writes every record of the catalogue, as of one instant, as one JSON document, one record a line. It holds no secret but what people wrote into records
// (a password in an image's URL): of tokens there are only hashes. Keep it readable by its owner alone. ErrNotFound without a cluster record, ErrUnreachable, and what w says.
func Export(ctx context.Context, c Catalog, w io.Writer) (Backed, error) {
	es, rev, err := c.List(ctx, "")
	if err != nil {
		return Backed{}, fmt.Errorf("back up the catalogue: %w", err)
	}
	var cluster Item[Cluster]
	for _, e := range es {
		if e.Key == ClusterKey() {
			if cluster, err = Decode[Cluster](e); err != nil {
				return Backed{}, fmt.Errorf("back up the catalogue: %w", err)
			}
		}
	}
	if cluster.Rev == 0 {
		return Backed{}, fmt.Errorf("back up the catalogue: no cluster record: %w", ErrNotFound)
	}
	b := Backed{ClusterID: cluster.Value.ID, Revision: rev, Time: time.Now().UTC(), Records: len(es)}
	if err := b.write(w, cluster.Value.Format, es); err != nil {
		return Backed{}, fmt.Errorf("back up the catalogue: %w", err)
	}
	return b, nil
}

func (b Backed) write(w io.Writer, format int, es []Entry) error {
	out := bufio.NewWriter(w)
	head, err := json.Marshal(backup{Backup: backupFormat, Format: format, ClusterID: b.ClusterID, Revision: b.Revision, Time: b.Time})
	if err != nil {
		return err
	}
	head, _, _ = bytes.Cut(head, []byte(`"records":`))
	fmt.Fprintf(out, "%s\"records\":[", head) // a bufio.Writer keeps its error for Flush
	enc := json.NewEncoder(out)               // it ends each record's line
	enc.SetEscapeHTML(false)
	for i, e := range es {
		out.WriteString([]string{"\n", ","}[min(i, 1)])
		if err := enc.Encode(backupRecord{Key: e.Key.String(), Rev: e.Rev, Value: e.Value}); err != nil {
			return err
		}
	}
	fmt.Fprintf(out, "],\"count\":%d}\n", len(es))
	return out.Flush()
}

// Restore puts the records of a backup into a catalogue that has none, or only some of these very records: so one that was interrupted can be repeated. Operations
// are left out: what was asked for before the backup may have been carried out since, and must not be done again; so is what is there only while somebody holds it. Nothing else may use the catalogue
// meanwhile. A volume that was opened after the backup is then refused (its replicas know more: design, invariant 14) until `ashlar recover`. ErrBackup, ErrNewer,
// ErrNotEmpty, ErrUnreachable (repeat it).
func Restore(ctx context.Context, c Catalog, r io.Reader) (Backed, error) {
	b, err := readBackup(r)
	if err != nil {
		return Backed{}, fmt.Errorf("restore the catalogue: %w", err)
	}
	out := Backed{ClusterID: b.ClusterID, Revision: b.Revision, Time: b.Time}
	missing, err := b.missing(ctx, c)
	if err != nil {
		return Backed{}, fmt.Errorf("restore the catalogue: %w", err)
	}
	for _, e := range missing {
		if _, err := c.Put(ctx, e.Key, e.Value, 0); err != nil {
			return out, fmt.Errorf("restore the catalogue: write %s: %w", e.Key, err)
		}
	}
	for _, r := range b.Records {
		switch k, _ := ParseKey(r.Key); {
		case k.Kind == KindOperation:
			out.Operations++
		case !k.held():
			out.Records++
		}
	}
	return out, nil
}

// readBackup reads a whole document; every record in it can be put.
func readBackup(r io.Reader) (backup, error) {
	var b backup
	dec := json.NewDecoder(r)
	if err := dec.Decode(&b); err != nil {
		return b, fmt.Errorf("%w: %w", ErrBackup, err)
	}
	switch {
	case b.Backup == 0 || b.ClusterID == "" || b.Count != len(b.Records):
		return b, fmt.Errorf("%w: version %d, cluster %.40q, %d of %d records", ErrBackup, b.Backup, b.ClusterID, len(b.Records), b.Count)
	case b.Backup > backupFormat || b.Format > Format:
		return b, fmt.Errorf("%w: document %d of format %d, this build reads up to %d of format %d", ErrNewer, b.Backup, b.Format, backupFormat, Format)
	}
	seen := map[string]bool{}
	for _, rec := range b.Records {
		k, err := ParseKey(rec.Key)
		if err == nil {
			err = CheckRecord(k, rec.Value)
		}
		if err == nil && seen[rec.Key] {
			err = fmt.Errorf("%s is there twice", rec.Key)
		}
		if err != nil {
			return b, fmt.Errorf("%w: %w", ErrBackup, err)
		}
		seen[rec.Key] = true
	}
	if !seen[ClusterKey().String()] {
		return b, fmt.Errorf("%w: no cluster record", ErrBackup)
	}
	return b, nil
}

// missing are the entries that are still to be put: the cluster's first, so that nobody takes a half restored catalogue for a new one, the rest in the order in
// which they were written.
func (b backup) missing(ctx context.Context, c Catalog) ([]Entry, error) {
	es, _, err := c.List(ctx, "")
	if err != nil {
		return nil, err
	}
	there := map[string][]byte{}
	for _, e := range es {
		there[e.Key.String()] = e.Value
	}
	var out []Entry
	for _, rec := range b.Records {
		k, _ := ParseKey(rec.Key)
		if k.Kind == KindOperation || k.held() {
			continue
		}
		value, ok := there[rec.Key]
		if ok && !bytes.Equal(value, rec.Value) {
			return nil, fmt.Errorf("%w: it has another %s", ErrNotEmpty, rec.Key)
		}
		if delete(there, rec.Key); !ok {
			out = append(out, Entry{Key: k, Value: rec.Value, Rev: rec.Rev})
		}
	}
	for key := range there {
		return nil, fmt.Errorf("%w: it has %s", ErrNotEmpty, key)
	}
	slices.SortStableFunc(out, func(a, b Entry) int {
		first := func(e Entry) int {
			if e.Key == ClusterKey() {
				return 0
			}
			return 1
		}
		return cmp.Or(cmp.Compare(first(a), first(b)), cmp.Compare(a.Rev, b.Rev))
	})
	return out, nil
}
