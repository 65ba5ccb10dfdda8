package dataplane

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"ashlar/internal/dataplane/client"
	"ashlar/internal/dataplane/hold"
)

// Upgraded is what a hand-over came to.
type Upgraded struct {
	From    string          `json:"from"` // version
	To      string          `json:"to"`
	PID     int             `json:"pid"`     // of the new data process
	Volumes []HandOverEvent `json:"volumes"` // one EventVolume each, in order
	Took    time.Duration   `json:"tookNanoseconds"`
}

// ErrNoHandOver: the data process that runs is older than hand-over, or there is none.
var ErrNoHandOver = errors.New("the running data process cannot hand over")

const (
	// successorPoll is how often it is looked whether a process that was started lives, or answers.
	successorPoll = 20 * time.Millisecond
	// tailBytes is how much of the data process's log an error quotes.
	tailBytes = 1500
)

// Upgrade has the newest installed data process take over from the one that runs, volume by volume, under running guests, and returns when the new one answers and the old one is gone. The holder starts it;
// one that is too old for that request has it started beside it. report, unless nil, is told of each step, in order.
//
// ErrCurrent: the installed version is the one that runs. ErrRefused: the builds cannot hand over, or a volume could not be taken, and everything is as it was. ErrNoHandOver. Other errors say that a process died on the way: then the one that is left, or one that
// the holder starts, has every volume, and clients connect again. When ctx ends what was begun goes on.
func Upgrade(ctx context.Context, cfg hold.Config, report func(HandOverEvent)) (Upgraded, error) {
	began := time.Now()
	if report == nil {
		report = func(HandOverEvent) {}
	}
	w, err := watchHandOver(ctx, cfg.RunDir)
	if err != nil {
		return Upgraded{}, fmt.Errorf("upgrade the data process: %w", err)
	}
	defer w.close()
	pid, err := startSuccessor(ctx, cfg)
	if err != nil {
		return Upgraded{}, fmt.Errorf("upgrade the data process: %w", err)
	}
	u := Upgraded{From: w.from, Volumes: []HandOverEvent{}}
	if err := w.follow(ctx, pid, func(e HandOverEvent) {
		u.To = e.To
		if e.What == EventVolume {
			u.Volumes = append(u.Volumes, e)
		}
		report(e)
	}); err != nil {
		return u, fmt.Errorf("upgrade the data process: %w", quoteLog(err, cfg))
	}
	if u.PID, err = untilAnswers(ctx, cfg.RunDir, u.From, u.To); err != nil {
		return u, fmt.Errorf("upgrade the data process: %w", err)
	}
	u.Took = time.Since(began)
	return u, nil
}

// startSuccessor has the holder start the taker, or starts it.
func startSuccessor(ctx context.Context, cfg hold.Config) (pid int, err error) {
	conn, err := hold.Dial(ctx, cfg)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	if pid, err = conn.Start(ctx); errors.Is(err, hold.ErrRefused) {
		return hold.StartSuccessor(cfg)
	}
	return pid, err
}

// watch is a connection on which the giver tells of hand-overs.
type watch struct {
	giver  *peer
	from   string
	events chan HandOverEvent // closed when the giver is gone
	quit   context.CancelFunc
	wg     sync.WaitGroup
}

// watchHandOver connects to the data process that runs. ErrNoHandOver.
func watchHandOver(ctx context.Context, runDir string) (*watch, error) {
	giver, err := dialHandover(ctx, runDir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, fmt.Errorf("%w: nobody waits at %s", ErrNoHandOver, handoverSocket(runDir))
	}
	if err != nil {
		return nil, err
	}
	ours := ourWindows()
	err = giver.send(frame{Kind: kindHello, Role: roleWatch, PID: os.Getpid(), Windows: &ours})
	var hello frame
	if err == nil {
		hello, err = giver.expect(kindHello)
	}
	if err != nil {
		giver.close()
		return nil, err
	}
	hello.drop()
	life, quit := context.WithCancel(context.WithoutCancel(ctx))
	w := &watch{giver: giver, from: hello.Version, events: make(chan HandOverEvent), quit: quit}
	w.wg.Go(func() { w.read(life) })
	return w, nil
}

func (w *watch) read(life context.Context) {
	defer close(w.events)
	for {
		f, err := w.giver.receive(0)
		f.drop()
		if err != nil || f.Event == nil {
			return
		}
		select {
		case w.events <- *f.Event:
		case <-life.Done():
			return
		}
	}
}

func (w *watch) close() {
	w.quit()
	w.giver.close()
	w.wg.Wait()
}

// follow reports events until the hand-over has ended; nil if the taker has everything.
func (w *watch) follow(ctx context.Context, pid int, report func(HandOverEvent)) error {
	tick := time.NewTicker(successorPoll)
	defer tick.Stop()
	for began := false; ; {
		select {
		case e, ok := <-w.events:
			if !ok {
				return fmt.Errorf("the data process %s died while it handed over: %w", w.from, io.ErrUnexpectedEOF)
			}
			report(e)
			switch began = true; e.What {
			case EventDone:
				return nil
			case EventCurrent:
				return fmt.Errorf("data process %s: %w", w.from, ErrCurrent)
			case EventRefused, EventReturned:
				return fmt.Errorf("%w: %s", ErrRefused, trimRefused(e.Text))
			case EventLost:
				return fmt.Errorf("the new data process %s died while it took over, and %s goes on: %s: %w", e.To, w.from, e.Text, io.ErrUnexpectedEOF)
			}
		case <-tick.C:
			if !began && errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
				return fmt.Errorf("the new data process (pid %d) ended before it asked to take over: %w", pid, io.ErrUnexpectedEOF)
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// trimRefused takes away what the sentinel says again.
func trimRefused(text string) string {
	return strings.TrimPrefix(text, ErrRefused.Error()+": ")
}

// untilAnswers waits for the new data process and the end of the old one.
func untilAnswers(ctx context.Context, runDir, from, to string) (pid int, err error) {
	c := client.New(client.DataSocket(runDir, to))
	for {
		ask, cancel := context.WithTimeout(ctx, time.Second)
		hello, helloErr := c.Hello(ask)
		cancel()
		if helloErr == nil && hello.Version == to && hold.VersionEnded(runDir, from) {
			return hello.PID, nil
		}
		select {
		case <-ctx.Done():
			return 0, errors.Join(fmt.Errorf("data process %s has everything, but does not answer yet: %w", to, ctx.Err()), helloErr)
		case <-time.After(successorPoll):
		}
	}
}

// quoteLog adds the end of the data process's log to an error of a process that died.
func quoteLog(err error, cfg hold.Config) error {
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		return err
	}
	text, readErr := os.ReadFile(cfg.DataLog())
	if readErr != nil {
		return err
	}
	return fmt.Errorf("%w; the end of %s:\n%s", err, cfg.DataLog(), text[max(0, len(text)-tailBytes):])
}
