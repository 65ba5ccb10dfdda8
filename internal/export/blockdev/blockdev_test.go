package blockdev

import (
	"errors"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func TestNames(t *testing.T) {
	for _, name := range []string{"", ".", "..", ".hidden", "a/b", "a\nb", string([]byte{0xff}), string(make([]byte, 300))} {
		if err := checkName(name); !errors.Is(err, ErrName) {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{"db1", "a b", "ä", "x.y"} {
		if err := checkName(name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestConfig(t *testing.T) {
	k := newKeeper(t)
	for name, c := range map[string]Config{
		"no run directory": {Keeper: k, NotHeld: errNotHeld}, "relative": {RunDir: "run", Keeper: k, NotHeld: errNotHeld},
		"relative devices": {RunDir: "/run/x", DevDir: "dev", Keeper: k, NotHeld: errNotHeld},
		"no keeper":        {RunDir: "/run/x", NotHeld: errNotHeld}, "no error": {RunDir: "/run/x", Keeper: k},
	} {
		if _, err := New(c); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	f, err := New(Config{RunDir: "/run/x/", Keeper: k, NotHeld: errNotHeld})
	if err != nil {
		t.Fatal(err)
	}
	if got := f.Path("db1"); got != "/dev/ashlar/db1" {
		t.Error(got)
	}
	if err := f.Resize(t.Context(), "db1"); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if err := f.Detach(t.Context(), "db1"); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
}

func TestParseMounts(t *testing.T) {
	got := parseMounts("42 30 0:39 / /run/a\\040b/fuse/vol rw,nosuid shared:5 - fuse.ashlar ashlar rw,user_id=0\n43 30 7:0 / /mnt rw - ext4 /dev/loop0 rw\nrubbish\n")
	want := []mountInfo{{"0:39", "/run/a b/fuse/vol", "fuse.ashlar", "ashlar"}, {"7:0", "/mnt", "ext4", "/dev/loop0"}}
	if !slices.Equal(got, want) {
		t.Errorf("%+v", got)
	}
}

// TestToolErrors: what the tool's process says had failed is the same value on this side.
func TestToolErrors(t *testing.T) {
	err := error(&toolError{text: "open /dev/loop0: busy", errno: unix.EBUSY})
	if !errors.Is(err, unix.EBUSY) || errors.Is(&toolError{text: "other"}, unix.EBUSY) {
		t.Error(err)
	}
	if code := Tool(t.Context(), []string{"format", "everything"}, nil); code != exitUsage {
		t.Error(code)
	}
}
