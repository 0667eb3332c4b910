//go:build linux

package client

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// TestNearBuffer: connections within the machine have the send buffer that was measured to be best, which the kernel doubles; a unix socket and an address
// where nobody listens are no matter.
func TestNearBuffer(t *testing.T) {
	var config net.ListenConfig
	listener, err := config.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	conn, err := dialNear(context.Background(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("/proc/sys/net/core/wmem_max")
	if err != nil {
		t.Fatal(err)
	}
	most, err := strconv.Atoi(strings.TrimSpace(string(text))) // that the system allows
	if err != nil {
		t.Fatal(err)
	}
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		if n, err := syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUF); err != nil || n != 2*min(nearBufferBytes, most) {
			t.Errorf("send buffer of %d bytes (%v), want twice %d", n, err, min(nearBufferBytes, most))
		}
	}); err != nil {
		t.Error(err)
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	if err := listener.Close(); err != nil {
		t.Error(err)
	}
	if conn, err := dialNear(context.Background(), "tcp", address); err == nil {
		t.Error("connected to nobody")
		conn.Close()
	}
	path := filepath.Join(t.TempDir(), "s")
	local, err := config.Listen(context.Background(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	if conn, err = dialNear(context.Background(), "unix", path); err != nil {
		t.Fatal(err)
	}
	conn.Close()
}
