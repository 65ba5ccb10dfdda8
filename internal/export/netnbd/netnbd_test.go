package netnbd

import (
	"errors"
	"slices"
	"testing"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/genetlink/genltest"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const testFamily = 33

// attributes encodes what fn puts in.
func attributes(t *testing.T, fn func(*netlink.AttributeEncoder)) []byte {
	t.Helper()
	e := netlink.NewAttributeEncoder()
	fn(e)
	data, err := e.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// driver answers as the kernel's does: the controller's part, and then what was asked goes to seen.
func driver(t *testing.T, known uint32, seen *[]genetlink.Message) *genetlink.Conn {
	c := genltest.Dial(func(m genetlink.Message, n netlink.Message) ([]genetlink.Message, error) {
		if n.Header.Type == unix.GENL_ID_CTRL {
			if known == 0 {
				return nil, genltest.Error(int(unix.ENOENT))
			}
			return []genetlink.Message{{Data: attributes(t, func(e *netlink.AttributeEncoder) {
				e.String(unix.CTRL_ATTR_FAMILY_NAME, "nbd")
				e.Uint16(unix.CTRL_ATTR_FAMILY_ID, testFamily)
				e.Uint32(unix.CTRL_ATTR_VERSION, 1)
				e.Uint32(unix.CTRL_ATTR_MAXATTR, known)
			})}}, nil
		}
		if n.Header.Type != testFamily || n.Header.Flags&netlink.Acknowledge == 0 {
			t.Errorf("header %+v", n.Header)
		}
		*seen = append(*seen, m)
		if m.Header.Command != cmdConnect {
			return nil, genltest.Error(0)
		}
		index := attributes(t, func(e *netlink.AttributeEncoder) { e.Uint32(attrIndex, 7) })
		return []genetlink.Message{{Header: genetlink.Header{Command: cmdConnect, Version: 1}, Data: index}}, nil
	})
	t.Cleanup(func() { c.Close() })
	return c
}

// TestFind: an absent driver, and one that knows no identifiers, are told from one that can be used.
func TestFind(t *testing.T) {
	for known, want := range map[uint32]error{0: ErrAbsent, attrBackend - 1: ErrAbsent, attrBackend: nil, attrBackend + 5: nil} {
		c, err := find(driver(t, known, nil))
		if !errors.Is(err, want) {
			t.Errorf("%d attributes: %v", known, err)
		}
		if err == nil && (c.family != testFamily || c.version != 1) {
			t.Errorf("%+v", c)
		}
	}
}

// TestWire: what goes over the wire, byte for byte, as include/uapi/linux/nbd-netlink.h lays it out on a little-endian machine.
func TestWire(t *testing.T) {
	var seen []genetlink.Message
	c, err := find(driver(t, attrBackend, &seen))
	if err != nil {
		t.Fatal(err)
	}
	index, err := c.Connect(Device{Identifier: "abc", SizeBytes: 1 << 20, BlockBytes: 512, Flags: 0x16d, Socket: 3, WaitSeconds: 60})
	if err != nil || index != 7 {
		t.Fatalf("%d, %v", index, err)
	}
	if err := c.Reconfigure(Change{Index: 7, Identifier: "abc", SizeBytes: 512, Socket: 4}); err != nil {
		t.Fatal(err)
	}
	if err := c.Reconfigure(Change{Index: 7, Identifier: "abc", SizeBytes: 512, Socket: -1}); err != nil {
		t.Fatal(err)
	}
	if err := c.Disconnect(7); err != nil {
		t.Fatal(err)
	}
	socket := func(fd byte) []byte { return []byte{16, 0, 7, 0x80, 12, 0, 1, 0x80, 8, 0, 1, 0, fd, 0, 0, 0} }
	u64 := func(attr, low, mid, high byte) []byte { return []byte{12, 0, attr, 0, low, mid, high, 0, 0, 0, 0, 0} }
	name := []byte{8, 0, 10, 0, 'a', 'b', 'c', 0}
	number := []byte{8, 0, 1, 0, 7, 0, 0, 0}
	want := []struct {
		cmd  uint8
		data []byte
	}{
		{1, slices.Concat(u64(2, 0, 0, 16), u64(3, 0, 2, 0), u64(4, 0, 0, 0), u64(5, 0x6d, 1, 0), u64(8, 60, 0, 0), name, socket(3))},
		{3, slices.Concat(number, name, u64(2, 0, 2, 0), socket(4))},
		{3, slices.Concat(number, name, u64(2, 0, 2, 0))},
		{2, number},
	}
	if len(seen) != len(want) {
		t.Fatalf("%d messages", len(seen))
	}
	for i, w := range want {
		if seen[i].Header.Command != w.cmd || !slices.Equal(seen[i].Data, w.data) {
			t.Errorf("message %d: command %d\n got %v\nwant %v", i, seen[i].Header.Command, seen[i].Data, w.data)
		}
	}
}

// FuzzReply: no reply makes the parser do anything but answer or refuse.
func FuzzReply(f *testing.F) {
	f.Add([]byte{8, 0, 1, 0, 7, 0, 0, 0})
	f.Add([]byte{8, 0, 2, 0, 7, 0, 0, 0})
	f.Add([]byte{5, 0, 1, 0, 7, 0, 0, 0})
	f.Add([]byte{200, 0, 1, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		index, err := parseIndex(data)
		if err != nil && index != 0 {
			t.Errorf("%d with %v", index, err)
		}
	})
}
