// Command packaging builds Ashlar's Debian package: the program, its units, manual pages, completions, the documented configuration, alerts and a dashboard. It needs
// dpkg-deb and nothing else. `make deb` calls it.
//
// What stands beside this file is what is packed: *.service and ashlar.tmpfiles for systemd, ashlar.toml (which `ashlar config example` prints), debian/ with the scripts
// that dpkg runs.
package main

import (
	"compress/gzip"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
)

func main() {
	binary := flag.String("ashlar", "bin/ashlar", "the program")
	version := flag.String("version", "", "the package's version; default: the program's")
	out := flag.String("out", "dist", "directory of the package")
	flag.Parse()
	name, err := build(*binary, *version, *out)
	if err != nil {
		fmt.Fprintln(os.Stderr, "packaging:", err)
		os.Exit(1)
	}
	fmt.Println(name)
}

// file is one file of the package.
type file struct {
	from, to string
	mode     fs.FileMode
}

func files(binary string) []file {
	return []file{
		{binary, "usr/bin/ashlar", 0o755},
		{"packaging/ashlar.service", "lib/systemd/system/ashlar.service", 0o644},
		{"packaging/ashlar-hold.service", "lib/systemd/system/ashlar-hold.service", 0o644},
		{"packaging/ashlar-data@.service", "lib/systemd/system/ashlar-data@.service", 0o644},
		{"packaging/ashlar.tmpfiles", "usr/lib/tmpfiles.d/ashlar.conf", 0o644},
		{"packaging/ashlar.toml", "etc/ashlar/ashlar.toml", 0o644},
		{"packaging/ashlar.toml", "usr/share/doc/ashlar/ashlar.toml.example", 0o644},
		{"packaging/alerts.yaml", "usr/share/doc/ashlar/alerts.yaml", 0o644},
		{"packaging/dashboard.json", "usr/share/doc/ashlar/dashboard.json", 0o644},
		{"README.md", "usr/share/doc/ashlar/README.md", 0o644},
		{"LICENSE", "usr/share/doc/ashlar/copyright", 0o644},
		{"packaging/debian/postinst", "DEBIAN/postinst", 0o755},
		{"packaging/debian/prerm", "DEBIAN/prerm", 0o755},
		{"packaging/debian/postrm", "DEBIAN/postrm", 0o755},
		{"packaging/debian/config", "DEBIAN/config", 0o755},
		{"packaging/debian/templates", "DEBIAN/templates", 0o644},
	}
}

// build stages the tree in a scratch directory and packs it.
func build(binary, version, out string) (string, error) {
	if version == "" {
		text, err := exec.Command(binary, "version").Output()
		if words := strings.Fields(string(text)); err == nil && len(words) > 1 {
			version = words[1]
		} else {
			return "", fmt.Errorf("%s does not say its version: %w", binary, err)
		}
	}
	root, err := os.MkdirTemp("", "ashlar-deb-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(root)
	if err := os.Chmod(root, 0o755); err != nil {
		return "", err
	}
	if err := stage(root, binary, debianVersion(version)); err != nil {
		return "", err
	}
	if err := os.MkdirAll(out, 0o755); err != nil {
		return "", err
	}
	name := filepath.Join(out, fmt.Sprintf("ashlar_%s_%s.deb", debianVersion(version), runtime.GOARCH))
	if text, err := exec.Command("dpkg-deb", "--root-owner-group", "-Zzstd", "--build", root, name).CombinedOutput(); err != nil {
		return "", fmt.Errorf("dpkg-deb: %w: %s", err, text)
	}
	return name, nil
}

func stage(root, binary, version string) error {
	size := int64(0)
	for _, f := range files(binary) {
		data, err := os.ReadFile(f.from)
		if err != nil {
			return err
		}
		size += int64(len(data))
		if err := put(filepath.Join(root, f.to), data, f.mode); err != nil {
			return err
		}
	}
	if err := errors.Join(manuals(root, binary), completions(root, binary)); err != nil {
		return err
	}
	control := fmt.Sprintf(`Package: ashlar
Version: %s
Architecture: %s
Maintainer: Ashlar <ashlar@localhost>
Installed-Size: %d
Depends: systemd
Recommends: qemu-utils
Section: admin
Priority: optional
Description: keeps the disks of virtual machines
 Golden images become thin copy-on-write volumes that guests use over NBD or as
 block devices, with snapshots, limits, export and import. One program, which
 loses nothing: what was flushed survives a power cut, and the data path is
 replaced under running guests.
`, version, runtime.GOARCH, size>>10)
	return errors.Join(put(filepath.Join(root, "DEBIAN/control"), []byte(control), 0o644),
		put(filepath.Join(root, "DEBIAN/conffiles"), []byte("/etc/ashlar/ashlar.toml\n"), 0o644))
}

// put writes one file whatever the umask, and the directories above it.
func put(name string, data []byte, mode fs.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(name, data, mode); err != nil {
		return err
	}
	return os.Chmod(name, mode)
}

// manuals are the program's own pages, compressed.
func manuals(root, binary string) error {
	dir, err := os.MkdirTemp("", "ashlar-man-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if text, err := exec.Command(binary, "manual", dir).CombinedOutput(); err != nil {
		return fmt.Errorf("manual pages: %w: %s", err, text)
	}
	pages, err := filepath.Glob(filepath.Join(dir, "*.1"))
	if err != nil {
		return err
	}
	for _, p := range pages {
		data, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		var packed strings.Builder
		w, err := gzip.NewWriterLevel(&packed, gzip.BestCompression)
		if err != nil {
			return err
		}
		_, err = w.Write(data)
		if err = errors.Join(err, w.Close()); err != nil {
			return err
		}
		if err := put(filepath.Join(root, "usr/share/man/man1", filepath.Base(p)+".gz"), []byte(packed.String()), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// completions are what the program prints for each shell.
func completions(root, binary string) error {
	for shell, to := range map[string]string{
		"bash": "usr/share/bash-completion/completions/ashlar",
		"zsh":  "usr/share/zsh/vendor-completions/_ashlar",
		"fish": "usr/share/fish/vendor_completions.d/ashlar.fish",
	} {
		text, err := exec.Command(binary, "completion", shell).Output()
		if err != nil {
			return fmt.Errorf("completion for %s: %w", shell, err)
		}
		if err := put(filepath.Join(root, to), text, 0o644); err != nil {
			return err
		}
	}
	return nil
}

var notInVersions = regexp.MustCompile(`[^0-9A-Za-z.+~]+`)

// debianVersion makes a version dpkg takes: it begins with a digit, and has no dashes, which would begin a revision.
func debianVersion(version string) string {
	v := notInVersions.ReplaceAllString(strings.TrimPrefix(version, "v"), "+")
	if v == "" || v[0] < '0' || v[0] > '9' {
		v = "0~" + v
	}
	return v
}
