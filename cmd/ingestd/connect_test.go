package main

import (
	"path/filepath"
	"testing"
)

// TestCertificatesThatAreNotInOrder: commands end at once and say so, whatever --wait says.
func TestCertificatesThatAreNotInOrder(t *testing.T) {
	dir, strangers := t.TempDir(), t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	for _, args := range [][]string{{"ca", "--dir", dir}, {"server", "--dir", dir, "--host", "127.0.0.1"}, {"client", "--dir", dir, "--name", "worker"}, {"ca", "--dir", strangers}} {
		ingestd(t, "", append([]string{"cert"}, args...)...).want(t, exitOK)
	}
	s := serveTable(t, "x:U8", "--listen", "tls://127.0.0.1:0", "--listen", "quic://127.0.0.1:0",
		"--tls-cert", in("server.pem"), "--tls-key", in("server.key"), "--tls-client-ca", in("ca.pem"))
	mine := []string{"--tls-cert", in("worker.pem"), "--tls-key", in("worker.key")}
	for scheme, addr := range map[string]string{"tls": s.TLS, "quic": s.QUIC} {
		for _, command := range [][]string{{"push", "--generate", "1"}, {"pull"}, {"weights", "verify"}, {"weights", "get", "-o", in("x")}} {
			t.Run(scheme+" "+command[0], func(t *testing.T) {
				args := append(append([]string{}, command...), "--addr", addr, "--table", "a", "--wait", "1h")
				ingestd(t, "", append(args, "--tls-ca", in("ca.pem"))...).want(t, exitRefused, "certificate required", "--tls-cert")
				ingestd(t, "", append(append(args, mine...), "--tls-ca", filepath.Join(strangers, "ca.pem"))...).want(t, exitRefused, "unknown authority", "--tls-ca")
			})
		}
	}
}
