package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"
)

// This file is the configuration: one table that the file, the environment, the flags, the example file and the manual all come from. Flags win over the
// environment, the environment over the file, the file over what holds without any of them.

// defaultConfig is read if it exists; a file that was named must exist.
const defaultConfig = "/etc/ashlar/ashlar.toml"

// errConfig: the configuration is wrong; the message names every mistake.
var errConfig = errors.New("bad configuration")

// option is one setting of a node or of its clients.
type option struct {
	key   string // in the file: KEY or SECTION.KEY
	flag  string
	env   string
	about string // sentences for people: what it does, in which unit, what is allowed
	value string // what holds if nobody says anything
	kind  kind
	check func(string) error // nil: everything of its kind
}

// kind is how an option is written in the file.
type kind int

const (
	text    kind = iota // a string
	path                // a string: an absolute path; one that was typed as a flag may be relative
	boolean             // true or false
	list                // an array of strings; commas elsewhere
)

// options is the table. Its order is that of the example file.
func options() []option {
	return []option{
		{key: "name", flag: "name", env: "ASHLAR_NAME", value: hostname(), check: checkNodeName, about: "The node's name in the cluster: letters, digits, dots and dashes. It must not change later."},
		{key: "data-dir", flag: "data-dir", env: "ASHLAR_DATA_DIR", value: "/var/lib/ashlar", kind: path, check: checkAbsolute, about: "Directory of the catalogue and of the first disk. Absolute."},
		{key: "run-dir", flag: "run-dir", env: "ASHLAR_RUN_DIR", value: "/run/ashlar", kind: path, check: checkAbsolute, about: "Directory of sockets and of what belongs to one boot. Absolute and short: a socket's path has 107 bytes at most."},
		{key: "listen", flag: "listen", env: "ASHLAR_LISTEN", value: "127.0.0.1:9500", check: checkListenAddress, about: "TCP address of the REST API, HOST:PORT; none: only the socket in run-dir. Beyond loopback it speaks TLS and asks for a token (ashlar token create)."},
		{key: "require-token", flag: "require-token", env: "ASHLAR_REQUIRE_TOKEN", kind: boolean, value: "false", about: "Ask for a token on plain loopback too, where otherwise every user of this machine may do everything. The socket in run-dir never asks: its mode says who may open it."},
		{key: "etcd", flag: "etcd", env: "ASHLAR_ETCD", kind: list, check: checkEndpoints, about: "Endpoints of an existing etcd. Without any, one is embedded."},
		{key: "etcd-tls.ca", flag: "etcd-ca", env: "ASHLAR_ETCD_CA", kind: path, check: checkAbsoluteOrNone, about: "File with the authority that signed an existing etcd's certificates, PEM."},
		{key: "etcd-tls.certificate", flag: "etcd-certificate", env: "ASHLAR_ETCD_CERTIFICATE", kind: path, check: checkAbsoluteOrNone, about: "File with the certificate that is shown to an existing etcd, PEM."},
		{key: "etcd-tls.key", flag: "etcd-key", env: "ASHLAR_ETCD_KEY", kind: path, check: checkAbsoluteOrNone, about: "File with its private key, PEM. Needed with etcd-tls.certificate."},
		{key: "log.level", flag: "log-level", env: "ASHLAR_LOG_LEVEL", value: "info", check: oneOf("debug", "info", "warn", "error"), about: "What `ashlar serve` logs: debug, info, warn or error."},
		{key: "log.format", flag: "log-format", env: "ASHLAR_LOG_FORMAT", value: "text", check: oneOf("text", "json"), about: "How: text (key=value) or json (one object a line). The data process and the holder log text, to data.log and hold.log in run-dir."},
		{key: "tls.certificate", flag: "tls-certificate", env: "ASHLAR_TLS_CERTIFICATE", kind: path, check: checkAbsoluteOrNone, about: "File with the certificate chain that REST shows beyond loopback, PEM. Without one, the cluster's own authority issues it: clients then need its certificate, DATA-DIR/identity/ca.crt (in a cluster DATA-DIR/cluster/ca.crt)."},
		{key: "tls.key", flag: "tls-key", env: "ASHLAR_TLS_KEY", kind: path, check: checkAbsoluteOrNone, about: "File with its private key, PEM. Needed with tls.certificate."},
		{key: "nbd.listen", flag: "nbd-listen", env: "ASHLAR_NBD_LISTEN", check: checkAddressOrNone, about: "TCP address at which attached volumes are offered over NBD beside their sockets, for example 127.0.0.1:10809. Beyond loopback nbd.certificate, nbd.key and nbd.client-ca are needed."},
		{key: "nbd.certificate", flag: "nbd-certificate", env: "ASHLAR_NBD_CERTIFICATE", kind: path, check: checkAbsoluteOrNone, about: "File with the certificate chain that NBD over TCP shows, PEM."},
		{key: "nbd.key", flag: "nbd-key", env: "ASHLAR_NBD_KEY", kind: path, check: checkAbsoluteOrNone, about: "File with its private key, PEM."},
		{key: "nbd.client-ca", flag: "nbd-client-ca", env: "ASHLAR_NBD_CLIENT_CA", kind: path, check: checkAbsoluteOrNone, about: "File with the authorities that clients' certificates must be signed by, PEM."},
		{key: "data.direct", flag: "direct", env: "ASHLAR_DIRECT", kind: boolean, value: "false", about: "Go around the page cache for guests' data (O_DIRECT). Takes effect when the data process is started again."},
		{key: "data.socket-group", flag: "socket-group", env: "ASHLAR_SOCKET_GROUP", about: "Group that may open the volumes' NBD sockets beside root, for example libvirt-qemu or kvm. Takes effect when the data process is started again."},
		{key: "client.server", flag: "server", env: "ASHLAR_SERVER", check: checkServer, about: "Node that commands speak to: unix:///PATH, http://HOST:PORT or https://HOST:PORT. Without one, the socket in run-dir."},
		{key: "client.token-file", flag: "token-file", env: "ASHLAR_TOKEN_FILE", kind: path, check: checkAbsoluteOrNone, about: "File with the token that commands show to a node beyond loopback. Only its owner should be able to read it."},
		{key: "client.ca-file", flag: "ca-file", env: "ASHLAR_CA_FILE", kind: path, check: checkAbsoluteOrNone, about: "File with the authority that signed that node's certificate, PEM; without one, the system's."},
	}
}

// configFile is a configuration file as read: values by key. Every mistake in it is named at once.
func configFile(name string) (map[string]string, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	tree := map[string]any{}
	if err := toml.Unmarshal(data, &tree); err != nil {
		var at *toml.DecodeError
		if errors.As(err, &at) {
			row, col := at.Position()
			return nil, fmt.Errorf("%w: %s, line %d, column %d: %s", errConfig, name, row, col, at.Error())
		}
		return nil, fmt.Errorf("%w: %s: %w", errConfig, name, err)
	}
	values, problems := map[string]string{}, []string{}
	known := map[string]option{}
	for _, o := range options() {
		known[o.key] = o
	}
	for _, key := range leaves(tree, "") {
		o, ok := known[key]
		if !ok {
			problems = append(problems, fmt.Sprintf("%s: there is no such setting%s", key, nearest(key)))
			continue
		}
		v, err := o.read(at(tree, key))
		if err == nil && o.check != nil {
			err = o.check(v)
		}
		if err != nil {
			problems = append(problems, fmt.Sprintf("%s: %v", key, err))
			continue
		}
		values[key] = v
	}
	if len(problems) > 0 {
		return nil, fmt.Errorf("%w: %s: %s", errConfig, name, strings.Join(problems, "; "))
	}
	return values, nil
}

// leaves are the keys of a tree that are not tables, dotted and sorted.
func leaves(tree map[string]any, prefix string) []string {
	var out []string
	for name, v := range tree {
		if sub, ok := v.(map[string]any); ok && len(sub) > 0 {
			out = append(out, leaves(sub, prefix+name+".")...)
		} else if !ok {
			out = append(out, prefix+name)
		}
	}
	sort.Strings(out)
	return out
}

// at is the value at a dotted key that leaves returned.
func at(tree map[string]any, key string) any {
	for {
		section, rest, ok := strings.Cut(key, ".")
		if sub, isTable := tree[section].(map[string]any); ok && isTable {
			tree, key = sub, rest
			continue
		}
		return tree[key]
	}
}

// read turns what the file says into an option's text.
func (o option) read(v any) (string, error) {
	switch v := v.(type) {
	case string:
		if o.kind == text || o.kind == path {
			return v, nil
		}
	case bool:
		if o.kind == boolean {
			return strconv.FormatBool(v), nil
		}
	case []any:
		if o.kind == list {
			words := make([]string, len(v))
			for i, w := range v {
				s, ok := w.(string)
				if !ok {
					return "", fmt.Errorf("entry %d is not a string", i+1)
				}
				words[i] = s
			}
			return strings.Join(words, ","), nil
		}
	}
	want := map[kind]string{text: "a string in quotes", path: "a string in quotes", boolean: "true or false", list: "an array of strings"}[o.kind]
	return "", fmt.Errorf("it must be %s", want)
}

// nearest suggests the setting somebody may have meant: the one whose last word is the same, or that begins alike.
func nearest(key string) string {
	last := key[strings.LastIndex(key, ".")+1:]
	for _, o := range options() {
		own := o.key[strings.LastIndex(o.key, ".")+1:]
		if own == last || own == strings.ReplaceAll(last, "_", "-") || len(last) > 3 && strings.HasPrefix(own, last[:4]) {
			return fmt.Sprintf(" (did you mean %s?)", o.key)
		}
	}
	return ""
}

// configure gives every flag of a command that was not typed its value from the environment, else from the file, and checks what came together.
func (a *app) configure(cmd *cobra.Command) error {
	name := a.configPath()
	named := name != defaultConfig
	file, err := configFile(name)
	if errors.Is(err, fs.ErrNotExist) && !named {
		err = nil
	} else if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		err = fmt.Errorf("%w: %w", errConfig, err)
	}
	if err != nil && !a.lenient {
		return err
	}
	if err != nil { // a typing mistake must not keep guests' I/O from coming back
		fmt.Fprintf(a.err, "ashlar: %v; going on without the file\n", err)
	}
	var problems []string
	for _, o := range options() {
		f := cmd.Flags().Lookup(o.flag)
		if f == nil {
			continue
		}
		if !f.Changed {
			from, v := "", ""
			if s, ok := file[o.key]; ok {
				v, from = s, name
			}
			if s := a.getenv(o.env); s != "" {
				v, from = s, o.env
				if o.kind == boolean && s == "1" {
					v = "true"
				}
			}
			if from == "" {
				continue
			}
			if err := f.Value.Set(v); err != nil {
				problems = append(problems, fmt.Sprintf("%s (%s): %v", o.key, from, err))
			}
		}
		if f.Changed && o.kind == path && f.Value.String() != "" {
			if whole, err := filepath.Abs(f.Value.String()); err == nil {
				_ = f.Value.Set(whole) // a string takes every string
			}
		}
		if o.check != nil {
			if err := o.check(f.Value.String()); err != nil {
				problems = append(problems, fmt.Sprintf("%s: %v", o.key, err))
			}
		}
	}
	problems = append(problems, contradictions(cmd)...)
	if len(problems) > 0 && !a.lenient {
		return fmt.Errorf("%w: %s", errConfig, strings.Join(problems, "; "))
	}
	return nil
}

// contradictions are settings that make no sense together.
func contradictions(cmd *cobra.Command) []string {
	value := func(flag string) string {
		if f := cmd.Flags().Lookup(flag); f != nil {
			return f.Value.String()
		}
		return ""
	}
	var out []string
	if (value("tls-certificate") == "") != (value("tls-key") == "") {
		out = append(out, "tls.certificate and tls.key: one without the other")
	}
	if (value("nbd-certificate") == "") != (value("nbd-key") == "") {
		out = append(out, "nbd.certificate and nbd.key: one without the other")
	}
	if (value("etcd-certificate") == "") != (value("etcd-key") == "") {
		out = append(out, "etcd-tls.certificate and etcd-tls.key: one without the other")
	}
	address := value("nbd-listen")
	if address != "" && !onLoopback(address) && (value("nbd-certificate") == "" || value("nbd-client-ca") == "") {
		out = append(out, fmt.Sprintf("nbd.listen: %s is beyond loopback, which needs nbd.certificate, nbd.key and nbd.client-ca", address))
	}
	if address == "" && value("nbd-certificate")+value("nbd-key")+value("nbd-client-ca") != "" {
		out = append(out, "nbd.listen: there are certificates for NBD over TCP, but no address")
	}
	if address != "" && address == value("listen") {
		out = append(out, fmt.Sprintf("nbd.listen: %s is REST's address", address))
	}
	if data, run := value("data-dir"), value("run-dir"); data != "" && data == run {
		out = append(out, fmt.Sprintf("data-dir and run-dir: both are %s", data))
	}
	return out
}

// define makes an option a flag of a command.
func (o option) define(cmd *cobra.Command, into *string) {
	cmd.Flags().StringVar(into, o.flag, o.value, o.usage())
}

// usage is what a flag's help says.
func (o option) usage() string {
	about := strings.TrimSuffix(o.about, ".")
	if !strings.HasPrefix(about, "TCP") {
		about = strings.ToLower(about[:1]) + about[1:]
	}
	return about + " (" + o.env + ")"
}

// optionOf finds an option by its flag; one that is not there is a mistake of the program.
func optionOf(flag string) option {
	all := options()
	i := slices.IndexFunc(all, func(o option) bool { return o.flag == flag })
	return all[i]
}

// exampleConfig is the documented file with every setting at what holds without it.
func exampleConfig() string {
	var b strings.Builder
	b.WriteString("# The configuration of Ashlar on this machine. Everything is optional; what is commented out shows what holds without it.\n" +
		"# Flags win over the environment, the environment over this file. `ashlar config check` reads it and names every mistake at once.\n")
	section := ""
	for _, o := range options() {
		key := o.key
		if s, k, ok := strings.Cut(o.key, "."); ok {
			if s != section {
				fmt.Fprintf(&b, "\n[%s]\n", s)
				section = s
			}
			key = k
		}
		fmt.Fprintf(&b, "\n# %s\n# Environment: %s. Flag: --%s.\n", o.about, o.env, o.flag)
		value := strconv.Quote(o.value)
		switch {
		case o.key == "name":
			value = `"kvm1"`
		case o.kind == boolean:
			value = o.value
		case o.kind == list:
			value = "[]"
		}
		fmt.Fprintf(&b, "#%s = %s\n", key, value)
	}
	return b.String()
}

func checkAbsolute(s string) error {
	if !filepath.IsAbs(s) || strings.ContainsAny(s, "\x00\n") {
		return fmt.Errorf("%q is not an absolute path", s)
	}
	return nil
}

func checkAbsoluteOrNone(s string) error {
	if s == "" {
		return nil
	}
	return checkAbsolute(s)
}

func checkNodeName(s string) error {
	bad := s == "" || len(s) > 63 || strings.HasPrefix(s, ".") || strings.HasPrefix(s, "-")
	for _, c := range []byte(s) {
		bad = bad || !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '.' || c == '-')
	}
	if bad {
		return fmt.Errorf("%q is not a name: 1 to 63 letters, digits, dots and dashes", s)
	}
	return nil
}

func checkAddress(s string) error {
	_, port, err := net.SplitHostPort(s)
	if err == nil {
		_, err = net.LookupPort("tcp", port)
	}
	if err != nil {
		return fmt.Errorf("%q is not HOST:PORT", s)
	}
	return nil
}

func checkAddressOrNone(s string) error {
	if s == "" {
		return nil
	}
	return checkAddress(s)
}

func checkListenAddress(s string) error {
	if s == "none" {
		return nil
	}
	return checkAddress(s)
}

// onLoopback tells whether an address can be reached from this machine only. A name other than localhost could come to mean another machine.
func onLoopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.Unmap().IsLoopback()
}

func checkEndpoints(s string) error {
	for e := range strings.SplitSeq(s, ",") {
		if s != "" && !strings.HasPrefix(e, "http://") && !strings.HasPrefix(e, "https://") {
			return fmt.Errorf("%q is not http://HOST:PORT or https://HOST:PORT", e)
		}
	}
	return nil
}

func checkServer(s string) error {
	for _, scheme := range []string{"unix:///", "http://", "https://"} {
		if strings.HasPrefix(s, scheme) {
			return nil
		}
	}
	if s == "" {
		return nil
	}
	return fmt.Errorf("%q is not unix:///PATH, http://HOST:PORT or https://HOST:PORT", s)
}

func oneOf(words ...string) func(string) error {
	return func(s string) error {
		if slices.Contains(words, s) {
			return nil
		}
		return fmt.Errorf("%q is not one of %s", s, strings.Join(words, ", "))
	}
}
