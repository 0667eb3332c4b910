//go:build linux && !race

package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/internal/daemon"
	"github.com/ingestd/ingestd/safetensors"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
)

// certify makes an authority with a server's and a client's certificate in a folder, as a person would.
func certify(t *testing.T, dir string) {
	t.Helper()
	run(t, exitOK, "cert", "ca", "--dir", dir)
	run(t, exitOK, "cert", "server", "--dir", dir, "--host", "127.0.0.1", "--host", "ingestd.test")
	run(t, exitOK, "cert", "client", "--dir", dir, "--name", "worker")
}

// TestSecure: over TLS and QUIC, with certificates on both sides and a token: who has all of it pushes; who lacks any hears nothing but that it lacks it, and is counted.
func TestSecure(t *testing.T) {
	t.Parallel()
	k := newKeyring(t)
	k.add("worker", "push", small.name)
	certs, strangers := filepath.Join(k.dir, "certs"), filepath.Join(k.dir, "strangers")
	certify(t, certs)
	certify(t, strangers)
	in := func(dir, name string) string { return filepath.Join(dir, name) }
	d := serve(t, []table{small}, "--listen", "tls://127.0.0.1:0", "--listen", "quic://127.0.0.1:0", "--tokens", k.path(),
		"--tls-cert", in(certs, "server.pem"), "--tls-key", in(certs, "server.key"), "--tls-client-ca", in(certs, "ca.pem"))
	with := func(ca, client string, more ...string) []string {
		args := []string{"--token-file", k.file("worker"), "--tls-ca", in(ca, "ca.pem")}
		if client != "" {
			args = append(args, "--tls-cert", in(client, "worker.pem"), "--tls-key", in(client, "worker.key"))
		}
		return append(args, more...)
	}
	for _, addr := range []string{d.TLS, d.QUIC} {
		scheme, _, _ := strings.Cut(addr, "://")
		t.Run(scheme, func(t *testing.T) {
			d := d.in(t)
			push := func(good bool, flags []string, words ...string) {
				t.Helper()
				p := d.push(small.name, 3, 0, append([]string{"--addr", addr}, flags...)...)
				<-p.done
				if code := p.cmd.ProcessState.ExitCode(); (code == exitOK) != good {
					t.Errorf("%v: exit code %d: %s", flags, code, p.err.String())
				}
				says(t, p.err.String(), words...)
				k.hides("a client", p.out.String()+p.err.String())
			}
			push(true, with(certs, certs))
			push(true, with(certs, certs, "--tls-name", "ingestd.test"))
			push(true, with(strangers, certs, "--tls-insecure-skip-verify"))
			push(false, with(strangers, certs), "authority")
			push(false, with(certs, certs, "--tls-name", "else.test"), "else.test")
			push(false, with(certs, strangers))
			push(false, with(certs, ""))
			push(false, with(certs, certs, "--token-file", k.wrong("worker")), "worker")
			transport := map[string]string{"tls": "tcp", "quic": "quic"}[scheme]
			counted := func(reason string) float64 {
				return d.metric(`ingestd_refused_total{reason="` + reason + `",transport="` + transport + `"}`)
			}
			eventually(t, "bad handshakes of TLS are counted", func() bool {
				return counted(ingest.RefusedTLS)+counted(ingest.RefusedCertificate)+counted(ingest.RefusedByPeer) >= 4 && counted(ingest.RefusedCertificate) == 1
			})
			if scheme == "quic" { // whose alerts are not overtaken by the end of a socket
				if alerts, none := counted(ingest.RefusedByPeer), counted(ingest.RefusedTLS); alerts != 2 || none != 1 {
					t.Errorf("%v clients that did not take the daemon's certificate, %v without one; want 2 and 1", alerts, none)
				}
				eventually(t, "connections that ended are counted", func() bool { return d.metric(`ingestd_quic_connections_ended_total{reason="clean"}`) >= 3 })
			}
			eventually(t, "the wrong token is counted", func() bool {
				return d.metric(`ingestd_refused_total{reason="not_authenticated",transport="`+transport+`"}`) == 1
			})
			push(true, with(certs, certs))
		})
	}
	// New certificates are shown without a restart.
	for _, name := range []string{"server.pem", "server.key", "ca.pem"} {
		text, err := os.ReadFile(in(strangers, name))
		check(t, err)
		fresh := in(certs, "fresh")
		check(t, os.WriteFile(fresh, text, 0o600))
		check(t, os.Rename(fresh, in(certs, name)))
	}
	for _, addr := range []string{d.TLS, d.QUIC} {
		d.push(small.name, 3, 0, append([]string{"--addr", addr}, with(strangers, strangers)...)...).ends(exitOK)
	}
	k.hides("the daemon", d.out.String()+d.err.String())
}

// TestSecureTrainers: trainers elsewhere read over TLS and QUIC what was pushed there, with the right to, and each sample once.
func TestSecureTrainers(t *testing.T) {
	t.Parallel()
	k := newKeyring(t)
	k.add("worker", "push", small.name)
	k.add("trainer", "read", small.name)
	certs := filepath.Join(k.dir, "certs")
	certify(t, certs)
	in := func(name string) string { return filepath.Join(certs, name) }
	d := serve(t, []table{small}, "--listen", "tls://127.0.0.1:0", "--listen", "quic://127.0.0.1:0", "--tokens", k.path(), "--tls-cert", in("server.pem"), "--tls-key", in("server.key"))
	var trainers []*process
	for i, addr := range []string{d.TCP, d.TLS, d.QUIC} {
		args := []string{"pull", "--table", small.name, "--verify", "--json", "--addr", addr, "--group", addr, "--tls-ca", in("ca.pem")}
		trainers = append(trainers, start(t, append(args, "--token-file", k.file("trainer"))...))
		p := start(t, append(args, "--token-file", k.file("worker"))...)
		p.ends(exitRefused)
		says(t, p.err.String(), "not_permitted")
		d.await("the trainer is there", func(s *status) bool { return len(s.Trainers) == i+1 })
	}
	const samples = 64 * 16
	for _, addr := range []string{d.TLS, d.QUIC} {
		d.push(small.name, samples, 0, "--addr", addr, "--tls-ca", in("ca.pem"), "--token-file", k.file("worker")).ends(exitOK)
	}
	d.signal(syscall.SIGTERM)
	d.ends(exitOK)
	for _, p := range trainers {
		p.ends(exitOK)
		if r := result[pulled](p); r.Samples != 2*samples || r.Wrong+r.Disorder > 0 || !r.Ended {
			t.Errorf("%v: %+v", p.args, r)
		}
	}
}

// TestSecureWeights: weights go over TLS and QUIC in both directions.
func TestSecureWeights(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	certs := filepath.Join(dir, "certs")
	certify(t, certs)
	in := func(name string) string { return filepath.Join(certs, name) }
	ready := filepath.Join(dir, "ready.json")
	p := start(t, "serve", "--table", "model", "--kind", "weights", "--listen", "tls://127.0.0.1:0", "--listen", "quic://127.0.0.1:0", "--admin", "off", "--ready-file", ready,
		"--tls-cert", in("server.pem"), "--tls-key", in("server.key"))
	var at daemon.Addresses
	eventually(t, "the daemon serves", func() bool {
		text, err := os.ReadFile(ready)
		return err == nil && json.Unmarshal(text, &at) == nil
	})
	m, err := tensor.NewManifest([]tensor.Tensor{{Name: "w", DType: spec.F32, Shape: []int64{1 << 18}}}, nil)
	check(t, err)
	data := bytes.Repeat([]byte("weights!"), 1<<17)
	model := filepath.Join(dir, "model.safetensors")
	check(t, safetensors.Write(model, m, nil, func(int) []byte { return data }))
	for i, addr := range []string{at.TLS, at.QUIC} {
		more := []string{"--table", "model", "--addr", addr, "--tls-ca", in("ca.pem")}
		run(t, exitOK, append([]string{"weights", "publish", model}, more...)...)
		run(t, exitOK, append([]string{"weights", "verify", model}, more...)...)
		out := filepath.Join(dir, fmt.Sprint(i))
		run(t, exitOK, append([]string{"weights", "get", "-o", out}, more...)...)
		f, err := safetensors.Open(out)
		check(t, err)
		if !bytes.Equal(f.Data(0), data) {
			t.Errorf("%s: other weights came back", addr)
		}
		check(t, f.Close())
	}
	p.signal(syscall.SIGTERM)
	p.ends(exitOK)
}

// TestBeyondLoopback: a listener that other machines can reach starts only where they are asked who they are, or --insecure says that nobody is.
func TestBeyondLoopback(t *testing.T) {
	t.Parallel()
	k := newKeyring(t)
	k.add("worker", "push", small.name)
	certs := filepath.Join(k.dir, "certs")
	certify(t, certs)
	secure := []string{"--tls-cert", filepath.Join(certs, "server.pem"), "--tls-key", filepath.Join(certs, "server.key")}
	mutual := append(secure[:4:4], "--tls-client-ca", filepath.Join(certs, "ca.pem"))
	for _, c := range []struct {
		code  int
		flags []string
		says  string
	}{
		{exitUsage, []string{"--listen", "tcp://0.0.0.0:7420"}, "--tokens"},
		{exitUsage, []string{"--listen", "tcp://[::]:7420"}, "--tokens"},
		{exitUsage, append(secure[:4:4], "--listen", "tls://0.0.0.0:7420"), "--tokens"},
		{exitUsage, append(secure[:4:4], "--listen", "quic://0.0.0.0:7420"), "--tokens"},
		{exitUsage, append(mutual[:6:6], "--listen", "tcp://0.0.0.0:7420"), "--tokens"},
		{exitUsage, []string{"--listen", "tls://127.0.0.1:7420"}, "--tls-cert"},
		{exitUsage, []string{"--listen", "echo://127.0.0.1:7420", "--tokens", k.path()}, "echo"},
		{exitUsage, []string{"--listen", "echo://0.0.0.0:7420"}, "credentials"},
		{exitOK, append(mutual[:6:6], "--listen", "tls://0.0.0.0:7420", "--listen", "quic://0.0.0.0:7420"), ""},
		{exitOK, []string{"--listen", "tcp://0.0.0.0:7420", "--tokens", k.path()}, ""},
		{exitOK, []string{"--listen", "tcp://0.0.0.0:7420", "--insecure"}, ""},
		{exitOK, []string{"--listen", "echo://127.0.0.1:7420", "--tokens", k.path(), "--insecure"}, ""},
	} {
		args := append([]string{"serve", "--table", small.name, "--spec", small.spec, "--admin", "off", "--print-config"}, c.flags...)
		says(t, run(t, c.code, args...), c.says)
	}
	// What is wrong with the files is an error of the configuration, without secrets.
	open := filepath.Join(k.dir, "open")
	text, err := os.ReadFile(k.path())
	check(t, err)
	check(t, os.WriteFile(open, text, 0o600))
	check(t, os.Chmod(open, 0o644))
	bad := filepath.Join(k.dir, "bad")
	check(t, os.WriteFile(bad, []byte("tokens:\n- name: x\n  secret: "+k.secrets[0]+"\n  rights: [everything]\n"), 0o600))
	empty := filepath.Join(k.dir, "empty")
	check(t, os.WriteFile(empty, nil, 0o600))
	for _, c := range []struct {
		flags []string
		says  string
	}{
		{[]string{"--tokens", open}, "chmod 600"},
		{[]string{"--tokens", bad}, "rights"},
		{[]string{"--tokens", filepath.Join(k.dir, "not")}, "no such file"},
		{[]string{"--tls-cert", empty, "--tls-key", secure[3]}, "tls"},
		{[]string{"--tls-cert", secure[1]}, "both"},
		{[]string{"--tls-cert", secure[1], "--tls-key", open}, "chmod 600"},
		{append(secure[:4:4], "--tls-client-ca", empty), "no certificate"},
	} {
		said := run(t, exitUsage, append([]string{"serve", "--table", small.name, "--spec", small.spec, "--admin", "off", "--listen", "tcp://127.0.0.1:0"}, c.flags...)...)
		says(t, said, c.says)
		k.hides("the daemon", said)
	}
}
