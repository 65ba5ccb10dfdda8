package layer

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"

	"ashlar/internal/block"
)

// ID names a layer: 32 lower-case hex digits, random, never used again.
type ID string

// NewID returns a fresh ID.
func NewID() ID {
	var b [16]byte
	rand.Read(b[:]) //nolint:errcheck // never fails: crypto/rand ends the program instead
	return ID(hex.EncodeToString(b[:]))
}

// ParseID checks that s is an ID.
func ParseID(s string) (ID, error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != 16 || hex.EncodeToString(b) != s {
		return "", fmt.Errorf("layer id %q is not 32 lower-case hex digits", s)
	}
	return ID(s), nil
}

// Kind says whose a layer is.
type Kind string

// The kinds of layer.
const (
	KindVolume Kind = "volume"
	KindImage  Kind = "image"
)

// State says what may be done with a layer.
type State string

// The states of a layer. building → head → sealed, or building → sealed; never back.
const (
	// StateBuilding: being filled by its maker (an import, a merge). Whoever else finds it may delete it.
	StateBuilding State = "building"
	// StateHead: takes writes.
	StateHead State = "head"
	// StateSealed: its units never change, but for pruning.
	StateSealed State = "sealed"
)

// Meta is a layer's changeable header, section 4 of docs/formats/layer.md. Fields this version does not know are kept.
type Meta struct {
	ID      ID    `json:"id"`
	Parent  ID    `json:"parent,omitempty"`
	Kind    Kind  `json:"kind"`
	State   State `json:"state"`
	Settled bool  `json:"settled,omitempty"` // sealed, map complete, log empty and freed
	Sums    bool  `json:"sums,omitempty"`    // the checksums are complete: every read is compared
	Failed  bool  `json:"failed,omitempty"`  // a flush failed; opening needs salvage
	// DataBytes is 4096 times the number of Data units; only in a settled layer, and not while it is pruned. Nil: to be counted.
	DataBytes *int64    `json:"dataBytes,omitempty"`
	Pruned    bool      `json:"pruned,omitempty"` // units that a younger layer hides were taken away: it reads as nothing of its own any more
	VolumeID  string    `json:"volumeID,omitempty"`
	Volume    string    `json:"volume,omitempty"` // the volume's name when the layer was made
	ReplicaID string    `json:"replicaID,omitempty"`
	Snapshot  *Snapshot `json:"snapshot,omitempty"`
	Image     *Image    `json:"image,omitempty"`
	Created   time.Time `json:"created"`

	unknown map[string]json.RawMessage
}

// Snapshot is what is said of a sealed layer of a volume.
type Snapshot struct {
	Name        string            `json:"name"`
	UserCreated bool              `json:"userCreated"`
	Removed     bool              `json:"removed"`
	Created     time.Time         `json:"created"`
	Labels      map[string]string `json:"labels,omitempty"`
}

// Image says which image a layer of KindImage holds, or, with Name and ID only, which one lies below a volume's lowest layer.
type Image struct {
	Name       string `json:"name"`
	ID         string `json:"id"`
	Format     string `json:"format,omitempty"`
	Source     string `json:"source,omitempty"`
	FileBytes  int64  `json:"fileBytes,omitempty"`
	FileSHA512 string `json:"fileSHA512,omitempty"`
	Digest     string `json:"digest,omitempty"`
}

// plainMeta is Meta without its methods, so that encoding does not recurse.
type plainMeta Meta

// MarshalJSON writes the known fields over the unknown ones that were read.
func (m Meta) MarshalJSON() ([]byte, error) {
	known, err := json.Marshal(plainMeta(m))
	if err != nil || len(m.unknown) == 0 {
		return known, err
	}
	all := make(map[string]json.RawMessage, len(m.unknown)+16)
	for k, v := range m.unknown {
		all[k] = v
	}
	if err := json.Unmarshal(known, &all); err != nil {
		return nil, err
	}
	return json.Marshal(all)
}

// UnmarshalJSON keeps what it does not know.
func (m *Meta) UnmarshalJSON(b []byte) error {
	var p plainMeta
	if err := json.Unmarshal(b, &p); err != nil {
		return err
	}
	var all map[string]json.RawMessage
	if err := json.Unmarshal(b, &all); err != nil {
		return err
	}
	for _, k := range []string{"id", "parent", "kind", "state", "settled", "sums", "failed", "dataBytes", "pruned", "volumeID", "volume", "replicaID", "snapshot", "image", "created"} {
		delete(all, k)
	}
	if len(all) > 0 {
		p.unknown = all
	}
	*m = Meta(p)
	return nil
}

// check says whether m can be a header.
func (m *Meta) check() error {
	if _, err := ParseID(string(m.ID)); err != nil {
		return fmt.Errorf("%w: %w", block.ErrCorrupt, err)
	}
	if m.Parent != "" {
		if _, err := ParseID(string(m.Parent)); err != nil {
			return fmt.Errorf("parent: %w: %w", block.ErrCorrupt, err)
		}
	}
	if m.Kind != KindVolume && m.Kind != KindImage {
		return fmt.Errorf("kind %q: %w", m.Kind, block.ErrCorrupt)
	}
	switch m.State {
	case StateBuilding, StateHead:
		if m.Settled || m.Sums {
			return fmt.Errorf("state %q cannot be settled: %w", m.State, block.ErrCorrupt)
		}
	case StateSealed:
		if m.Sums && !m.Settled {
			return fmt.Errorf("sums without settled: %w", block.ErrCorrupt)
		}
		if m.DataBytes != nil && (*m.DataBytes < 0 || *m.DataBytes > MaxSizeBytes || *m.DataBytes%unitBytes != 0) {
			return fmt.Errorf("%d bytes of data: %w", *m.DataBytes, block.ErrCorrupt)
		}
	default:
		return fmt.Errorf("state %q: %w", m.State, block.ErrCorrupt)
	}
	return nil
}

// clone returns a copy that shares nothing a caller could change.
func (m *Meta) clone() Meta {
	c := *m
	if m.Snapshot != nil {
		s := *m.Snapshot
		if s.Labels != nil {
			s.Labels = make(map[string]string, len(m.Snapshot.Labels))
			for k, v := range m.Snapshot.Labels {
				s.Labels[k] = v
			}
		}
		c.Snapshot = &s
	}
	if m.Image != nil {
		i := *m.Image
		c.Image = &i
	}
	return c
}
