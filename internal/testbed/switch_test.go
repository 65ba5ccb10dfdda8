//go:build integration

package testbed_test

import (
	"os/exec"
	"strings"
	"testing"
	"time"

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
	// A datagram there, and what arrived; bash's /dev/udp would say nothing of a loss, and neither must the sender hear of it.
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
	s.Cut(0, 1)
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
