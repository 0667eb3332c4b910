package auth

import (
	"crypto/tls"
	"fmt"
	"net"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/wire"
)

// PeerOf asks a connection for what a Gate needs: of one that has TLS (a method ConnectionState, as *tls.Conn has) its exporter, after the TLS handshake, and of a
// unix socket the peer's user.
func PeerOf(conn net.Conn) (Peer, error) {
	switch c := conn.(type) {
	case interface{ ConnectionState() tls.ConnectionState }:
		state := c.ConnectionState()
		exporter, err := state.ExportKeyingMaterial(wire.ExporterLabel, nil, wire.ExporterBytes)
		if err != nil {
			return Peer{}, fmt.Errorf("auth: bind to TLS: %w", err)
		}
		return Peer{Exporter: exporter}, nil
	case interface {
		syscall.Conn
		net.Conn
	}:
		if conn.LocalAddr().Network() == "unix" {
			return Peer{Local: true, User: userOf(c)}, nil
		}
	}
	return Peer{}, nil
}

// userOf asks the kernel who connected; -1 if it does not say.
func userOf(conn syscall.Conn) int {
	user := -1
	raw, err := conn.SyscallConn()
	if err != nil {
		return user
	}
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			user = int(cred.Uid)
		}
	})
	return user
}
