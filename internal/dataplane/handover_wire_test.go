package dataplane

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"

	"ashlar/internal/dataplane/client"
)

// bytesConn is a stream of bytes without descriptors.
type bytesConn struct{ *bytes.Reader }

func (c bytesConn) ReadMsgUnix(b, _ []byte) (n, oobn, flags int, addr *net.UnixAddr, err error) {
	n, err = c.Read(b)
	return n, 0, 0, nil, err
}

// peers are two ends of a connection.
func peers(t *testing.T) (a, b *peer) {
	t.Helper()
	ln, err := client.Listen(filepath.Join(shortDir(t), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	out, err := net.DialUnix("unix", nil, ln.Addr().(*net.UnixAddr))
	if err != nil {
		t.Fatal(err)
	}
	in, err := ln.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	a, errA := newPeer(out)
	b, errB := newPeer(in)
	if errA != nil || errB != nil {
		t.Fatal(errA, errB)
	}
	t.Cleanup(func() { a.close(); b.close() })
	return a, b
}

// TestFrames: what is sent arrives, with its descriptor and with no other's, however the stream is cut.
func TestFrames(t *testing.T) {
	a, b := peers(t)
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	large := make([]byte, 8<<20)
	for i := range large {
		large[i] = 'x'
	}
	sent := []frame{{Kind: kindHello, Version: "1"}, {Kind: kindConn, file: f, State: []byte(`{"received":"` + string(large) + `"}`)}, {Kind: kindReady}, {Kind: kindVolume, file: f}}
	done := make(chan error, 1)
	go func() {
		var errs []error
		for _, s := range sent {
			errs = append(errs, a.send(s))
		}
		done <- errors.Join(errs...)
	}()
	for _, want := range sent {
		got, err := b.receive(stepTimeout)
		if err != nil {
			t.Fatal(err)
		}
		if got.Kind != want.Kind || (got.file != nil) != (want.file != nil) || !bytes.Equal(got.State, want.State) {
			t.Errorf("%s arrived as %s, with a descriptor: %v", want.Kind, got.Kind, got.file != nil)
		}
		if got.file != nil {
			x, errX := f.Stat()
			y, errY := got.file.Stat()
			if errX != nil || errY != nil || !os.SameFile(x, y) {
				t.Error("the descriptor is another file's")
			}
			got.drop()
		}
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	a.close()
	if _, err := b.receive(stepTimeout); !errors.Is(err, io.EOF) {
		t.Errorf("after the end: %v, want io.EOF", err)
	}
}

// FuzzFrame: whatever the bytes, reading a frame ends without a panic, with a frame or with an error.
func FuzzFrame(f *testing.F) {
	whole := func(body string, with uint32) []byte {
		return append(binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, uint32(len(body))), with), body...)
	}
	f.Add(whole(`{"kind":"hello","role":"take","version":"1","windows":{"handover":[1,1]}}`, 0))
	f.Add(whole(`{"kind":"volume","conns":-1}`, 1))
	f.Add(whole(`{"kind":""}`, 0))
	f.Add(whole(`[]`, 7))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0})
	f.Add([]byte{0, 0, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := readFrame(bytesConn{bytes.NewReader(data)})
		if err == nil && (got.Kind == "" || got.file != nil) {
			t.Errorf("read %+v", got)
		}
	})
}
