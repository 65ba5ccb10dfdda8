// Package job runs imports and exports in a process of their own, so that foreign bytes cannot hurt guests' I/O: the data process calls Start, which executes `ashlar work`
// (Main) with the spec on its standard input. The child has a memory limit, no way to gain privileges, a low priority and a bare environment, and
// ends when its parent does. Progress and the outcome come back as JSON lines; errors come back as the sentinels they were.
//
//	Start ──spec──▶ stdin   work: confine, exec itself, import, seal, settle; or export
//	  ◀──progress… ─ stdout
//	  ◀──result or error
//	  ──closes──▶ stdin     work ends (also when Start's process is gone: that is how a killed data process takes its imports with it)
//
// Read next: wire.go (what is said), main.go (the child), import.go and export.go (the kinds of work), source.go (what they read and write besides files and URLs).
package job

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"ashlar/internal/disk"
)

// The ways work fails that are not its own errors; those of image, layer and disk come through as they are.
var (
	// ErrSpec: the spec makes no sense. Nothing was done.
	ErrSpec = errors.New("bad job spec")
	// ErrMemory: the work would need more memory than its limit.
	ErrMemory = errors.New("job reached its memory limit")
	// ErrDied: the work process ended without a word, or its words made no sense. Killed, out of memory at once, or a fault in the program.
	ErrDied = errors.New("work process died")
	// ErrCrashed: the work process met a fault in the program and said so.
	ErrCrashed = errors.New("fault in the work process")
)

// errNonsense is part of what ErrDied says.
var errNonsense = errors.New("no message of ours")

// DefaultMemoryBytes is the limit on a work process's data.
const DefaultMemoryBytes = int64(1) << 30

// Config says how to run work processes. The zero value runs this program's own binary.
type Config struct {
	// Exe is the program that calls Main; default /proc/self/exe, which is the running binary even after an upgrade replaced the file.
	Exe string
	// Args are its arguments; default "work".
	Args []string
	// Env is added to the child's environment, which otherwise has only the proxy and certificate variables of this one.
	Env []string
	// MemoryBytes limits the child's data (RLIMIT_DATA, and what the garbage collector aims at); 0 means DefaultMemoryBytes, less than 0 none.
	MemoryBytes int64
	// Grace is how long a cancelled child may take to clean up before it is killed; default 5 s.
	Grace time.Duration
	// Turns, unless nil, is shared by jobs of which at most its capacity have a process at one time: each keeps an element in it meanwhile. Work on a stream takes no turn:
	// somebody waits at its other end.
	Turns chan struct{}
}

func (c Config) withDefaults() Config {
	if c.Exe == "" {
		c.Exe = "/proc/self/exe"
	}
	if c.Args == nil {
		c.Args = []string{"work"}
	}
	if c.MemoryBytes == 0 {
		c.MemoryBytes = DefaultMemoryBytes
	}
	if c.Grace <= 0 {
		c.Grace = 5 * time.Second
	}
	return c
}

// passedOn are the variables a child needs to reach the outside world, in either case.
func passedOn() []string {
	return []string{"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR"}
}

// Job is one piece of work under way. Whoever starts one must Wait for it. All methods may be called concurrently.
type Job struct {
	cfg    Config
	spec   Spec
	cancel context.CancelCauseFunc
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stdout io.Reader
	stderr *tail
	work   sync.WaitGroup
	done   chan struct{} // closed when result and err are final

	mu       sync.Mutex // guards the rest
	progress Progress
	result   *Result
	err      error
}

// Start checks the spec and starts a process for it, at once if it is its turn, else as soon as it is; until then the job has no process and no progress. The work ends
// early when ctx does. An error means that nothing runs, nothing will, and nothing was made.
func Start(ctx context.Context, cfg Config, spec Spec) (*Job, error) {
	if err := spec.check(); err != nil {
		return nil, fmt.Errorf("job: %w", err)
	}
	cfg = cfg.withDefaults()
	spec.MemoryBytes = cfg.MemoryBytes
	line, err := json.Marshal(spec)
	if err != nil {
		return nil, fmt.Errorf("job: %w: %w", err, ErrSpec)
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("job: %w", context.Cause(ctx))
	}
	if err := spec.checkTarget(); err != nil {
		return nil, fmt.Errorf("job: %w", err)
	}
	j := &Job{cfg: cfg, spec: spec, done: make(chan struct{}), stderr: new(tail), progress: Progress{TotalBytes: -1}}
	ctx, j.cancel = context.WithCancelCause(ctx)
	if spec.onStream() {
		j.cfg.Turns = nil
	}
	if !j.turn() {
		j.work.Go(func() { j.wait(ctx, append(line, '\n')) })
		return j, nil
	}
	if err := j.begin(); err != nil {
		j.giveTurn()
		j.cancel(nil)
		return nil, err
	}
	j.work.Go(func() { j.run(ctx, append(line, '\n')) })
	return j, nil
}

// turn takes a turn if there is one.
func (j *Job) turn() bool {
	if j.cfg.Turns == nil {
		return true
	}
	select {
	case j.cfg.Turns <- struct{}{}:
		return true
	default:
		return false
	}
}

func (j *Job) giveTurn() {
	if j.cfg.Turns != nil {
		<-j.cfg.Turns
	}
}

// wait is run for a job that has to wait for its turn.
func (j *Job) wait(ctx context.Context, spec []byte) {
	var err error
	select {
	case <-ctx.Done():
		err = fmt.Errorf("job: %w", context.Cause(ctx))
	case j.cfg.Turns <- struct{}{}:
		if err = j.begin(); err == nil {
			j.run(ctx, spec)
			return
		}
		j.giveTurn()
	}
	j.cancel(nil)
	j.mu.Lock()
	j.err = err
	j.mu.Unlock()
	close(j.done)
}

// begin starts the process.
func (j *Job) begin() (err error) {
	j.cmd = exec.Command(j.cfg.Exe, j.cfg.Args...)
	j.cmd.Dir = "/"
	j.cmd.Env = append(childEnv(j.cfg.Env), memoryEnv+"="+strconv.FormatInt(j.cfg.MemoryBytes, 10))
	j.cmd.Stderr = j.stderr
	j.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a terminal's ^C is for the parent to act on
	if j.stdin, err = j.cmd.StdinPipe(); err != nil {
		return fmt.Errorf("job: %w", err)
	}
	if j.stdout, err = j.cmd.StdoutPipe(); err != nil {
		return fmt.Errorf("job: %w", err)
	}
	if err := j.cmd.Start(); err != nil {
		return fmt.Errorf("job: start %s: %w", j.cfg.Exe, err)
	}
	return nil
}

func childEnv(more []string) []string {
	env := []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"}
	for _, name := range passedOn() {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return append(env, more...)
}

// Progress returns how far the work is. Percent never falls.
func (j *Job) Progress() Progress {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.progress
}

// Done is closed when the process is gone and Wait will not block.
func (j *Job) Done() <-chan struct{} { return j.done }

// Cancel asks the work to end; Wait tells when it has. A job that is done stays done.
func (j *Job) Cancel() { j.cancel(context.Canceled) }

// Wait waits for the process to end. With a nil error the file named in the spec is there, complete and durable; the name of an import's is not: the caller renames it and
// syncs the directories. With an error nothing of it is left (an export whose process was killed at its very end may have given its file its name). The errors are those of image, layer and disk as sentinels, ErrMemory, ErrDied, ErrCrashed, and
// the cause of a cancelled context.
func (j *Job) Wait() (Result, error) {
	j.work.Wait()
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.err != nil {
		return Result{}, j.err
	}
	return *j.result, nil
}

// run talks to the child until it is gone, and tidies up after it.
func (j *Job) run(ctx context.Context, spec []byte) {
	defer close(j.done)
	defer j.giveTurn()
	defer j.cancel(nil)
	kill := time.AfterFunc(time.Hour, func() { j.cmd.Process.Kill() }) //nolint:errcheck // it may be gone already
	kill.Stop()
	stop := context.AfterFunc(ctx, func() {
		j.stdin.Close() //nolint:errcheck // the child sees the end of its input, which cannot fail
		kill.Reset(j.cfg.Grace)
	})
	_, writeErr := j.stdin.Write(spec)
	said, talkErr := j.listen()
	if !stop() && said == nil {
		talkErr = context.Cause(ctx)
	}
	j.stdin.Close() //nolint:errcheck // closed twice after a cancellation
	kill.Reset(j.cfg.Grace)
	waitErr := j.cmd.Wait()
	kill.Stop()

	var err error
	var result *Result
	switch {
	case said != nil && said.Result != nil && waitErr == nil:
		result = said.Result
	case context.Cause(ctx) != nil:
		err = context.Cause(ctx)
	case said != nil && said.Error != nil:
		err = said.Error.err()
	default:
		err = j.obituary(writeErr, talkErr) // waitErr repeats the state
	}
	if err != nil {
		err = fmt.Errorf("job: %w", err)
		if said == nil || said.Error == nil { // who says why it failed has tidied up first
			err = errors.Join(err, j.tidy())
		}
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.result, j.err = result, err
}

// listen reads the child's lines until it has said how it ended, or says no more. A child that makes no sense is killed.
func (j *Job) listen() (*message, error) {
	lines := bufio.NewScanner(j.stdout)
	lines.Buffer(nil, maxLineBytes)
	for lines.Scan() {
		var m message
		if err := json.Unmarshal(lines.Bytes(), &m); err != nil || !m.valid() {
			j.cmd.Process.Kill() //nolint:errcheck // it may be gone already
			return nil, fmt.Errorf("it said %.200q: %w", lines.Text(), errNonsense)
		}
		if m.Progress == nil {
			return &m, nil
		}
		j.mu.Lock()
		if m.Progress.Percent >= j.progress.Percent {
			j.progress = *m.Progress
		}
		j.mu.Unlock()
	}
	if err := lines.Err(); err != nil {
		j.cmd.Process.Kill() //nolint:errcheck // it may be gone already
		return nil, err
	}
	return nil, nil
}

// obituary says what is known of a child that ended without a word. If it held most of what it may, that was the reason.
func (j *Job) obituary(why ...error) error {
	died, limit := ErrDied, "no memory limit"
	if j.cfg.MemoryBytes > 0 {
		limit = fmt.Sprintf("a memory limit of %d bytes", j.cfg.MemoryBytes)
		if usage, ok := j.cmd.ProcessState.SysUsage().(*syscall.Rusage); ok && usage.Maxrss*1024 > j.cfg.MemoryBytes/4*3 {
			died = fmt.Errorf("%w: %w", ErrMemory, ErrDied)
		}
	}
	known := []string{j.cmd.ProcessState.String(), "under " + limit}
	for _, err := range why {
		if err != nil {
			known = append(known, err.Error())
		}
	}
	if last := j.stderr.String(); last != "" {
		known = append(known, "its last words: "+last)
	}
	return fmt.Errorf("%s: %w (%s)", j.spec.Kind, died, strings.Join(known, "; "))
}

// checkTarget wants the names free, because tidy may remove them.
func (s *Spec) checkTarget() error {
	dir, names := s.makes()
	if s.Export != nil && dir != "" {
		names = append(names, filepath.Base(s.Export.To))
	}
	return eachName(dir, names, func(fsys disk.FS, name string) error {
		if ok, err := disk.Exists(fsys, name); err != nil || !ok {
			return err
		}
		return fmt.Errorf("target %s: %w", name, fs.ErrExist)
	})
}

// tidy removes what a child that died may have left. It is gone, and the names were free when it was started.
func (j *Job) tidy() error {
	dir, names := j.spec.makes()
	return eachName(dir, names, func(fsys disk.FS, name string) error {
		if err := fsys.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("tidy up: %w", err)
		}
		return nil
	})
}

// makes names the files that unfinished work may leave, and the directory they are in; "" for none.
func (s *Spec) makes() (dir string, names []string) {
	switch {
	case s.Import != nil:
		return s.Import.Root, []string{s.Import.Name, s.Import.spoolName()}
	case s.Export != nil && !isStream(s.Export.To):
		return filepath.Dir(s.Export.To), []string{filepath.Base(s.Export.To) + partialSuffix}
	}
	return "", nil
}

// eachName calls f with each of the files in dir.
func eachName(dir string, names []string, f func(fsys disk.FS, name string) error) error {
	if dir == "" {
		return nil
	}
	fsys, err := disk.OpenReal(dir, disk.RealOptions{})
	if err != nil {
		return err
	}
	defer fsys.Close()
	var all error
	for _, name := range names {
		all = errors.Join(all, f(fsys, name))
	}
	return all
}

// tail keeps the last words of a process.
type tail struct {
	mu sync.Mutex // guards b
	b  []byte
}

// tailBytes holds a Go panic's first lines, which come first and say most, when there is little else.
const tailBytes = 2 << 10

// Write keeps the first half and the last half of what was written.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	if over := len(t.b) - tailBytes; over > 0 {
		t.b = append(t.b[:tailBytes/2], t.b[tailBytes/2+over:]...)
	}
	return len(p), nil
}

// String gives it as one line.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.Join(strings.Fields(string(t.b)), " ")
}
