//go:build linux

package weights

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ingestd/ingestd/internal/sendfile"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// What a remote reader answers when it has a generation.
const (
	answerShown = 1
	answerBad   = 2
)

// RemoteStats is a reader that is served over its connection, and what it was sent.
type RemoteStats struct {
	Number     uint64 // as among the store's readers
	Table      string
	Who        Who
	Since      time.Time
	Have       uint64 // the generation it has shown last; 0: none yet
	Generation uint64 // that is being sent, or whose answer is waited for; 0: it has the newest
	Sent       int64  // bytes of that
	Total      int64  // bytes of that to send
	RemoteCounts
}

// RemoteCounts counts what was sent to remote readers.
type RemoteCounts struct {
	Generations uint64 // shown
	Deltas      uint64 // of those, sent as what differs from the one before
	Resumed     uint64 // transfers that went on where they had broken off
	Broken      uint64 // transfers that the reader, or its connection, did not end well
	Bad         uint64 // generations that did not come as they were sent
	Skipped     uint64 // generations never sent because a newer one was there
	Bytes       uint64 // of tensors
	Refused     uint64 // readers above the limit
}

func (c *RemoteCounts) add(d RemoteCounts) {
	c.Generations += d.Generations
	c.Deltas += d.Deltas
	c.Resumed += d.Resumed
	c.Broken += d.Broken
	c.Bad += d.Bad
	c.Skipped += d.Skipped
	c.Bytes += d.Bytes
	c.Refused += d.Refused
}

// remotes are the readers served over connections, of all tables.
type remotes struct {
	mu      sync.Mutex
	serving map[*remote]struct{}
	ended   RemoteCounts
}

// stats returns those that are served now, by table and number, and what all together were sent.
func (rs *remotes) stats() (all []RemoteStats, sum RemoteCounts) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	sum = rs.ended
	for _, r := range slices.Collect(maps.Keys(rs.serving)) {
		st := r.status()
		sum.add(st.RemoteCounts)
		all = append(all, st)
	}
	slices.SortFunc(all, func(a, b RemoteStats) int {
		if a.Table != b.Table {
			return map[bool]int{true: -1, false: 1}[a.Table < b.Table]
		}
		return int(a.Number) - int(b.Number)
	})
	return all, sum
}

// remote is a reader that is served over its connection: always the newest generation that it does not have. One goroutine writes to it, and one reads its
// answers.
type remote struct {
	conn    netConn
	limits  limits
	log     *slog.Logger
	store   *Store
	reader  *Reader
	delta   bool
	answers chan byte // capacity 1
	sender  sender

	have    spec.Fingerprint // digest of the generation st.Have; zero: it is not to be a base
	refused uint64           // a generation that came damaged
	inside  bool             // a generation was begun and not all of it was written
	torn    bool             // the connection was closed there
	due     atomic.Bool      // an answer may come

	mu sync.Mutex
	st RemoteStats
}

func (r *remote) status() RemoteStats {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.st
}

func (r *remote) note(f func(st *RemoteStats)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f(&r.st)
}

// serveRemote serves a reader over its connection, until that, ctx or the table's manifest ends.
func (s *Server) serveRemote(ctx context.Context, conn net.Conn, hello *wire.Hello, store *Store, who Who, log *slog.Logger) error {
	nc, ok := conn.(netConn)
	if !ok {
		return wire.Refuse(wire.CodeInternal, "a connection of type %T cannot be served", conn)
	}
	r := &remote{
		conn: nc, limits: s.limits(), log: log, store: store, delta: hello.Delta, answers: make(chan byte, 1), sender: sender{sendfile.Sender{Conn: nc, Stall: s.cfg.StallTimeout}},
	}
	if !s.remotes.admit(r, s.cfg.RemoteReadersMax) {
		return wire.Refuse(wire.CodeTooManyConnections,
			"%d readers are served over connections, which is this daemon's limit: end one, raise the limit, or try again later", s.cfg.RemoteReadersMax)
	}
	defer s.remotes.leave(r)
	if err := s.awaitFirst(ctx, conn, store, hello); err != nil {
		return quiet(err)
	}
	reader, err := store.OpenReader(who)
	if err != nil {
		return refusalOf(err)
	}
	defer reader.Close()
	if err := r.accept(ctx, reader, who); err != nil {
		return quiet(err)
	}
	s.accepted(1, 0)
	r.log = log.With("reader", reader.Number(), "peer", who.Addr)
	r.log.Info("reader connected")
	defer r.log.Info("reader ended")
	err = r.serve(ctx, hello)
	var notice *wire.Notice
	if errors.As(err, &notice) {
		dismiss(ctx, nc, notice, s.cfg.LingerTimeout)
	}
	return quiet(err)
}

func (rs *remotes) admit(r *remote, most int) bool {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if len(rs.serving) >= most {
		rs.ended.Refused++
		return false
	}
	if rs.serving == nil {
		rs.serving = map[*remote]struct{}{}
	}
	r.st.Table, r.st.Since = r.store.Table(), time.Now()
	rs.serving[r] = struct{}{}
	return true
}

func (rs *remotes) leave(r *remote) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	delete(rs.serving, r)
	rs.ended.add(r.status().RemoteCounts)
}

// Why a reader's context ends.
var (
	errPeerLeft = errors.New("weights: the reader has ended")
	errTalks    = errors.New("weights: the reader said something that nobody asked for")
)

// listen reads the reader's answers until its connection ends.
func (r *remote) listen(gone context.CancelCauseFunc) {
	var b [1]byte
	for {
		n, err := r.conn.Read(b[:]) // over QUIC the last byte and the end may come together
		if n > 0 && !r.answer(b[0]) {
			gone(errTalks)
		}
		if n == 0 || err != nil {
			gone(errPeerLeft)
			return
		}
	}
}

// answer takes an answer, if one is due.
func (r *remote) answer(b byte) bool {
	if !r.due.Load() {
		return false
	}
	select {
	case r.answers <- b:
		return true
	default:
		return false
	}
}

// accept replies.
func (r *remote) accept(ctx context.Context, reader *Reader, who Who) error {
	r.note(func(st *RemoteStats) { st.Number, st.Who = reader.Number(), who })
	r.reader = reader
	reply, err := wire.AppendAccepted(nil, &wire.AcceptedSubscribe{
		Table: r.store.Table(), Reader: reader.Number(), Newest: reader.Newest(), Manifest: reader.Manifest().JSON(),
	})
	if err != nil {
		return err
	}
	return r.sender.write(ctx, reply)
}

// serve sends generations until the connection or ctx ends, or there will be no more. It returns nil if the reader ended it, the *wire.Notice that it is to be
// ended with, or what went wrong with the connection.
func (r *remote) serve(ctx context.Context, hello *wire.Hello) error {
	ctx, gone := context.WithCancelCause(ctx)
	defer gone(nil)
	var listening sync.WaitGroup
	defer listening.Wait()
	defer func() { _ = r.conn.SetReadDeadline(past) }()
	listening.Go(func() { r.listen(gone) })
	defer context.AfterFunc(ctx, func() { _ = r.conn.SetWriteDeadline(past) })()
	err := r.run(ctx, hello)
	if notice := r.notice(ctx, err); notice != nil && !r.torn {
		return notice
	}
	if r.torn || errors.Is(context.Cause(ctx), errPeerLeft) {
		return nil
	}
	return err
}

// run sends one generation after the other.
func (r *remote) run(ctx context.Context, hello *wire.Hello) error {
	r.claims(hello)
	if hello.Resume != 0 {
		if held, ok := r.reader.At(uint64(hello.Resume), hello.ResumeDigest); ok && hello.ResumeOffset <= held.Manifest().DataBytes() {
			r.note(func(st *RemoteStats) { st.Resumed++ })
			if err := r.give(ctx, held, nil, hello.ResumeOffset); err != nil {
				return err
			}
		} else if ok {
			held.Release()
		}
	}
	for {
		held, err := r.reader.Wait(ctx, r.status().Have)
		if err != nil {
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			return err
		}
		base := (*Held)(nil)
		if r.delta && !r.have.IsZero() {
			base, _ = r.reader.At(r.status().Have, r.have)
		}
		if err := r.give(ctx, held, base, 0); err != nil {
			return err
		}
	}
}

// claims takes what the reader says it has, if that can be: numbers of another life of the daemon say nothing.
func (r *remote) claims(hello *wire.Hello) {
	have, newest := uint64(hello.Have), r.store.Newest()
	if have == 0 || have > newest {
		return
	}
	if have == newest {
		held, ok := r.reader.At(have, hello.HaveDigest)
		if !ok {
			return
		}
		held.Release()
	}
	r.have = hello.HaveDigest
	r.note(func(st *RemoteStats) { st.Have = have })
}

// give sends a generation, of which the reader has the first bytes or what does not differ from base, and waits for its answer. Both are let go of when it has
// answered: until then what lies in the sockets' buffers is the memory itself.
func (r *remote) give(ctx context.Context, held, base *Held, from int64) (err error) {
	defer held.Release()
	a := announce(held, base)
	if base != nil {
		base.Release() // what differs is known
	}
	a.From = from
	r.note(func(st *RemoteStats) { st.Generation, st.Sent, st.Total = a.Generation, from, a.Bytes })
	defer r.note(func(st *RemoteStats) { st.Generation, st.Sent, st.Total = 0, 0, 0 })
	answer, err := r.send(ctx, held, a)
	if err != nil && r.inside {
		r.breakOff()
	}
	if errors.Is(err, errPeerLeft) { // maybe right after its answer
		select {
		case answer = <-r.answers:
		default:
		}
	}
	if answer == answerShown || answer == answerBad {
		r.took(held, a, answer)
	} else {
		r.note(func(st *RemoteStats) { st.Broken++ })
	}
	return err
}

// breakOff closes a connection in the middle of a generation: no reason can be said there, and what was not read yet is not to be read any more.
func (r *remote) breakOff() {
	r.torn = true
	_ = sendfile.Abort(r.conn)
}

// errNoAnswer is a reader that has all of a generation and says nothing.
var errNoAnswer = errors.New("weights: the reader does not say whether it has the generation")

// send writes a generation and waits for the answer.
func (r *remote) send(ctx context.Context, held *Held, a *Announcement) (answer byte, err error) {
	text, err := wire.AppendMessage(nil, a, AnnouncementBytesMax)
	if err != nil {
		return 0, err
	}
	for _, sum := range held.Sums() {
		text = binary.LittleEndian.AppendUint32(text, sum)
	}
	r.inside = true
	r.due.Store(true)
	if err := r.sender.write(ctx, text); err != nil {
		return 0, r.why(ctx, err)
	}
	sent := func(n int64) {
		r.note(func(st *RemoteStats) {
			st.Sent += n
			st.Bytes += uint64(n)
		})
	}
	skip := a.From
	for _, span := range a.Ranges {
		n := min(skip, span[1])
		skip -= n
		if err := r.sender.send(ctx, held, span[0]+n, span[1]-n, sent); err != nil {
			return 0, r.why(ctx, err)
		}
	}
	r.inside = false
	timer := time.NewTimer(r.limits.answer)
	defer timer.Stop()
	select {
	case answer = <-r.answers:
		r.due.Store(false)
		if answer != answerShown && answer != answerBad {
			return 0, errTalks
		}
		return answer, nil
	case <-timer.C:
		return 0, errNoAnswer
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
}

// why says why a write failed: the context that ended, if one did.
func (r *remote) why(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// took notes the reader's answer.
func (r *remote) took(held *Held, a *Announcement, answer byte) {
	g := a.Generation
	if answer == answerBad {
		r.note(func(st *RemoteStats) { st.Bad++ })
		r.log.Warn("a generation did not arrive as it was sent", "generation", g, "again", r.refused != g)
		r.have = spec.Fingerprint{}
		have := uint64(0)
		if r.refused == g { // twice: its publisher may have given sums that are not those of its bytes
			have = g
		}
		r.refused = g
		r.note(func(st *RemoteStats) { st.Have = have })
		return
	}
	r.have = held.Digest()
	r.note(func(st *RemoteStats) {
		st.Generations++
		if a.Base != 0 {
			st.Deltas++
		}
		if st.Have != 0 && g > st.Have {
			st.Skipped += g - st.Have - 1
		}
		st.Have = g
	})
}

// notice says with which words a reader is ended, nil if it is gone.
func (r *remote) notice(ctx context.Context, err error) *wire.Notice {
	replaced := (*ReplacedError)(nil)
	many := (*TooManyReadersError)(nil)
	switch cause := context.Cause(ctx); {
	case errors.Is(err, errTalks) || errors.Is(cause, errTalks):
		return &wire.Notice{Code: wire.CodeBadPeer, Reason: "a reader says one byte, 01 or 02, after each generation, and nothing else"}
	case errors.Is(cause, errPeerLeft):
		return nil
	case errors.As(err, &replaced):
		return &wire.Notice{Code: wire.CodeReplaced, Reason: replaced.Error()}
	case errors.As(err, &many):
		return &wire.Notice{Code: wire.CodeTooManyConnections, Reason: many.Error()}
	case cause != nil, errors.Is(err, errClosed):
		return &wire.Notice{Code: wire.CodeShuttingDown, Reason: "the daemon is stopping"}
	case errors.Is(err, errNoAnswer):
		reason := fmt.Sprintf("all of a generation was sent, and for %v the reader did not say whether it has it", r.limits.answer)
		return &wire.Notice{Code: wire.CodeStalled, Reason: reason}
	case errors.Is(err, os.ErrDeadlineExceeded):
		r.log.Info("a reader took nothing for too long", "dur", r.limits.stall)
	}
	return nil
}
