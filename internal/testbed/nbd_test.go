//go:build integration

package testbed_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"

	"ashlar/internal/testbed"
)

// client is a plain NBD client for one request at a time: what was answered, and what was not, is known for certain.
type client struct {
	conn net.Conn
	r    *bufio.Reader
	size int64
	next uint64
}

// Requests of the NBD protocol.
const (
	nbdRead  = 0
	nbdWrite = 1
	nbdFlush = 3
	nbdTrim  = 4
	nbdZero  = 6
)

// errNBD is an answer that is an error; anything else is a broken connection.
var errNBD = errors.New("NBD error")

// dial connects and negotiates, within a limit.
func dial(ctx context.Context, socket, export string, limit time.Duration) (*client, error) {
	d := net.Dialer{}
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(limit))
	c := &client{conn: conn, r: bufio.NewReader(conn)}
	if err := c.negotiate(export); err != nil {
		conn.Close()
		return nil, err
	}
	return c, nil
}

func (c *client) negotiate(export string) error {
	var greeting struct {
		Magic, Option uint64
		Flags         uint16
	}
	if err := binary.Read(c.r, binary.BigEndian, &greeting); err != nil {
		return err
	}
	if greeting.Magic != 0x4e42444d41474943 || greeting.Option != 0x49484156454f5054 {
		return fmt.Errorf("greeting %x: %w", greeting, errNBD)
	}
	const optGo = 7
	msg := binary.BigEndian.AppendUint32(nil, 3) // fixed newstyle, no zeroes
	msg = binary.BigEndian.AppendUint64(msg, greeting.Option)
	msg = binary.BigEndian.AppendUint32(msg, optGo)
	msg = binary.BigEndian.AppendUint32(msg, uint32(4+len(export)+2))
	msg = binary.BigEndian.AppendUint32(msg, uint32(len(export)))
	msg = append(append(msg, export...), 0, 0)
	if _, err := c.conn.Write(msg); err != nil {
		return err
	}
	for {
		var reply struct {
			Magic             uint64
			Option, Type, Len uint32
		}
		if err := binary.Read(c.r, binary.BigEndian, &reply); err != nil {
			return err
		}
		data := make([]byte, reply.Len)
		if _, err := io.ReadFull(c.r, data); err != nil {
			return err
		}
		switch {
		case reply.Type == 1: // ACK
			return nil
		case reply.Type == 3 && len(data) == 12 && data[1] == 0: // INFO, export
			c.size = int64(binary.BigEndian.Uint64(data[2:]))
		case reply.Type&(1<<31) != 0:
			return fmt.Errorf("negotiation: reply %#x %q: %w", reply.Type, data, errNBD)
		}
	}
}

// do sends one request and waits for its answer. errNBD with an errno: the server refused; anything else: there was no answer.
func (c *client) do(kind uint16, off int64, data []byte, n uint32) error {
	c.conn.SetDeadline(time.Now().Add(30 * time.Second))
	c.next++
	msg := binary.BigEndian.AppendUint32(nil, 0x25609513)
	msg = binary.BigEndian.AppendUint16(msg, 0)
	msg = binary.BigEndian.AppendUint16(msg, kind)
	msg = binary.BigEndian.AppendUint64(msg, c.next)
	msg = binary.BigEndian.AppendUint64(msg, uint64(off))
	msg = binary.BigEndian.AppendUint32(msg, n)
	if kind == nbdWrite {
		msg = append(msg, data...)
	}
	if _, err := c.conn.Write(msg); err != nil {
		return err
	}
	var reply struct {
		Magic, Errno uint32
		Cookie       uint64
	}
	if err := binary.Read(c.r, binary.BigEndian, &reply); err != nil {
		return err
	}
	if reply.Magic != 0x67446698 || reply.Cookie != c.next {
		return fmt.Errorf("reply %x to request %d: %w", reply, c.next, errNBD)
	}
	if reply.Errno != 0 {
		return fmt.Errorf("request %d at %d, %d bytes: %w: %w", kind, off, n, errNBD, syscall.Errno(reply.Errno))
	}
	if kind == nbdRead {
		_, err := io.ReadFull(c.r, data)
		return err
	}
	return nil
}

func (c *client) read(off int64, p []byte) error  { return c.do(nbdRead, off, p, uint32(len(p))) }
func (c *client) write(off int64, p []byte) error { return c.do(nbdWrite, off, p, uint32(len(p))) }
func (c *client) flush() error                    { return c.do(nbdFlush, 0, nil, 0) }

func (c *client) close() { c.conn.Close() }

// redial connects as often as it takes.
func redial(ctx context.Context, socket, export string, limit time.Duration) (c *client, err error) {
	var last error
	err = testbed.Until(ctx, limit, func() (bool, error) {
		c, last = dial(ctx, socket, export, limit)
		return last == nil, nil
	})
	if err != nil {
		return nil, fmt.Errorf("connect to %s again: %w: %w", socket, err, last)
	}
	return c, nil
}

func (b *bed) dial(volume string) *client {
	b.Helper()
	c, err := redial(b.ctx, b.socket(volume), volume, 10*time.Second)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(c.close)
	return c
}
