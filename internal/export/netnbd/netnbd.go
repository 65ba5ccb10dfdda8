// Package netnbd tells Linux's nbd driver, over generic netlink, to make block devices of connections to NBD servers, to take another connection for one, to
// change its size, and to let it go.
//
// The protocol is that of include/uapi/linux/nbd-netlink.h and drivers/block/nbd.c. Whoever asks need not stay alive: the driver keeps the connection. A device is told
// from others by the identifier it was made with, which the kernel shows in /sys/block/nbdN/backend; that needs Linux 5.14, and older drivers are
// taken as absent (they lack fixes of reconnecting, too).
//
// Read next: package export/blockdev, whose kernel.go uses it; docs/formats/blockdev.md for what is relied on.
package netnbd

import (
	"errors"
	"fmt"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// ErrAbsent: the kernel has no nbd driver, it is not loaded, or it is older than Linux 5.14.
var ErrAbsent = errors.New("no usable nbd driver in the kernel")

// Commands of the family.
const (
	cmdConnect     = 1
	cmdDisconnect  = 2
	cmdReconfigure = 3
)

// Attributes of the family.
const (
	attrIndex           = 1
	attrSizeBytes       = 2
	attrBlockSizeBytes  = 3
	attrTimeout         = 4
	attrServerFlags     = 5
	attrSockets         = 7
	attrDeadConnTimeout = 8
	attrBackend         = 10
)

// Attributes within attrSockets.
const (
	sockItem = 1
	sockFD   = 1
)

const (
	familyName  = "nbd"
	controlName = unix.GENL_ID_CTRL
)

// Conn is a connection to the driver. Its methods may be called concurrently. They do not wait for I/O of a device, except where they say so.
type Conn struct {
	c       *genetlink.Conn
	family  uint16
	version uint8
}

// Dial finds the driver, or returns ErrAbsent. It loads no module.
func Dial() (*Conn, error) {
	c, err := genetlink.Dial(nil)
	if err != nil {
		return nil, fmt.Errorf("netnbd: generic netlink: %w", err)
	}
	conn, err := find(c)
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return conn, nil
}

// find asks the controller (genl_ctrl) for the family and for the attributes it knows.
func find(c *genetlink.Conn) (*Conn, error) {
	e := netlink.NewAttributeEncoder()
	e.String(unix.CTRL_ATTR_FAMILY_NAME, familyName)
	data, err := e.Encode()
	if err != nil {
		return nil, fmt.Errorf("netnbd: find the driver: %w", err)
	}
	m := genetlink.Message{Header: genetlink.Header{Command: unix.CTRL_CMD_GETFAMILY, Version: 1}, Data: data}
	got, err := c.Execute(m, controlName, netlink.Request)
	if errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("netnbd: %w: it is not there, or not loaded", ErrAbsent)
	}
	if err != nil {
		return nil, fmt.Errorf("netnbd: find the driver: %w", err)
	}
	conn := &Conn{c: c}
	known := uint32(0)
	for _, m := range got {
		d, err := netlink.NewAttributeDecoder(m.Data)
		if err != nil {
			return nil, fmt.Errorf("netnbd: find the driver: %w", err)
		}
		for d.Next() {
			switch d.Type() {
			case unix.CTRL_ATTR_FAMILY_ID:
				conn.family = d.Uint16()
			case unix.CTRL_ATTR_VERSION:
				conn.version = uint8(d.Uint32())
			case unix.CTRL_ATTR_MAXATTR:
				known = d.Uint32()
			}
		}
		if err := d.Err(); err != nil {
			return nil, fmt.Errorf("netnbd: find the driver: %w", err)
		}
	}
	if conn.family == 0 || known < attrBackend {
		return nil, fmt.Errorf("netnbd: %w: it knows attributes up to %d, needed is %d (Linux 5.14)", ErrAbsent, known, attrBackend)
	}
	return conn, nil
}

// Close ends the connection to the driver. Devices stay.
func (c *Conn) Close() error {
	if err := c.c.Close(); err != nil {
		return fmt.Errorf("netnbd: close: %w", err)
	}
	return nil
}

// Device is what Connect makes.
type Device struct {
	// Identifier tells the device from others, in /sys/block/nbdN/backend; required, without newline.
	Identifier string
	// SizeBytes is a multiple of BlockBytes, which is the sector: a power of two from 512 to the page size.
	SizeBytes, BlockBytes int64
	// Flags are the transmission flags of the NBD protocol that a server would tell its client.
	Flags uint16
	// Socket is a descriptor of this process: a connected stream socket, on whose other end a server is in the transmission phase, with simple replies. The driver takes a
	// reference.
	Socket int
	// WaitSeconds is how long requests wait for another connection when this one is dead, before they fail with EIO. Zero: not at all.
	WaitSeconds uint64
}

// Connect makes a block device, on a number that is free, and returns that number. Requests have no time limit. The device stays, for reuse, when it is
// disconnected. Errors are the kernel's, wrapped.
func (c *Conn) Connect(d Device) (index uint32, err error) {
	e := netlink.NewAttributeEncoder()
	e.Uint64(attrSizeBytes, uint64(d.SizeBytes))
	e.Uint64(attrBlockSizeBytes, uint64(d.BlockBytes))
	e.Uint64(attrTimeout, 0)
	e.Uint64(attrServerFlags, uint64(d.Flags))
	e.Uint64(attrDeadConnTimeout, d.WaitSeconds)
	e.String(attrBackend, d.Identifier)
	e.Nested(attrSockets, sockets(d.Socket))
	got, err := c.ask(cmdConnect, e)
	if err != nil {
		return 0, fmt.Errorf("netnbd: connect %s: %w", d.Identifier, err)
	}
	for _, m := range got {
		if m.Header.Command != cmdConnect {
			continue
		}
		if index, err = parseIndex(m.Data); err != nil {
			return 0, fmt.Errorf("netnbd: connect %s: %w", d.Identifier, err)
		}
		return index, nil
	}
	return 0, fmt.Errorf("netnbd: connect %s: the driver did not say which device it is", d.Identifier)
}

// Change is what Reconfigure does to the device with this number and identifier, which is refused (EINVAL) if that is another's or it is not connected.
type Change struct {
	Index      uint32
	Identifier string
	SizeBytes  int64 // the size from now on
	// Socket, if not negative, is a connection in place of one that is dead. The driver says nothing when none is, and closes it: the server reads the end then. Requests that the
	// dead one was sent and did not answer are sent again, each when its timer looks at it (queue/io_timeout).
	Socket int
}

// Reconfigure changes a device that may be in use. Errors are the kernel's, wrapped.
func (c *Conn) Reconfigure(ch Change) error {
	e := netlink.NewAttributeEncoder()
	e.Uint32(attrIndex, ch.Index)
	e.String(attrBackend, ch.Identifier)
	e.Uint64(attrSizeBytes, uint64(ch.SizeBytes))
	if ch.Socket >= 0 {
		e.Nested(attrSockets, sockets(ch.Socket))
	}
	if _, err := c.ask(cmdReconfigure, e); err != nil {
		return fmt.Errorf("netnbd: reconfigure %s: %w", ch.Identifier, err)
	}
	return nil
}

// Disconnect has the device with this number let its connection go: requests that are not answered, and later ones, fail with EIO. It is free when nobody has it open any
// more. It tells the server that it leaves, and waits while that takes nothing. Errors are the kernel's, wrapped.
func (c *Conn) Disconnect(index uint32) error {
	e := netlink.NewAttributeEncoder()
	e.Uint32(attrIndex, index)
	if _, err := c.ask(cmdDisconnect, e); err != nil {
		return fmt.Errorf("netnbd: disconnect nbd%d: %w", index, err)
	}
	return nil
}

func sockets(fd int) func(*netlink.AttributeEncoder) error {
	return func(all *netlink.AttributeEncoder) error {
		all.Nested(sockItem, func(item *netlink.AttributeEncoder) error {
			item.Uint32(sockFD, uint32(fd))
			return nil
		})
		return nil
	}
}

func (c *Conn) ask(cmd uint8, e *netlink.AttributeEncoder) ([]genetlink.Message, error) {
	data, err := e.Encode()
	if err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	m := genetlink.Message{Header: genetlink.Header{Command: cmd, Version: c.version}, Data: data}
	return c.c.Execute(m, c.family, netlink.Request|netlink.Acknowledge)
}

var errReply = errors.New("a reply without the device's number")

// parseIndex takes the number out of a reply to cmdConnect.
func parseIndex(data []byte) (uint32, error) {
	d, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return 0, fmt.Errorf("reply: %w", err)
	}
	index, found := uint32(0), false
	for d.Next() {
		if d.Type() == attrIndex {
			index, found = d.Uint32(), true
		}
	}
	if err := d.Err(); err != nil {
		return 0, fmt.Errorf("reply: %w", err)
	}
	if !found {
		return 0, errReply
	}
	return index, nil
}
