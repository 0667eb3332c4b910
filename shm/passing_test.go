//go:build linux

package shm

import (
	"errors"
	"net"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestReadFromReset: a daemon that dies with our hello unread resets the connection; that is an error and nothing that was read.
func TestReadFromReset(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
	check(t, err)
	defer l.Close()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: path})
	check(t, err)
	defer conn.Close()
	_, err = conn.Write([]byte("hello"))
	check(t, err)
	daemon, err := l.Accept()
	check(t, err)
	check(t, daemon.Close())
	r := &descriptorReader{conn: conn}
	if n, err := r.Read(make([]byte, 8)); n != 0 || !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("read %d bytes, %v", n, err)
	}
}
