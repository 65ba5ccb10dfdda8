//go:build integration

package etcd_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/gob"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"ashlar/internal/catalog/etcd"
	"ashlar/internal/testbed"
)

// memberVariable makes this test's program a member of a cluster and nothing else: etcd.Options as JSON.
const memberVariable = "ASHLAR_TEST_MEMBER"

func TestMain(m *testing.M) {
	if o := os.Getenv(memberVariable); o != "" {
		os.Exit(beMember(o))
	}
	os.Exit(m.Run())
}

// beMember is a member until its input ends.
func beMember(options string) int {
	var r role
	if err := gob.NewDecoder(hex.NewDecoder(strings.NewReader(options))).Decode(&r); err != nil {
		fmt.Println(err)
		return 2
	}
	o := etcd.Options{Dir: r.Dir, Member: &r.Member}
	o.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	s, err := etcd.Open(ctx, o)
	if errors.Is(err, etcd.ErrEmptied) || errors.Is(err, etcd.ErrRemoved) {
		if err = etcd.Rejoin(ctx, o); err == nil {
			s, err = etcd.Open(ctx, o)
		}
		if err == nil {
			err = s.Promote(ctx, o.Member.Name)
		}
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("ready")
	work := func() {}
	if r.Load {
		l := loadFrom(context.Background(), map[string]*etcd.Store{"own": s})
		defer l.cancel()
		work = func() {
			l.mu.Lock()
			defer l.mu.Unlock()
			fmt.Println("load", l.acked, l.unknown, l.last["own"], len(l.errs), l.longest.Milliseconds())
			for _, err := range l.errs {
				fmt.Fprintln(os.Stderr, err)
			}
		}
	}
	// Every line asks for a report.
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		work()
	}
	_ = s.Close()
	return 0
}

// role is what a process is to be.
type role struct {
	Dir    string
	Member etcd.Member
	Load   bool // increment and watch the counter
}

// process is a member in a process of its own.
type process struct {
	cmd   *exec.Cmd
	input io.WriteCloser
	said  chan string

	reader sync.WaitGroup
}

// report is what a process with load has seen.
type report struct{ acked, unknown, last, errs, longestMS int }

func (p *process) report(t *testing.T) (r report) {
	t.Helper()
	if _, err := io.WriteString(p.input, "\n"); err != nil {
		t.Fatal(err)
	}
	line := <-p.said
	if n, err := fmt.Sscanf(line, "load %d %d %d %d %d", &r.acked, &r.unknown, &r.last, &r.errs, &r.longestMS); n != 5 {
		t.Fatalf("report %q: %v", line, err)
	}
	return r
}

// spawn starts a member, in a network namespace if there is one, and returns when it is ready.
func (c *cluster) spawn(n *node, namespace string) *process {
	c.t.Helper()
	m := n.member
	var o bytes.Buffer
	if err := gob.NewEncoder(hex.NewEncoder(&o)).Encode(role{n.dir, m, namespace != ""}); err != nil {
		c.t.Fatal(err)
	}
	args := []string{os.Args[0]}
	if namespace != "" {
		args = append([]string{"ip", "netns", "exec", namespace}, args...)
	}
	p := &process{cmd: exec.Command(args[0], args[1:]...), said: make(chan string, 100)}
	p.cmd.Env = append(os.Environ(), memberVariable+"="+o.String())
	p.cmd.Stderr = c.t.Output()
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		c.t.Fatal(err)
	}
	if p.input, err = p.cmd.StdinPipe(); err != nil {
		c.t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(p.kill)
	p.reader.Go(func() {
		defer close(p.said)
		for in := bufio.NewScanner(out); in.Scan(); {
			p.said <- in.Text()
		}
	})
	return p
}

func (c *cluster) ready(p *process) {
	c.t.Helper()
	select {
	case s := <-p.said:
		if s != "ready" {
			c.t.Fatalf("the member said %q", s)
		}
	case <-time.After(time.Minute):
		c.t.Fatal("the member is not ready after 30 s")
	}
}

func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	p.reader.Wait()
	_ = p.cmd.Wait()
}

// grown is three members in processes: the first begins, the others join.
func (c *cluster) grown(namespace func(int) string) []*process {
	c.t.Helper()
	var ps []*process
	for i, n := range c.nodes {
		if i > 0 {
			n.member.Members = c.peers()
			s := c.guest("helper")
			if _, err := s.AddLearner(c.t.Context(), n.member.Name, n.member.PeerURL); err != nil {
				c.t.Fatal(err)
			}
			defer s.Close()
		}
		p := c.spawn(n, namespace(i))
		c.ready(p)
		ps = append(ps, p)
		if i > 0 {
			s := c.guest("helper")
			defer s.Close()
			if err := s.Promote(c.t.Context(), n.member.Name); err != nil {
				c.t.Fatal(err)
			}
		}
	}
	for _, n := range c.nodes {
		n.member.Members = c.peers()
	}
	return ps
}

func nowhere(int) string { return "" }

// leader returns the index of the node whose member leads.
func (c *cluster) leader(s *etcd.Store) int {
	c.t.Helper()
	leader := -1
	eventually(c.t, time.Minute, "somebody leads", func() bool {
		ms, err := s.Members(c.t.Context())
		if err != nil {
			return false
		}
		leader = slices.IndexFunc(ms, func(m etcd.MemberInfo) bool { return m.Leader })
		return leader >= 0
	})
	return leader
}

// TestMembersKilled: under load from two clients, kill -9 of each member in turn, of all at once, of the leader twice, and one comes back with an emptied disk. Nothing that was
// acknowledged is lost, watches have no gaps.
func TestMembersKilled(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	ps := c.grown(nowhere)
	a, b := c.guest("a"), c.guest("b")
	l := startLoad(t, map[string]*etcd.Store{"a": a, "b": b})
	l.more(50)
	again := func(i int) {
		t.Helper()
		ps[i] = c.spawn(c.nodes[i], "")
	}
	order := []int{0, 1, 2, c.leader(a), -1, -1}
	for _, i := range order {
		if i < 0 {
			i = c.leader(a)
		}
		begin := time.Now()
		ps[i].kill()
		l.more(30)
		t.Logf("n%d killed: 30 more after %v", i+1, time.Since(begin).Round(time.Millisecond))
		again(i)
		c.ready(ps[i])
	}
	begin := time.Now()
	for i := range ps {
		ps[i].kill()
	}
	for i := range ps {
		again(i)
	}
	l.more(30)
	t.Logf("all killed at once: 30 more after %v", time.Since(begin).Round(time.Millisecond))
	for i := range ps {
		c.ready(ps[i])
	}
	ps[1].kill()
	if err := os.RemoveAll(c.nodes[1].dir); err != nil {
		t.Fatal(err)
	}
	l.more(30)
	again(1)
	c.ready(ps[1])
	if err := a.Promote(t.Context(), "n2"); err != nil {
		t.Fatal(err)
	}
	ps[0].kill() // now the one that came back is needed
	l.more(30)
	l.stop(b, "a", "b")
}

// TestMemberCutOff: a leader that is cut off from the others stops being it, and its clients go elsewhere; one that is frozen too; when they are back they follow.
func TestMemberCutOff(t *testing.T) {
	t.Parallel()
	sw, err := testbed.NewSwitch("etcdcut", 4)
	if err != nil {
		t.Fatal(err)
	}
	defer sw.Close()
	c := newCluster(t, 3)
	for i, n := range c.nodes {
		m := &n.member
		ip := sw.Address(i)
		m.PeerListen, m.ClientListen = ip+":9511", ip+":9512"
		m.PeerURL, m.ClientURL = "https://"+m.PeerListen, "https://"+m.ClientListen
		m.Files = c.ca.issue(t, m.Name, time.Hour, net.ParseIP(ip))
	}
	var ps []*process
	for i, n := range c.nodes {
		n.member.Members = c.peers()[:i+1]
		ps = append(ps, c.spawn(n, sw.Namespace(i))) // it joins by itself, as one whose disk was emptied
		c.ready(ps[i])
	}
	for _, n := range c.nodes {
		n.member.Members = c.peers()
	}
	more := func(n int, of ...int) {
		t.Helper()
		want := map[int]int{}
		for _, i := range of {
			want[i] = ps[i].report(t).acked + n
		}
		eventually(t, time.Minute, fmt.Sprintf("%d more increments of each of %v", n, of), func() bool {
			for _, i := range of {
				if ps[i].report(t).acked < want[i] {
					return false
				}
			}
			return true
		})
	}
	more(10, 0, 1, 2)
	for i := range 2 {
		others := []int{(i + 1) % 3, (i + 2) % 3}
		begin := time.Now()
		sw.Isolate(i)
		more(10, others...)
		t.Logf("n%d cut off: the others go on after %v", i+1, time.Since(begin).Round(time.Millisecond))
		eventually(t, time.Minute, "it does not go on", func() bool {
			before := ps[i].report(t).acked
			<-time.After(time.Second)
			return ps[i].report(t).acked == before
		})
		begin = time.Now()
		sw.Heal()
		more(10, 0, 1, 2)
		t.Logf("healed: all go on after %v", time.Since(begin).Round(time.Millisecond))
	}
	// Cut off from one of the others only, in one direction: what it sends is lost.
	sw.Cut(0, 1)
	more(10, 1, 2)
	sw.Heal()
	more(10, 0, 1, 2)
	// Frozen: its kernel still answers.
	if err := ps[0].cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	more(10, 1, 2)
	t.Logf("n1 frozen: the others go on after %v", time.Since(begin).Round(time.Millisecond))
	if err := ps[0].cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	more(10, 0, 1, 2)
	var sum report
	for i, p := range ps {
		r := p.report(t)
		t.Logf("n%d: %+v", i+1, r)
		sum.acked += r.acked
		sum.unknown += r.unknown
		sum.errs += r.errs
	}
	if last := ps[0].report(t).last; sum.errs > 0 || last < sum.acked {
		t.Fatalf("the counter is at least %d; together %+v", last, sum)
	}
}
