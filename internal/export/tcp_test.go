package export

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
)

func serveTCP(t *testing.T, n *NBD, config *tls.Config) (*TCP, string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := n.ServeTCP(l, config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tcp.Close(); err != nil {
			t.Error(err)
		}
	})
	return tcp, l.Addr().String()
}

func dialTCP(t *testing.T, address string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// TestTCP: one port serves every volume under its name, what is added later too; removing one ends its connections there and no others.
func TestTCP(t *testing.T) {
	ctx := context.Background()
	n := newFrontend(t, t.TempDir(), newLocal(t))
	tcp, address := serveTCP(t, n, nil)
	if _, err := n.Add(ctx, "a", disk(t, "content of a"), Options{}); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Add(ctx, "b", disk(t, "content of b"), Options{ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	if got := tcp.URI("a b"); got != "nbd://"+address+"/a%20b" {
		t.Errorf("URI %s", got)
	}
	conns := map[string]net.Conn{"a": dialTCP(t, address), "b": dialTCP(t, address)}
	for name, c := range conns {
		if got, err := converse(c, name, 12); err != nil || string(got) != "content of "+name {
			t.Errorf("%s: %q %v", name, got, err)
		}
	}
	wantVisit(t, n.Path("a"), "a", "content of a")
	for _, name := range []string{"", "c"} {
		if _, err := converse(dialTCP(t, address), name, 1); err == nil {
			t.Errorf("%q is served", name)
		}
	}
	if st := n.Stats()["a"]; st.Reads != 2 || st.Conns < 1 || st.Accepted != 2 {
		t.Errorf("stats of a: %+v", st)
	}
	if got := len(n.Conns("b")); got != 1 {
		t.Errorf("%d connections to b", got)
	}
	if err := n.Remove(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if _, err := conns["a"].Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("removed, and: %v", err)
	}
	if _, err := converse(dialTCP(t, address), "a", 1); err == nil {
		t.Error("removed, and served")
	}
	if _, err := conns["b"].Write(request(0, 7)); err != nil {
		t.Fatal(err)
	}
	var reply [16 + 7]byte
	if _, err := io.ReadFull(conns["b"], reply[:]); err != nil || string(reply[16:]) != "content" {
		t.Errorf("another volume's connection: %q %v", reply[16:], err)
	}
	if _, err := n.Add(ctx, "a", disk(t, "another a"), Options{}); err != nil {
		t.Fatal(err)
	}
	if got, err := converse(dialTCP(t, address), "a", 9); err != nil || string(got) != "another a" {
		t.Errorf("added again: %q %v", got, err)
	}
	if err := tcp.Drain(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := conns["b"].Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("drained, and: %v", err)
	}
	if c, err := net.Dial("tcp", address); err == nil {
		c.Close()
		t.Error("drained, and somebody listens")
	}
	wantVisit(t, n.Path("b"), "b", "content of b")
	if st := n.Stats()["b"]; st.Reads != 3 {
		t.Errorf("stats of b: %+v", st)
	}
}

// TestTCPRemoveWaitsForCalls: as on a volume's own socket.
func TestTCPRemoveWaitsForCalls(t *testing.T) {
	n := newFrontend(t, t.TempDir(), newLocal(t))
	_, address := serveTCP(t, n, nil)
	dev := stuck{disk(t, "x"), make(chan struct{}), make(chan struct{})}
	if _, err := n.Add(context.Background(), "v", dev, Options{}); err != nil {
		t.Fatal(err)
	}
	c := dialTCP(t, address)
	answered := make(chan error, 1)
	go func() { _, err := converse(c, "v", 1); answered <- err }()
	<-dev.reading
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := n.Remove(ctx, "v"); !errors.Is(err, context.Canceled) {
		t.Errorf("removed during a call: %v", err)
	}
	close(dev.goOn)
	<-answered
}

// TestTCPList: names are volumes' names.
func TestTCPList(t *testing.T) {
	n := newFrontend(t, t.TempDir(), newLocal(t))
	var names []string
	for _, name := range []string{"b", "a"} {
		if _, err := n.Add(context.Background(), name, disk(t, ""), Options{Description: "volume " + name}); err != nil {
			t.Fatal(err)
		}
	}
	for _, e := range (&visitor{n: n}).List() {
		names = append(names, e.Name+"="+e.Description)
	}
	if got := strings.Join(names, ","); got != "a=volume a,b=volume b" {
		t.Errorf("list %s", got)
	}
}
