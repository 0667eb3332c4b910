//go:build linux

package shm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/internal/failpoint"
	"github.com/ingestd/ingestd/spsc"
	"github.com/ingestd/ingestd/wire"
)

// filler is the daemon's side of one producer that fills places in place. While it runs it has three goroutines: one commits what the giveback queue says is
// complete, and lends new places as long as some are free; one waits for a free place when none is; one watches the socket.
type filler struct {
	server *Server
	id     uint64
	conn   *net.UnixConn
	table  Table
	client string
	sess   string
	notes  bool
	peer   credentials
	since  time.Time
	grant  int // most places lent at once
	settle time.Duration
	log    *slog.Logger

	alive  context.Context // ends when the daemon stops
	die    context.CancelCauseFunc
	ending context.Context // bounds what is done after that
	giveUp context.CancelCauseFunc
	cut    context.CancelCauseFunc // ends the attachment; the first cause counts

	link   *link           // set by serve; for others under server.mu
	lender *drainer.Lender // the same

	mu      sync.Mutex // of lending: whoever holds the turn pushes to the deliver queue
	lending bool       // the lending goroutine has the turn, and waits for a place
	kick    chan struct{}
	ended   atomic.Bool // the ring was closed, and the peer told

	// The committing goroutine's own.
	descs      [256]spsc.Desc
	unfinished bool // the place being filled is full, and could be neither published nor copied
	last       bool // the attachment has ended: nothing more is lent
	armed      bool
	oldest     rowAge
	said       []byte      // what a Checker has for the producer
	settleDue  atomic.Bool // set by its timer
	clock      *time.Timer

	noteMu sync.Mutex // of writing to the socket
	note   *time.Timer
	waits  int  // goroutines of ours that wait for the ring
	mute   bool // a note could not be written, or all are sent

	sentNotes, stranded atomic.Uint64
	outcome             atomic.Int32 // a fillOutcome
}

type fillOutcome int32

const (
	fillAttached fillOutcome = iota
	fillDetached
	fillCutOff
	fillTaken
	fillBadPeer
)

func newFiller(s *Server, id uint64, conn *net.UnixConn, hello *wire.Hello, table Table, grant int, peer credentials, log *slog.Logger) *filler {
	f := &filler{
		server: s, id: id, conn: conn, table: table, client: hello.Client, sess: hello.Session, notes: hello.Notes, peer: peer, since: time.Now(), grant: grant,
		settle: s.cfg.Fill.SettleAfter, log: log, lending: true, kick: make(chan struct{}, 1),
	}
	if table.Linger > 0 {
		f.settle = min(f.settle, table.Linger)
	}
	return f
}

// stop ends the producer because the daemon does; ctx bounds how long what it has filled waits for room.
func (f *filler) stop(ctx context.Context) {
	f.die(errStopping)
	context.AfterFunc(ctx, func() { f.giveUp(errStopping) })
}

// serve is the attachment's life.
func (f *filler) serve(ctx context.Context, hello *wire.Hello) error {
	running, cut := context.WithCancelCause(f.alive)
	defer cut(nil)
	f.cut = cut
	defer context.AfterFunc(ctx, func() { // a daemon that gives no time still lets a short batch be published
		if f.server.stopping() == nil {
			time.AfterFunc(f.server.cfg.WriteTimeout, func() { f.giveUp(errStopping) })
		}
	})()
	var loops sync.WaitGroup
	loops.Go(func() { cut(f.watch(running)) })
	err := f.openLender(running, hello)
	if err == nil {
		if err = f.accept(); err == nil {
			f.server.attached()
			f.log.Info("filler attached", "prefetch", f.grant, "session", f.sess, "stream", f.lender.ID(), "held", f.lender.Held())
			f.kick <- struct{}{}
			loops.Go(func() { cut(f.lendLoop(running)) })
			loops.Go(func() { cut(f.commitLoop(running)) })
		}
	}
	if err != nil {
		cut(err)
	}
	<-running.Done()
	f.join(&loops)
	cause := context.Cause(running)
	if f.lender == nil || err != nil {
		if f.lender != nil {
			_ = f.lender.End(f.ending, true)
			f.lender.Free()
		}
		f.closeLink()
		if errors.Is(err, errSocketEnded) {
			return nil
		}
		return err
	}
	err = f.end(cause)
	f.closeLink()
	return err
}

// accept makes the channel and answers the hello.
func (f *filler) accept() error {
	l, err := openLink(fmt.Sprintf("ingestd fill channel %d", f.id), f.grant)
	if err != nil {
		f.log.Error("cannot attach a filler", "err", err)
		return wire.Refuse(wire.CodeInternal,
			"the daemon could not make the channel: %v; free or raise what it has too little of (for open files: ulimit -n) and attach again", err)
	}
	f.server.mu.Lock()
	f.link = l
	f.server.mu.Unlock()
	f.clock = time.AfterFunc(time.Hour, func() {
		f.settleDue.Store(true)
		l.toUs.signal()
	})
	f.clock.Stop()
	layout := f.table.View.Layout()
	reply, err := wire.AppendAccepted(nil, &wire.AcceptedFill{
		Table: f.table.Name, Spec: f.table.Spec, Fingerprint: f.table.Spec.Fingerprint(), Stream: f.lender.ID(), Held: f.lender.Held(),
		BatchSize: int64(layout.BatchSize), Batches: int64(layout.Batches), SegmentBytes: f.table.View.SegmentBytes(),
		ChannelBytes: l.bytes, Prefetch: int64(f.grant),
	})
	if err != nil {
		return fmt.Errorf("table %q: making the reply: %w", f.table.Name, err)
	}
	segment, _ := f.table.Memory.Writable()
	_ = f.conn.SetWriteDeadline(time.Now().Add(f.server.cfg.WriteTimeout))
	if err := l.send(f.conn, reply, segment); err != nil {
		return fmt.Errorf("table %q: filler %d: %w", f.table.Name, f.id, err)
	}
	return nil
}

func (f *filler) closeLink() {
	f.server.mu.Lock()
	l := f.link
	f.link = nil
	f.server.mu.Unlock()
	if l == nil {
		return
	}
	if err := l.close(); err != nil {
		f.log.Error("ending a filler", "err", err)
	}
}

// watch returns when the socket says something or ends, or ctx does.
func (f *filler) watch(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { _ = f.conn.SetReadDeadline(time.Unix(1, 0)) })()
	var one [1]byte
	n, err := f.conn.Read(one[:])
	switch {
	case n > 0:
		return wireNotice(wire.CodeBadPeer, "a producer that fills in place sends nothing after its hello, and this one sent byte %#02x", one[0])
	case errors.Is(err, os.ErrDeadlineExceeded):
		return context.Cause(ctx)
	}
	return errSocketEnded
}

// join waits for the goroutines to see that the attachment has ended; see trainer.join.
func (f *filler) join(loops *sync.WaitGroup) {
	done := make(chan struct{})
	go func() { loops.Wait(); close(done) }()
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for {
		if f.link != nil {
			f.link.toUs.signal()
		}
		select {
		case <-done:
			if f.clock != nil {
				f.clock.Stop()
			}
			return
		case <-again.C:
			if f.link != nil {
				f.link.toPeer.unstick()
			}
		}
	}
}

// refill lends places as long as some are free at once, and leaves waiting to the lending goroutine. Called by the committing one.
func (f *filler) refill() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for !f.lending && f.lender.Places() < f.grant {
		lease, place, ok := f.lender.TryLend()
		if !ok {
			f.lending = true
			f.kick <- struct{}{}
			return nil
		}
		if err := f.deliver(lease, place.Index); err != nil {
			return err
		}
	}
	return nil
}

func (f *filler) deliver(lease uint64, index uint32) error {
	one := [1]spsc.Desc{{A: lease, B: uint64(index)}}
	failpoint.Hit("shm/filler/lent")
	n, err := f.link.deliver.TryPush(one[:])
	if err != nil {
		return wireNotice(wire.CodeBadPeer, "deliver queue: %v", err)
	}
	if n == 0 { // it has room for all that can be lent at once
		return wireNotice(wire.CodeBadPeer, "deliver queue: rows of places were called complete that were never taken from it")
	}
	return nil
}

// lendLoop waits for free places whenever it has the turn. It returns a cause to end for.
func (f *filler) lendLoop(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-f.kick:
		}
		for !f.yield() {
			lease, place, ok := f.lender.TryLend()
			if !ok {
				var err error
				f.waiting(1)
				lease, place, err = f.lender.Lend(ctx)
				f.waiting(-1)
				if errors.Is(err, os.ErrClosed) {
					f.ended.Store(true)
					f.link.deliver.Close()
					f.link.ringPeer()
					<-ctx.Done() // what it still has is taken
					return context.Cause(ctx)
				}
				if err != nil {
					return context.Cause(ctx)
				}
			}
			if err := f.deliver(lease, place.Index); err != nil {
				return err
			}
			f.link.ringPeer()
		}
	}
}

// yield gives the turn back to the committing goroutine when the producer has all it may have.
func (f *filler) yield() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lending = f.lender.Places() < f.grant
	return !f.lending
}

// commitLoop takes what the producer calls complete. It returns a cause to end for.
func (f *filler) commitLoop(ctx context.Context) error {
	for ctx.Err() == nil {
		n, err := f.takePolling(ctx)
		if err != nil {
			return err
		}
		if n > 0 {
			continue
		}
		if err := f.settleOld(ctx); err != nil {
			return err
		}
		f.link.giveback.SetWaiting(true)
		n, err = f.take(ctx)
		if n == 0 && err == nil && !f.settleDue.Load() && ctx.Err() == nil {
			err = f.link.toUs.wait()
		}
		f.link.giveback.SetWaiting(false)
		if err != nil {
			return err
		}
	}
	return context.Cause(ctx)
}

// takePolling is take that goes on looking for a while where the configuration says so.
func (f *filler) takePolling(ctx context.Context) (int, error) {
	n, err := f.take(ctx)
	if n > 0 || err != nil || f.server.cfg.Fill.Poll == 0 {
		return n, err
	}
	until := time.Now().Add(f.server.cfg.Fill.Poll)
	for round := 1; ; round++ {
		if n, err = f.take(ctx); n > 0 || err != nil {
			return n, err
		}
		if round%16 == 0 && (time.Now().After(until) || f.settleDue.Load() || ctx.Err() != nil) {
			return 0, nil
		}
		pause(round)
	}
}

// take does what lies in the giveback queue, after checking each descriptor against what was lent. consumed moves when it is done: it is the committed ack.
func (f *filler) take(ctx context.Context) (int, error) {
	if f.unfinished {
		if err := f.finish(ctx); err != nil {
			return 0, err
		}
	}
	n, err := f.link.giveback.Peek(f.descs[:])
	if err != nil {
		return 0, wireNotice(wire.CodeBadPeer, "giveback queue: %v", err)
	}
	if n == 0 {
		return 0, nil
	}
	defer f.link.ringPeer()
	arrival := uint64(time.Now().UnixNano())
	for i := 0; i < n; {
		k, err := f.handle(ctx, f.descs[i:n], arrival)
		if err != nil {
			return i, err
		}
		i += k
	}
	return n, nil
}

// What a giveback descriptor asks for, in the high half of its second word.
const (
	verbComplete = 1
	verbSettle   = 2
	verbResumed  = 3
	verbBits     = 32
	rowsMask     = 1<<verbBits - 1
)

// handle does the first of the descriptors, together with those after it that go on with the same place, and returns how many those were.
func (f *filler) handle(ctx context.Context, descs []spsc.Desc, arrival uint64) (int, error) {
	d := descs[0]
	switch {
	case d.B>>verbBits == verbComplete && d.B&rowsMask != 0:
		rows, k := d.B&rowsMask, 1
		for k < len(descs) && descs[k].A == d.A && descs[k].B>>verbBits == verbComplete && descs[k].B&rowsMask != 0 {
			rows += descs[k].B & rowsMask
			k++
		}
		full, err := f.lender.Commit(d.A, int(rows), arrival)
		if err != nil {
			return 0, turnedDown(err)
		}
		failpoint.Hit("shm/filler/committed")
		f.tellChecked()
		f.link.giveback.Done(k)
		failpoint.Hit("shm/filler/acked")
		if full {
			return k, f.finish(ctx)
		}
		return k, nil
	case d.B == verbSettle<<verbBits:
		if lease, ok := f.lender.Current(); ok && d.A == lease {
			if err := f.copyOut(ctx); err != nil {
				return 0, err
			}
		} else if !f.lender.Passed(d.A) {
			return 0, wireNotice(wire.CodeBadPeer, "giveback queue: lease %d is to be settled, which is not being filled", d.A)
		}
	case d.B == verbResumed<<verbBits && d.A == 0:
		f.lender.Resumed()
	default:
		return 0, wireNotice(wire.CodeBadPeer, "giveback queue: descriptor %#x %#x means nothing", d.A, d.B)
	}
	f.link.giveback.Done(1)
	return 1, nil
}

// finish publishes the place that is full, or copies what of it must be copied, and lends another.
func (f *filler) finish(ctx context.Context) error {
	if !f.lender.TryPublish() {
		f.unfinished = true
		if err := f.copyOut(ctx); err != nil {
			return err
		}
	}
	f.unfinished = false
	runtime.Gosched() // who gives what was published to trainers waits for this processor
	if f.last {
		return nil
	}
	return f.refill()
}

// copyOut settles what is complete. It may wait for room in the ring, so the peer is first told of what was done before.
func (f *filler) copyOut(ctx context.Context) error {
	f.link.ringPeer()
	f.waiting(1)
	defer f.waiting(-1)
	switch err := f.lender.Settle(ctx); {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrClosed):
		return errStopping
	default:
		return context.Cause(ctx)
	}
}

// settleOld settles rows that have waited long enough, and sees to it that others are looked at in time.
func (f *filler) settleOld(ctx context.Context) error {
	if f.settleDue.Swap(false) {
		f.armed = false
	}
	since, waiting := f.lender.Unsettled()
	if !waiting {
		return nil
	}
	age := f.oldest.age(since, time.Now())
	switch {
	case f.armed:
		return nil
	case age < f.settle:
		f.armed = true
		f.clock.Reset(f.settle - age)
		return nil
	}
	return f.copyOut(ctx)
}

// rowAge tells how long the oldest row has waited. Arrivals are times of the wall clock, which may be set back or forward, so an arrival only says which row
// it is; its age counts from when it was first seen, by a clock that does not jump.
type rowAge struct {
	arrival, seen time.Time
}

func (r *rowAge) age(arrival, now time.Time) time.Duration {
	if !arrival.Equal(r.arrival) {
		r.arrival, r.seen = arrival, now
	}
	return now.Sub(r.seen)
}

// end takes what is complete, puts it where trainers find it, and takes the places back. It says what Serve returns.
func (f *filler) end(cause error) error {
	f.last = true
	var notice *wire.Notice
	bad := errors.As(cause, &notice) && (notice.Code == wire.CodeBadPeer || notice.Code == wire.CodeBadChunk)
	for !bad {
		n, err := f.take(f.ending)
		var broke *wire.Notice
		if errors.As(err, &broke) {
			notice, bad = broke, true
		}
		if n == 0 || err != nil {
			break
		}
	}
	stopping := f.alive.Err() != nil || errors.Is(cause, errStopping)
	// A producer that saw the end of the table may have left by itself, to come back to the next daemon.
	stay := !bad && (stopping || f.ended.Load() || f.server.stopping() != nil) && f.sess != "" && f.table.Memory.Kept()
	if stay {
		f.lender.StayLent()
	} else if bad || errors.Is(cause, errSocketEnded) { // what it did not fill may be what its last rows need
		f.lender.Free()
	}
	if err := f.lender.End(f.ending, stopping); err != nil {
		var stranded *drainer.StrandedError
		if errors.As(err, &stranded) {
			f.stranded.Store(uint64(stranded.Samples))
		}
		f.log.Warn("samples stay where they are", "err", err)
	}
	log := f.log.With("committed", f.lender.Stats().Committed, "settled", f.lender.Stats().Settled)
	free, outcome := true, fillDetached
	switch {
	case bad:
		outcome = fillBadPeer
	case notice != nil && notice.Code == wire.CodeSessionTaken:
		outcome = fillTaken
	case errors.Is(cause, errSocketEnded):
		notice = nil
	case stopping:
		notice, outcome, free = wireNotice(wire.CodeShuttingDown, "the daemon is stopping"), fillCutOff, false // an honest peer may be writing still
	default:
		notice, outcome = wireNotice(wire.CodeInternal, "the daemon failed; its log says why"), fillCutOff
	}
	f.outcome.Store(int32(outcome))
	if notice == nil {
		log.Info("filler detached")
		if !stay {
			f.lender.Free()
		}
		return nil
	}
	log.Warn("filler cut off", "code", notice.Code, "reason", notice.Reason, "err", cause)
	f.farewell(notice)
	if outcome == fillTaken {
		free = f.awaitPeer()
	}
	if free {
		f.lender.Free()
	}
	if notice.Code == wire.CodeInternal {
		return fmt.Errorf("table %q: filler %d: %w", f.table.Name, f.id, cause)
	}
	return notice
}

// awaitPeer waits until the peer has closed its socket, so that nothing honest writes to the place it was filling; false if the daemon stops first.
func (f *filler) awaitPeer() bool {
	_ = f.conn.SetReadDeadline(noDeadline)
	_ = f.watch(f.alive)
	return f.alive.Err() == nil
}

// waiting counts the goroutines that wait for the ring; while there are any, notes go out.
func (f *filler) waiting(by int) {
	if !f.notes || f.table.Holder == nil {
		return
	}
	f.noteMu.Lock()
	defer f.noteMu.Unlock()
	f.waits += by
	switch {
	case f.waits == 1 && by == 1 && f.note == nil:
		f.note = time.AfterFunc(noteAfter, f.sendNote)
	case f.waits == 1 && by == 1:
		f.note.Reset(noteAfter)
	case f.waits == 0:
		f.note.Stop()
	}
}

// sendNote tells the producer whom it waits for, if it does: while it has rows to fill, it waits for nobody.
func (f *filler) sendNote() {
	f.noteMu.Lock()
	defer f.noteMu.Unlock()
	if f.waits == 0 || f.mute {
		return
	}
	since := f.lender.WaitingSince()
	if age := time.Since(since); since.IsZero() || age < noteAfter {
		f.note.Reset(noteAfter)
		return
	}
	note, ok := f.table.Holder()
	note.Code = wire.NoteRingFull
	if !ok && note.Reason == "" {
		note.Reason = "no place of the table is free, and no trainer holds one: other producers fill them, or nobody reads the table"
	}
	if note.Reason == "" {
		note.Reason = "no place of the table is free"
	}
	_ = f.conn.SetWriteDeadline(time.Now().Add(f.server.cfg.WriteTimeout))
	if _, err := f.conn.Write(wire.AppendNote(nil, &note)); err != nil {
		f.mute = true // what follows could not be told from the rest of it
		return
	}
	f.sentNotes.Add(1)
	f.note.Reset(noteAgain)
}

// turnedDown is what the producer is told when rows were not committed.
func turnedDown(err error) error {
	if bad := (*drainer.CheckError)(nil); errors.As(err, &bad) {
		return wireNotice(wire.CodeBadChunk, "%v", bad)
	}
	return wireNotice(wire.CodeBadPeer, "giveback queue: %v", err)
}

// tellChecked writes what the stream's Checker has for the producer, before the rows that it is about are acked.
func (f *filler) tellChecked() {
	if f.said = f.lender.AppendNotes(f.said[:0]); len(f.said) == 0 || !f.notes {
		return
	}
	f.noteMu.Lock()
	defer f.noteMu.Unlock()
	if f.mute {
		return
	}
	_ = f.conn.SetWriteDeadline(time.Now().Add(f.server.cfg.WriteTimeout))
	if _, err := f.conn.Write(f.said); err != nil {
		f.mute = true
	}
}

// farewell sends the closing notice; no note follows.
func (f *filler) farewell(notice *wire.Notice) {
	f.noteMu.Lock()
	defer f.noteMu.Unlock()
	if f.mute {
		return
	}
	f.mute = true
	_ = f.conn.SetWriteDeadline(time.Now().Add(f.server.cfg.WriteTimeout))
	_, _ = f.conn.Write(wire.AppendNotice(nil, notice))
}

// addTo adds what the producer did to s. Called under the server's mu, as stats.
func (f *filler) addTo(s *FillStats) {
	if f.lender != nil {
		st := f.lender.Stats()
		s.Committed += st.Committed
		s.Settled += st.Settled
		s.Published += st.Published
	}
	s.Stranded += f.stranded.Load()
	s.Notes += f.sentNotes.Load()
	switch fillOutcome(f.outcome.Load()) {
	case fillDetached:
		s.Detached++
	case fillCutOff:
		s.CutOff++
	case fillTaken:
		s.Taken++
	case fillBadPeer:
		s.BadPeers++
	}
}

func (f *filler) stats() FillerStats {
	st := FillerStats{
		ID: f.id, Table: f.table.Name, Client: f.client, Session: f.sess, PID: f.peer.pid, UID: int(f.peer.uid), Since: f.since, Prefetch: f.grant,
		State: FillHasRoom, Sleeping: f.link != nil && f.link.deliver.ConsumerWaiting(),
	}
	if f.lender != nil {
		l := f.lender.Stats()
		st.Stream, st.Lent, st.WaitingSince, st.Committed, st.Settled, st.Published = l.Stream, l.Lent, l.WaitingSince, l.Committed, l.Settled, l.Published
	}
	switch {
	case f.ended.Load():
		st.State = FillEnded
	case !st.WaitingSince.IsZero():
		st.State = FillWaiting
	}
	return st
}
