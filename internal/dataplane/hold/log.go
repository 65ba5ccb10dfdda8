package hold

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
)

// MaxLogBytes bounds each log file of the run directory; what overflows is kept once, in a file of the same name with .1 added.
const MaxLogBytes = 4 << 20

// Log is a bounded log file. The file is opened for appending, so that a process's standard error (a panic, say) can go to it as well; when it is full
// it is copied aside and emptied in place. Write may be called concurrently. Nothing of it is promised to survive a power cut.
type Log struct {
	path string
	max  int64
	mu   sync.Mutex // guards the size of the file
	file *os.File
}

// OpenLog opens or creates the log at path, at most maxBytes long.
func OpenLog(path string, maxBytes int64) (*Log, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	l := &Log{path: path, max: maxBytes, file: f}
	if err := l.bound(0); err != nil {
		f.Close()
		return nil, err
	}
	return l, nil
}

// Logger returns a log on standard error; on a Log if that is the file at path, as it is in a process that a holder, or an intermediate, started. The caller calls end
// when it is done.
func Logger(path string) (log *slog.Logger, end func(), err error) {
	stderr, err := os.Stderr.Stat()
	if err != nil {
		return slog.New(slog.DiscardHandler), func() {}, nil //nolint:nilerr // without standard error there is no log
	}
	named, err := os.Stat(path)
	if err != nil || !os.SameFile(stderr, named) {
		return slog.New(slog.NewTextHandler(os.Stderr, nil)), func() {}, nil
	}
	l, err := OpenLog(path, MaxLogBytes)
	if err != nil {
		return nil, nil, err
	}
	return slog.New(slog.NewTextHandler(l, nil)), func() { l.Close() }, nil
}

// Write appends p, after making room if the file would grow beyond its bound.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.bound(int64(len(p))); err != nil {
		return 0, err
	}
	return l.file.Write(p)
}

// File is the open file, for a child's standard output and error.
func (l *Log) File() *os.File { return l.file }

// Close closes the file.
func (l *Log) Close() error { return l.file.Close() }

// bound moves the content aside if adding n bytes would make the file too long. Callers hold mu (or are the only user).
func (l *Log) bound(n int64) error {
	info, err := l.file.Stat()
	if err != nil {
		return fmt.Errorf("bound log: %w", err)
	}
	if info.Size()+n <= l.max || info.Size() == 0 {
		return nil
	}
	old, err := os.OpenFile(l.path+".1", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("bound log: %w", err)
	}
	// The last of it: a crash loop's panics may have made it longer than the bound.
	start := max(0, info.Size()-l.max)
	_, err = io.Copy(old, io.NewSectionReader(l.file, start, l.max))
	if err = errors.Join(err, old.Close(), l.file.Truncate(0)); err != nil {
		return fmt.Errorf("bound log: %w", err)
	}
	return nil
}
