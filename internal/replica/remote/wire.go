package remote

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"

	"ashlar/internal/block"
	"ashlar/internal/nbd"
	"ashlar/internal/replica"
)

// The first line of a connection says what follows (docs/formats/remote.md, section 1). Both have the same length, so that one read takes exactly that.
const (
	preambleBytes = "ashlar-bytes/1\n"
	preambleVerbs = "ashlar-verbs/1\n"
)

// Limits of what a peer may say.
const (
	maxQuestionBytes = 4 << 20
	maxAnswerBytes   = 64 << 20
	maxMessageBytes  = 1 << 10
	maxRanges        = 1 << 16
	maxIDBytes       = 128
)

// Code is a further error that crosses the wire as a word.
type Code struct {
	Word string
	Err  error
}

// errnoBase is where the Errnos between nodes begin: the base with one bit for each sentinel that the error is.
const errnoBase = nbd.Errno(0x41530000)

// codes are the errors that cross the wire; bit is what stands for it in an Errno, 0 for what no read or write answers.
var codes = []struct {
	word string
	bit  nbd.Errno
	err  error
}{
	{"fenced", 1 << 0, block.ErrFenced},
	{"closed", 1 << 1, block.ErrClosed},
	{"no-space", 1 << 2, block.ErrNoSpace},
	{"failed", 1 << 3, block.ErrFailed},
	{"corrupt", 1 << 4, block.ErrCorrupt},
	{"align", 1 << 5, block.ErrAlign},
	{"range", 1 << 6, block.ErrRange},
	{"read-only", 1 << 7, block.ErrReadOnly},
	{"stale", 0, replica.ErrStale},
	{"no-snapshot", 1 << 8, replica.ErrNoSnapshot},
	{"pruned", 1 << 9, replica.ErrPruned},
	{"not-below", 0, replica.ErrNotBelow},
	{"chain", 0, replica.ErrChain},
	{"unknown", 0, ErrUnknown},
	{"busy", 0, ErrBusy},
}

// errFar is what has no word of its own.
var errFar = errors.New("the other node reports an error")

// farError is an error of the other node, and every sentinel that it is there.
type farError struct {
	message string
	errs    []error
}

// Error implements error.
func (e *farError) Error() string {
	if e.message == "" {
		return errors.Join(e.errs...).Error()
	}
	return "the other node says: " + e.message
}

// Unwrap returns the sentinels.
func (e *farError) Unwrap() []error { return e.errs }

// errnoOf names err for the client of an export of ours.
func errnoOf(err error) nbd.Errno {
	e := errnoBase
	for _, c := range codes {
		if c.bit != 0 && errors.Is(err, c.err) {
			e |= c.bit
		}
	}
	return e
}

// fromErrno is the inverse of errnoOf; false if e is not of ours.
func fromErrno(e nbd.Errno) (*farError, bool) {
	if e&0xffff0000 != errnoBase {
		return nil, false
	}
	far := &farError{}
	for _, c := range codes {
		if c.bit != 0 && e&c.bit != 0 {
			far.errs = append(far.errs, c.err)
		}
	}
	if far.errs == nil {
		far.errs = []error{errFar}
	}
	return far, true
}

// wordsOf names err in an answer.
func wordsOf(err error, more []Code) []string {
	words := []string{}
	for _, c := range codes {
		if errors.Is(err, c.err) {
			words = append(words, c.word)
		}
	}
	for _, c := range more {
		if errors.Is(err, c.Err) {
			words = append(words, c.Word)
		}
	}
	return words
}

// fromWords is the inverse of wordsOf; words that are not known are left out.
func fromWords(f failure, more []Code) *farError {
	far := &farError{message: f.Message}
	for _, word := range f.Words {
		for _, c := range codes {
			if c.word == word {
				far.errs = append(far.errs, c.err)
			}
		}
		for _, c := range more {
			if c.Word == word {
				far.errs = append(far.errs, c.Err)
			}
		}
	}
	if far.errs == nil {
		far.errs = []error{errFar}
	}
	return far
}

// question is the body of a verb; which fields it has says the verb (docs/formats/remote.md, section 3).
type question struct {
	Replica  string                `json:"replica,omitempty"`
	Writer   *replica.Writer       `json:"writer,omitempty"`
	Record   *replica.Record       `json:"record,omitempty"`
	Change   *replica.Change       `json:"change,omitempty"`
	Layer    replica.LayerID       `json:"layer,omitempty"`
	Snapshot *replica.SnapshotMeta `json:"snapshot,omitempty"`
	Diff     *diff                 `json:"diff,omitempty"`
	Token    string                `json:"token,omitempty"`
	Source   string                `json:"source,omitempty"`
}

type diff struct {
	From replica.LayerID `json:"from,omitempty"`
	To   replica.LayerID `json:"to,omitempty"`
	Off  int64           `json:"off"`
	Max  int             `json:"max"`
}

// line of an answer: any number that tell how far it is, or only that the peer is there, and then the one with the answer.
type answerLine struct {
	Done   int64   `json:"done,omitempty"`
	Total  int64   `json:"total,omitempty"`
	Answer *answer `json:"answer,omitempty"`
}

// answer has Failure, or what the verb returns.
type answer struct {
	Failure *failure        `json:"failure,omitempty"`
	Status  *replica.Status `json:"status,omitempty"` // status, fence
	Usage   *replica.Usage  `json:"usage,omitempty"`
	Ranges  []replica.Range `json:"ranges,omitempty"`
	Next    int64           `json:"next,omitempty"`
	Info    json.RawMessage `json:"info,omitempty"`      // source
	Size    int64           `json:"sizeBytes,omitempty"` // source, fence
}

// failure is an error as it crosses the wire.
type failure struct {
	Words   []string        `json:"words"`
	Message string          `json:"message"`        // for people
	Held    *replica.Writer `json:"held,omitempty"` // fence, refused: the newest writer the replica knows of
}

func failureOf(err error, more []Code) *failure {
	text := err.Error()
	if len(text) > maxMessageBytes {
		text = strings.ToValidUTF8(text[:maxMessageBytes], "")
	}
	return &failure{Words: wordsOf(err, more), Message: text}
}

// The kinds of export names.
const (
	kindReplica  = "replica"
	kindSnapshot = "snapshot"
	kindSource   = "source"
)

// exportName is an export name taken apart.
type exportName struct {
	kind    string
	replica string
	writer  replica.Writer  // of a replica
	layer   replica.LayerID // of a snapshot
	token   string          // of a snapshot: what its opener calls this connection
	source  string
}

// String is the inverse of parseName.
func (n exportName) String() string {
	switch n.kind {
	case kindReplica:
		return fmt.Sprintf("replica/%s/%d/%d", n.replica, n.writer.Epoch, n.writer.Session)
	case kindSnapshot:
		return fmt.Sprintf("snapshot/%s/%s/%s", n.replica, n.layer, n.token)
	}
	return "source/" + n.source
}

// parseName takes the name of an export apart. Only the form that String gives is accepted.
func parseName(s string) (n exportName, ok bool) {
	p := strings.Split(s, "/")
	if len(p) != 4 {
		return n, false
	}
	switch n.kind = p[0]; n.kind {
	case kindReplica:
		var errE, errS error
		n.replica = p[1]
		n.writer.Epoch, errE = strconv.ParseUint(p[2], 10, 64)
		n.writer.Session, errS = strconv.ParseUint(p[3], 10, 64)
		ok = validID(p[1]) && errE == nil && errS == nil
	case kindSnapshot:
		n.replica, n.layer, n.token = p[1], replica.LayerID(p[2]), p[3]
		ok = validID(p[1]) && validID(p[2]) && validID(p[3])
	case kindSource:
		n.source = strings.Join(p[1:], "/")
		ok = validSource(n.source)
	}
	return n, ok && n.String() == s
}

// validSource tells whether name is that of a source.
func validSource(name string) bool {
	p := strings.Split(name, "/")
	return len(p) == 3 && (p[0] == "image" || p[0] == "layer") && validID(p[1]) && validID(p[2])
}

// validID tells whether id may be one: it ends up in file names.
func validID(id string) bool {
	if id == "" || len(id) > maxIDBytes || id[0] == '.' {
		return false
	}
	for _, c := range []byte(id) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && c != '-' && c != '_' && c != '.' {
			return false
		}
	}
	return true
}

// A session on the wire is the engine's above the number of the connection (docs/formats/remote.md, section 4).
const (
	turnBits = 32
	// takeOver is by how much who takes over from another connection of the same writer passes it.
	takeOver = 1 << 16
)

// onWire is w's turn-th connection. False if there is no such number.
func onWire(w replica.Writer, turn uint64) (replica.Writer, bool) {
	if w.Session > math.MaxUint32 || turn > math.MaxUint32 {
		return replica.Writer{}, false
	}
	return replica.Writer{Epoch: w.Epoch, Session: w.Session<<turnBits | turn}, true
}

// fromWire is the engine's writer of a connection.
func fromWire(w replica.Writer) replica.Writer {
	return replica.Writer{Epoch: w.Epoch, Session: w.Session >> turnBits}
}

// turnAfter is the first turn of a connection of w that comes after whoever has the replica as held.
func turnAfter(w, held replica.Writer) uint64 {
	if fromWire(held) != w {
		return 0
	}
	return (held.Session&math.MaxUint32 | (takeOver - 1)) + 1
}

// gone tells whether err is only that somebody stopped waiting.
func gone(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}
