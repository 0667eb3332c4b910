package quicingest

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// SocketBytes is what the buffers of a UDP socket should hold: what comes while the daemon does something else, at a few GB/s for a few milliseconds.
const SocketBytes = 8 << 20

// Listen opens a UDP socket for Serve whose buffers are as large as the machine allows, and logs which sysctl to raise where that is not enough.
func Listen(ctx context.Context, address string, log *slog.Logger) (*net.UDPConn, error) {
	var lc net.ListenConfig
	pc, err := lc.ListenPacket(ctx, "udp", address)
	if err != nil {
		return nil, err
	}
	socket := pc.(*net.UDPConn)
	for _, b := range []struct {
		option, force int
		sysctl        string
	}{
		{unix.SO_RCVBUF, unix.SO_RCVBUFFORCE, "net.core.rmem_max"},
		{unix.SO_SNDBUF, unix.SO_SNDBUFFORCE, "net.core.wmem_max"},
	} {
		got, err := grow(socket, b.option, b.force)
		if err != nil {
			_ = socket.Close()
			return nil, fmt.Errorf("buffers of UDP socket %s: %w", address, err)
		}
		if got < SocketBytes {
			log.Warn("the UDP buffers are small, so that bursts are lost and sent again; raise the limit with: sysctl -w "+fmt.Sprintf("%s=%d", b.sysctl, SocketBytes),
				"component", "quicingest", "bytes", got, "wanted", SocketBytes)
			// quic-go would say less of it, to standard error.
			_ = os.Setenv("QUIC_GO_DISABLE_RECEIVE_BUFFER_WARNING", "true")
		}
	}
	return socket, nil
}

// grow makes a buffer as large as allowed, at most SocketBytes, and returns how large it is.
func grow(socket *net.UDPConn, option, force int) (got int, err error) {
	raw, err := socket.SyscallConn()
	if err != nil {
		return 0, err
	}
	failed := raw.Control(func(fd uintptr) {
		if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, force, SocketBytes) != nil { // only root may
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, option, SocketBytes)
		}
		if err == nil {
			got, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, option)
		}
	})
	if failed != nil {
		err = failed
	}
	return got / 2, err // the kernel counts its own needs, too
}
