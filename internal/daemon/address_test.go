package daemon

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestUnixSocketIsTakenOverOnlyWhenNobodyServes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d.sock")
	a := address{scheme: "unix", host: path}
	first, err := listen(t.Context(), a)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v: a socket that others may connect to", info.Mode(), err)
	}
	var busy *ListenError
	if _, err := listen(t.Context(), a); !errors.As(err, &busy) || !strings.Contains(err.Error(), "another") {
		t.Errorf("a socket in use: %v", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}

	// A daemon that died leaves its socket behind.
	stale, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	stale.(*net.UnixListener).SetUnlinkOnClose(false)
	_ = stale.Close()
	again, err := listen(t.Context(), a)
	if err != nil {
		t.Fatalf("the socket of a dead daemon: %v", err)
	}
	_ = again.Close()

	// Another program without our lock.
	other, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := listen(t.Context(), a); !errors.As(err, &busy) || !strings.Contains(err.Error(), "another program") {
		t.Errorf("a socket of another program: %v", err)
	}
	_ = other.Close()

	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listen(t.Context(), a); !errors.As(err, &busy) || !strings.Contains(err.Error(), "no socket") {
		t.Errorf("a file that is no socket: %v", err)
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != "precious" {
		t.Error("the file was touched")
	}
	if _, err := listen(t.Context(), address{scheme: "unix", host: filepath.Join(t.TempDir(), "no", "d.sock")}); !errors.As(err, &busy) {
		t.Errorf("no folder: %v", err)
	}
}

func TestPortInUse(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, err = listen(t.Context(), address{scheme: "tcp", host: l.Addr().String()})
	var busy *ListenError
	if !errors.As(err, &busy) || !strings.Contains(err.Error(), "another program listens there") {
		t.Errorf("got %v", err)
	}
	if _, err = listen(t.Context(), address{scheme: "tcp", host: "192.0.2.1:0"}); !errors.As(err, &busy) {
		t.Errorf("got %v", err)
	}
}

// TestUnixListenerClosedTwice: by who stops the daemon and by who serves it.
func TestUnixListenerClosedTwice(t *testing.T) {
	ln, err := listenUnix(t.Context(), filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	if err := ln.Close(); err != nil {
		t.Error(err)
	}
	if err := ln.Close(); !errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrClosed) {
		t.Errorf("closed again: %v", err)
	}
}
