package image

import (
	"bytes"
	"fmt"
)

// headBytes is how much of a source Detect wants to see.
const headBytes = 4096

// foreign lists what is recognised only to be refused with advice. Order matters only where one magic begins another.
var foreign = []struct {
	name   string
	off    int
	magic  string
	advice string
}{
	{"VMDK", 0, "KDMV", convertAdvice},
	{"VMDK", 0, "COWD", convertAdvice},
	{"VMDK", 0, "# Disk DescriptorFile", convertAdvice},
	{"VHDX", 0, "vhdxfile", convertAdvice},
	{"VHD", 0, "conectix", convertAdvice},
	{"VDI", 0x40, "\x7f\x10\xda\xbe", convertAdvice},
	{"QED", 0, "QED\x00", convertAdvice},
	{"Parallels", 0, "WithoutFreeSpace", convertAdvice},
	{"Parallels", 0, "WithouFreSpacExt", convertAdvice},
	{"gzip", 0, "\x1f\x8b", unpackAdvice},
	{"xz", 0, "\xfd7zXZ\x00", unpackAdvice},
	{"zstd", 0, "\x28\xb5\x2f\xfd", unpackAdvice},
	{"bzip2", 0, "BZh", unpackAdvice},
	{"zip", 0, "PK\x03\x04", unpackAdvice},
	{"7z", 0, "7z\xbc\xaf\x27\x1c", unpackAdvice},
}

const (
	qcowMagic     = "QFI\xfb"
	convertAdvice = `convert it first: "qemu-img convert -O qcow2 IN OUT"`
	unpackAdvice  = "unpack it first, or pack the disk itself with gzip, xz or zstd, once"
)

// Detect tells an image's format by its first bytes (4096 or the whole file, if that is shorter). What is neither qcow2 nor known to be something
// else is Raw. It says nothing of packed files, which DetectWrapper knows: here they are content, and refused. Formats that are known and not taken are ErrUnsupported; a web page, which is what a wrong URL often gives, is ErrFormat.
// Whoever wants the bytes taken as they are says Raw instead of asking.
func Detect(head []byte) (Format, error) {
	if bytes.HasPrefix(head, []byte(qcowMagic)) {
		return Qcow2, nil
	}
	for _, f := range foreign {
		if len(head) >= f.off && bytes.HasPrefix(head[f.off:], []byte(f.magic)) {
			return Auto, fmt.Errorf("looks like %s; %s: %w", f.name, f.advice, ErrUnsupported)
		}
	}
	text := bytes.ToLower(bytes.TrimLeft(head, " \t\r\n\ufeff"))
	for _, tag := range []string{"<!doctype html", "<html", "<?xml"} {
		if bytes.HasPrefix(text, []byte(tag)) {
			return Auto, fmt.Errorf("looks like a web page, not a disk; check the URL: %w", ErrFormat)
		}
	}
	return Raw, nil
}

// resolve applies a user's wish to what the bytes say.
func resolve(wish Format, head []byte) (Format, error) {
	if wish == Raw {
		return Raw, nil
	}
	found, err := Detect(head)
	if err != nil {
		return Auto, err
	}
	if wish == Qcow2 && found != Qcow2 {
		return Auto, fmt.Errorf("asked for qcow2, but the file does not begin with its magic: %w", ErrFormat)
	}
	return found, nil
}
