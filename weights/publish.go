//go:build linux

package weights

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

// publishInPlace serves a publisher that writes into the segment. conn is nil where it came over no unix socket.
//
// A publisher that has begun may take as long as it likes: until its socket ends it may still be writing, so its place cannot be given to another one.
func (s *Server) publishInPlace(ctx context.Context, conn *net.UnixConn, m *tensor.Manifest, store *Store, who Who, log *slog.Logger) error {
	if conn == nil {
		return wire.Refuse(wire.CodeBadOption, "in_place is for publishers on the daemon's machine, over its unix socket: take it out, or use that")
	}
	if store.cfg.Heap {
		return wire.Refuse(wire.CodeWrongRole, "table %q lies in the memory of its daemon's own process and cannot be mapped: take in_place out", store.Table())
	}
	if refusal := s.cfg.Fill.Permit(conn, store.Table()); refusal != nil {
		return refusal
	}
	p, err := store.OpenPublisher(m, who)
	if err != nil {
		return refusalOf(err)
	}
	defer p.Close()
	log = log.With("publisher", p.number, "pid", who.PID)
	if err := s.acceptPublisher(conn, p); err != nil {
		return err
	}
	s.accepted(0, 1)
	log.Info("publisher attached", "bytes", m.DataBytes())
	defer log.Info("publisher ended")

	err = newSession(conn, p, false, limits{write: s.cfg.WriteTimeout, linger: s.cfg.WriteTimeout}, log).run(ctx)
	return quiet(err)
}

func (s *Server) acceptPublisher(conn *net.UnixConn, p *Publishing) error {
	reply, err := wire.AppendAccepted(nil, &wire.AcceptedPublish{
		Table: p.store.Table(), Publisher: p.number, Newest: p.store.Newest(), ChunkBytes: int64(s.cfg.ChunkBytes), SegmentBytes: p.SegmentBytes(),
	})
	if err != nil {
		return fmt.Errorf("table %q: making the reply: %w", p.store.Table(), err)
	}
	fd, ok := p.Descriptor()
	if !ok {
		return fmt.Errorf("table %q: its segment cannot be mapped writable", p.store.Table())
	}
	_ = conn.SetWriteDeadline(time.Now().Add(s.cfg.WriteTimeout))
	if err := shm.SendDescriptors(conn, reply, fd); err != nil {
		return fmt.Errorf("table %q: publisher %d: %w", p.store.Table(), p.number, err)
	}
	return nil
}
