package drainer

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ingestd/ingestd/internal/failpoint"
	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/ring"
)

// LenderID says for whom a Lender is.
type LenderID struct {
	Stream  uint64        // number of the stream; that of the session where there is one
	Session *ring.Session // nil: none

	// FlushAtEnd publishes the batch being filled when the stream ends and some of its samples were copied there.
	FlushAtEnd bool

	// Check, if not nil, looks at rows that are called complete before they are committed.
	Check Checker

	// Resumed, if set, is called when the producer says that it needs nothing of what an earlier connection of its session had filled.
	Resumed func()
}

// Lender is the daemon's side of one producer that fills places of the ring itself. It lends it whole places, commits the rows that the producer calls
// complete, publishes each place whose last row is, and settles those that must not wait for that: copies their rows into the batch that all
// writers share.
//
// Two goroutines use it: one lends (TryLend, Lend), one commits (all from Commit to Free). Stats, Room, Waiting, Held and Done are for any.
type Lender struct {
	ring     *ring.Ring
	id       LenderID
	size     int // rows of a place
	next     uint64
	before   uint64 // openings below it may hold samples of the stream that came by another way; 0: none
	shared   sharedSpot
	stay     bool     // StayLent was called
	behind   int      // complete places that were copied in a row, since an earlier sample was not published yet
	columns  [][]byte // what a Checker is given; nil without one
	seat     *park.Waiter
	lendSeat *park.Waiter

	committed, settled, published, held atomic.Uint64

	mu      sync.Mutex
	places  []*lent // oldest first, which is the one being filled
	unused  []*lent
	lease   uint64    // number of the last one
	starved time.Time // since when there is no row to fill; zero: there is one
	copying time.Time // since when a copy waits for a slot
	done    chan struct{}
}

// lent is a place in the producer's hands.
type lent struct {
	lease   uint64
	place   ring.Place
	first   uint64 // number of the sample in row 0
	rows    int    // committed
	settled int    // of those, copied to a shared batch
}

// sharedSpot is where the last sample of the stream went that was copied.
type sharedSpot struct {
	opening uint64
	index   uint32
	pending bool // it was not published when we last looked
}

// LenderStats is a snapshot of a Lender.
type LenderStats struct {
	Stream       uint64
	Session      string
	Lent         int       // places the producer has
	Committed    uint64    // samples in the ring
	Settled      uint64    // of those, copied to a shared batch
	Published    uint64    // places that became a batch as they were
	WaitingSince time.Time // since when the producer waits for a slot; zero if it does not
}

// LeaseError says that a producer named rows that it cannot have filled: end it.
type LeaseError struct {
	Lease, Due uint64 // the lease it named, and the one it is filling; Due 0: it has none
	Rows, Left int    // rows it named, and those that are left
}

func (e *LeaseError) Error() string {
	switch {
	case e.Due == 0:
		return fmt.Sprintf("%d rows of lease %d are called complete, while no place is lent", e.Rows, e.Lease)
	case e.Lease != e.Due:
		return fmt.Sprintf("%d rows of lease %d are called complete, while lease %d is to be filled", e.Rows, e.Lease, e.Due)
	}
	return fmt.Sprintf("%d rows of lease %d are called complete, and %d are left", e.Rows, e.Lease, e.Left)
}

// NewLender returns a Lender without a place. The samples of its stream go on where its session stands; without a session at 0.
func NewLender(r *ring.Ring, id LenderID) *Lender {
	l := &Lender{
		ring: r, id: id, size: r.BatchSize(), seat: park.NewWaiter(), lendSeat: park.NewWaiter(), starved: time.Now(), done: make(chan struct{}),
	}
	if id.Session != nil {
		l.next = id.Session.Held()
		l.held.Store(l.next)
	}
	if id.Check != nil {
		l.columns = make([][]byte, len(r.Layout().Columns))
	}
	if l.next > 0 { // the last of them may lie in any batch that was opened up to now
		l.before = (r.Reserved() + uint64(l.size) - 1) / uint64(l.size)
	}
	return l
}

// ID returns the number of the stream.
func (l *Lender) ID() uint64 { return l.id.Stream }

// Held returns the number of the next sample: so many of the stream are committed.
func (l *Lender) Held() uint64 { return l.held.Load() }

// Done is closed when everything that was committed is where trainers find it, and nothing follows.
func (l *Lender) Done() <-chan struct{} { return l.done }

// TryLend lends one more place, or returns false when none is free, others wait for one, or the ring is closed.
func (l *Lender) TryLend() (lease uint64, p ring.Place, ok bool) {
	if p, ok = l.ring.TryLend(l.id.Stream); !ok {
		return 0, p, false
	}
	return l.add(p), p, true
}

// Lend is TryLend that waits in line. It returns os.ErrClosed when the ring is closed, or the context's error.
func (l *Lender) Lend(ctx context.Context) (lease uint64, p ring.Place, err error) {
	if p, err = l.ring.Lend(ctx, l.lendSeat, l.id.Stream); err != nil {
		return 0, p, err
	}
	return l.add(p), p, nil
}

func (l *Lender) add(p ring.Place) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	var t *lent
	if n := len(l.unused); n > 0 {
		t, l.unused = l.unused[n-1], l.unused[:n-1]
	} else {
		t = new(lent)
	}
	l.lease++
	*t = lent{lease: l.lease, place: p}
	l.places = append(l.places, t)
	l.starved = time.Time{}
	return l.lease
}

// Places returns how many places the producer has.
func (l *Lender) Places() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.places)
}

// current returns the place being filled, nil if none is lent.
func (l *Lender) current() *lent {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.places) == 0 {
		return nil
	}
	return l.places[0]
}

// drop forgets the oldest place.
func (l *Lender) drop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unused = append(l.unused, l.places[0])
	l.places = append(l.places[:0], l.places[1:]...)
}

// Commit takes so many further rows of a lease as complete at arrival (Unix nanoseconds): they are in the ring when it returns. full says that they
// were the place's last; then Publish or Settle comes next. The error is a *LeaseError, and then nothing was taken, or a *CheckError, and then the rows before
// the one that the Checker turned down were.
func (l *Lender) Commit(lease uint64, rows int, arrival uint64) (full bool, err error) {
	t := l.current()
	switch {
	case t == nil:
		return false, &LeaseError{Lease: lease, Rows: rows}
	case lease != t.lease || rows < 1 || rows > l.size-t.rows:
		return false, &LeaseError{Lease: lease, Due: t.lease, Rows: rows, Left: l.size - t.rows}
	}
	if l.id.Check != nil {
		if rows, err = l.check(t, rows); rows == 0 {
			return false, err
		}
	}
	if t.rows == 0 {
		t.first = l.next
	}
	var mark ring.Mark
	if l.id.Session != nil {
		mark = l.id.Session.Mark(l.next + uint64(rows))
	}
	l.ring.CommitPlace(t.place, t.rows, rows, l.id.Stream, l.next, arrival, mark)
	t.rows += rows
	l.next += uint64(rows)
	l.held.Store(l.next)
	l.committed.Store(l.committed.Load() + uint64(rows))
	if t.rows < l.size {
		return false, err
	}
	l.mu.Lock()
	if len(l.places) == 1 {
		l.starved = time.Now()
	}
	l.mu.Unlock()
	return true, nil
}

// check returns how many of the rows may be committed.
func (l *Lender) check(t *lent, rows int) (int, error) {
	columns := l.ring.Layout().Columns
	for leaf, bytes := range columns {
		l.columns[leaf] = l.ring.PlaceColumn(t.place, leaf)[int64(t.rows)*bytes : int64(t.rows+rows)*bytes]
	}
	good, err := l.id.Check.Check(l.columns)
	if err != nil {
		err = &CheckError{err}
	}
	return good, err
}

// AppendNotes appends what the Checker has for the producer, to be written before it is told that its rows were taken.
func (l *Lender) AppendNotes(dst []byte) []byte {
	if l.id.Check == nil {
		return dst
	}
	return l.id.Check.AppendNotes(dst)
}

// TryPublish publishes the place being filled, which is full, as it is. It returns false when that would break the stream's order, or part of the place was
// copied already: then Settle does it.
func (l *Lender) TryPublish() bool {
	t := l.current()
	if t.settled > 0 {
		return false
	}
	if !l.inOrder() {
		// A producer that was slow and is fast now: one short batch, and it is rid of the copying. It is tried more and more seldom, since
		// another writer may be holding that batch up.
		l.behind++
		if l.behind < 2 || l.behind&(l.behind-1) != 0 || !l.ring.Flush() || !l.inOrder() {
			return false
		}
	}
	l.publish(t)
	return true
}

func (l *Lender) publish(t *lent) {
	l.behind = 0
	l.published.Store(l.published.Load() + 1)
	l.ring.PublishPlace(t.place, t.rows)
	l.drop()
}

// inOrder tells whether every earlier sample of the stream that went into a shared batch is published, so that what is published now comes after it.
func (l *Lender) inOrder() bool {
	if l.before > 0 {
		for i := range l.ring.Batches() {
			if st := l.ring.BatchState(i); (st.State == ring.Open || st.State == ring.Sealing) && st.Number < l.before {
				return false
			}
		}
		l.before = 0
	}
	if l.shared.pending {
		st := l.ring.BatchState(int(l.shared.index))
		l.shared.pending = (st.State == ring.Open || st.State == ring.Sealing) && st.Number == l.shared.opening
	}
	return !l.shared.pending
}

// Unsettled returns since when committed rows of the place being filled wait for the rest of it; false if none do.
func (l *Lender) Unsettled() (since time.Time, waiting bool) {
	t := l.current()
	if t == nil || t.rows == t.settled {
		return time.Time{}, false
	}
	return time.Unix(0, int64(l.ring.PlaceArrivals(t.place)[t.settled])), true
}

// Settle copies what is committed of the place being filled, so that trainers need not wait for the rest of it, and gives the place back if it is full.
// It waits while the ring is full, and can be called again after its context has ended. It returns os.ErrClosed when the ring is closed.
func (l *Lender) Settle(ctx context.Context) error {
	t := l.current()
	if t == nil {
		return nil
	}
	if err := l.copyRows(ctx, t); err != nil {
		return err
	}
	if t.rows == l.size {
		l.ring.ReturnPlace(t.place)
		l.drop()
	}
	return nil
}

func (l *Lender) copyRows(ctx context.Context, t *lent) error {
	arrivals := l.ring.PlaceArrivals(t.place)
	columns := l.ring.Layout().Columns
	for t.settled < t.rows {
		run, err := l.reserve(ctx, t.rows-t.settled)
		if err != nil {
			return err
		}
		for leaf, bytes := range columns {
			copy(l.ring.RunColumn(run, leaf), l.ring.PlaceColumn(t.place, leaf)[int64(t.settled)*bytes:])
			failpoint.Hit("drainer/settle/copying")
		}
		l.shared = sharedSpot{opening: run.Position / uint64(l.size), index: run.Index, pending: true}
		for run.N > 0 { // in parts that were complete at the same time
			n := 1
			for n < int(run.N) && arrivals[t.settled+n] == arrivals[t.settled] {
				n++
			}
			var part ring.Run
			part, run = run.Split(n)
			first, arrival := t.first+uint64(t.settled), arrivals[t.settled]
			t.settled += n
			l.settled.Store(l.settled.Load() + uint64(n))
			l.ring.Commit(part, l.id.Stream, first, arrival, l.ring.SettledMark(t.place, t.settled))
			failpoint.Hit("drainer/settle/committed")
		}
	}
	return nil
}

func (l *Lender) reserve(ctx context.Context, n int) (ring.Run, error) {
	if run, ok := l.ring.TryReserveInTurn(n); ok {
		return run, nil
	}
	l.setCopying(time.Now())
	defer l.setCopying(time.Time{})
	return l.ring.Reserve(ctx, l.seat, n)
}

func (l *Lender) setCopying(since time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.copying = since
}

// Passed tells whether a lease is over: its place was full, and is no longer the producer's.
func (l *Lender) Passed(lease uint64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return lease >= 1 && lease <= l.lease && (len(l.places) == 0 || lease < l.places[0].lease)
}

// Current returns the lease being filled; false if none is.
func (l *Lender) Current() (lease uint64, ok bool) {
	if t := l.current(); t != nil {
		return t.lease, true
	}
	return 0, false
}

// Resumed passes on that the producer needs nothing of an earlier connection of its session.
func (l *Lender) Resumed() {
	if l.id.Resumed != nil {
		l.id.Resumed()
	}
}

// StrandedError says that samples stay in places that can neither be published nor copied. A segment that is kept still has them.
type StrandedError struct {
	Samples int
	Err     error // why they could not be copied
}

func (e *StrandedError) Error() string {
	return fmt.Sprintf("%d committed samples stay in places that were lent: %v", e.Samples, e.Err)
}

func (e *StrandedError) Unwrap() error { return e.Err }

// StayLent says that the places outlive this process in a segment that is kept, and that the producer may still write to them: what it calls complete too late
// for us it copies from there to the next process. So End publishes none of them; those with samples that it cannot copy are Stranded, and found by the next
// process as well.
func (l *Lender) StayLent() { l.stay = true }

// End sees that everything committed is where trainers find it, and says so through Done. Nothing is committed or lent any more; the places stay the
// producer's until Free.
//
// The last rows are copied. In a full ring that would wait, and so they are published as a short batch of their own if their order allows it; with inPlace,
// for a daemon that stops, they are in any case. The error is a *StrandedError if neither was possible before ctx ended.
func (l *Lender) End(ctx context.Context, inPlace bool) error {
	defer close(l.done)
	t := l.current()
	if t == nil || t.rows == t.settled {
		l.flush()
		return nil
	}
	short := func() bool {
		if l.stay || t.settled > 0 || !l.inOrder() && !(l.ring.Flush() && l.inOrder()) {
			return false
		}
		l.publish(t)
		return true
	}
	if (inPlace || l.full()) && short() {
		return nil
	}
	err := l.copyRows(ctx, t)
	if err == nil {
		l.flush()
		return nil
	}
	if short() {
		return nil
	}
	return &StrandedError{t.rows - t.settled, err}
}

// full tells whether a copy would have to wait.
func (l *Lender) full() bool {
	run, ok := l.ring.TryReserveInTurn(1)
	if ok {
		l.ring.Abandon(run)
	}
	return !ok
}

// flush publishes the shared batch in which the stream ended.
func (l *Lender) flush() {
	if l.id.FlushAtEnd && !l.inOrder() {
		l.ring.Flush()
	}
}

// Free takes the places back, when the producer can no longer write to them and nothing is lent any more. Those with samples that are not settled stay lent:
// End deals with them, and is followed by another Free.
func (l *Lender) Free() {
	l.mu.Lock()
	defer l.mu.Unlock()
	keep := l.places[:0]
	for _, t := range l.places {
		if t.rows > t.settled {
			keep = append(keep, t)
			continue
		}
		l.ring.ReturnPlace(t.place)
	}
	clear(l.places[len(keep):])
	l.places = keep
}

// WaitingSince returns since when the producer has no row to fill and waits for a place, or for its rows to be copied; zero if it does not wait.
func (l *Lender) WaitingSince() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.starved.IsZero() && (l.copying.IsZero() || l.starved.Before(l.copying)) {
		return l.starved
	}
	return l.copying
}

// Stats returns a snapshot.
func (l *Lender) Stats() LenderStats {
	st := LenderStats{Stream: l.id.Stream, Lent: l.Places(), Settled: l.settled.Load(), Published: l.published.Load(), WaitingSince: l.WaitingSince()}
	st.Committed = l.committed.Load() // after settled, so that it is never below it
	if l.id.Session != nil {
		st.Session = l.id.Session.Name()
	}
	return st
}
