//go:build linux

package weights

import (
	"context"
	"log/slog"
	"net"

	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

func (s *Server) servePublishStream(context.Context, net.Conn, *wire.Hello, *tensor.Manifest, *Store, Who, *slog.Logger) error {
	return wire.Refuse(wire.CodeWrongRole, "streamed publishing is not served")
}

func (s *Server) serveRemote(context.Context, net.Conn, *wire.Hello, *Store, Who, *slog.Logger) error {
	return wire.Refuse(wire.CodeWrongRole, "streamed reading is not served")
}
