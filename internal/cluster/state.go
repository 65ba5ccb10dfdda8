package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/identity"
)

// Dir is the cluster directory of a node, <data-dir>/cluster; docs/formats/cluster.md, section 1.
type Dir string

// The files.
const (
	stateFile   = "node.json"
	caFile      = "ca.crt"
	caKeyFile   = "ca.key"
	pemFile     = "node.pem" // key and certificates in one, so that a crash cannot leave one without the other
	joiningFile = "joining.json"
)

// stateFormat is the version of node.json.
const stateFormat = 1

// maxState bounds what is read of node.json.
const maxState = 1 << 20

// State is node.json: who this node is and where.
type State struct {
	Format    int    `json:"format"`
	ClusterID string `json:"clusterID"`
	NodeID    string `json:"nodeID"`
	Name      string `json:"name"`
	Host      string `json:"host"`
	Port      int    `json:"port"` // the first of four
	// Voter: it keeps a member of the embedded etcd.
	Voter bool `json:"voter"`
	// Members are etcd's, as last seen: where the next start finds the catalogue.
	Members []Member `json:"members"`
	// Discard names the disks of the cluster of its own that the node had before it joined. As long as it is there the old catalogue and the (empty) disks are yet to be
	// discarded, before anything else is done.
	Discard *Discard `json:"discard,omitempty"`
}

// Member is one of the catalogue's etcd.
type Member struct {
	Name      string `json:"name"` // the node's
	PeerURL   string `json:"peerURL"`
	ClientURL string `json:"clientURL"`
}

// nodePort is where the node of a member answers other nodes.
func (m Member) nodePort() (address string, ok bool) {
	u, err := url.Parse(m.PeerURL)
	if err != nil {
		return "", false
	}
	port, err := strconv.Atoi(u.Port())
	return Address(u.Hostname(), port, catalog.PortNode-catalog.PortEtcdPeer), err == nil
}

// Discard is what a node left behind when it joined.
type Discard struct {
	ClusterID string   `json:"clusterID"` // its own, before
	Disks     []string `json:"disks"`     // paths
}

// Path is that of a file in the directory.
func (d Dir) Path(name string) string { return filepath.Join(string(d), name) }

// Load reads node.json. ErrNone if there is none, ErrState, or the file system's error.
func (d Dir) Load() (State, error) {
	var s State
	f, err := os.Open(d.Path(stateFile))
	if errors.Is(err, fs.ErrNotExist) {
		return s, ErrNone
	}
	if err != nil {
		return s, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return s, err
	}
	if info.Size() > maxState {
		return s, fmt.Errorf("%s has %d bytes: %w", f.Name(), info.Size(), ErrState)
	}
	data := make([]byte, info.Size())
	if _, err := f.ReadAt(data, 0); err != nil {
		return s, fmt.Errorf("%s: %w", f.Name(), err)
	}
	if err := json.Unmarshal(data, &s); err != nil {
		return s, fmt.Errorf("%s: %w: %w", f.Name(), ErrState, err)
	}
	if err := s.check(); err != nil {
		return s, fmt.Errorf("%s: %w: %w", f.Name(), ErrState, err)
	}
	return s, nil
}

func (s *State) check() error {
	if s.Format > stateFormat {
		return fmt.Errorf("it has format %d, this build reads up to %d; install a newer version", s.Format, stateFormat)
	}
	if s.Format < 1 || !validID(s.ClusterID) || !validID(s.NodeID) {
		return errors.New("format, clusterID and nodeID are wanted")
	}
	return errors.Join(CheckName(s.Name), checkAddress(s.Host, s.Port))
}

// Save replaces node.json as a whole, durably.
func (d Dir) Save(s State) error {
	s.Format = stateFormat
	if err := s.check(); err != nil {
		return fmt.Errorf("node.json: %w: %w", ErrState, err)
	}
	data, err := json.MarshalIndent(s, "", " ")
	if err != nil {
		return err
	}
	return d.put(stateFile, append(data, '\n'), 0o600)
}

// put replaces a file as a whole, and makes the directory if it is not there.
func (d Dir) put(name string, data []byte, mode fs.FileMode) error {
	if err := os.MkdirAll(string(d), 0o700); err != nil {
		return err
	}
	return identity.WriteFile(d.Path(name), data, mode)
}

// remove removes a file that may be missing.
func (d Dir) remove(name string) error {
	if err := os.Remove(d.Path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Files are those of the node's identity.
func (d Dir) Files() identity.NodeFiles {
	return identity.NodeFiles{CertFile: d.Path(pemFile), KeyFile: d.Path(pemFile), CAFile: d.Path(caFile)}
}

// TLS reads the node's identity; changed is told when its files were renewed (nil: nobody is).
func (d Dir) TLS(changed func(error)) (*identity.NodeTLS, error) {
	f := d.Files()
	f.Changed = changed
	return identity.OpenNodeTLS(f)
}

// Authority opens the cluster's authority, which only voters have (and who founded a cluster on an etcd that was there before); fs.ErrNotExist elsewhere.
func (d Dir) Authority(now func() time.Time) (*identity.Authority, error) {
	return identity.ReadAuthority(d.Path(caKeyFile), now)
}

// Self is the node as a member of etcd.
func (s State) Self() Member {
	return Member{Name: s.Name, PeerURL: "https://" + Address(s.Host, s.Port, catalog.PortEtcdPeer), ClientURL: "https://" + Address(s.Host, s.Port, catalog.PortEtcdClient)}
}

// Identity is the node as its certificate says it.
func (s State) Identity() identity.Node {
	return identity.Node{ClusterID: s.ClusterID, NodeID: s.NodeID, Name: s.Name, Host: s.Host}
}

// Alone is the node as the only member of etcd.
func (s State) Alone() State {
	s.Members = []Member{s.Self()}
	return s
}

// Endpoints are where etcd is asked: this node's own member first.
func (s State) Endpoints() []string {
	var out []string
	if s.Voter {
		out = append(out, s.Self().ClientURL)
	}
	for _, m := range s.Members {
		if m.ClientURL != "" && (!s.Voter || m.Name != s.Name) {
			out = append(out, m.ClientURL)
		}
	}
	return out
}
