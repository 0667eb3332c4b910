//go:build linux

package sendfile

import (
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// tcpBelow returns the TCP socket that a connection is, or that TLS runs over; nil: there is none.
func tcpBelow(conn net.Conn) *net.TCPConn {
	for {
		switch c := conn.(type) {
		case *net.TCPConn:
			return c
		case interface{ NetConn() net.Conn }:
			conn = c.NetConn()
		default:
			return nil
		}
	}
}

// SetPatience has the kernel end a connection over TCP whose peer acknowledges nothing of what it was sent for d, or has no room for it: that of a machine that vanished, too, whose
// socket took all of what was written. Reads and writes fail then. Keepalive does not tell while anything is under way. What is not TCP is left as it is.
func SetPatience(conn net.Conn, d time.Duration) {
	tcp := tcpBelow(conn)
	if tcp == nil {
		return
	}
	if raw, err := tcp.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(max(d.Milliseconds(), 1)))
		})
	}
}

// ResetAtEnd makes every end of a TCP connection that Abort's is, also the one that the kernel makes when this process dies: without it the kernel goes on sending what the socket has
// taken, from memory that may belong to others by then. What the network card's queue has by then, some packets, goes out before the reset.
func ResetAtEnd(conn net.Conn) {
	if tcp := tcpBelow(conn); tcp != nil {
		_ = tcp.SetLinger(0)
	}
}

// Abort closes a connection, and what was not sent yet never is: the memory that it would have been sent from may change. It waits for nothing: TLS below which there is no
// socket any more cannot take leave of its peer.
func Abort(conn net.Conn) error {
	tcp := tcpBelow(conn)
	if tcp == nil || conn == net.Conn(tcp) {
		ResetAtEnd(conn)
		return conn.Close()
	}
	_ = tcp.SetLinger(0)
	err := tcp.Close()
	_ = conn.Close()
	return err
}
