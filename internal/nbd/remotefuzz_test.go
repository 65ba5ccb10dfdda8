package nbd

import (
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"ashlar/internal/block"
)

// FuzzClient answers a client with arbitrary bytes: it must neither panic nor hang, nor take much memory, nor let anything but an error or a whole
// answer come out of a call. The first byte says whether the bytes begin with the greeting or after a good negotiation.
func FuzzClient(f *testing.F) {
	greeting := be.AppendUint16(be.AppendUint64(be.AppendUint64(nil, magicServer), magicOption), 3)
	f.Add(uint8(0), greeting)
	f.Add(uint8(0), append(append([]byte{}, greeting...), negotiated(1<<20)...))
	chunkOf := func(done bool, typ uint16, cookie uint64, p ...byte) []byte {
		head := make([]byte, structuredBytes)
		putChunk(head, chunk{done: done, typ: typ, cookie: cookie, n: len(p)})
		return append(head, p...)
	}
	hole := be.AppendUint32(be.AppendUint64(nil, 0), 8192)
	first := uint64(1 << 8)
	f.Add(uint8(1), chunkOf(true, replyOffsetHole, first, hole...))
	f.Add(uint8(1), append(chunkOf(false, replyOffsetHole, first, hole...), chunkOf(true, replyOffsetHole, first, hole...)...))
	f.Add(uint8(1), chunkOf(true, replyOffsetData, first, append(be.AppendUint64(nil, 0), make([]byte, 8192)...)...))
	f.Add(uint8(1), chunkOf(true, replyError, first, 0, 0, 0, 5, 0, 2, 'n', 'o'))
	f.Add(uint8(2), chunkOf(true, replyBlockStatus, first, 0, 0, 0, 1, 0, 0, 0x10, 0, 0, 0, 0, 3, 255, 255, 255, 255, 0, 0, 0, 0))
	simple := make([]byte, simpleBytes)
	putSimple(simple, first, EIO)
	f.Add(uint8(1), simple)
	f.Add(uint8(2), simple)
	f.Fuzz(func(t *testing.T, mode uint8, p []byte) {
		if len(p) > 1<<20 {
			return
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		talkTo(t, mode, p)
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; n > 64<<20 {
			t.Errorf("%d bytes of a server made the client allocate %d", len(p), n)
		}
	})
}

// negotiated is what a good server says after its greeting to a client that asks for base:allocation.
func negotiated(size uint64) []byte {
	p := appendReply(nil, optStructuredReply, repAck, nil)
	p = appendReply(p, optSetMetaContext, repMetaContext, append([]byte{0, 0, 0, 1}, allocation...))
	p = appendReply(p, optSetMetaContext, repAck, nil)
	info := be.AppendUint64(be.AppendUint16(nil, infoExport), size)
	p = appendReply(p, optGo, repInfo, be.AppendUint16(info, flagHasFlags|flagFlush|flagWriteZeroes))
	return appendReply(p, optGo, repAck, nil)
}

func talkTo(t *testing.T, mode uint8, p []byte) {
	a, b := net.Pipe()
	if err := b.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if mode != 0 {
		greeting := be.AppendUint16(be.AppendUint64(be.AppendUint64(nil, magicServer), magicOption), 3)
		p = append(append(greeting, negotiated(1<<20)...), p...)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := io.Copy(io.Discard, b); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("the client does not give up")
		}
	})
	wg.Go(func() {
		_, _ = b.Write(p)
		_ = b.Close()
	})
	defer wg.Wait()
	c, err := NewClient(t.Context(), a, "x", ClientOptions{})
	if err != nil {
		return
	}
	defer c.Close()
	if mode == 2 {
		extents, err := c.Extents(0, c.Size())
		if err == nil && !covers(extents, 0, min(c.Size(), extents[len(extents)-1].Off+extents[len(extents)-1].N)) {
			t.Errorf("extents %v", extents)
		}
		return
	}
	got := make([]byte, min(8192, c.Size()))
	if _, err := c.ReadAt(got, 0); err != nil && errors.Is(err, block.ErrRange) {
		t.Error(err)
	}
}
