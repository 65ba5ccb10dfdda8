package job

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"sync"
	"time"
)

// doer does one kind of work.
type doer func(ctx context.Context, spec Spec, report func(Progress)) (Result, error)

// exits of the child. The parent goes by what was said, not by these; they are for people.
const (
	exitOK      = 0
	exitFailed  = 1
	exitConfine = 3
	exitStuck   = 4
)

// stuckAfter is how long work that was cancelled may go on before the child gives itself up: the parent, which would do it, may be gone.
const stuckAfter = 30 * time.Second

// Main is the whole life of a work process and returns its exit code. It reads the spec from stdin, writes what there is to say to stdout, and ends early when stdin
// ends or ctx does. On the way it limits itself and executes its own binary again, with the same arguments, so that the limits hold from the first thread on: call it before
// anything else was started.
func Main(ctx context.Context, stdin io.Reader, stdout io.Writer) int {
	return mainWith(ctx, stdin, stdout, map[string]doer{KindImport: doImport, KindExport: doExport})
}

func mainWith(ctx context.Context, stdin io.Reader, stdout io.Writer, doers map[string]doer) int {
	if err := confine(); err != nil {
		fmt.Fprintln(os.Stderr, "ashlar work: confine:", err)
		return exitConfine
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	in := bufio.NewReaderSize(stdin, maxLineBytes)
	out := &speaker{w: json.NewEncoder(stdout), lost: cancel}
	line, err := in.ReadSlice('\n')
	if err != nil {
		out.say(message{Error: failureOf(fmt.Errorf("read spec: %w: %w", err, ErrSpec))})
		return exitFailed
	}
	spec, err := decodeSpec(line)
	if err != nil {
		out.say(message{Error: failureOf(err)})
		return exitFailed
	}
	var watch sync.WaitGroup
	watch.Go(func() {
		io.Copy(io.Discard, in) //nolint:errcheck // an error is an end like any other
		cancel(context.Canceled)
	})
	defer context.AfterFunc(ctx, func() {
		time.AfterFunc(stuckAfter, func() { os.Exit(exitStuck) })
	})()
	stopLimit := limitMemory(spec.MemoryBytes, cancel)
	result, err := do(ctx, doers[spec.Kind], spec, out.progress)
	stopLimit()
	code := exitOK
	if err != nil {
		if cause := context.Cause(ctx); errors.Is(cause, ErrMemory) {
			err = cause
		}
		code = exitFailed
		out.say(message{Error: failureOf(err)})
	} else {
		out.say(message{Result: &result})
	}
	watch.Wait() // the parent answers by closing our input
	return code
}

// do runs the work; a panic becomes ErrCrashed with its stack on stderr. It is the last resort: a panic in another goroutine of the work ends
// the process, and the parent says so.
func do(ctx context.Context, work doer, spec Spec, report func(Progress)) (result Result, err error) {
	if work == nil {
		return Result{}, fmt.Errorf("kind %q: %w", spec.Kind, ErrSpec)
	}
	defer func() {
		if p := recover(); p != nil {
			fmt.Fprintf(os.Stderr, "%v\n%s", p, debug.Stack())
			err = fmt.Errorf("%v: %w", p, ErrCrashed)
		}
	}()
	return work(ctx, spec, report)
}

// limitMemory makes the collector work harder near the limit, and ends the work with ErrMemory before the kernel ends the process.
func limitMemory(limit int64, cancel context.CancelCauseFunc) (stop func()) {
	if limit <= 0 {
		return func() {}
	}
	debug.SetMemoryLimit(limit / 4 * 3)
	quit := make(chan struct{})
	var watch sync.WaitGroup
	watch.Go(func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		// What RLIMIT_DATA counts: all that the runtime has mapped, returned to the system or not.
		sample := []metrics.Sample{{Name: "/memory/classes/total:bytes"}}
		for {
			select {
			case <-quit:
				return
			case <-tick.C:
			}
			metrics.Read(sample)
			if used := int64(sample[0].Value.Uint64()); used > limit/10*9 {
				cancel(fmt.Errorf("%d of %d bytes are in use: %w", used, limit, ErrMemory))
				return
			}
		}
	})
	return func() { close(quit); watch.Wait() }
}

// speaker writes messages, one a line.
type speaker struct {
	mu   sync.Mutex // guards the rest
	w    *json.Encoder
	lost context.CancelCauseFunc // nobody listens any more
	last time.Time
	told Progress
}

func (s *speaker) say(m message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.w.Encode(m); err != nil {
		s.lost(context.Canceled)
	}
}

// progress says something ten times a second, and whenever a percent or a phase is complete.
func (s *speaker) progress(p Progress) {
	s.mu.Lock()
	now := time.Now()
	quiet := p.Percent == s.told.Percent && p.Phase == s.told.Phase && now.Sub(s.last) < 100*time.Millisecond
	if !quiet {
		s.told, s.last = p, now
	}
	s.mu.Unlock()
	if !quiet {
		s.say(message{Progress: &p})
	}
}
