package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"ashlar/internal/catalog"
)

// Code says what kind of failure an answer is. It crosses the wire as the error's "reason", so that a client need not read the message.
type Code string

// The codes. Those of failed operations are the data process's own, passed on by the agent.
const (
	CodeNotFound     Code = "not-found"        // no such object
	CodeExists       Code = "exists"           // the name is taken
	CodeInUse        Code = "in-use"           // something stands on it
	CodeInvalid      Code = "invalid"          // the request makes no sense; nothing was changed
	CodeConflict     Code = "conflict"         // the object is in another state than the verb needs, or changed meanwhile
	CodeNoSpace      Code = "no-space"         // a disk is full
	CodeCorrupt      Code = "corrupt"          // stored bytes do not match their checksum or format
	CodeFenced       Code = "fenced"           // a newer writer owns the volume
	CodeFailed       Code = "failed"           // a flush or write-back failed before
	CodeSalvage      Code = "needs-salvage"    // the last copy failed; a person has to decide
	CodeStale        Code = "stale-catalogue"  // the catalogue is an old copy
	CodeForeignDisk  Code = "foreign-disk"     // the disk belongs to another cluster
	CodeVersion      Code = "version"          // the two sides have no version in common
	CodeUnreachable  Code = "unreachable"      // the catalogue, a node or the server did not answer
	CodeChecksum     Code = "checksum"         // the bytes are not those that were promised
	CodeFormat       Code = "format"           // the image's format is refused
	CodeSource       Code = "source"           // the image's source did not deliver
	CodeFrontend     Code = "frontend-enabled" // the verb needs the frontend disabled
	CodeNotAttached  Code = "not-attached"     // the verb needs the volume attached
	CodeCancelled    Code = "cancelled"        // given up on request
	CodeTimeout      Code = "timeout"          // still going on when the wait ended
	CodeNotBuilt     Code = "not-built"        // a verb of the dialect that Ashlar does not have yet
	CodeNotSupported Code = "not-supported"    // a part of the dialect that Ashlar will not have
	CodeUnauthorized Code = "unauthorized"     // a token is missing, not known, expired, or in the wrong place
	CodeForbidden    Code = "forbidden"        // not over this connection, or not with this token
	CodeMethod       Code = "method"           // the method does not exist here
	CodeTooLarge     Code = "too-large"        // the body is over the limit
	CodeInternal     Code = "internal"         // anything else
)

// status is the one table from codes to HTTP.
func (c Code) status() int {
	switch c {
	case CodeNotFound:
		return http.StatusNotFound
	case CodeInvalid, CodeNotSupported:
		return http.StatusBadRequest
	case CodeExists, CodeInUse, CodeConflict, CodeFenced, CodeSalvage, CodeStale, CodeForeignDisk, CodeVersion, CodeFrontend, CodeNotAttached, CodeCancelled:
		return http.StatusConflict
	case CodeUnauthorized:
		return http.StatusUnauthorized
	case CodeForbidden:
		return http.StatusForbidden
	case CodeMethod:
		return http.StatusMethodNotAllowed
	case CodeTooLarge:
		return http.StatusRequestEntityTooLarge
	case CodeChecksum, CodeFormat:
		return http.StatusUnprocessableEntity
	case CodeNotBuilt:
		return http.StatusNotImplemented
	case CodeSource:
		return http.StatusBadGateway
	case CodeUnreachable:
		return http.StatusServiceUnavailable
	case CodeTimeout:
		return http.StatusGatewayTimeout
	case CodeNoSpace:
		return http.StatusInsufficientStorage
	}
	return http.StatusInternalServerError
}

// Error is an answer other than success, on both ends of the wire. Message is one sentence for people: what is wrong with which object, then what to do.
type Error struct {
	Status  int // of HTTP; 0 if no answer came
	Code    Code
	Message string
	cause   error
}

// Error returns the message.
func (e *Error) Error() string { return e.Message }

// Unwrap returns what was behind it, if this side knows.
func (e *Error) Unwrap() error { return e.cause }

// Failure makes an Error of a code; its Status is the code's.
func Failure(code Code, format string, args ...any) *Error {
	return &Error{Status: code.status(), Code: code, Message: fmt.Sprintf(format, args...)}
}

// Because is Failure with the error that caused it, which is kept for errors.Is and not shown.
func Because(cause error, code Code, format string, args ...any) *Error {
	e := Failure(code, format, args...)
	e.cause = cause
	return e
}

// CodeOf returns an error's code: an *Error's own, the one that belongs to a sentinel of the catalogue, CodeInternal for anything else, "" for nil.
func CodeOf(err error) Code {
	var e *Error
	switch {
	case err == nil:
		return ""
	case errors.As(err, &e):
		return e.Code
	case errors.Is(err, catalog.ErrNotFound):
		return CodeNotFound
	case errors.Is(err, catalog.ErrConflict):
		return CodeConflict
	case errors.Is(err, catalog.ErrUnreachable):
		return CodeUnreachable
	case errors.Is(err, context.DeadlineExceeded):
		return CodeTimeout
	case errors.Is(err, context.Canceled):
		return CodeCancelled
	}
	return CodeInternal
}

// modified is the dialect's text for a lost race, which its clients know and answer by trying again.
const modified = "the object has been modified; please apply your changes to the latest version and try again"

// asError makes the Error that is sent for any error a handler returned.
func (h *Handler) asError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	code := CodeOf(err)
	if code == CodeInternal && h.cfg.CodeOf != nil {
		if c := Code(h.cfg.CodeOf(err)); c != "" {
			code = c
		}
	}
	switch code {
	case CodeConflict:
		return Because(err, code, "%s", modified)
	case CodeUnreachable:
		return Because(err, code, "the catalogue did not answer; what was asked may have been done: look, then try again (%v)", err)
	}
	return Because(err, code, "%v", err)
}
