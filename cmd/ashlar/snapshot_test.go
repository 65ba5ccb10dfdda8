package main

import (
	"context"
	"io"
	"slices"
	"testing"
	"time"

	"ashlar/internal/api"
	"ashlar/internal/api/client"
	"ashlar/internal/catalog"
)

// TestBorrow: a command that finds a volume attached by another command attaches it for itself too, because the other may be about to take its attachment back: an operation that is on record then would wait for the next
// attachment, whenever that is. What a person attached with a frontend is used as it is.
func TestBorrow(t *testing.T) {
	dir := t.TempDir()
	mem, stop, err := fakeNode(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	c, err := client.New("unix://" + client.Socket(dir))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	tickets := func() []string {
		t.Helper()
		w, _, err := catalog.Read[catalog.VolumeWanted](ctx, mem, catalog.VolumeKey(catalog.Wanted, "v"))
		must(err)
		var ids []string
		for _, k := range w.Tickets {
			ids = append(ids, k.ID)
		}
		return ids
	}
	attached := func(v api.Volume) (bool, error) { return v.State == "attached", nil }
	_, err = c.CreateVolume(ctx, client.NewVolume{Name: "v", Size: "64Mi", Copies: 1, Frontend: "nbd"})
	must(err)
	_, err = c.WaitVolume(ctx, "v", func(v api.Volume) (bool, error) { return v.State == "detached", nil })
	must(err)
	a := newApp(io.Discard, io.Discard, func(string) string { return "" })

	_, err = c.Attach(ctx, "v", client.Attachment{Node: "n1", DisableFrontend: true, ID: "cli-another"})
	must(err)
	_, err = c.WaitVolume(ctx, "v", attached)
	must(err)
	must(a.borrow(ctx, c, "v", func() error {
		_, err := c.Detach(ctx, "v", client.Detachment{ID: "cli-another"})
		if got := tickets(); len(got) != 1 || got[0] == "cli-another" {
			t.Errorf("once the other command is done, %q hold the volume, want one of this command's own", got)
		}
		return err
	}))
	if got := tickets(); len(got) != 0 {
		t.Errorf("afterwards %q hold the volume", got)
	}

	_, err = c.WaitVolume(ctx, "v", func(v api.Volume) (bool, error) { return v.State == "detached", nil })
	must(err)
	_, err = c.Attach(ctx, "v", client.Attachment{Node: "n1", ID: "person"})
	must(err)
	must(a.borrow(ctx, c, "v", func() error {
		if got := tickets(); !slices.Equal(got, []string{"person"}) {
			t.Errorf("beside a person's attachment %q hold the volume", got)
		}
		return nil
	}))
	if got := tickets(); !slices.Equal(got, []string{"person"}) {
		t.Errorf("afterwards %q hold the volume, want the person's", got)
	}
}
