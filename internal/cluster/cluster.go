// Package cluster makes one cluster of nodes: it founds one (Init), brings a machine into one that is open (Join), answers other nodes (Server), and keeps what a node is in its
// cluster as the records want it (Keeper): its certificate, its member of the catalogue's etcd, its address. docs/formats/cluster.md is the normative page (files, ports, wire);
// decision 0016 says why it is as it is.
//
// It knows catalogue, identity and the wire of membership records, and nothing of volumes. internal/node wires it: whenever Keeper finds that the node must be another than it
// is, it ends with ErrRestart, and the node is built anew from node.json.
//
// Read next: state.go (the files), join.go (both ends of joining), server.go (the node port), keeper.go.
package cluster

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
)

var (
	// ErrNone: this node is in no cluster but its own, which listens nowhere.
	ErrNone = errors.New("this node is in no cluster")
	// ErrIn: this node is in a cluster already.
	ErrIn = errors.New("this node is in a cluster already")
	// ErrState: a file of the cluster directory does not hold what it should.
	ErrState = errors.New("not what a file of the cluster directory should hold")
	// ErrAddress: an address that no node can have.
	ErrAddress = errors.New("bad address")
	// ErrRestart: the node must be built anew from node.json. It is no failure.
	ErrRestart = errors.New("the node has changed and is built anew")
	// ErrRemoved: the cluster has no record of this node any more.
	ErrRemoved = errors.New("this node was removed from its cluster")
	// ErrRemains: what is on this machine would be lost if it joined.
	ErrRemains = errors.New("there is something on this machine")
	// ErrClock: this machine's clock and another node's are too far apart.
	ErrClock = errors.New("the clocks are too far apart")
)

// The window of versions of the wire between nodes that this build speaks.
const (
	APIMin     = 1
	APICurrent = 1
)

// DefaultPort is the first of a node's four ports unless it was given another.
const DefaultPort = 9510

// lastPort is the highest first port: three more follow it.
const lastPort = 65535 - 3

// MaxVoters is how many nodes keep the catalogue.
const MaxVoters = 3

// ParseAddress reads HOST or HOST:PORT as people give it; without a port it is DefaultPort. ErrAddress.
func ParseAddress(s string) (host string, port int, err error) {
	host, port = s, DefaultPort
	if h, p, err := net.SplitHostPort(s); err == nil {
		host = h
		if port, err = strconv.Atoi(p); err != nil {
			return "", 0, fmt.Errorf("%w: %q: the port is a number", ErrAddress, s)
		}
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	return host, port, checkAddress(host, port)
}

// checkAddress wants a host that other machines could reach, as far as that can be seen, and a port with room for three more.
func checkAddress(host string, port int) error {
	switch ip, err := netip.ParseAddr(host); {
	case err == nil && (ip.IsUnspecified() || ip.IsMulticast() || ip.Zone() != ""):
		return fmt.Errorf("%w: %s is no address that another machine could use for this one", ErrAddress, host)
	case err != nil && !hostName(host):
		return fmt.Errorf("%w: %.80q is neither an IP address nor a host name", ErrAddress, host)
	case port < 1 || port > lastPort:
		return fmt.Errorf("%w: port %d: a node has four ports in a row, so 1 to %d", ErrAddress, port, lastPort)
	}
	return nil
}

// hostName tells whether s could be a host's name: dotted labels of letters, digits and dashes (RFC 1123 2.1).
func hostName(s string) bool {
	if len(s) > 253 {
		return false
	}
	digits := true
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for _, c := range []byte(label) {
			if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-') {
				return false
			}
			digits = digits && '0' <= c && c <= '9'
		}
	}
	return !digits // 1.2.3 would be an address that is none
}

// CheckName wants a node's name: 1 to 63 letters, digits, dots and dashes.
func CheckName(s string) error {
	bad := s == "" || len(s) > 63 || s[0] == '.' || s[0] == '-'
	for _, c := range []byte(s) {
		bad = bad || !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '.' || c == '-')
	}
	if bad {
		return fmt.Errorf("%.80q is not a node's name: 1 to 63 letters, digits, dots and dashes", s)
	}
	return nil
}

// validID tells whether s is 32 lower-case hex digits.
func validID(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == 16 && hex.EncodeToString(b) == s
}

// newID makes an id. Ids are never used again.
func newID() string {
	var b [16]byte
	rand.Read(b[:]) //nolint:errcheck // it cannot fail
	return hex.EncodeToString(b[:])
}

// Address is HOST:PORT of one of a node's ports.
func Address(host string, port, offset int) string {
	return net.JoinHostPort(host, strconv.Itoa(port+offset))
}
