package fuse

import (
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TestBuffersAreThere: a buffer's pages are in memory before anything was read into it; a page that is not makes the kernel fail a request with EIO when the process is killed
// while it copies the request there.
func TestBuffersAreThere(t *testing.T) {
	p := NewBuffers(1)
	defer p.Close()
	for range 2 {
		b, err := p.get()
		if err != nil {
			t.Fatal(err)
		}
		in := make([]byte, len(b.mem)/pageBytes)
		if _, _, e := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&b.mem[0])), uintptr(len(b.mem)), uintptr(unsafe.Pointer(&in[0]))); e != 0 {
			t.Fatal(e)
		}
		for i, there := range in {
			if there&1 == 0 {
				t.Fatalf("page %d is not in memory", i)
			}
		}
		if uintptr(unsafe.Pointer(&b.data[0]))%pageBytes != 0 || len(b.head) != headBytes || len(b.data) != MaxWriteBytes {
			t.Errorf("buffer of %d and %d bytes at %p", len(b.head), len(b.data), &b.data[0])
		}
		p.put(b)
	}
}
