// Package image turns what users bring, files and URLs in foreign formats, into content Ashlar can trust: it fetches,
// verifies, detects, checks and converts. An opened image is a read-only block.Device.
//
// Everything here parses foreign bytes. The rules: nothing is believed before it was compared with the file's length
// and with Limits; an image never names another file; no allocation is proportional to a number in a header unless that number was
// compared first; every refusal is one of the sentinels below, with what was found and what to do about it. It still runs in a process
// of its own (package job), so that what these rules miss cannot hurt guests' I/O.
//
// Read next: Import (the whole way from a source to a device), qcow2_header.go and qcow2_check.go (what is refused and why),
// docs/formats/digest.md (what a digest is).
package image

import (
	"errors"
	"fmt"

	"ashlar/internal/block"
)

// Format names how an image's bytes are laid out in its file.
type Format string

const (
	// Auto stands for "look at the first bytes"; no opened image has it.
	Auto Format = ""
	// Raw is the disk's bytes and nothing else.
	Raw Format = "raw"
	// Qcow2 is QEMU's format, versions 2 and 3, without backing file, external data file or encryption.
	Qcow2 Format = "qcow2"
)

// ParseFormat takes what a user may write for a format; the empty string means Auto. Anything else is ErrUnsupported.
func ParseFormat(s string) (Format, error) {
	switch f := Format(s); f {
	case Auto, Raw, Qcow2:
		return f, nil
	}
	return Auto, fmt.Errorf("image format %q: want raw or qcow2: %w", s, ErrUnsupported)
}

// The ways an image is refused. Each error that leaves this package because of what a source holds, or does, is one of them.
var (
	// ErrFormat: the bytes contradict their own format. The file is damaged or made to deceive.
	ErrFormat = errors.New("not a valid image")
	// ErrUnsupported: the bytes may well be right, but are of a kind that is not taken, on purpose or not yet.
	ErrUnsupported = errors.New("unsupported image")
	// ErrTooLarge: a size is beyond the limit given.
	ErrTooLarge = errors.New("image beyond limits")
	// ErrChecksum: the file as received is not the one that was asked for.
	ErrChecksum = errors.New("checksum mismatch")
	// ErrSource: the source does not exist, cannot be reached, or answers something else than an image.
	ErrSource = errors.New("image source failed")
	// ErrStalled: the source sent nothing for the idle timeout.
	ErrStalled = errors.New("image source stalled")
	// ErrTruncated: the source, or the file, ended before its announced end.
	ErrTruncated = errors.New("image cut short")
)

// Limits bounds what an image may ask for. A zero field means its default.
type Limits struct {
	// FileBytes is the most a source may hold, as received. Default and maximum 16 TiB.
	FileBytes int64 `json:"fileBytes,omitempty"`
	// VirtualBytes is the largest disk an image may describe. Default and maximum 15 TiB, which is the largest layer.
	VirtualBytes int64 `json:"virtualBytes,omitempty"`
	// Expand is how many bytes each byte of a file with compressed clusters may become, beyond the first GiB, which is free. Default 1024:
	// zlib cannot reach it without deceit, a disk that holds the same byte everywhere in zstd clusters can.
	Expand int64 `json:"expand,omitempty"`
}

const (
	kib = int64(1) << 10
	mib = int64(1) << 20
	gib = int64(1) << 30
	tib = int64(1) << 40

	maxFileBytes    = 16 * tib
	maxVirtualBytes = 15 * tib
	defaultExpand   = 1024
	freeExpandBytes = gib
)

// withDefaults fills in what was left out; a limit beyond the maximum, or below zero, becomes the maximum.
func (l Limits) withDefaults() Limits {
	if l.FileBytes <= 0 || l.FileBytes > maxFileBytes {
		l.FileBytes = maxFileBytes
	}
	if l.VirtualBytes <= 0 || l.VirtualBytes > maxVirtualBytes {
		l.VirtualBytes = maxVirtualBytes
	}
	if l.Expand <= 0 {
		l.Expand = defaultExpand
	}
	return l
}

// Info is what is known of an image once its header was checked.
type Info struct {
	Format Format `json:"format"`
	// FileBytes is the length of the file as received.
	FileBytes int64 `json:"fileBytes"`
	// VirtualBytes is the size of the disk as the image states it; for raw, the file's length.
	VirtualBytes int64 `json:"virtualBytes"`
	// DeviceBytes is VirtualBytes rounded up to whole units: the Size of the device. What is added reads as zero.
	DeviceBytes int64 `json:"deviceBytes"`
}

// checkVirtual refuses sizes no disk can have and fills in DeviceBytes.
func (i *Info) checkVirtual(l Limits) error {
	if i.VirtualBytes <= 0 {
		return fmt.Errorf("%s: the disk is empty (0 bytes): %w", i.Format, ErrFormat)
	}
	if i.VirtualBytes > l.VirtualBytes {
		return fmt.Errorf("%s: the disk is %d bytes, the limit is %d: %w", i.Format, i.VirtualBytes, l.VirtualBytes, ErrTooLarge)
	}
	i.DeviceBytes = roundUp(i.VirtualBytes, block.UnitBytes)
	return nil
}

func roundUp(n, to int64) int64 { return (n + to - 1) / to * to }
