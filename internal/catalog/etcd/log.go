package etcd

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// quiet is the logger of etcd's clients: errors go to log, all else is dropped.
func quiet(log *slog.Logger) *zap.Logger { return zap.New(core{log: log}) }

// guarded is the logger of a member. Where etcd would end the process (Fatal, Panic: a log that cannot be written, a broken invariant) only the goroutine ends, as by
// runtime.Goexit, and the member gives up; whoever hears it stops the rest. What etcd complains of while it is being stopped is dropped.
func guarded(log *slog.Logger, m *member) *zap.Logger {
	h := hook{gaveUp: m.gaveUp}
	return zap.New(core{log: log, mute: m.stopping}, zap.WithFatalHook(h), zap.WithPanicHook(h))
}

// hook is a zapcore.CheckWriteHook.
type hook struct {
	gaveUp func(error)
}

// OnWrite implements zapcore.CheckWriteHook.
func (h hook) OnWrite(e *zapcore.CheckedEntry, fields []zapcore.Field) {
	h.gaveUp(reason(e.Message, fields))
	runtime.Goexit()
}

// reason makes an error of what etcd logged; what it wraps is the error that etcd had.
func reason(message string, fields []zapcore.Field) error {
	for _, f := range fields {
		if err, ok := f.Interface.(error); ok && f.Type == zapcore.ErrorType {
			return fmt.Errorf("%s: %w", message, err)
		}
	}
	return fmt.Errorf("%s", message)
}

// core is a zapcore.Core that writes to slog.
type core struct {
	log  *slog.Logger
	with []zapcore.Field
	mute func() bool // nil: never
}

// Enabled implements zapcore.Core.
func (c core) Enabled(l zapcore.Level) bool { return l >= zapcore.ErrorLevel }

// With implements zapcore.Core.
func (c core) With(f []zapcore.Field) zapcore.Core {
	return core{log: c.log, with: append(c.with[:len(c.with):len(c.with)], f...), mute: c.mute}
}

// Check implements zapcore.Core.
func (c core) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

// Write implements zapcore.Core.
func (c core) Write(e zapcore.Entry, fields []zapcore.Field) error {
	if c.mute != nil && c.mute() {
		return nil
	}
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range append(c.with[:len(c.with):len(c.with)], fields...) {
		f.AddTo(enc)
	}
	attrs := make([]slog.Attr, 0, len(enc.Fields))
	for k, v := range enc.Fields {
		attrs = append(attrs, slog.Any(k, v))
	}
	c.log.LogAttrs(context.Background(), slog.LevelError, "etcd: "+e.Message, attrs...)
	return nil
}

// Sync implements zapcore.Core.
func (core) Sync() error { return nil }
