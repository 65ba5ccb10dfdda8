package catalog

import (
	"fmt"
	"strings"
)

// Prefix stands before every record's key in the store; v1 is the version of the format (docs/formats/catalog.md).
const Prefix = "/ashlar/v1/"

// String is Kind/Part/Name.
func (k Key) String() string { return string(k.Kind) + "/" + string(k.Part) + "/" + k.Name }

// Check tells whether a record can have this key; ErrKey if not.
func (k Key) Check() error {
	switch {
	case k.Kind == "" || strings.Contains(string(k.Kind), "/"):
	case k.Part != Wanted && k.Part != Observed:
	case k.Name == "" || strings.HasPrefix(k.Name, "/") || strings.HasSuffix(k.Name, "/"):
	case strings.Count(k.Name, "/") > 1 || strings.ContainsRune(k.Name, 0):
	default:
		return nil
	}
	return fmt.Errorf("key %q: %w", k.String(), ErrKey)
}

// ParseKey is the inverse of String; ErrKey.
func ParseKey(s string) (Key, error) {
	kind, rest, _ := strings.Cut(s, "/")
	part, name, _ := strings.Cut(rest, "/")
	k := Key{Kind: Kind(kind), Part: Part(part), Name: name}
	return k, k.Check()
}

// VolumeKey names the wanted or observed half of a volume.
func VolumeKey(part Part, name string) Key { return Key{KindVolume, part, name} }

// ImageKey names the wanted or observed half of an image.
func ImageKey(part Part, name string) Key { return Key{KindImage, part, name} }

// NodeKey names the wanted or observed half of a node.
func NodeKey(part Part, name string) Key { return Key{KindNode, part, name} }

// OperationKey names an operation on a volume.
func OperationKey(volume, id string) Key { return Key{KindOperation, Wanted, volume + "/" + id} }

// MembershipKey names a volume's membership record, by the volume's id.
func MembershipKey(volumeID string) Key { return Key{KindMembership, Wanted, volumeID} }

// SettingKey names a changed setting.
func SettingKey(name string) Key { return Key{KindSetting, Wanted, name} }

// EventKey names an event.
func EventKey(id string) Key { return Key{KindEvent, Wanted, id} }

// ClusterKey names the one record of the cluster.
func ClusterKey() Key { return Key{KindCluster, Wanted, "cluster"} }

// JoinKey names a join token.
func JoinKey(name string) Key { return Key{KindJoin, Wanted, name} }

// AliveKey names the record that is there while a node lives.
func AliveKey(node string) Key { return Key{KindAlive, Observed, node} }

// LeaderKey names the record that is there while somebody leads.
func LeaderKey() Key { return Key{KindLeader, Observed, "leader"} }

// held tells whether a record is there only while somebody holds it.
func (k Key) held() bool { return k.Kind == KindAlive || k.Kind == KindLeader }
