package image

import (
	"bytes"
	"compress/flate"
	"testing"

	"ashlar/internal/block"
	"ashlar/internal/block/blocktest"

	"github.com/klauspost/compress/zstd"
)

// encoding says how encodeQcow2 writes an image.
type encoding struct {
	bits       uint
	compressed bool
	zstd       bool
	extended   bool
}

// encodeQcow2 writes content as a qcow2 image: header, L1, a place for the refcount table, all L2 tables, then the clusters in order. Clusters of zeroes are, in turn,
// left out and marked as zero.
func encodeQcow2(t testing.TB, content []byte, o encoding) []byte {
	t.Helper()
	size := 1 << o.bits
	entry := 8
	f := (&forged{b: make([]byte, size)}).bytes(0, []byte(qcowMagic)).u32(4, 3).u32(20, uint32(o.bits)).u64(24, uint64(len(content)))
	features := uint64(0)
	if o.zstd {
		features |= incompatCompression
		f.bytes(104, []byte{1})
	}
	if o.extended {
		features |= incompatExtendedL2
		entry = 16
	}
	clusters := (len(content) + size - 1) / size
	perTable := size / entry
	tables := (clusters + perTable - 1) / perTable
	l1Clusters := (tables*8 + size - 1) / size
	l2 := (2 + l1Clusters) * size
	f.u64(72, features).u32(96, 4).u32(100, 112).u32(36, uint32(tables)).u64(40, uint64(size)).u64(48, uint64((1+l1Clusters)*size)).u32(56, 1)
	for i := range tables {
		f.u64(size+i*8, uint64(l2+i*size)|copied)
	}
	f.grow(l2 + tables*size)
	pack := packer(t, o.zstd)
	for i := range clusters {
		p := make([]byte, size)
		copy(p, content[i*size:])
		at := l2 + i*entry
		switch {
		case allZero(p) && o.extended:
			f.u64(at+8, uint64(0xf0f0f0f0)<<32)
		case allZero(p):
			f.u64(at, uint64(i%2))
		case o.compressed:
			packed := pack(p)
			if len(packed) >= size {
				f.addCluster(at, p)
				continue
			}
			host := len(f.b)
			sectors := (host+len(packed)-1)/512 - host/512
			f.u64(at, l2Compressed|uint64(sectors)<<(62-(o.bits-8))|uint64(host)).bytes(host, packed)
		default:
			f.addCluster(at, p)
			if o.extended {
				f.u64(at+8, 0xffffffff)
			}
		}
	}
	return f.b
}

func (f *forged) addCluster(at int, p []byte) {
	host := (len(f.b) + len(p) - 1) / len(p) * len(p)
	f.u64(at, uint64(host)|copied).bytes(host, p)
}

// packer gives a function that compresses clusters one after the other.
func packer(t testing.TB, useZstd bool) func([]byte) []byte {
	t.Helper()
	if useZstd {
		w, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
		if err != nil {
			t.Fatal(err)
		}
		return func(p []byte) []byte { return w.EncodeAll(p, nil) }
	}
	w, err := flate.NewWriter(nil, flate.BestSpeed)
	if err != nil {
		t.Fatal(err)
	}
	return func(p []byte) []byte {
		var b bytes.Buffer
		w.Reset(&b)
		w.Write(p)
		w.Close()
		return b.Bytes()
	}
}

// TestConformance: every kind of image is a Device.
func TestConformance(t *testing.T) {
	kinds := map[string]func(testing.TB, []byte) []byte{"raw": func(_ testing.TB, b []byte) []byte { return b }}
	for name, o := range map[string]encoding{
		"512": {bits: 9}, "4k": {bits: 12}, "64k": {bits: 16}, "2M": {bits: 21},
		"512 deflate": {bits: 9, compressed: true}, "64k deflate": {bits: 16, compressed: true}, "2M deflate": {bits: 21, compressed: true},
		"1k zstd": {bits: 10, compressed: true, zstd: true}, "64k zstd": {bits: 16, compressed: true, zstd: true},
		"16k extended": {bits: 14, extended: true}, "64k extended": {bits: 16, extended: true},
	} {
		kinds[name] = func(t testing.TB, b []byte) []byte { return encodeQcow2(t, b, o) }
	}
	for name, encode := range kinds {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			format := Qcow2
			if name == "raw" {
				format = Raw
			}
			blocktest.RunReadOnly(t, blocktest.ReadOnlyConfig{New: func(t testing.TB, content []byte) block.Device {
				dev, err := Open(t.Context(), memFile(t, encode(t, content)), Options{Format: format})
				if err != nil {
					t.Fatal(err)
				}
				return dev
			}})
		})
	}
}

// TestConvertsWhatWasEncoded closes the circle: content, encoded, imported, is the content.
func TestConvertsWhatWasEncoded(t *testing.T) {
	content := padded(rawSample())
	for _, o := range []encoding{{bits: 9}, {bits: 16, compressed: true}, {bits: 21, compressed: true}, {bits: 14, extended: true}} {
		dev, err := Open(t.Context(), memFile(t, encodeQcow2(t, content, o)), Options{})
		if err != nil {
			t.Fatal(err)
		}
		dst := newMemDevice(make([]byte, dev.Size()))
		digest, err := convert(t.Context(), dst, dev, nil)
		if err != nil || !bytes.Equal(dst.b, content) {
			t.Fatalf("%+v: %v", o, err)
		}
		if want, err := Digest(t.Context(), newMemDevice(content)); err != nil || digest != want {
			t.Fatalf("%+v: digest %s, want %s, %v", o, digest, want, err)
		}
	}
}
