package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"
)

// Service is what a data process does when it is asked. Client is one, over the wire. All methods may be called concurrently and every verb may be
// repeated after a lost answer: said again with the same arguments it changes nothing more. Errors wrap the sentinels of this package.
//
// It is one interface of more than seven methods because it is the list of the wire's verbs.
type Service interface {
	// Hello says who answers.
	Hello(ctx context.Context) (Hello, error)
	// AdoptDisk takes a directory into use. ErrForeignDisk, ErrVersion (newer format), ErrInUse (another process has it), ErrInvalid (neither empty nor a disk).
	AdoptDisk(ctx context.Context, a Disk) (DiskStatus, error)
	// State returns everything now.
	State(ctx context.Context) (State, error)
	// WaitState returns the state once its revision is not afterRev; with ctx's error if that ends first. Zero never waits.
	WaitState(ctx context.Context, afterRev uint64) (State, error)
	// CreateReplica makes an empty replica; it is durable on return. ErrNotFound (disk, image), ErrExists (same id, other arguments), ErrNoSpace, ErrInvalid.
	CreateReplica(ctx context.Context, a CreateReplica) error
	// DeleteReplica removes a replica for good. ErrInUse while it is open.
	DeleteReplica(ctx context.Context, a DeleteReplica) error
	// RebuildReplica makes a replica's own record again. ErrNotFound, ErrInUse (it is open), ErrCorrupt (a layer is missing, or it has another chain than the record), ErrInvalid.
	RebuildReplica(ctx context.Context, a RebuildReplica) error
	// OpenVolume makes this process the volume's writer and exports it. ErrNotFound, ErrSalvage, ErrFenced, ErrStaleCatalogue, ErrUnreachable (of the catalogue, or of the replica's node),
	// ErrExists (open with other arguments).
	OpenVolume(ctx context.Context, a OpenVolume) (VolumeStatus, error)
	// CloseVolume ends the export, waits for requests under way, flushes and gives the writer up. Content when it is not open. An error of the last flush
	// is returned, and the volume is closed all the same. ErrUnreachable, and it stays open, while its replica's node does not answer (see CloseVolume.Force).
	CloseVolume(ctx context.Context, a CloseVolume) error
	// Operate does one verb on an open volume. ErrNotFound (volume not open, no such snapshot), ErrExists, ErrFrontend, ErrInvalid, ErrFailed.
	Operate(ctx context.Context, a Operate) (VolumeStatus, error)
	// ImportImage starts an import, or returns the one that runs or the image that is there. ErrNotFound (disk), ErrInvalid.
	ImportImage(ctx context.Context, a ImportImage) (Job, error)
	// CancelImport gives an import up, forgets its result, and removes what it left. Content when there is none.
	CancelImport(ctx context.Context, a CancelImport) error
	// DeleteImage removes an image. ErrInUse while a replica of the same disk stands on it or it is being imported.
	DeleteImage(ctx context.Context, a DeleteImage) error
	// Check verifies a replica's layers. ErrNotFound.
	Check(ctx context.Context, a Check) (Problems, error)
	// SetLimits changes an open volume's limits, from the next request on. ErrNotFound, ErrInvalid.
	SetLimits(ctx context.Context, a SetLimits) error
	// SetBackground bounds the node's own work, from now on.
	SetBackground(ctx context.Context, a Background) error
	// SetNetwork begins, changes or ends the offer over TCP. ErrInvalid (beyond loopback without certificates, certificates that cannot be read), ErrInUse (the port).
	SetNetwork(ctx context.Context, a Network) error
	// SetCluster says which cluster the node is in, from now on. ErrInvalid (files that cannot be read), ErrInUse (the port).
	SetCluster(ctx context.Context, a Cluster) error
	// CopyReplica starts a copy, or returns the one that runs or ended. ErrNotFound (disk), ErrInvalid.
	CopyReplica(ctx context.Context, a CopyReplica) (Job, error)
	// OpenSource makes a snapshot or an image readable. ErrNotFound, ErrInvalid.
	OpenSource(ctx context.Context, a OpenSource) (Source, error)
	// CloseSource ends that, also for clients that still read. Content when there is none.
	CloseSource(ctx context.Context, a CloseSource) error
	// ExportImage starts an export, or returns the one that runs or ended. ErrInvalid.
	ExportImage(ctx context.Context, a ExportImage) (Job, error)
	// Diff tells what changed between two snapshots. ErrNotFound (volume not open, no such snapshot), ErrInvalid (From is not below To).
	Diff(ctx context.Context, a Diff) (Changes, error)
	// Shutdown ends the process in order and answers when every volume is closed.
	Shutdown(ctx context.Context, a Shutdown) error
}

const (
	// maxRequestBytes bounds what the serving end reads of one request, maxAnswerBytes what the asking end reads of one answer.
	maxRequestBytes = 1 << 20
	maxAnswerBytes  = 256 << 20
	// longPoll is how long the serving end holds a WaitState before it answers with the same revision; the Client then asks again.
	longPoll = 25 * time.Second
)

// Handler serves s to a Client. Sockets only this user can open are the only protection; see Listen.
func Handler(s Service) http.Handler { return handler(s, ThisBuild()) }

// handler is Handler with a window to choose, for tests of the refusal.
func handler(s Service, w Window) http.Handler {
	mux := http.NewServeMux()
	handle(mux, "hello", noInput(s.Hello))
	handle(mux, "state", noInput(s.State))
	handle(mux, "wait-state", waitState(s))
	handle(mux, "adopt-disk", s.AdoptDisk)
	handle(mux, "create-replica", noOutput(s.CreateReplica))
	handle(mux, "delete-replica", noOutput(s.DeleteReplica))
	handle(mux, "rebuild-replica", noOutput(s.RebuildReplica))
	handle(mux, "open-volume", s.OpenVolume)
	handle(mux, "close-volume", noOutput(s.CloseVolume))
	handle(mux, "operate", s.Operate)
	handle(mux, "import-image", s.ImportImage)
	handle(mux, "cancel-import", noOutput(s.CancelImport))
	handle(mux, "delete-image", noOutput(s.DeleteImage))
	handle(mux, "check", s.Check)
	handle(mux, "set-limits", noOutput(s.SetLimits))
	handle(mux, "set-background", noOutput(s.SetBackground))
	handle(mux, "set-network", noOutput(s.SetNetwork))
	handle(mux, "set-cluster", noOutput(s.SetCluster))
	handle(mux, "copy-replica", s.CopyReplica)
	handle(mux, "open-source", s.OpenSource)
	handle(mux, "close-source", noOutput(s.CloseSource))
	handle(mux, "export-image", s.ExportImage)
	handle(mux, "diff", s.Diff)
	handle(mux, "shutdown", noOutput(s.Shutdown))
	return versioned(w, mux)
}

// waitState bounds the wait, so that an asker that vanished without a trace costs nothing for long.
func waitState(s Service) func(context.Context, WaitState) (State, error) {
	return func(ctx context.Context, a WaitState) (State, error) {
		bounded, cancel := context.WithTimeout(ctx, longPoll)
		defer cancel()
		st, err := s.WaitState(bounded, a.AfterRev)
		if err != nil && bounded.Err() != nil && ctx.Err() == nil {
			return s.State(ctx)
		}
		return st, err
	}
}

// nothing is the body of a request or answer that says nothing.
type nothing struct{}

func noInput[Out any](fn func(context.Context) (Out, error)) func(context.Context, nothing) (Out, error) {
	return func(ctx context.Context, _ nothing) (Out, error) { return fn(ctx) }
}

func noOutput[In any](fn func(context.Context, In) error) func(context.Context, In) (nothing, error) {
	return func(ctx context.Context, in In) (nothing, error) { return nothing{}, fn(ctx, in) }
}

// handle routes one verb: its JSON arguments in, its JSON answer or failure out.
func handle[In, Out any](mux *http.ServeMux, verb string, fn func(context.Context, In) (Out, error)) {
	mux.HandleFunc("POST /"+verb, func(w http.ResponseWriter, r *http.Request) {
		var in In
		if err := readBody(http.MaxBytesReader(w, r.Body, maxRequestBytes), &in); err != nil {
			answerFailure(w, fmt.Errorf("%s: %w: %w", verb, ErrInvalid, err))
			return
		}
		out, err := fn(r.Context(), in)
		if err != nil {
			answerFailure(w, err)
			return
		}
		answer(w, http.StatusOK, out)
	})
}

// versioned refuses askers outside the window and tells everybody ours.
func versioned(ours Window, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set(windowHeader, ours.String())
		if err := ours.check(r.Header.Get(windowHeader)); err != nil {
			answerFailure(w, err)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// readBody decodes exactly one JSON value. Unknown fields are ignored: a newer peer within the window may send them.
func readBody(r io.Reader, into any) error {
	dec := json.NewDecoder(r)
	if err := dec.Decode(into); err != nil {
		return err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("more than one JSON value")
	}
	return nil
}

// failed is an error as it crosses the wire.
type failed struct {
	Code    Code   `json:"code"`
	Message string `json:"message"`
}

func answerFailure(w http.ResponseWriter, err error) {
	code := CodeOf(err)
	answer(w, statusOf(code), failed{Code: code, Message: err.Error()})
}

func answer(w http.ResponseWriter, status int, body any) {
	data, err := json.Marshal(body)
	if err != nil {
		status, data = http.StatusInternalServerError, []byte(`{"code":"internal","message":"answer cannot be written as JSON"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(data) //nolint:errcheck // an asker that went away asks again
}
