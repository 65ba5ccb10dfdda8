package client

import (
	"context"
	"errors"
	"fmt"
	"net/http"
)

// The sentinels, one for each Code. Both ends speak in them: a Service returns an error that wraps one, the Client returns an error that wraps
// the same one. What the other side's message says is for people; programs ask errors.Is.
var (
	// ErrNotFound: there is no such disk, replica, volume, image, snapshot or record.
	ErrNotFound = errors.New("not found")
	// ErrExists: it is there already, with other arguments.
	ErrExists = errors.New("exists already")
	// ErrInUse: something stands on it or has it open; nothing was changed.
	ErrInUse = errors.New("in use")
	// ErrInvalid: the arguments make no sense; nothing was changed.
	ErrInvalid = errors.New("invalid")
	// ErrConflict: it changed meanwhile; read it again.
	ErrConflict = errors.New("changed meanwhile")
	// ErrNoSpace: the disk is full.
	ErrNoSpace = errors.New("no space left on disk")
	// ErrCorrupt: stored bytes do not match their checksum or their format.
	ErrCorrupt = errors.New("corrupt")
	// ErrFenced: a newer writer owns the volume.
	ErrFenced = errors.New("fenced by a newer writer")
	// ErrFailed: a flush or write-back failed before.
	ErrFailed = errors.New("failed")
	// ErrSalvage: the last copy failed; opening it again needs a person's decision.
	ErrSalvage = errors.New("needs salvage")
	// ErrStaleCatalogue: a replica holds a newer record than the catalogue, which must be an old copy.
	ErrStaleCatalogue = errors.New("catalogue is older than the replicas")
	// ErrForeignDisk: the disk belongs to another cluster.
	ErrForeignDisk = errors.New("disk of another cluster")
	// ErrVersion: the two sides, or this build and what is on the disk, have no version in common.
	ErrVersion = errors.New("version out of window")
	// ErrUnreachable: the other side did not answer; what was asked may have been done.
	ErrUnreachable = errors.New("unreachable")
	// ErrChecksum: the bytes received are not those that were promised.
	ErrChecksum = errors.New("checksum mismatch")
	// ErrFormat: an image's format is not one that can be read, or is not allowed.
	ErrFormat = errors.New("image format refused")
	// ErrSource: an image's source did not deliver.
	ErrSource = errors.New("image source failed")
	// ErrFrontend: refused while the volume's frontend is enabled.
	ErrFrontend = errors.New("frontend is enabled")
	// ErrCancelled: it was given up on request.
	ErrCancelled = errors.New("cancelled")
	// ErrInternal: anything else; the message is all there is.
	ErrInternal = errors.New("internal error")
)

// coded is one row of the table between codes, sentinels and HTTP statuses.
type coded struct {
	code   Code
	err    error
	status int
}

// codes is the one table, read in both directions. The status is for whoever looks at the wire; the Client goes by the code.
func codes() []coded {
	return []coded{
		{CodeNotFound, ErrNotFound, http.StatusNotFound},
		{CodeExists, ErrExists, http.StatusConflict},
		{CodeInUse, ErrInUse, http.StatusConflict},
		{CodeInvalid, ErrInvalid, http.StatusBadRequest},
		{CodeConflict, ErrConflict, http.StatusConflict},
		{CodeNoSpace, ErrNoSpace, http.StatusInsufficientStorage},
		{CodeCorrupt, ErrCorrupt, http.StatusInternalServerError},
		{CodeFenced, ErrFenced, http.StatusConflict},
		{CodeFailed, ErrFailed, http.StatusInternalServerError},
		{CodeSalvage, ErrSalvage, http.StatusConflict},
		{CodeStale, ErrStaleCatalogue, http.StatusConflict},
		{CodeForeignDisk, ErrForeignDisk, http.StatusConflict},
		{CodeVersion, ErrVersion, http.StatusUpgradeRequired},
		{CodeUnreachable, ErrUnreachable, http.StatusServiceUnavailable},
		{CodeChecksum, ErrChecksum, http.StatusUnprocessableEntity},
		{CodeFormat, ErrFormat, http.StatusUnprocessableEntity},
		{CodeSource, ErrSource, http.StatusBadGateway},
		{CodeFrontend, ErrFrontend, http.StatusConflict},
		{CodeCancelled, ErrCancelled, http.StatusConflict},
		{CodeInternal, ErrInternal, http.StatusInternalServerError},
	}
}

// CodeOf returns the code of an error that wraps a sentinel of this package; CodeCancelled for an ended context, CodeInternal for anything else,
// and "" for nil.
func CodeOf(err error) Code {
	if err == nil {
		return ""
	}
	for _, c := range codes() {
		if errors.Is(err, c.err) {
			return c.code
		}
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return CodeCancelled
	}
	return CodeInternal
}

// Sentinel returns the error value of a code; ErrInternal for one this build does not know, nil for "".
func Sentinel(code Code) error {
	if code == "" {
		return nil
	}
	for _, c := range codes() {
		if c.code == code {
			return c.err
		}
	}
	return ErrInternal
}

// statusOf returns the HTTP status that goes with a code.
func statusOf(code Code) int {
	for _, c := range codes() {
		if c.code == code {
			return c.status
		}
	}
	return http.StatusInternalServerError
}

// Failure makes an error out of what crosses a wire or stands in a State: it wraps the code's sentinel and says message. nil for the empty code.
func Failure(code Code, message string) error {
	if code == "" {
		return nil
	}
	return &failure{sentinel: Sentinel(code), message: message}
}

// failure keeps the other side's message without repeating the sentinel's words, which it has already.
type failure struct {
	sentinel error
	message  string
}

func (f *failure) Error() string {
	if f.message == "" {
		return f.sentinel.Error()
	}
	return f.message
}

func (f *failure) Unwrap() error { return f.sentinel }

// unreachable wraps a transport error so that errors.Is finds both it and ErrUnreachable.
func unreachable(what string, err error) error {
	return fmt.Errorf("%s: %w: %w", what, ErrUnreachable, err)
}
