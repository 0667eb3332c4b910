package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ingestd/ingestd/auth"
)

// TestCertificates makes an authority and certificates, and shakes hands with them.
func TestCertificates(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "certs")
	ingestd(t, "", "cert", "server", "--dir", dir).want(t, exitFailure, "there is no authority", "ingestd cert ca --dir "+dir)
	ingestd(t, "", "cert", "ca", "--dir", dir).want(t, exitOK, filepath.Join(dir, "ca.pem"), filepath.Join(dir, "ca.key"), "valid until")
	ingestd(t, "", "cert", "server", "--dir", dir, "--host", "daemon.test,192.0.2.7", "--host", "*.example.test").want(t, exitOK, "daemon.test, 192.0.2.7, *.example.test")
	ingestd(t, "", "cert", "server", "--dir", dir, "--name", "here").want(t, exitOK, "localhost", "here.pem")
	ingestd(t, "", "cert", "client", "--dir", dir, "--name", "worker-1").want(t, exitOK, "worker-1.pem")
	list, err := os.ReadDir(dir)
	if err != nil || len(list) != 8 {
		t.Fatalf("%v, %v", list, err)
	}
	for _, f := range list {
		if info, err := f.Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", f.Name(), info.Mode(), err)
		}
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the folder: %v, %v", info, err)
	}
	shake(t, dir)
	// Nothing is overwritten.
	before, err := os.ReadFile(filepath.Join(dir, "ca.key"))
	if err != nil {
		t.Fatal(err)
	}
	ingestd(t, "", "cert", "ca", "--dir", dir).want(t, exitFailure, "is there already")
	ingestd(t, "", "cert", "server", "--dir", dir).want(t, exitFailure, "is there already")
	ingestd(t, "", "cert", "client", "--dir", dir, "--name", "ca").want(t, exitFailure, "is there already")
	if after, err := os.ReadFile(filepath.Join(dir, "ca.key")); err != nil || string(after) != string(before) {
		t.Errorf("the authority has another key: %v", err)
	}
	for _, args := range [][]string{
		{"cert"}, {"cert", "other"}, {"cert", "ca", "x"}, {"cert", "ca", "--days", "0"}, {"cert", "ca", "--days", "36501"}, {"cert", "client", "--name", "../x"}, {"cert", "client", "--name", ""},
	} {
		ingestd(t, "", append(args, "--dir", dir)...).want(t, exitUsage, "cert")
	}
	ingestd(t, "", "cert", "server", "--dir", dir, "--name", "bad", "--host", "https://x").want(t, exitFailure, "without port and scheme")
}

// shake does a TLS handshake in which both sides have certificates of the folder.
func shake(t *testing.T, dir string) {
	t.Helper()
	pair := func(name string) []tls.Certificate {
		c, err := tls.LoadX509KeyPair(filepath.Join(dir, name+".pem"), filepath.Join(dir, name+".key"))
		if err != nil {
			t.Fatal(err)
		}
		return []tls.Certificate{c}
	}
	text, err := os.ReadFile(filepath.Join(dir, "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		t.Fatal("no certificate in ca.pem")
	}
	for _, name := range []string{"daemon.test", "192.0.2.7", "a.example.test"} {
		a, b := net.Pipe()
		server := tls.Server(a, &tls.Config{Certificates: pair("server"), ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13})
		client := tls.Client(b, &tls.Config{Certificates: pair("worker-1"), RootCAs: pool, ServerName: name})
		done := make(chan error, 1)
		go func() { done <- server.Handshake() }()
		if err := errors.Join(client.Handshake(), <-done); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		_, _ = a.Close(), b.Close()
	}
}

func TestTokenNew(t *testing.T) {
	first := ingestd(t, "", "token", "new", "worker").want(t, exitOK)
	second := ingestd(t, "", "token", "new", "boss", "--rights", "read,admin", "--rights", "publish", "--tables", "digits,w*").want(t, exitOK)
	path := filepath.Join(t.TempDir(), "tokens.yaml")
	if err := os.WriteFile(path, []byte("tokens:\n"+first.out+second.out), 0o600); err != nil {
		t.Fatal(err)
	}
	tokens, err := auth.Load(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	st := tokens.Stats().Tokens
	if len(st) != 2 || st[0].Name != "worker" || !slices.Equal(st[0].Rights, []string{"push"}) || !slices.Equal(st[0].Tables, []string{"*"}) ||
		!slices.Equal(st[1].Rights, []string{"read", "publish", "admin"}) || !slices.Equal(st[1].Tables, []string{"digits", "w*"}) {
		t.Errorf("%+v", st)
	}
	_, secret, _ := strings.Cut(first.out, "secret: ")
	secret, _, _ = strings.Cut(secret, "\n")
	if _, ok := tokens.Bearer("Bearer worker:" + secret); !ok || first.err != "" {
		t.Errorf("%q, %q", secret, first.err)
	}
	if again := ingestd(t, "", "token", "new", "worker"); again.out == first.out {
		t.Error("the same secret twice")
	}
	for _, args := range [][]string{{"token"}, {"token", "new"}, {"token", "new", "a", "b"}, {"token", "new", "a:b"}, {"token", "new", "a", "--rights", "write"}, {"token", "new", "a", "--rights", ""}} {
		ingestd(t, "", args...).want(t, exitUsage, "token")
	}
}

// TestTokensAreGiven: commands read the token from a file or the environment, and say so if it cannot be used; a daemon without tokens tells who has one.
func TestTokensAreGiven(t *testing.T) {
	const secret = "0123456789abcdef0123456789abcdef"
	s := serveTable(t, "x:U8")
	good, readable := filepath.Join(t.TempDir(), "good"), filepath.Join(t.TempDir(), "readable")
	for path, mode := range map[string]os.FileMode{good: 0o600, readable: 0o644} {
		if err := errors.Join(os.WriteFile(path, []byte("worker:"+secret+"\n"), 0o600), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
	}
	for _, args := range [][]string{
		{"push", "--addr", s.TCP, "--generate", "1"}, {"pull", "--addr", s.Unix}, {"inspect", "--addr", s.Unix},
		{"weights", "verify", "--addr", s.TCP}, {"weights", "get", "--addr", s.Unix, "-o", filepath.Join(t.TempDir(), "x")},
	} {
		args = append(args, "--table", "a")
		ingestd(t, "", append(args, "--token-file", good)...).want(t, exitRefused, "bad_option", "has no tokens")
		r := ingestd(t, "", append(args, "--token-file", readable)...).want(t, exitUsage, "chmod 600")
		if strings.Contains(r.out+r.err, secret) {
			t.Errorf("%q shows the secret: %s", args, r.err)
		}
		ingestd(t, "", append(args, "--token-file", good+"-not")...).want(t, exitUsage, "no such file")
	}
	t.Setenv("INGESTD_TOKEN", "worker:"+secret)
	ingestd(t, "", "push", "--addr", s.TCP, "--table", "a", "--generate", "1").want(t, exitRefused, "has no tokens")
	t.Setenv("INGESTD_TOKEN", "worker:"+secret[1:])
	r := ingestd(t, "", "push", "--addr", s.TCP, "--table", "a", "--generate", "1").want(t, exitUsage, "INGESTD_TOKEN", "31 characters")
	if strings.Contains(r.err, secret[1:]) {
		t.Error(r.err)
	}
}
