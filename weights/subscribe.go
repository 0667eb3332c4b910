//go:build linux

package weights

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/wire"
)

// newsMark says that there is a newer generation.
const newsMark = 0x01

// subscribe serves a reader on this machine: it gives it the segment and a page of pins, and rings when something was published.
func (s *Server) subscribe(ctx context.Context, conn *net.UnixConn, hello *wire.Hello, store *Store, who Who, log *slog.Logger) error {
	if hello.Delta || hello.Have != 0 || hello.Resume != 0 {
		return wire.Refuse(wire.CodeBadOption,
			"have, resume and delta are for readers to whom generations are streamed; this one maps them: take them out, or set stream")
	}
	if err := s.awaitFirst(ctx, conn, store, hello); err != nil {
		return quiet(err)
	}
	page, err := shm.NewMemory(shm.MemoryConfig{Name: "ingestd-pins", Size: PinsBytes, PeersWrite: true})
	if err != nil {
		return wire.Refuse(wire.CodeInternal, "the daemon could not make a page of pins: %v", err)
	}
	r, err := store.openReader(who, page)
	if err != nil {
		_ = page.Close()
		return refusalOf(err)
	}
	defer r.Close()
	log = log.With("reader", r.number, "pid", who.PID)
	if err := s.acceptReader(conn, r, page); err != nil {
		return err
	}
	s.accepted(1, 0)
	log.Info("reader attached")
	defer log.Info("reader ended")

	spoke := make(chan error, 1)
	var watching sync.WaitGroup
	defer watching.Wait()
	defer conn.Close()
	watching.Go(func() {
		var b [1]byte
		n, err := conn.Read(b[:])
		if n > 0 {
			err = errSpoke
		}
		spoke <- err
	})
	for {
		select {
		case <-r.News():
			if err := r.Err(); err != nil {
				return s.farewell(conn, noticeOf(err))
			}
			ring(conn)
		case <-ctx.Done():
			return s.farewell(conn, &wire.Notice{Code: wire.CodeShuttingDown, Reason: "the daemon is stopping"})
		case err := <-spoke:
			if err == errSpoke {
				_ = r.Close() // now, and not when it has read why
				return s.farewell(conn, &wire.Notice{Code: wire.CodeBadPeer, Reason: "a reader that maps the segment says nothing"})
			}
			return quiet(err)
		}
	}
}

func (s *Server) acceptReader(conn *net.UnixConn, r *Reader, page backing) error {
	if r.memory.backing == nil {
		return wire.Refuse(wire.CodeWrongRole, "table %q lies in the memory of its daemon's own process and cannot be mapped: set stream", r.store.Table())
	}
	reply, err := wire.AppendAccepted(nil, &wire.AcceptedSubscribe{Table: r.store.Table(), Reader: r.number, Newest: r.Newest(), SegmentBytes: r.SegmentBytes()})
	if err != nil {
		return fmt.Errorf("table %q: making the reply: %w", r.store.Table(), err)
	}
	_ = conn.SetWriteDeadline(time.Now().Add(s.cfg.WriteTimeout))
	defer conn.SetWriteDeadline(time.Time{})
	if err := shm.SendDescriptors(conn, reply, r.memory.backing.Descriptor(), page.Descriptor()); err != nil {
		return fmt.Errorf("table %q: reader %d: %w", r.store.Table(), r.number, err)
	}
	return nil
}

// ring writes the mark of news, if there is room for it: a reader that has not read so many has news enough. It never waits, so that a reader that is
// stopped, and still pins what it reads, is not cut off for it.
func ring(conn *net.UnixConn) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Write(func(fd uintptr) bool {
		_, _ = unix.Write(int(fd), []byte{newsMark})
		return true
	})
}

// quiet makes nothing of a connection that the peer has closed.
func quiet(err error) error {
	for _, closed := range [...]error{io.EOF, io.ErrUnexpectedEOF, unix.ECONNRESET, unix.EPIPE, net.ErrClosed} {
		if errors.Is(err, closed) {
			return nil
		}
	}
	return err
}
