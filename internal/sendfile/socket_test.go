//go:build linux

package sendfile

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/internal/devcert"
)

// secure puts TLS over our end of a connection, and gives theirs what is needed for reading it.
func secure(t *testing.T, ours, theirs net.Conn) (server net.Conn, client *tls.Conn) {
	t.Helper()
	ca, err := devcert.NewAuthority("test", time.Hour)
	check(t, err)
	pair, err := ca.NewServer([]string{"127.0.0.1"}, time.Hour)
	check(t, err)
	s := tls.Server(ours, &tls.Config{Certificates: []tls.Certificate{pair.TLS()}, MinVersion: tls.VersionTLS13})
	client = tls.Client(theirs, &tls.Config{RootCAs: ca.Pool(), ServerName: "127.0.0.1", MinVersion: tls.VersionTLS13})
	shaken := make(chan error, 1)
	go func() { shaken <- s.HandshakeContext(t.Context()) }()
	check(t, client.HandshakeContext(t.Context()))
	check(t, <-shaken)
	return wrapped{s}, client
}

// wrapped stands for what a transport makes of its TLS.
type wrapped struct{ *tls.Conn }

// unplug has a socket drop all that it is sent, as that of a machine that vanished.
func unplug(t *testing.T, conn net.Conn) {
	t.Helper()
	raw, err := conn.(*net.TCPConn).SyscallConn()
	check(t, err)
	drop := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K}
	check(t, raw.Control(func(fd uintptr) {
		err = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &drop})
	}))
	check(t, err)
}

// TestPatience: the kernel ends a connection whose peer is silent, although its socket took all that was written; and one that has no room for it.
func TestPatience(t *testing.T) {
	for _, over := range []string{"tcp", "tls"} {
		for _, how := range []string{"gone", "full"} {
			ours, theirs := pair(t, "tcp")
			below := theirs
			if over == "tls" {
				ours, _ = secure(t, ours, theirs)
			}
			SetPatience(ours, 300*time.Millisecond)
			if how == "gone" {
				unplug(t, below)
				_, err := ours.Write(make([]byte, 1000))
				check(t, err)
			} else {
				fill(t, ours)
			}
			check(t, ours.SetReadDeadline(time.Now().Add(time.Minute)))
			if _, err := ours.Read(make([]byte, 1)); !errors.Is(err, unix.ETIMEDOUT) {
				t.Errorf("%s, %s: %v", over, how, err)
			}
		}
	}
}

// fill writes until the socket takes no more.
func fill(t *testing.T, conn net.Conn) {
	t.Helper()
	check(t, conn.SetWriteDeadline(time.Now().Add(50*time.Millisecond)))
	for {
		if _, err := conn.Write(make([]byte, 1<<20)); errors.Is(err, os.ErrDeadlineExceeded) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	check(t, conn.SetWriteDeadline(time.Time{}))
}

// TestAbort: what had not been sent never is, and the peer reads no end in order; so it is with every end of a connection that ResetAtEnd was called for.
func TestAbort(t *testing.T) {
	for _, over := range []string{"tcp", "tls"} {
		for name, end := range map[string]func(conn net.Conn) error{
			"aborted": Abort,
			"closed": func(conn net.Conn) error {
				ResetAtEnd(conn)
				if s, ok := conn.(wrapped); ok {
					conn = s.NetConn() // which the kernel closes when a process dies
				}
				return conn.Close()
			},
		} {
			ours, theirs := pair(t, "tcp")
			below := theirs
			if over == "tls" {
				ours, _ = secure(t, ours, theirs)
			}
			fill(t, ours)
			check(t, end(ours))
			if _, err := io.Copy(io.Discard, below); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("%s, %s: the peer reads %v to the end", over, name, err)
			}
		}
	}
}

// TestAbortOfOthers: what has no socket is closed.
func TestAbortOfOthers(t *testing.T) {
	for _, network := range []string{"unix", "pipe"} {
		ours, theirs := pair(t, network)
		SetPatience(ours, time.Second)
		ResetAtEnd(ours)
		check(t, Abort(ours))
		if _, err := theirs.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("%s: the peer reads %v", network, err)
		}
	}
}
