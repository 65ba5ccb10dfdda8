package image

import (
	"context"
	"runtime"

	"golang.org/x/sync/errgroup"
)

// ordered moves items through a pipeline: feed gives them one after the other, do works on several at once, collect takes them in the order they came. Memory is a few
// items a worker. The first error, or the end of ctx, ends it; all calls have returned when it does.
//
// workers is how many do run at once; 0 means one a processor and at least four, because what they do is mostly waiting for the source.
type ordered[T any] struct {
	workers int
	feed    func(emit func(T) error) error
	do      func(T) error
	collect func(T) error
}

type orderedItem[T any] struct {
	item T
	done chan struct{} // closed by the worker
}

func (o ordered[T]) run(ctx context.Context) error {
	workers := o.workers
	if workers <= 0 {
		workers = max(4, runtime.GOMAXPROCS(0))
	}
	work := make(chan orderedItem[T])
	order := make(chan orderedItem[T], 2*workers)
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(work)
		defer close(order)
		return o.feed(func(item T) error {
			i := orderedItem[T]{item, make(chan struct{})}
			for _, queue := range []chan orderedItem[T]{order, work} {
				select {
				case queue <- i:
				case <-gctx.Done():
					return context.Cause(gctx)
				}
			}
			return nil
		})
	})
	for range workers {
		g.Go(func() error {
			for i := range work {
				if err := gctx.Err(); err != nil {
					return context.Cause(gctx)
				}
				if err := o.do(i.item); err != nil {
					return err
				}
				close(i.done)
			}
			return nil
		})
	}
	g.Go(func() error {
		for i := range order {
			select {
			case <-i.done:
			case <-gctx.Done():
				return context.Cause(gctx)
			}
			if err := o.collect(i.item); err != nil {
				return err
			}
		}
		return nil
	})
	if err := g.Wait(); err != nil {
		return err
	}
	return context.Cause(ctx)
}
