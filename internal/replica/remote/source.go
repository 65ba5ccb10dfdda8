package remote

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"ashlar/internal/block"
)

// OpenSource opens something on another node that is only read, an image or a layer's own units: "image/DISKID/IMAGEID", "layer/REPLICAID/LAYERID"; its info is what the Host there says of it. The
// Device connects again by itself; its calls wait while the peer is away, until Close. Extents of a layer say what it does not have: Absent. ErrAway when nobody answers before ctx ends;
// ErrUnknown; ErrVersion; what the Host there says.
func OpenSource(ctx context.Context, dial Dial, name string) (block.Device, json.RawMessage, error) {
	if !validSource(name) {
		return nil, nil, fmt.Errorf("remote source %q: no such name: %w", name, ErrUnknown)
	}
	cfg := Config{Dial: dial}.defaults()
	s := &source{talker: newTalker(cfg), name: exportName{kind: kindSource, source: name}, own: true}
	var info json.RawMessage
	s.check = func(ctx context.Context) error {
		a, err := s.talker.ask(ctx, "source", question{Source: name}, nil)
		if err == nil {
			info = a.Info
		}
		return err
	}
	err := s.describe(ctx)
	said := info // later connections may ask again
	if err == nil {
		err = s.open(ctx, cfg)
	}
	if err != nil {
		s.talker.close()
		return nil, nil, fmt.Errorf("open remote source %s: %w", name, err)
	}
	return s, said, nil
}

// describe asks what the source is, until it is answered or ctx ends.
func (s *source) describe(ctx context.Context) error {
	for wait := retryFirst; ; wait = min(2*wait, retryMost) {
		err := s.check(ctx)
		if err == nil || !errors.Is(err, errLost) && !errors.Is(err, block.ErrClosed) {
			return err
		}
		if cause := rest(ctx, wait); cause != nil {
			return fmt.Errorf("%w: %w: %w", ErrAway, cause, err)
		}
	}
}
