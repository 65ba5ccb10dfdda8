package nbd

import (
	"errors"
	"io"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"ashlar/internal/block"
)

// TestFreshState: a client that was told everything by others is served from its first request on, with simple replies; it may be detached as any other, and its end is told to
// whoever serves it.
func TestFreshState(t *testing.T) {
	e := Export{Name: "vol", Device: block.NewMem(1 << 20)}
	servers := pairServers(t, e)
	state, flags, err := FreshState(e)
	if err != nil {
		t.Fatal(err)
	}
	if want := uint16(flagHasFlags | flagFlush | flagFUA | flagTrim | flagWriteZeroes); flags&want != want || flags&(flagReadOnly|flagDF) != 0 {
		t.Errorf("flags %#x", flags)
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	client := os.NewFile(uintptr(fds[1]), "client")
	defer client.Close()
	served := make(chan error, 1)
	serve := func(s *Server, file *os.File, state []byte) {
		s.wg.Go(func() { served <- s.ServeAdopted(file, state) })
	}
	ask := func(cookie uint64) {
		t.Helper()
		p := appendRequest(nil, request{cmd: cmdRead, cookie: cookie, n: 512})
		if _, err := client.Write(p); err != nil {
			t.Fatal(err)
		}
		reply := make([]byte, simpleBytes+512)
		if _, err := io.ReadFull(client, reply); err != nil {
			t.Fatal(err)
		}
		if be.Uint32(reply) != magicSimple || be.Uint32(reply[4:]) != 0 || be.Uint64(reply[8:]) != cookie {
			t.Errorf("reply %x", reply[:simpleBytes])
		}
	}
	serve(servers[0], os.NewFile(uintptr(fds[0]), "server"), state)
	ask(1)
	given := mustDetach(t, servers[0], "vol", 1)
	if err := <-served; !errors.Is(err, ErrServerClosed) {
		t.Errorf("after it was given away: %v", err)
	}
	serve(servers[1], given[0].File, given[0].State)
	ask(2)
	if err := client.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-served; err != nil {
		t.Errorf("after its client left: %v", err)
	}
	if err := servers[0].ServeAdopted(os.Stdin, []byte("{}")); !errors.Is(err, ErrState) {
		t.Errorf("no state: %v", err)
	}
}
