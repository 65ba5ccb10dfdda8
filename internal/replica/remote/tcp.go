package remote

import (
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// tune makes the kernel give up a connection whose peer is gone about as fast as we do (tcp(7)): what was sent and not acknowledged, and, by probes, one on which nothing is said. What cannot be
// set only costs time.
func tune(nc net.Conn, silence time.Duration) {
	for {
		inner, ok := nc.(interface{ NetConn() net.Conn }) // a *tls.Conn, for one
		if !ok {
			break
		}
		nc = inner.NetConn()
	}
	tcp, ok := nc.(*net.TCPConn)
	if !ok {
		return
	}
	_ = tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: max(silence, time.Second), Interval: time.Second, Count: 3})
	rc, err := tcp.SyscallConn()
	if err != nil {
		return
	}
	_ = rc.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(max(2*silence, 2*time.Second).Milliseconds()))
	})
}
