//go:build integration

package testbed_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ashlar/internal/testbed"
)

// TestSwitch wants frames to pass, to be lost in one direction alone, and to be late.
func TestSwitch(t *testing.T) {
	s, err := testbed.NewSwitch("ashlar-switch", 3)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	// A conversation, which needs both directions.
	reach := func(from, to int) (bool, time.Duration) {
		listen := exec.Command("nsenter", "--net=/var/run/netns/"+s.Namespace(to), "timeout", "5", "busybox", "nc", "-l", "-p", "7000", "-w", "3")
		var got strings.Builder
		listen.Stdout = &got
		if err := listen.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { listen.Process.Kill(); listen.Wait() }()
		deadline := time.Now().Add(1500 * time.Millisecond)
		for time.Now().Before(deadline) {
			start := time.Now()
			call := exec.Command("nsenter", "--net=/var/run/netns/"+s.Namespace(from), "busybox", "nc", "-w", "1", s.Address(to), "7000")
			call.Stdin = strings.NewReader("hello\n")
			if call.Run() == nil {
				return true, time.Since(start)
			}
		}
		return false, 0
	}
	for from := range 3 {
		for to := range 3 {
			if from == to {
				continue
			}
			if ok, _ := reach(from, to); !ok {
				t.Errorf("%d does not reach %d", from, to)
			}
		}
	}
	var ends []net.PacketConn // one in each namespace
	for i := range 3 {
		ends = append(ends, listenThere(t, s.Namespace(i), s.Address(i)+":7001"))
	}
	// A datagram there; neither its sender nor its receiver hears of a loss.
	arrives := func(from, to int, within time.Duration) bool {
		t.Helper()
		text := []byte(fmt.Sprintf("from %d", from))
		if _, err := ends[from].WriteTo(text, &net.UDPAddr{IP: net.ParseIP(s.Address(to)), Port: 7001}); err != nil {
			t.Fatal(err)
		}
		if err := ends[to].SetReadDeadline(time.Now().Add(within)); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 100)
		n, _, err := ends[to].ReadFrom(got)
		return err == nil && string(got[:n]) == string(text)
	}
	s.Cut(0, 1)
	if arrives(0, 1, 500*time.Millisecond) {
		t.Error("a datagram came through a cut")
	}
	for _, way := range [][2]int{{1, 0}, {0, 2}, {2, 1}} {
		if !arrives(way[0], way[1], 5*time.Second) {
			t.Errorf("nothing of %d arrives at %d, which was not cut", way[0], way[1])
		}
	}
	if ok, _ := reach(0, 1); ok {
		t.Error("0 reaches 1 through a cut")
	}
	if ok, _ := reach(1, 0); ok {
		t.Error("1 has a conversation with 0, who cannot answer")
	}
	if ok, _ := reach(0, 2); !ok {
		t.Error("0 does not reach 2, which was not cut")
	}
	s.Heal()
	s.Delay(0, 1, 50*time.Millisecond)
	if ok, took := reach(0, 1); !ok || took < 50*time.Millisecond {
		t.Errorf("late frames: %v, %v", ok, took)
	}
	s.Isolate(2)
	if ok, _ := reach(0, 2); ok {
		t.Error("0 reaches 2, who is alone")
	}
}

// listenThere opens a UDP socket in a network namespace; a socket stays where it was opened. It is closed with the test.
func listenThere(t *testing.T, namespace, address string) net.PacketConn {
	t.Helper()
	there, err := os.Open("/var/run/netns/" + namespace)
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()
	opened, failed := make(chan net.PacketConn, 1), make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with this, and nothing else ever runs in the wrong network
		err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET)
		var conn net.PacketConn
		if err == nil {
			conn, err = net.ListenPacket("udp4", address)
		}
		opened <- conn
		failed <- err
	}()
	conn, err := <-opened, <-failed
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}
