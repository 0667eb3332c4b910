package quicingest

import (
	"bytes"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// sysctl reads a limit of the kernel's.
func sysctl(t *testing.T, name string) int {
	t.Helper()
	text, err := os.ReadFile("/proc/sys/" + strings.ReplaceAll(name, ".", "/"))
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// unprivileged runs f on a thread that may do nothing that needs CAP_NET_ADMIN, and ends it.
func unprivileged(t *testing.T, f func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: no other goroutine gets this thread
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var caps [2]unix.CapUserData
		err := unix.Capget(&header, &caps[0])
		if err == nil {
			caps[0].Effective &^= 1 << unix.CAP_NET_ADMIN
			err = unix.Capset(&header, &caps[0])
		}
		if err == nil {
			f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// TestListen: a user without privileges gets buffers as large as the machine's limits, and hears which to raise if that is less than what it should be.
func TestListen(t *testing.T) {
	var log bytes.Buffer
	var socket *net.UDPConn
	var err error
	unprivileged(t, func() { socket, err = Listen(t.Context(), "127.0.0.1:0", slog.New(slog.NewTextHandler(&log, nil))) })
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	for name, option := range map[string]int{"net.core.rmem_max": unix.SO_RCVBUF, "net.core.wmem_max": unix.SO_SNDBUF} {
		limit := sysctl(t, name)
		if got, want := bufferOf(t, socket, option), min(limit, SocketBytes); got != want {
			t.Errorf("%s is %d, and the buffer %d, want %d", name, limit, got, want)
		}
		advice := fmt.Sprintf("sysctl -w %s=%d", name, SocketBytes)
		if said := strings.Contains(log.String(), advice); said != (limit < SocketBytes) {
			t.Errorf("%s is %d, and %q is said: %v; all that is said: %s", name, limit, advice, said, &log)
		}
	}
}

func bufferOf(t *testing.T, socket *net.UDPConn, option int) (bytes int) {
	t.Helper()
	raw, err := socket.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if failed := raw.Control(func(fd uintptr) { bytes, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, option) }); failed != nil || err != nil {
		t.Fatal(failed, err)
	}
	return bytes / 2 // the kernel counts its own needs, too
}

// TestListenPrivileged: a user who may does not care for the limits.
func TestListenPrivileged(t *testing.T) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&header, &caps[0]); err != nil {
		t.Fatal(err)
	}
	if caps[0].Effective&(1<<unix.CAP_NET_ADMIN) == 0 {
		t.Skip("needs CAP_NET_ADMIN, as of root")
	}
	var log bytes.Buffer
	socket, err := Listen(t.Context(), "127.0.0.1:0", slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	for _, option := range []int{unix.SO_RCVBUF, unix.SO_SNDBUF} {
		if got := bufferOf(t, socket, option); got != SocketBytes {
			t.Errorf("a buffer of %d bytes, want %d", got, SocketBytes)
		}
	}
	if log.Len() > 0 {
		t.Errorf("said: %s", &log)
	}
}

// TestListenFails: an address that is taken, or is none.
func TestListenFails(t *testing.T) {
	taken, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for _, address := range []string{taken.LocalAddr().String(), "127.0.0.1", "127.0.0.1:99999"} {
		if socket, err := Listen(t.Context(), address, slog.Default()); err == nil {
			_ = socket.Close()
			t.Errorf("listens on %s", address)
		}
	}
}
