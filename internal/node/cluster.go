package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ashlar/internal/agent"
	"ashlar/internal/api"
	"ashlar/internal/catalog"
	"ashlar/internal/catalog/etcd"
	"ashlar/internal/cluster"
	"ashlar/internal/identity"
	"ashlar/internal/plan"
)

// This file is what a node is in its cluster: where it finds the catalogue, what it shows other nodes, and how it becomes another than it is.

// ErrRestart is what Wait returns when the node is to be built anew: close it, and Start it again with the same Config. It is no failure, and guests do not notice.
var ErrRestart = cluster.ErrRestart

// ErrRemoved is what Wait returns when the node was removed from its cluster. It does not help to start it again.
var ErrRemoved = cluster.ErrRemoved

func (n *Node) dir() cluster.Dir { return cluster.Dir(dirOf(n.cfg.DataDir)) }

// dirOf is the cluster directory below a data directory.
func dirOf(dataDir string) string { return filepath.Join(dataDir, "cluster") }

func (n *Node) authorityDir() string { return filepath.Join(n.cfg.DataDir, "identity") }

// embedded tells whether the catalogue's etcd is the nodes' own.
func (n *Node) embedded() bool { return len(n.cfg.Etcd) == 0 }

// loadCluster reads who this node is; state stays nil in a cluster of one.
func (n *Node) loadCluster() error {
	s, err := n.dir().Load()
	if errors.Is(err, cluster.ErrNone) {
		return nil
	}
	if err != nil {
		return err
	}
	if s.Name != n.cfg.Name {
		return fmt.Errorf("%w: this node is called %s in its cluster, and the configuration calls it %s; a name never changes", ErrConfig, s.Name, n.cfg.Name)
	}
	n.state = &s
	if err := cluster.Refresh(n.dir(), s, n.cfg.Now); err != nil {
		return fmt.Errorf("the node's certificate: %w", err)
	}
	files := n.dir().Files()
	files.Now = n.cfg.Now
	files.Changed = func(err error) {
		if err != nil {
			n.cfg.Log.Error("the node's certificate changed and cannot be used; the old one stays", "error", err)
		} else {
			n.cfg.Log.Info("the node shows its new certificate")
		}
	}
	if n.tls, err = identity.OpenNodeTLS(files); err != nil {
		return fmt.Errorf("the node's identity: %w", err)
	}
	n.roster = cluster.OpenRoster(cluster.RosterConfig{Dir: n.dir(), State: s, Log: n.cfg.Log, Changed: func() {
		if store := n.store.Load(); store != nil {
			store.Expel(n.roster.Knows)
		}
	}})
	return nil
}

// settle finishes what joining and leaving the voters began, before anything runs.
func (n *Node) settle(ctx context.Context) error {
	if n.state == nil {
		return nil
	}
	if n.state.Discard != nil {
		if err := n.discard(ctx); err != nil {
			return err
		}
	}
	if n.embedded() && !n.state.Voter {
		// What a member left that the others have forgotten is of no use, and must never be opened again.
		return os.RemoveAll(n.catalogueDir())
	}
	return nil
}

// clusterOptions are how the catalogue is opened by a node that is in a cluster.
func (n *Node) clusterOptions(s cluster.State) etcd.Options {
	f := n.dir().Files()
	files := etcd.Files{Cert: f.CertFile, Key: f.KeyFile, CA: f.CAFile}
	if !s.Voter {
		return etcd.Options{Endpoints: s.Endpoints(), Sync: true, Files: files, Log: n.cfg.Log}
	}
	self := s.Self()
	listen := listenHost(s.Host)
	m := &etcd.Member{
		Name: s.Name, PeerListen: cluster.Address(listen, s.Port, catalog.PortEtcdPeer), ClientListen: cluster.Address(listen, s.Port, catalog.PortEtcdClient),
		PeerURL: self.PeerURL, ClientURL: self.ClientURL, Files: files, Admit: n.roster.Admit,
	}
	for _, x := range s.Members {
		m.Members = append(m.Members, etcd.Peer{Name: x.Name, PeerURL: x.PeerURL, ClientURL: x.ClientURL})
	}
	return etcd.Options{Dir: n.catalogueDir(), Member: m, Log: n.cfg.Log}
}

// listenHost is the address to listen on for a host: etcd takes no names. A name that cannot be resolved is left to fail with what that says.
func listenHost(host string) string {
	if ip := net.ParseIP(host); ip != nil {
		return host
	}
	ctx, cancel := context.WithTimeout(context.Background(), openRetry)
	defer cancel()
	found, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil || len(found) == 0 {
		return host
	}
	return found[0].Unmap().String()
}

// The waits between tries to open the catalogue, and of the whole node when its own member cannot run: one whose disk was full is tried again as soon as there is room for another file of its
// log (64 MiB), which is looked for every roomLook.
const (
	openRetry   = 2 * time.Second
	memberRetry = 5 * time.Minute
	roomLook    = 2 * time.Second
	roomWanted  = 64 << 20
)

// openLate opens the catalogue of a cluster, as long as that takes, and hands it to l. A member of this node's that cannot run is no reason to stop: the others are asked. A node that
// was removed meanwhile is refused by the catalogue, and hears it from the others.
func (n *Node) openLate(ctx context.Context, l *late) error {
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(nil)
	opened := make(chan struct{})
	wg.Go(func() {
		if err := n.removedMeanwhile(ctx, opened); err != nil {
			cancel(err)
		}
	})
	return n.openUntil(ctx, l, opened)
}

// removedMeanwhile asks the other nodes, until the catalogue is open, whether this one still is one of them: cluster.ErrRemoved if not.
func (n *Node) removedMeanwhile(ctx context.Context, opened <-chan struct{}) error {
	if !n.embedded() {
		return nil
	}
	tick := time.NewTicker(openRetry)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-opened:
			return nil
		case <-tick.C:
		}
		if err := cluster.StillThere(ctx, n.tls, *n.state); errors.Is(err, cluster.ErrRemoved) {
			return n.goodbye(err)
		}
	}
}

// goodbye says what can be done with a machine that was removed.
func (n *Node) goodbye(err error) error {
	return fmt.Errorf("%w; to use this machine again, move %s away and start with an empty disk", err, n.cfg.DataDir)
}

func (n *Node) openUntil(ctx context.Context, l *late, opened chan<- struct{}) error {
	options := n.options()
	whom, where := "a majority of the catalogue's voters", strings.Join(n.state.Endpoints(), " ")
	if !n.embedded() {
		whom, where = "the catalogue's etcd", strings.Join(n.cfg.Etcd, " ")
	}
	n.cfg.Log.Info("waiting for "+whom, "voter", n.state.Voter, "members", where)
	l.waits(fmt.Errorf("waiting for %s: %s", whom, where))
	for {
		s, err := etcd.Open(ctx, options)
		if err == nil {
			n.cfg.Log.Info("the catalogue answers")
			close(opened)
			n.store.Store(s) // before l.set lets go of who asks how the member is
			if err := l.set(s); err != nil {
				return err
			}
			return n.watchMember(ctx, s)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		l.waits(fmt.Errorf("waiting for %s (%s): %w", whom, where, err))
		n.cfg.Log.Warn("the catalogue cannot be opened yet; trying again", "error", err)
		if others := n.others(); options.Member != nil && len(others.Endpoints()) > 0 && !errors.Is(err, catalog.ErrUnreachable) {
			n.member.Store(&memberNote{text: "failed: " + err.Error(), failed: true, why: err})
			n.cfg.Log.Error("this node's member of the catalogue cannot run; going on through the others", "error", err)
			if errors.Is(err, etcd.ErrRemoved) || errors.Is(err, etcd.ErrEmptied) {
				// The keeper makes a new place for it, if the node is to have one.
				n.state.Voter = false
				n.member.Store(&memberNote{text: "client"})
			}
			options = n.clusterOptions(others)
			continue
		}
		if !wait(ctx, openRetry) {
			return context.Cause(ctx)
		}
	}
}

// others is this node as one that asks the other voters.
func (n *Node) others() cluster.State {
	s := *n.state
	s.Voter = false
	s.Members = nil
	for _, m := range n.state.Members {
		if m.Name != s.Name {
			s.Members = append(s.Members, m)
		}
	}
	return s
}

// options are how the catalogue is opened.
func (n *Node) options() etcd.Options {
	switch {
	case !n.embedded():
		return etcd.Options{Endpoints: n.cfg.Etcd, Files: n.cfg.EtcdFiles, Log: n.cfg.Log}
	case n.state != nil:
		return n.clusterOptions(*n.state)
	}
	return etcd.Options{Dir: n.catalogueDir(), Log: n.cfg.Log}
}

// memberNote is what the agent reports of this node's member.
type memberNote struct {
	text   string
	failed bool // it is to be tried again
	why    error
}

// watchMember notes how this node's member is. When it stops by itself the store goes on through the others; after a while the node is built anew, to try again.
func (n *Node) watchMember(ctx context.Context, s *etcd.Store) error {
	var why error
	if note := n.member.Load(); note != nil && note.failed {
		why = note.why
	} else {
		ended := s.MemberFailed() // nil, and so never, of a node that has none
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-ended:
		}
		var state etcd.State
		state, why = s.MemberState()
		if n.unseated(ctx, s) { // as the keeper saw to, which is about to have the node built anew, or ended
			n.cfg.Log.Info("this node's member of the catalogue ended, as the records want it", "state", state)
		} else {
			n.cfg.Log.Error("this node's member of the catalogue stopped; going on through the others", "state", state, "error", why)
			// For people, and for every agent to look again. That it cannot be recorded is in the log already.
			_ = catalog.Note(ctx, s, catalog.EventRecord{
				Time: n.cfg.Now().UTC(), Type: catalog.Warning, Kind: catalog.KindNode, Name: n.cfg.Name, Reason: "MemberFailed", Message: "its member of the catalogue stopped",
			})
		}
	}
	if !n.awaitRoom(ctx, why) {
		return context.Cause(ctx)
	}
	return fmt.Errorf("to try again with this node's member of the catalogue: %w", ErrRestart)
}

// unseated tells whether the records want no member on this node: it is being removed, was removed, or another has its seat.
func (n *Node) unseated(ctx context.Context, s *etcd.Store) bool {
	w, _, err := catalog.Read[catalog.NodeWanted](ctx, s, catalog.NodeKey(catalog.Wanted, n.cfg.Name))
	return errors.Is(err, catalog.ErrNotFound) || err == nil && (w.Deleted != nil || !w.Voter)
}

// awaitRoom waits until it is worth trying again with a member that failed; false if ctx ended first.
func (n *Node) awaitRoom(ctx context.Context, why error) bool {
	if !errors.Is(why, unix.ENOSPC) {
		return wait(ctx, memberRetry)
	}
	for wait(ctx, roomLook) {
		var fs unix.Statfs_t
		if err := unix.Statfs(n.catalogueDir(), &fs); err == nil && fs.Bavail*uint64(fs.Bsize) >= roomWanted {
			n.cfg.Log.Info("there is room again for this node's member of the catalogue")
			return true
		}
	}
	return false
}

// memberState is what the agent says of this node's member.
func (n *Node) memberState() string {
	if m := n.member.Load(); m != nil {
		return m.text
	}
	s := n.store.Load()
	if s == nil || !n.embedded() {
		return ""
	}
	switch state, err := s.MemberState(); {
	case state == etcd.StateNone:
		return "client"
	case err != nil:
		return string(state) + ": " + err.Error()
	default:
		return string(state)
	}
}

// memberIs is what this node's member is doing.
func (n *Node) memberIs() etcd.State {
	s := n.store.Load()
	if s == nil {
		return etcd.StateNone
	}
	state, _ := s.MemberState()
	return state
}

// wait waits; false if ctx ended first.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// startCluster runs what a node of a cluster has beside the others: the node port and the keeper.
func (n *Node) startCluster(l *late, ln net.Listener, ledger *agent.Agent, rest http.Handler) {
	server := cluster.NewServer(cluster.ServerConfig{
		Dir: n.dir(), State: *n.state, TLS: n.tls, Catalog: l, Embedded: n.embedded(), Etcd: l, Ledger: ledger.Ledger(),
		REST: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { rest.ServeHTTP(w, api.FromNode(r)) }), Now: n.cfg.Now, Log: n.cfg.Log,
	})
	n.loop("the node port "+ln.Addr().String(), func(ctx context.Context) error { return server.Serve(ctx, ln) })
	n.loop("cluster", l.after(func(ctx context.Context) error {
		keeper := cluster.NewKeeper(cluster.KeeperConfig{
			Dir: n.dir(), State: *n.state, TLS: n.tls, Catalog: l, Embedded: n.embedded(), Etcd: l, Roster: n.guarding(), Member: n.memberIs, Now: n.cfg.Now, Log: n.cfg.Log,
			Rejoin: func(ctx context.Context, s cluster.State) error { return etcd.Rejoin(ctx, n.clusterOptions(s)) },
		})
		err := keeper.Run(ctx)
		if errors.Is(err, cluster.ErrRemoved) {
			err = n.goodbye(err)
			n.endEmpty(ctx, ledger, err)
		}
		return err
	}))
}

// endEmpty ends a removed node as a whole, data process and holder too, if no volume is open there, and returns when it ends; else at once: then serve ends, and what guests have of it goes on.
func (n *Node) endEmpty(ctx context.Context, ag *agent.Agent, why error) {
	data, err := n.findData(ctx)
	if err != nil {
		return
	}
	st, err := data.State(ctx)
	if err != nil || len(st.Volumes) > 0 {
		return
	}
	n.farewell.Store(&why)
	if err := ag.Shutdown(ctx); err != nil {
		n.cfg.Log.Warn("the data process of a removed node does not end", "error", err)
		return
	}
	<-ctx.Done()
}

// stop ends the node because the agent shut it down: in order, or because it was removed.
func (n *Node) stop() {
	if why := n.farewell.Load(); why != nil {
		n.cancel(*why)
	}
	n.cancel(errStopped)
}

// guarding is the roster that is to be kept up to date: of a node that has ports of etcd's.
func (n *Node) guarding() *cluster.Roster {
	if n.state.Voter && n.embedded() {
		return n.roster
	}
	return nil
}

// hold keeps the record that says that this node lives. A node that is built anew lets its lease run on for that time, or every change of what it is would look like a death to the others: then the
// catalogue is closed under it, which gives nothing back.
func (n *Node) hold(ctx context.Context, c catalog.Catalog) error {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return err
	}
	alive := catalog.Alive{Node: n.cfg.Name, BootID: strings.TrimSpace(string(boot)), Version: n.cfg.Version}
	if n.state != nil {
		alive.NodeID = n.state.NodeID
	}
	held, end := context.WithCancel(context.WithoutCancel(ctx))
	context.AfterFunc(ctx, func() {
		if !errors.Is(context.Cause(ctx), ErrRestart) {
			end()
		}
	})
	for {
		alive.Since = n.cfg.Now().UTC()
		value, err := json.Marshal(alive)
		if err != nil {
			return err
		}
		ended := make(chan error, 1)
		n.leases.Go(func() {
			ended <- c.Hold(held, catalog.Holding{Key: catalog.AliveKey(n.cfg.Name), Value: value, TTL: catalog.AliveTTL}, func(catalog.Rev) {})
		})
		select {
		case <-ctx.Done():
			if !errors.Is(context.Cause(ctx), ErrRestart) {
				<-ended // it gives the lease back
			}
			return context.Cause(ctx)
		case err = <-ended:
		}
		n.cfg.Log.Debug("this node is not recorded as alive; trying again", "error", err)
		if !wait(ctx, holdRetry) {
			return context.Cause(ctx)
		}
	}
}

// holdRetry is the wait before a lease that was lost is asked for again.
const holdRetry = 250 * time.Millisecond

// clusterFiles is what the agent tells the data process, and others.
func (n *Node) clusterFiles() *agent.ClusterFiles {
	if n.state == nil {
		return nil
	}
	f := n.dir().Files()
	return &agent.ClusterFiles{
		ClusterID: n.state.ClusterID, NodeID: n.state.NodeID, Host: n.state.Host, Port: n.state.Port, CertFile: f.CertFile, KeyFile: f.KeyFile, CAFile: f.CAFile,
		APIMin: cluster.APIMin, APICurrent: cluster.APICurrent,
	}
}

// forward passes requests on to another node's node port.
func (n *Node) forward(c catalog.Catalog) func(context.Context, string) (http.Handler, error) {
	if n.state == nil {
		return nil
	}
	return func(ctx context.Context, node string) (http.Handler, error) {
		p, err := cluster.PeerOf(ctx, c, node)
		if err != nil {
			return nil, err
		}
		return api.PassTo(&url.URL{Scheme: "https", Host: p.Address}, cluster.Transport(n.tls, p)), nil
	}
}

// membership implements api.Cluster for a node.
type membership struct {
	n       *Node
	catalog catalog.Catalog
}

var _ api.Cluster = membership{}

// Describe implements api.Cluster.
func (m membership) Describe(ctx context.Context) (api.ClusterState, error) {
	c, _, err := catalog.Read[catalog.Cluster](ctx, m.catalog, catalog.ClusterKey())
	if err != nil {
		return api.ClusterState{}, err
	}
	s := api.ClusterState{ID: c.ID, Node: m.n.cfg.Name}
	if st := m.n.state; st != nil {
		s.NodeID, s.Address, s.Fingerprint = st.NodeID, cluster.Address(st.Host, st.Port, 0), identity.Fingerprint(m.n.tls.Authority())
	}
	return s, nil
}

// Init implements api.Cluster.
func (m membership) Init(ctx context.Context, address string) error {
	host, port, err := cluster.ParseAddress(address)
	if err != nil {
		return said(err)
	}
	_, err = cluster.Init(ctx, cluster.InitConfig{
		Dir: m.n.dir(), Authority: m.n.authorityDir(), Catalog: m.catalog, Name: m.n.cfg.Name, Host: host, Port: port, External: !m.n.embedded(), Now: m.n.cfg.Now,
	})
	return m.anew(err)
}

// anew has the node built anew if a change went well, and otherwise says why it did not.
func (m membership) anew(err error) error {
	if err == nil {
		m.n.cancel(ErrRestart)
	}
	return said(err)
}

// said gives an error its code for REST, and keeps its words: a conflict here is no lost race.
func said(err error) error {
	if err == nil || errors.Is(err, catalog.ErrUnreachable) {
		return err
	}
	return api.Because(err, api.Code(codeOf(err)), "%v", err)
}

// Join implements api.Cluster.
func (m membership) Join(ctx context.Context, to, token, address string) error {
	if st := m.n.state; st != nil { // it is done, or cannot be, or its certificate has ended
		ended := cluster.Ended(m.n.tls, m.n.cfg.Now)
		_, err := cluster.Join(ctx, cluster.JoinConfig{Dir: m.n.dir(), To: to, Token: token, Name: st.Name, Host: st.Host, Port: st.Port, Now: m.n.cfg.Now})
		if ended {
			return m.anew(err)
		}
		return said(err)
	}
	host, port, err := cluster.ParseAddress(address)
	if err != nil {
		return said(err)
	}
	cfg := cluster.JoinConfig{Dir: m.n.dir(), To: to, Token: token, Name: m.n.cfg.Name, Host: host, Port: port, Now: m.n.cfg.Now}
	if m.n.embedded() {
		own, _, err := catalog.Read[catalog.Cluster](ctx, m.catalog, catalog.ClusterKey())
		if err != nil {
			return err
		}
		node, _, err := catalog.Read[catalog.NodeWanted](ctx, m.catalog, catalog.NodeKey(catalog.Wanted, m.n.cfg.Name))
		if err != nil {
			return err
		}
		if err := m.nothingHere(ctx); err != nil {
			return said(err)
		}
		cfg.OwnID, cfg.Disks, cfg.Zone = own.ID, node.Disks, node.Zone
	}
	_, err = cluster.Join(ctx, cfg)
	return m.anew(err)
}

// nothingHere refuses to give up a cluster of one in which there is something: cluster.ErrRemains, with what.
func (m membership) nothingHere(ctx context.Context) error {
	var there []string
	for kind, word := range map[catalog.Kind]string{catalog.KindVolume: "volume ", catalog.KindImage: "image "} {
		entries, _, err := m.catalog.List(ctx, kind)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if e.Key.Part == catalog.Wanted {
				there = append(there, word+e.Key.Name)
			}
		}
	}
	data, err := m.n.awaitData(ctx, startPatience)
	if err != nil {
		return err
	}
	st, err := data.State(ctx)
	if err != nil {
		return err
	}
	for _, d := range st.Disks {
		for _, r := range d.Replicas {
			there = append(there, "replica "+r.ReplicaID+" in "+d.Path)
		}
		for _, i := range d.Images {
			there = append(there, "image "+i.ImageID+" in "+d.Path)
		}
		if d.Error != "" {
			there = append(there, "a disk that cannot be read: "+d.Path)
		}
	}
	if len(there) == 0 {
		return nil
	}
	const shown = 5
	text := strings.Join(there[:min(len(there), shown)], ", ")
	if more := len(there) - shown; more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return fmt.Errorf("%w that would be lost by joining: %s; delete it, or join with an empty data directory", cluster.ErrRemains, text)
}

// Readdress implements api.Cluster.
func (m membership) Readdress(ctx context.Context, address string) error {
	host, _, err := cluster.ParseAddress(address)
	if err != nil {
		return said(err)
	}
	// The node is about to listen there: with an address that is yet to come it would not come up again.
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return said(fmt.Errorf("%w: %s is not this machine's (yet): %w; stop serve, give the machine its address, and say this before serve is started again", cluster.ErrAddress, host, err))
	}
	if err := l.Close(); err != nil {
		return err
	}
	return m.anew(cluster.Readdress(m.n.dir(), address))
}

// Token implements api.Cluster.
func (m membership) Token(ctx context.Context, life time.Duration) (string, catalog.Join, error) {
	if m.n.state == nil {
		return "", catalog.Join{}, said(fmt.Errorf("%w yet: `ashlar cluster init --address HOST[:PORT]` opens one", cluster.ErrNone))
	}
	token, record, err := cluster.MakeToken(ctx, m.catalog, m.n.dir(), life, m.n.cfg.Now)
	return token, record, said(err)
}

// FullAddress is HOST:PORT of an address as people give it, with the port that a node has unless another is named; what is no address stays as it is.
func FullAddress(address string) string {
	host, port, err := cluster.ParseAddress(address)
	if err != nil {
		return address
	}
	return cluster.Address(host, port, 0)
}

// Readdress changes where a node whose serve does not run is reached; ErrInUse if it runs (ask it instead), cluster's errors.
func Readdress(ctx context.Context, cfg Config, address string) (err error) {
	if cfg.Name == "" {
		cfg.Name = "node" // it is not asked for
	}
	if err := cfg.check(); err != nil {
		return err
	}
	n := &Node{cfg: cfg}
	n.ctx, n.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	defer func() { err = errors.Join(err, n.Close()) }()
	if _, err := os.Stat(n.dir().Path("node.json")); errors.Is(err, fs.ErrNotExist) {
		return cluster.ErrNone
	}
	if err := n.lock(); err != nil {
		return err
	}
	return cluster.Readdress(n.dir(), address)
}

// errNoRoom: what is to leave has nowhere to go.
var errNoRoom = errors.New("what lies there has nowhere to go")

// canEvict asks plan, with the records as they are now, whether all that lies on a node's disk would find another place.
func canEvict(cat catalog.Catalog) func(ctx context.Context, node, disk string) error {
	return func(ctx context.Context, node, disk string) error {
		entries, _, err := cat.List(ctx, "")
		if err != nil {
			return err
		}
		view := plan.NewView()
		for _, e := range entries {
			if err := view.Apply(catalog.Event{Entry: e}); err != nil {
				return err
			}
		}
		why := plan.RefuseEviction(view, plan.Emptying{Node: node, Disk: disk, API: plan.Window{Min: cluster.APIMin, Current: cluster.APICurrent}})
		const most = 5
		if more := len(why) - most; more > 0 {
			why = append(why[:most], fmt.Sprintf("and %d more", more))
		}
		if len(why) > 0 {
			return fmt.Errorf("%w: %s", errNoRoom, strings.Join(why, "; "))
		}
		return nil
	}
}
