//go:build linux

package weights

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

// waitingAfter is how long a publisher waits for a place before it is told for whom.
const waitingAfter = 50 * time.Millisecond

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

	session := &inPlace{server: s, conn: conn, publishing: p, asks: make(chan asked, 1), done: make(chan struct{})}
	var reading sync.WaitGroup
	defer reading.Wait()
	defer conn.Close()
	defer close(session.done)
	reading.Go(session.read)
	err = session.run(ctx)
	var notice *wire.Notice
	if errors.As(err, &notice) {
		p.Close() // before the peer reads of it
		return s.cutOff(conn, notice.Code, "%s", notice.Reason)
	}
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

// inPlace is a publisher's session.
type inPlace struct {
	server     *Server
	conn       *net.UnixConn
	publishing *Publishing
	place      *Place // nil: none was begun
	asks       chan asked
	done       chan struct{} // closed when nobody takes asks any more
}

type asked struct {
	Ask
	err error
}

// read hands over what the publisher asks, one by one, and last why the connection ended.
func (p *inPlace) read() {
	for {
		var a asked
		a.err = wire.ReadMessage(p.conn, wire.MessageBytesMax, &a.Ask)
		select {
		case p.asks <- a:
		case <-p.done:
			return
		}
		if a.err != nil {
			return
		}
	}
}

func bad(format string, args ...any) error {
	return &wire.Notice{Code: wire.CodeBadPeer, Reason: fmt.Sprintf(format, args...)}
}

// check returns the notice for what could not be read.
func (a *asked) check() error {
	if errors.Is(a.err, wire.ErrProtocol) {
		return bad("%v", a.err)
	}
	return a.err
}

// run answers until the connection ends. A *wire.Notice in the error is to be sent.
func (p *inPlace) run(ctx context.Context) error {
	for {
		var a asked
		select {
		case a = <-p.asks:
		case <-ctx.Done():
			return &wire.Notice{Code: wire.CodeShuttingDown, Reason: "the daemon is stopping"}
		}
		if err := a.check(); err != nil {
			return err
		}
		if err := p.answer(ctx, &a.Ask); err != nil {
			return err
		}
	}
}

func (p *inPlace) answer(ctx context.Context, a *Ask) error {
	switch a.Op {
	case OpBegin:
		return p.begin(ctx, a)
	case OpCommit:
		if p.place == nil || p.place.Generation() != a.Generation {
			return bad("commit of generation %d, which was not begun", a.Generation)
		}
		digest, err := p.place.CommitWritten()
		if err != nil {
			return &wire.Notice{Code: wire.CodeShuttingDown, Reason: "the daemon is stopping"} // the store was closed; nothing else can be
		}
		p.place = nil
		return p.say(&Answer{Op: OpPublished, Generation: a.Generation, Digest: digest})
	case OpAbort:
		return p.abort()
	default:
		return bad("the operation %q is not known; it is begin, commit or abort", a.Op)
	}
}

func (p *inPlace) abort() error {
	if p.place != nil {
		p.place.Abort()
		p.place = nil
	}
	return p.say(&Answer{Op: OpAborted})
}

// begin takes a place, and waits for one while readers pin all.
func (p *inPlace) begin(ctx context.Context, a *Ask) error {
	switch {
	case p.place != nil:
		return bad("begin, and generation %d is under way", p.place.Generation())
	case a.DeadlineMS < 0:
		return bad("a deadline of %d ms", a.DeadlineMS)
	}
	deadline := p.server.cfg.DeadlineMax
	if a.DeadlineMS < deadline.Milliseconds() {
		deadline = time.Duration(a.DeadlineMS) * time.Millisecond
	}
	start, told := time.Now(), false
	timer := time.NewTimer(0)
	defer timer.Stop()
	for pause := lookFirst; ; pause = min(2*pause, lookLast) {
		place, err := p.publishing.TryBegin(a.Generation)
		waited := time.Since(start)
		var pinned *PinnedError
		var old *OldGenerationError
		switch {
		case err == nil:
			p.place = place
			return p.say(&Answer{Op: OpPlace, Generation: place.Generation(), Place: place.Index()})
		case errors.As(err, &old):
			return p.say(&Answer{Op: OpFailed, Code: string(FailedOldGeneration), Reason: err.Error()})
		case !errors.As(err, &pinned):
			return &wire.Notice{Code: wire.CodeShuttingDown, Reason: "the daemon is stopping"} // the store was closed
		case waited >= deadline:
			p.publishing.store.fail(FailedPinned)
			return p.say(&Answer{Op: OpFailed, Code: string(FailedPinned), Reason: err.Error(), Pins: pinTexts(pinned.Pins)})
		case waited >= waitingAfter && !told:
			told = true
			if err := p.say(&Answer{Op: OpWaiting, Pins: pinTexts(pinned.Pins)}); err != nil {
				return err
			}
		}
		timer.Reset(min(pause, max(deadline-waited, 0)))
		select {
		case <-timer.C:
		case <-ctx.Done():
			return &wire.Notice{Code: wire.CodeShuttingDown, Reason: "the daemon is stopping"}
		case a := <-p.asks:
			if err := a.check(); err != nil {
				return err
			}
			if a.Op != OpAbort {
				return bad("%q while a place is waited for; only abort can be said then", a.Op)
			}
			p.publishing.store.fail(FailedAborted)
			return p.abort()
		}
	}
}

// say sends an answer.
func (p *inPlace) say(a *Answer) error {
	b, err := wire.AppendMessage(nil, a, wire.MessageBytesMax)
	if err != nil {
		return fmt.Errorf("table %q: publisher %d: %w", p.publishing.store.Table(), p.publishing.number, err)
	}
	_ = p.conn.SetWriteDeadline(time.Now().Add(p.server.cfg.WriteTimeout))
	if _, err := p.conn.Write(b); err != nil {
		return fmt.Errorf("table %q: publisher %d: answering: %w", p.publishing.store.Table(), p.publishing.number, err)
	}
	return nil
}
