package image

import (
	"errors"
	"strings"
	"testing"
)

// TestDetect names what is recognised; a raw disk may begin with anything else, a partition table or an ISO's zeroes.
func TestDetect(t *testing.T) {
	at := func(off int, s string) []byte {
		return []byte(strings.Repeat("\x00", off) + s + strings.Repeat("\x00", 100))
	}
	for _, c := range []struct {
		head []byte
		want Format
		err  error
	}{
		{at(0, "QFI\xfb\x00\x00\x00\x03"), Qcow2, nil},
		{at(510, "\x55\xaa"), Raw, nil},
		{at(0, ""), Raw, nil},
		{nil, Raw, nil},
		{at(0, "LUKS\xba\xbe"), Raw, nil},
		{at(0, "KDMV"), Auto, ErrUnsupported},
		{at(0, "# Disk DescriptorFile"), Auto, ErrUnsupported},
		{at(0, "vhdxfile"), Auto, ErrUnsupported},
		{at(0, "conectix"), Auto, ErrUnsupported},
		{at(0x40, "\x7f\x10\xda\xbe"), Auto, ErrUnsupported},
		{at(0, "\x1f\x8b\x08"), Auto, ErrUnsupported},
		{at(0, "\xfd7zXZ\x00"), Auto, ErrUnsupported},
		{at(0, "\x28\xb5\x2f\xfd"), Auto, ErrUnsupported},
		{[]byte("\r\n  <!DocType HTML>"), Auto, ErrFormat},
	} {
		got, err := Detect(c.head)
		if got != c.want || !errors.Is(err, c.err) || (err == nil) != (c.err == nil) {
			t.Errorf("%.12q: %q, %v", c.head, got, err)
		}
	}
	if _, err := ParseFormat("vmdk"); !errors.Is(err, ErrUnsupported) {
		t.Error(err)
	}
}
