//go:build integration

package blockdev

import (
	"testing"
)

func TestSmoke(t *testing.T) {
	b := newBed(t)
	f := b.frontend()
	if !f.Resends() {
		t.Log("this kernel does not resend")
	}
	dev := b.open(b.file("disk", 256<<20))
	path, err := f.Add(t.Context(), "vol1", dev, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Log(path)
	t.Log(b.command("losetup", "-l"))
	t.Log(b.command("mkfs.ext4", "-q", path))
	t.Log(b.command("fsck.ext4", "-fn", path))
	t.Log(f.Stats())
	if err := f.Remove(t.Context(), "vol1"); err != nil {
		t.Fatal(err)
	}
}
