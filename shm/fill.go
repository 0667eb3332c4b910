//go:build linux

package shm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/wire"
)

// FillConfig says who may fill places in place, and how that is done. All may be left zero.
type FillConfig struct {
	// Users and Groups are the numbers of those who may, beside the daemon's own user, who always may. Whoever does has the table's memory mapped writable:
	// it can spoil every sample there and what the daemon keeps of them. Root is not special.
	Users, Groups []uint32

	// Prefetch is the places that a producer which names no number is lent at once. Default 2: it fills one while the other is exchanged.
	Prefetch int

	// FillersMax is the most such producers attached at once, over all tables. Default 256. Those of one table of n batches are together lent at
	// most n-2 places, and never so many that trainers and fillers together could hold n.
	FillersMax int

	// SettleAfter is how long complete rows wait for the rest of their place before they are copied into the batch that all share; a table's shorter
	// Linger comes first. Default 100 ms.
	SettleAfter time.Duration

	// Poll is how long the daemon looks at a producer's queue before it sleeps. Default 0: it costs a core while a producer is attached, and saves a wake-up.
	Poll time.Duration
}

func (c FillConfig) withDefaults() FillConfig {
	if c.Prefetch == 0 {
		c.Prefetch = 2
	}
	if c.FillersMax == 0 {
		c.FillersMax = 256
	}
	if c.SettleAfter == 0 {
		c.SettleAfter = 100 * time.Millisecond
	}
	return c
}

func (c FillConfig) check(prefetchMax int) error {
	switch {
	case c.Prefetch < 1 || c.Prefetch > prefetchMax:
		return fmt.Errorf("shm: Fill.Prefetch is %d, must be from 1 to PrefetchMax (%d)", c.Prefetch, prefetchMax)
	case c.FillersMax < 1:
		return fmt.Errorf("shm: Fill.FillersMax is %d, must be at least 1", c.FillersMax)
	case c.SettleAfter < 0 || c.Poll < 0:
		return fmt.Errorf("shm: Fill.SettleAfter is %v and Fill.Poll %v, neither may be negative", c.SettleAfter, c.Poll)
	}
	return nil
}

// When a note goes out: after the producer has waited for noteAfter, and then once in noteAgain.
const (
	noteAfter = 50 * time.Millisecond
	noteAgain = time.Second
)

// errStopping is the cause when the daemon stops its fillers.
var errStopping = errors.New("the daemon is stopping")

// filling is what the server knows of all fillers.
type filling struct {
	fillers map[uint64]*filler
	granted map[string]int // per table, the places that its fillers may have together; also counted in Server.granted
	stop    context.Context
	running sync.WaitGroup
	total   FillStats // of those that have ended
}

// StopFilling ends all producers that fill in place, and refuses new ones: what they have called complete is taken and put where trainers find it, and they
// are told that the daemon is stopping. ctx bounds the wait for room in a full ring. It returns when all have ended.
func (s *Server) StopFilling(ctx context.Context) {
	s.mu.Lock()
	if s.filling.stop == nil {
		s.filling.stop = ctx
		for _, f := range s.filling.fillers {
			f.stop(ctx)
		}
	}
	s.mu.Unlock()
	s.filling.running.Wait()
}

// stopping returns what StopFilling was called with, or nil.
func (s *Server) stopping() context.Context {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.filling.stop
}

// fill serves a producer that fills places in place, for as long as it stays.
func (s *Server) fill(ctx context.Context, conn *net.UnixConn, hello *wire.Hello, table Table, log *slog.Logger) error {
	if ctx.Err() != nil {
		return wire.Refuse(wire.CodeShuttingDown, "the daemon is stopping")
	}
	peer := credentialsOf(conn)
	if refusal := s.cfg.Fill.permit(peer, table); refusal != nil {
		return refusal
	}
	if _, ok := table.Memory.Writable(); !ok || table.Fill == nil {
		return wire.Refuse(wire.CodeWrongRole, "table %q does not offer to be filled in place; push to it over this socket", table.Name)
	}
	f, err := s.addFiller(ctx, conn, hello, table, peer, log)
	if err != nil {
		return err
	}
	defer s.removeFiller(f)
	return f.serve(ctx, hello)
}

// addFiller gives the producer a number and its share of the table's places: what it asks for, at most half (rounded up) of what others left.
func (s *Server) addFiller(ctx context.Context, conn *net.UnixConn, hello *wire.Hello, table Table, peer credentials, log *slog.Logger) (*filler, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.filling.stop != nil {
		return nil, wire.Refuse(wire.CodeShuttingDown, "the daemon is stopping")
	}
	if n := len(s.filling.fillers); n >= s.cfg.Fill.FillersMax {
		return nil, wire.Refuse(wire.CodeTooManyConnections,
			"%d producers fill in place, which is this daemon's limit: end one, raise the limit, or push over this socket", n)
	}
	want := hello.Prefetch
	if want == 0 {
		want = int64(s.cfg.Fill.Prefetch)
	}
	batches := table.View.Batches()
	left := min(batches-1-s.granted[table.Name], batches-2-s.filling.granted[table.Name]) // one for shared filling, and one for a trainer
	grant := int(min(want, int64(s.cfg.PrefetchMax), int64(left+1)/2))
	if grant < 1 {
		return nil, wire.Refuse(wire.CodeTooManyConnections,
			"trainers and producers of table %q may already hold all of its %d batches but those that must stay free: "+
				"end one, let them prefetch less, or give the table more batches", table.Name, batches)
	}
	s.lastID++
	f := newFiller(s, s.lastID, conn, hello, table, grant, peer, log.With("filler", s.lastID, "pid", peer.pid, "uid", peer.uid))
	f.alive, f.die = context.WithCancelCause(ctx)
	f.ending, f.giveUp = context.WithCancelCause(context.WithoutCancel(ctx))
	s.filling.fillers[f.id] = f
	s.filling.granted[table.Name] += grant
	s.granted[table.Name] += grant
	s.filling.running.Add(1)
	return f, nil
}

func (s *Server) attached() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.filling.total.Attached++
}

// removeFiller adds what the producer did to the totals.
func (s *Server) removeFiller(f *filler) {
	f.die(nil)
	f.giveUp(nil)
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.filling.fillers, f.id)
	for _, granted := range [...]map[string]int{s.granted, s.filling.granted} {
		if granted[f.table.Name] -= f.grant; granted[f.table.Name] == 0 {
			delete(granted, f.table.Name)
		}
	}
	f.addTo(&s.filling.total)
	s.filling.running.Done()
}

// fillStats is called under mu.
func (s *Server) fillStats() FillStats {
	all := s.filling.total
	for _, f := range s.filling.fillers {
		f.addTo(&all)
		all.Fillers = append(all.Fillers, f.stats())
	}
	slices.SortFunc(all.Fillers, func(a, b FillerStats) int { return cmp.Compare(a.ID, b.ID) })
	return all
}

// openLender opens the stream, and makes a refusal of what went wrong with it.
func (f *filler) openLender(ctx context.Context, hello *wire.Hello) error {
	lender, err := f.table.Fill(ctx, hello, func() {
		f.cut(wireNotice(wire.CodeSessionTaken, "another connection has opened session %q", hello.Session))
	})
	if err == nil {
		f.server.mu.Lock()
		f.lender = lender
		f.server.mu.Unlock()
		return nil
	}
	var refusal *wire.Refusal
	var full *ring.SessionsFullError
	var notice *wire.Notice
	switch {
	case errors.As(err, &refusal):
		return refusal
	case errors.As(err, &full):
		return wire.Refuse(wire.CodeTooManySessions, "%v; use fewer names, or give the table room for more", full)
	case errors.As(context.Cause(ctx), &notice):
		return wire.Refuse(notice.Code, "%s", notice.Reason)
	case errors.Is(context.Cause(ctx), errSocketEnded):
		return errSocketEnded
	case ctx.Err() != nil || errors.Is(err, os.ErrClosed):
		return wire.Refuse(wire.CodeShuttingDown, "the daemon is stopping")
	}
	f.log.Error("cannot open a stream for a filler", "err", err)
	return wire.Refuse(wire.CodeInternal, "the daemon could not open a stream: %v", err)
}
