package image

import (
	"bytes"
	"fmt"
	"runtime"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
)

// deflateWindowBytes is QEMU's: its reader promises no more than 4 KiB of history.
const deflateWindowBytes = 4 << 10

// newPacker gives the compressor of a qcow2 compression type, appending to dst; nil for none. It may be called concurrently, and gives the same bytes for the same bytes.
func newPacker(name string) (func(dst, cluster []byte) []byte, error) {
	switch name {
	case "":
		return nil, nil
	case "zstd":
		// Without a checksum: QEMU writes none, and a cluster's frame is found by its place.
		e, err := zstd.NewWriter(nil, zstd.WithEncoderCRC(false), zstd.WithEncoderConcurrency(runtime.GOMAXPROCS(0)), zstd.WithEncoderLevel(zstd.SpeedDefault))
		if err != nil {
			return nil, fmt.Errorf("start zstd: %w", err)
		}
		return func(dst, cluster []byte) []byte { return e.EncodeAll(cluster, dst) }, nil
	case "zlib":
		var writers sync.Pool // of *flate.Writer
		return func(dst, cluster []byte) []byte {
			out := bytes.NewBuffer(dst)
			w, _ := writers.Get().(*flate.Writer)
			if w == nil {
				var err error
				if w, err = flate.NewWriterWindow(out, deflateWindowBytes); err != nil {
					panic(err) // the window's size is a constant
				}
			} else {
				w.Reset(out)
			}
			// A bytes.Buffer takes everything.
			w.Write(cluster) //nolint:errcheck
			w.Close()        //nolint:errcheck
			writers.Put(w)
			return out.Bytes()
		}, nil
	}
	return nil, fmt.Errorf("compression %q: want zlib or zstd: %w", name, ErrUnsupported)
}
