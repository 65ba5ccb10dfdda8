package remote

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"

	"ashlar/internal/block"
	"ashlar/internal/nbd"
)

// TestAcquireWhileEnding: who comes while a replica is being let go of waits until it is, and opens it again; what is ending is nobody's any more.
func TestAcquireWhileEnding(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFar(t, testHead, testSize)
		first, err := f.srv.acquire(t.Context(), testReplica)
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() { f.srv.end(first); close(ended) }()
		synctest.Wait() // it is ending, and has a user
		second := make(chan *opened, 1)
		go func() {
			o, err := f.srv.acquire(t.Context(), testReplica)
			if err != nil {
				t.Error(err)
			}
			second <- o
		}()
		synctest.Wait()
		if len(second) != 0 {
			t.Fatal("a replica that is ending has a new user")
		}
		f.srv.release(first)
		<-ended
		o := <-second
		if o == first || o == nil || f.openedTimes() != 2 {
			t.Fatalf("it was opened %d times", f.openedTimes())
		}
		f.srv.release(o)
	})
}

// TestJudge: what the peer answered is an answer, in our words; what only says that it, or the connection, is at its end has the next connection asked again; what was never sent is not sent again.
func TestJudge(t *testing.T) {
	for _, c := range []struct {
		err   error
		want  error
		again bool
	}{
		{nbd.ESHUTDOWN, errEnded, true},
		{fmt.Errorf("write: %w", nbd.ESHUTDOWN), errEnded, true},
		{errnoOf(block.ErrFenced), errEnded, true},
		{errnoOf(block.ErrClosed), errEnded, true},
		{errnoOf(block.ErrNoSpace), block.ErrNoSpace, false},
		{nbd.EINVAL, errFar, false},
		{nbd.EIO, errFar, false},
		{block.ErrRange, block.ErrRange, false},
		{block.ErrReadOnly, block.ErrReadOnly, false},
		{errors.New("connection reset"), nil, true},
	} {
		got, again := judge(c.err)
		if again != c.again || c.want != nil && !errors.Is(got, c.want) {
			t.Errorf("%v: %v, again %v; want %v, %v", c.err, got, again, c.want, c.again)
		}
	}
}
