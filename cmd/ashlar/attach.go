package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"ashlar/internal/api"
	"ashlar/internal/api/client"
)

// reconnectSeconds is how long a guest's NBD client shall try to connect again: the data process is back in a few seconds when it dies, and requests wait meanwhile.
const reconnectSeconds = 30

func (a *app) volumeAttach() *cobra.Command {
	var at client.Attachment
	var frontend string
	cmd := &cobra.Command{
		Use:   "attach NAME",
		Short: "Make a volume usable on a node, and print what to give to QEMU or libvirt",
		Long: `Attach a volume: it is opened on a node and offered there from now until "ashlar volume detach", also after a reboot: over NBD on a unix socket, or as the block
device /dev/ashlar/NAME. What is printed can be pasted into a command line or a domain's definition. The forms for QEMU and libvirt make the guest's
NBD client connect again for 30 seconds, and its I/O wait meanwhile: a data process that dies is back long before that.`,
		Example: "  ashlar volume attach db1\n  ashlar volume attach db1 -o json | jq -r .attach.uri\n  ashlar volume attach db1 --frontend blockdev   # /dev/ashlar/db1\n  ashlar volume attach db1 --frontend none   # for a revert",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch frontend {
			case "none":
				at.DisableFrontend = true
			case "", "nbd", "blockdev":
				at.Frontend = frontend
			case "iscsi", "vhostuser":
				return api.Failure(api.CodeNotBuilt, "volume %s: frontend %q: not built yet; use nbd or blockdev", args[0], frontend)
			default:
				return api.Failure(api.CodeInvalid, "volume %s: there is no frontend %q; use nbd, blockdev, or none", args[0], frontend)
			}
			return a.withNode(func(c *client.Client) error { return a.attach(cmd.Context(), c, args[0], at) })
		},
	}
	cmd.Flags().StringVar(&at.Node, "node", "", "where; default: the node that answers")
	cmd.Flags().StringVar(&frontend, "frontend", "", "nbd, blockdev, or none; default: as before, at first nbd")
	return a.waits(cmd, time.Minute)
}

func (a *app) attach(ctx context.Context, c *client.Client, name string, at client.Attachment) error {
	v, err := a.attachVolume(ctx, c, name, at)
	if err != nil {
		return err
	}
	var p *paste
	endpoint := v.Controllers[0].Endpoint
	if strings.HasPrefix(endpoint, "/") {
		return a.print(v, func() {
			a.say("volume %s: %s on %s, %s\n\nBlock device:\n  %s", v.Name, v.State, dash(v.Controllers[0].HostID), sizeOf(v.Size), endpoint)
		})
	}
	if endpoint != "" {
		if p, err = newPaste(v.Name, endpoint); err != nil {
			return err
		}
	}
	return a.print(struct {
		api.Volume
		Attach *paste `json:"attach,omitempty"`
	}{v, p}, func() {
		a.say("volume %s: %s on %s, %s", v.Name, v.State, dash(v.Controllers[0].HostID), sizeOf(v.Size))
		if p != nil {
			a.say("\nNBD URI (qemu-img, nbdinfo, nbdcopy; clients that do not connect again by themselves):\n  %s", p.URI)
			a.say("\nQEMU (reconnect-delay=%d):\n  qemu-system-x86_64 …%s", reconnectSeconds, " \\\n    "+strings.Join(p.QEMU, " \\\n    "))
			a.say("\nlibvirt (reconnect delay='%d'):\n%s", reconnectSeconds, indent(p.Libvirt))
		}
	})
}

// attachVolume attaches and, if wanted, waits.
func (a *app) attachVolume(ctx context.Context, c *client.Client, name string, at client.Attachment) (api.Volume, error) {
	if at.Node == "" {
		about, err := c.About(ctx)
		if err != nil {
			return api.Volume{}, err
		}
		at.Node = about.Node
	}
	v, err := c.Attach(ctx, name, at)
	if err != nil || !a.waiting() {
		return v, err
	}
	return a.waitAttached(ctx, c, name, at)
}

func (a *app) waitAttached(ctx context.Context, c *client.Client, name string, at client.Attachment) (api.Volume, error) {
	short, cancel := a.bounded(ctx)
	defer cancel()
	v, err := c.WaitVolume(short, name, func(v api.Volume) (bool, error) {
		if v.Robustness == "faulted" {
			return false, api.Failure(api.CodeSalvage, "volume %s is faulted%s; look with `ashlar volume show %s`", name, because(v), name)
		}
		return v.State == "attached" && (at.DisableFrontend || v.Controllers[0].Endpoint != ""), nil
	})
	return v, stillGoing(err, "volume %s is still attaching%s; `ashlar volume show %s`", name, because(v), name)
}

// paste is what a person gives to the programs that use a volume.
type paste struct {
	URI            string   `json:"uri"`
	Socket         string   `json:"socket"`
	ReconnectDelay int      `json:"reconnectDelay"` // seconds
	QEMU           []string `json:"qemu"`           // arguments, two each
	Libvirt        string   `json:"libvirt"`        // a <disk> element
}

// newPaste makes it from a volume's endpoint, nbd+unix:///EXPORT?socket=PATH.
func newPaste(volume, endpoint string) (*paste, error) {
	u, err := url.Parse(endpoint)
	if err != nil || u.Scheme != "nbd+unix" || u.Query().Get("socket") == "" {
		return nil, api.Failure(api.CodeInternal, "volume %s: its endpoint %q is none that this program knows", volume, endpoint)
	}
	socket, export := u.Query().Get("socket"), strings.TrimPrefix(u.Path, "/")
	node := qemuNode(volume)
	// In QEMU's own syntax a comma ends an option unless it is doubled.
	comma := strings.NewReplacer(",", ",,")
	p := &paste{URI: endpoint, Socket: socket, ReconnectDelay: reconnectSeconds}
	p.QEMU = []string{
		fmt.Sprintf("-blockdev driver=nbd,node-name=%s,server.type=unix,server.path=%s,export=%s,reconnect-delay=%d,discard=unmap,detect-zeroes=unmap", node,
			comma.Replace(socket), comma.Replace(export), reconnectSeconds),
		fmt.Sprintf("-device virtio-blk-pci,drive=%s", node),
	}
	p.Libvirt = fmt.Sprintf(`<disk type='network' device='disk'>
  <driver name='qemu' type='raw' discard='unmap' detect_zeroes='unmap'/>
  <source protocol='nbd' name='%s'>
    <host transport='unix' socket='%s'/>
    <reconnect delay='%d'/>
  </source>
  <target dev='vda' bus='virtio'/>
</disk>`, escape(export), escape(socket), reconnectSeconds)
	return p, nil
}

func escape(s string) string {
	var b strings.Builder
	// A strings.Builder takes everything.
	_ = xml.EscapeText(&b, []byte(s))
	return b.String()
}

// qemuNode makes a node name of QEMU's, which has 31 characters at most: long names are cut and told apart by a sum.
func qemuNode(volume string) string {
	name := "ashlar-" + volume
	if len(name) <= 31 {
		return name
	}
	sum := sha256.Sum256([]byte(volume))
	return name[:22] + "-" + hex.EncodeToString(sum[:4])
}

func indent(s string) string {
	return "  " + strings.ReplaceAll(s, "\n", "\n  ")
}
