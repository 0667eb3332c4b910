package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/ingestd/ingestd/internal/daemon"
	"github.com/ingestd/ingestd/internal/tensorfile"
	"github.com/ingestd/ingestd/spec"
)

// asBinary makes the test binary behave as ingestd itself.
const asBinary = "INGESTD_TEST_RUNS_AS_INGESTD"

func TestMain(m *testing.M) {
	if os.Getenv(asBinary) != "" {
		main()
	}
	os.Exit(m.Run())
}

// result is how a command ended.
type result struct {
	code     int
	out, err string
}

func command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	cmd.Env = append(os.Environ(), asBinary+"=1")
	return cmd
}

func ingestd(t testing.TB, stdin string, args ...string) result {
	t.Helper()
	cmd := command(t.Context(), args...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	return ended(t, cmd.Run(), &out, &errs)
}

func ended(t testing.TB, err error, out, errs *bytes.Buffer) result {
	t.Helper()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	r := result{out: out.String(), err: errs.String()}
	if exit != nil {
		r.code = exit.ExitCode()
	}
	return r
}

// want fails the test unless the code is right and every text stands on standard output or error.
func (r result) want(t testing.TB, code int, texts ...string) result {
	t.Helper()
	if r.code != code {
		t.Errorf("exit code %d, want %d\n%s%s", r.code, code, r.out, r.err)
	}
	for _, text := range texts {
		if !strings.Contains(r.out+r.err, text) {
			t.Errorf("%q is not in\n%s%s", text, r.out, r.err)
		}
	}
	return r
}

// process is a command that runs on.
type process struct {
	cmd       *exec.Cmd
	out, errs bytes.Buffer
	done      chan struct{}
	err       error
}

func background(t testing.TB, args ...string) *process {
	t.Helper()
	p := &process{cmd: command(context.Background(), args...), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.errs
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-p.done
	})
	return p
}

func (p *process) signal(t testing.TB, s syscall.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

func (p *process) wait(t testing.TB) result {
	t.Helper()
	<-p.done
	return ended(t, p.err, &p.out, &p.errs)
}

// server is a running `ingestd serve`.
type server struct {
	*process
	daemon.Addresses
}

// serveTable runs a daemon with a table "a" and more arguments, and waits until it serves.
func serveTable(t testing.TB, layout string, args ...string) *server {
	t.Helper()
	return serveWith(t, append([]string{"--table", "a", "--spec", layout}, args...)...)
}

// serveWith runs a daemon and waits until it serves.
func serveWith(t testing.TB, args ...string) *server {
	t.Helper()
	folder := t.TempDir()
	ready := filepath.Join(folder, "ready.json")
	s := &server{process: background(t, append([]string{
		"serve", "--listen", "tcp://127.0.0.1:0", "--listen", "unix://" + filepath.Join(folder, "d.sock"),
		"--admin", "127.0.0.1:0", "--ready-file", ready,
	}, args...)...)}
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		text, err := os.ReadFile(ready)
		if err == nil {
			if err := json.Unmarshal(text, &s.Addresses); err != nil {
				t.Fatal(err)
			}
			return s
		}
		select {
		case <-s.done:
			t.Fatalf("serve ended: %v\n%s%s", s.err, s.out.String(), s.errs.String())
		case <-tick.C:
		}
	}
}

func parse[T any](t testing.TB, text string) T {
	t.Helper()
	var v T
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v in %q", err, text)
	}
	return v
}

func TestUsage(t *testing.T) {
	nowhere := "unix://" + filepath.Join(t.TempDir(), "none.sock")
	for _, c := range []struct {
		args string
		code int
		want string
	}{
		{"", exitUsage, "no command given"},
		{"fly", exitUsage, "unknown command"},
		{"help", exitOK, "serve"},
		{"help exit-codes", exitOK, "6  a file, a segment"},
		{"version", exitOK, "protocol 1"},
		{"version x", exitUsage, "unknown command"},
		{"serve --nonsense", exitUsage, "nonsense"},
		{"serve", exitUsage, "say what one sample is"},
		{"serve x", exitUsage, "unknown command"},
		{"serve --spec x:U8 --batches 2 --capacity 1GiB", exitUsage, "give one"},
		{"serve --spec x:U8 --capacity many", exitUsage, "not a size"},
		{"serve --spec x:U8 --listen tcp://0.0.0.0:0", exitUsage, "--insecure"},
		{"serve --config /nonexistent.yaml", exitUsage, "no such file"},
		{"push", exitUsage, "nothing to push"},
		{"push --generate 5 x.npy", exitUsage, "not both"},
		{"push --ack never x.npy", exitUsage, "queued or committed"},
		{"push --rate -1 x.npy", exitUsage, "negative"},
		{"push -", exitUsage, "--spec"},
		{"push --spec x:Z9 -", exitUsage, "Z9"},
		{"push /nonexistent.npy", exitFailure, "no such file"},
		{"push --generate 1 --addr tcp://127.0.0.1:1", exitUnreachable, "is the daemon running"},
		{"push --generate 1 --addr nowhere", exitFailure, "tcp://host:port"},
		{"pull --gapless", exitUsage, "--verify"},
		{"pull --addr " + nowhere, exitUnreachable, "is the daemon running"},
		{"pull --wait 150ms --addr " + nowhere, exitUnreachable, "no socket is there"},
		{"inspect --addr " + nowhere, exitUnreachable, "is the daemon running"},
		{"inspect --addr tcp://127.0.0.1:1", exitUsage, "unix:///path"},
		{"inspect /nonexistent.seg", exitUsage, "no such file"},
		{"check", exitUsage, "requires at least 1"},
		{"check /dev/null", exitData, "not a segment"},
		{"check " + os.Args[0], exitData, "not with the magic"},
		{"bench --help", exitOK, "tcp"},
	} {
		ingestd(t, "", strings.Fields(c.args)...).want(t, c.code, c.want)
	}
}

// TestDocumentedExitCodes: docs/cli.md has the codes of exit.go, word for word, and every command.
func TestDocumentedExitCodes(t *testing.T) {
	text, err := os.ReadFile("../../docs/cli.md")
	if err != nil {
		t.Fatal(err)
	}
	var rows []string
	for _, m := range regexp.MustCompile(`(?m)^\| (\d) \| (.*) \|$`).FindAllStringSubmatch(string(text), -1) {
		rows = append(rows, m[1]+" "+m[2])
	}
	var codes []string
	for _, c := range exitCodes {
		codes = append(codes, fmt.Sprintf("%d %s", c.code, c.text))
	}
	if strings.Join(rows, "\n") != strings.Join(codes, "\n") {
		t.Errorf("docs/cli.md has\n%s\nthe code\n%s", strings.Join(rows, "\n"), strings.Join(codes, "\n"))
	}
	for _, c := range rootCommand(streams{}).Commands() {
		if !c.Hidden && c.Runnable() && !strings.Contains(string(text), "`ingestd "+c.Name()+"`") {
			t.Errorf("docs/cli.md does not name the command %s", c.Name())
		}
	}
}

// TestPrintConfig: what is printed is a file with the same meaning, and flags win over the file.
func TestPrintConfig(t *testing.T) {
	printed := ingestd(t, "", "serve", "--spec", "x:F32[4]", "--batches", "8", "--print-config", "--drain-timeout", "7s").want(t, exitOK, "batches: 8", "drain_timeout: 7s")
	path := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(path, []byte(printed.out), 0o600); err != nil {
		t.Fatal(err)
	}
	if again := ingestd(t, "", "serve", "--config", path, "--print-config").want(t, exitOK); again.out != printed.out {
		t.Errorf("printed\n%s\nand from that\n%s", printed.out, again.out)
	}
	ingestd(t, "", "serve", "--config", path, "--table", "default", "--batches", "16", "--log-level", "warn", "--print-config").
		want(t, exitOK, "batches: 16", "level: warn", "x:F32[4]", "drain_timeout: 7s")
	ingestd(t, "", "serve", "--config", path, "--table", "other", "--spec", "y:U8", "--print-config").want(t, exitOK, "name: default", "name: other")
	ingestd(t, "", "serve", "--config", path, "--batches", "16", "--print-config").want(t, exitUsage, "say --table NAME")
}

func write(t testing.TB, s *spec.Spec, samples int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "in.npz")
	w, err := tensorfile.Create(path, s)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Append(samples, func(leaf int) []byte {
		b := make([]byte, samples*int(s.Leaf(leaf).Bytes()))
		for i := range b {
			b[i] = byte(i + 13*leaf)
		}
		return b
	}); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// samplesOf reads a file as concatenated samples.
func samplesOf(t testing.TB, path string, s *spec.Spec) []byte {
	t.Helper()
	src, err := tensorfile.Open(path, s)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	var all []byte
	for {
		c, err := src.Next(0)
		if err != nil {
			return all
		}
		for i := range c.Count {
			for _, leaf := range c.Sample(nil, s, i) {
				all = append(all, leaf...)
			}
		}
	}
}

// TestEveryServeFlagCounts: each flag changes the settings in force, so none is forgotten on its way there.
func TestEveryServeFlagCounts(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "file") // settings are checked without reading it
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	values := map[string]string{
		"tokens": file, "bans": "false", "bans-loopback": "true", "bans-kernel": "false", "compression": "s2,zstd+shuffle", "tls-cert": file, "tls-key": file, "tls-client-ca": file, "half-open": "99", "half-open-per-address": "9",
		"segment-dir": dir, "discard-segments": "true", "ack": "committed", "sessions": "9", "session-ttl": "9s", "table": "other", "spec": "y:U8", "batch-size": "7", "batches": "9", "capacity": "1MiB", "linger": "9ms", "huge-pages": "true",
		"listen": "tcp://127.0.0.1:9", "admin": "off", "insecure": "true", "drainers": "3", "drain-timeout": "9s", "ready-file": "/x", "log-level": "debug",
		"log-format": "json", "max-connections": "9", "window-samples": "9", "window-bytes": "9KiB", "window-bytes-max": "99MiB", "handshake-timeout": "9s", "idle-timeout": "9s",
		"stall-timeout": "9s", "ack-timeout": "9s", "max-trainers": "9", "prefetch": "9",
		"kind": "weights", "chunk-bytes": "64KiB", "max-lag": "9", "generations": "9",
	}
	// Tables that have the flag.
	tables := map[string][]string{
		"kind": {}, "chunk-bytes": {"--kind=tensors"}, "max-lag": {"--kind=tensors"}, "generations": {"--kind=weights"},
		"tls-client-ca": {"--spec=x:F32[4]", "--tls-cert=" + file, "--tls-key=" + file},
		"tls-cert":      {"--spec=x:F32[4]", "--tls-key=" + file}, "tls-key": {"--spec=x:F32[4]", "--tls-cert=" + file},
	}
	flags := serveCommand(streams{}).Flags()
	flags.VisitAll(func(f *pflag.Flag) {
		switch value, known := values[f.Name]; {
		case f.Name == "config", f.Name == "print-config":
		case !known:
			t.Errorf("--%s: give this test a value for it", f.Name)
		default:
			args, ok := tables[f.Name]
			if !ok {
				args = []string{"--spec=x:F32[4]"}
			}
			args = append([]string{"serve", "--print-config"}, args...)
			base := ""
			switch {
			case strings.HasPrefix(f.Name, "tls-") && f.Name != "tls-client-ca": // a pair
				base = ingestd(t, "", args[:3]...).want(t, exitOK).out
			case len(args) > 2: // without a table there is nothing to compare with
				base = ingestd(t, "", args...).want(t, exitOK).out
			}
			if ingestd(t, "", append(args, "--"+f.Name+"="+value)...).want(t, exitOK).out == base {
				t.Errorf("--%s %s changes nothing", f.Name, value)
			}
		}
	})
}
