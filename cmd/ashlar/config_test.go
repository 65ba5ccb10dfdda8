package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

func writeConfig(t *testing.T, content string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "ashlar.toml")
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// TestConfigMistakes names every mistake of a file at once, each by its key.
func TestConfigMistakes(t *testing.T) {
	_, err := configFile(writeConfig(t, `
name = "-bad name"
data_dir = "/srv"
listen = 9500
run-dir = "run"
[nbd]
port = 10809
listen = "everywhere"
[data]
direct = "yes"
[log]
level = "loud"
[colours]
red = true
`))
	if !errors.Is(err, errConfig) {
		t.Fatal(err)
	}
	for _, want := range []string{"name: ", "data_dir: there is no such setting (did you mean data-dir?)", "listen: it must be a string", `run-dir: "run" is not an absolute path`,
		"nbd.port: there is no such setting", `nbd.listen: "everywhere" is not HOST:PORT`, "data.direct: it must be true or false", `log.level: "loud" is not one of debug, info, warn, error`,
		"colours.red: there is no such setting"} {
		if !strings.Contains(err.Error(), want) { // what people read is what is tested here
			t.Errorf("not named: %s\nin: %v", want, err)
		}
	}
	if _, err := configFile(writeConfig(t, "name = \"a\"\nlisten = \n")); !errors.Is(err, errConfig) || !strings.Contains(err.Error(), "line 2") {
		t.Errorf("a syntax error: %v", err)
	}
}

// TestConfigContradictions: settings that are right alone and wrong together are refused before anything starts.
func TestConfigContradictions(t *testing.T) {
	for content, want := range map[string]string{
		"[tls]\ncertificate = \"/a.pem\"":                         "tls.certificate and tls.key",
		"[nbd]\nlisten = \"0.0.0.0:10809\"":                       "beyond loopback",
		"[nbd]\nkey = \"/k\"\ncertificate = \"/c\"":               "no address",
		"listen = \"127.0.0.1:1\"\n[nbd]\nlisten=\"127.0.0.1:1\"": "REST's address",
		"data-dir = \"/x\"\nrun-dir = \"/x\"":                     "both are /x",
	} {
		a := newApp(&bytes.Buffer{}, &bytes.Buffer{}, func(string) string { return "" })
		a.config = writeConfig(t, content)
		if err := a.configure(probeServe(a)); !errors.Is(err, errConfig) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", content, err, want)
		}
	}
}

func probeServe(a *app) *cobra.Command {
	cmd := a.serveCommand()
	cmd.Flags().StringVar(&a.runDir, "run-dir", optionOf("run-dir").value, "")
	return cmd
}

// TestConfigOrder: flags win over the environment, the environment over the file, the file over what holds without.
func TestConfigOrder(t *testing.T) {
	file := writeConfig(t, "data-dir = \"/file\"\nlisten = \"127.0.0.1:1\"\nname = \"file\"\netcd = [\"http://a:1\", \"http://b:1\"]\n")
	env := map[string]string{"ASHLAR_LISTEN": "127.0.0.1:2", "ASHLAR_NAME": "env", "ASHLAR_CONFIG": file}
	a := newApp(&bytes.Buffer{}, &bytes.Buffer{}, func(name string) string { return env[name] })
	cmd := probeServe(a)
	if err := cmd.ParseFlags([]string{"--name", "flag"}); err != nil {
		t.Fatal(err)
	}
	if err := a.configure(cmd); err != nil {
		t.Fatal(err)
	}
	for flag, want := range map[string]string{"data-dir": "/file", "listen": "127.0.0.1:2", "name": "flag", "run-dir": "/run/ashlar", "etcd": "http://a:1,http://b:1"} {
		if got := cmd.Flags().Lookup(flag).Value.String(); got != want {
			t.Errorf("--%s is %q, want %q", flag, got, want)
		}
	}
}

// TestConfigLenient: the data process starts whatever the file says.
func TestConfigLenient(t *testing.T) {
	var out bytes.Buffer
	a := newApp(&out, &out, func(string) string { return "" })
	a.config, a.lenient = writeConfig(t, "nonsense = 1\nrun-dir = 7\n"), true
	if err := a.configure(a.dataCommand()); err != nil || !strings.Contains(out.String(), "nonsense") {
		t.Errorf("%v, said %q", err, out.String())
	}
}

// TestConfigExample: the packaged file is what the program prints, and every line of it is right once it is not commented out.
func TestConfigExample(t *testing.T) {
	packaged, err := os.ReadFile("../../packaging/ashlar.toml")
	if err != nil {
		t.Fatal(err)
	}
	if string(packaged) != exampleConfig() {
		t.Error("packaging/ashlar.toml differs from `ashlar config example`: write it again")
	}
	live := regexp.MustCompile(`(?m)^#([a-z-]+ = )`).ReplaceAllString(exampleConfig(), "$1")
	values, err := configFile(writeConfig(t, live))
	if err != nil || len(values) != len(options()) {
		t.Errorf("%d of %d settings: %v", len(values), len(options()), err)
	}
}
