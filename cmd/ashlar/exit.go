package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/spf13/cobra"

	"ashlar/internal/api"
	"ashlar/internal/api/client"
	"ashlar/internal/dataplane"
	dataclient "ashlar/internal/dataplane/client"
	"ashlar/internal/dataplane/hold"
	"ashlar/internal/node"
)

// Exit codes, as docs/cli.md and the help text list them.
const (
	exitDone        = 0
	exitFailed      = 1
	exitUsage       = 2
	exitNotFound    = 3
	exitConflict    = 4
	exitUnreachable = 5
	exitRefused     = 6
	exitProblems    = 7
	exitNotBuilt    = 8
	exitRemoved     = 9 // of serve; packaging/ashlar.service names it, and does not start it again
	exitInterrupted = 130
)

// usageError is a command line that makes no sense.
type usageError struct {
	cmd *cobra.Command
	err error
}

func (e usageError) Error() string { return e.err.Error() }

// errProblems ends a check that found some; they have been printed.
var errProblems = errors.New("problems were found")

// goesOn wraps a wait that ended before what was waited for: what it is, and how to look at it later.
type goesOn struct {
	err  error
	what string
}

func (e *goesOn) Error() string { return e.what }
func (e *goesOn) Unwrap() error { return e.err }

// stillGoing turns the end of a wait into words: the work itself goes on.
func stillGoing(err error, format string, args ...any) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return &goesOn{err: err, what: fmt.Sprintf(format, args...)}
	}
	return err
}

// exitCode is the one switch from errors to exit codes.
func exitCode(ctx context.Context, err error) int {
	var usage usageError
	var own exitStatus
	switch {
	case err == nil:
		return exitDone
	case errors.As(err, &own):
		return int(own)
	case errors.As(err, &usage):
		return exitUsage
	case errors.Is(err, node.ErrRemoved):
		return exitRemoved
	case errors.Is(err, node.ErrInUse), errors.Is(err, hold.ErrRunning), errors.Is(err, dataclient.ErrInUse):
		return exitConflict
	case errors.Is(err, dataplane.ErrRefused), errors.Is(err, dataplane.ErrNoHandOver):
		return exitConflict
	case errors.Is(err, fs.ErrExist) && api.CodeOf(err) == api.CodeInternal: // a file here, that is never written over
		return exitConflict
	case errors.Is(err, node.ErrConfig), errors.Is(err, errConfig), errors.Is(err, node.ErrFormat):
		return exitRefused
	case errors.Is(err, errProblems):
		return exitProblems
	case errors.Is(err, fs.ErrNotExist) && api.CodeOf(err) == api.CodeInternal:
		return exitNotFound
	case ctx.Err() != nil && errors.Is(err, context.Canceled):
		return exitInterrupted
	}
	switch api.CodeOf(err) {
	case api.CodeNotFound:
		return exitNotFound
	case api.CodeExists, api.CodeInUse, api.CodeConflict, api.CodeFrontend, api.CodeNotAttached, api.CodeFenced, api.CodeSalvage, api.CodeStale, api.CodeForeignDisk:
		return exitConflict
	case api.CodeUnreachable:
		return exitUnreachable
	case api.CodeInvalid, api.CodeNotSupported, api.CodeForbidden, api.CodeTooLarge, api.CodeFormat, api.CodeChecksum, api.CodeSource:
		return exitRefused
	case api.CodeNotBuilt:
		return exitNotBuilt
	}
	return exitFailed
}

// noAnswer tells that nobody answered at all, rather than a node that cannot ask another, or its catalogue.
func noAnswer(err error) bool {
	var e *api.Error
	return errors.As(err, &e) && e.Status == 0
}

// report prints what went wrong and returns the exit code.
func (a *app) report(ctx context.Context, err error) int {
	code := exitCode(ctx, err)
	var usage usageError
	var on *goesOn
	var own exitStatus
	switch {
	case err == nil || errors.Is(err, errProblems) || errors.As(err, &own):
	case errors.As(err, &usage):
		fmt.Fprintf(a.err, "ashlar: %v; see `%s --help`\n", usage.err, usage.cmd.CommandPath())
	case errors.As(err, &on) && code == exitInterrupted:
		fmt.Fprintf(a.err, "ashlar: interrupted; %v\n", on)
	case errors.As(err, &on):
		fmt.Fprintf(a.err, "ashlar: gave up waiting; %v\n", on)
	case code == exitInterrupted:
		fmt.Fprintln(a.err, "ashlar: interrupted")
	case code == exitUnreachable && a.server == "" && noAnswer(err):
		fmt.Fprintf(a.err, "ashlar: %v; is `ashlar serve` running here? (looked for %s)\n", err, client.Socket(a.runDir))
	default:
		fmt.Fprintf(a.err, "ashlar: %v\n", err)
	}
	return code
}
