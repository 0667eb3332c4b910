//go:build linux

package shm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/spsc"
	"github.com/ingestd/ingestd/wire"
)

// FillAttachment is a producer's side of a table in another process, whose places it fills in place.
//
// One goroutine at a time uses it; Err, Note, Accepted and Close are for any. Closing it ends the attachment and leaves the memory mapped, so that rows
// that the daemon did not take can still be read; Unmap ends that.
type FillAttachment struct {
	path     string
	conn     *net.UnixConn
	accepted wire.AcceptedFill

	segment  *Mapping
	view     *ring.View
	channel  *Mapping
	toUs     *bell
	toDaemon *bell
	deliver  *spsc.Consumer
	giveback *spsc.Producer

	gone     atomic.Pointer[error] // why the socket ended; written once, by watch
	note     atomic.Pointer[wire.Note]
	refused  atomic.Pointer[wire.Note]
	hearing  hearing
	ended    func()
	closing  atomic.Bool
	watching sync.WaitGroup

	next    LentPlace // taken from the queue and not given out; Lease 0: none
	lease   uint64    // the last one that came
	handed  uint64    // rows called complete
	counts  []uint64  // at n modulo its length: rows called complete with the descriptors up to number n
	seen    uint64    // descriptors the daemon had taken when last asked
	taken   uint64    // rows it had taken then
	rung    bool      // the daemon was rung, and
	rungAt  uint64    // had taken so many descriptors then
	bad     error     // what the daemon shared that makes no sense
	follows follower
}

// LentPlace is a place of the segment that the daemon lent.
type LentPlace struct {
	Lease uint64
	ring.Place
}

// follower sees to it that the end of a context rings a bell. It is kept from call to call: registering again for each wait would allocate.
type follower struct {
	followed <-chan struct{} // the context's Done
	unfollow func() bool
}

// follow returns the context's error when it has ended.
func (f *follower) follow(ctx context.Context, b *bell) error {
	if ctx.Err() != nil {
		return contextError(ctx)
	}
	if ctx.Done() == f.followed {
		return nil
	}
	f.leave()
	f.followed, f.unfollow = ctx.Done(), context.AfterFunc(ctx, b.signal)
	return nil
}

func (f *follower) leave() {
	if f.unfollow != nil {
		f.unfollow()
	}
	f.followed, f.unfollow = nil, nil
}

// AttachFill joins a table of the daemon whose socket is at path as a producer that fills in place. Role and versions of the hello may be left out. ctx bounds
// the attaching only. ended, if not nil, is called once from another goroutine when the daemon ends the attachment or dies, after Err says so.
//
// A *wire.Refusal in the error says why the daemon would not; *FormatError that it shared what makes no sense.
func AttachFill(ctx context.Context, path string, hello wire.Hello, ended func()) (*FillAttachment, error) {
	fill(&hello, wire.RoleFill)
	a := &FillAttachment{path: path, ended: ended}
	conn, r, err := say(ctx, path, &hello, &a.accepted)
	if err != nil {
		return nil, err
	}
	a.conn = conn
	if err := errors.Join(a.open(r), r.close()); err != nil {
		_ = a.conn.Close()
		_ = a.Unmap()
		return nil, fmt.Errorf("attach to table %q at %s: %w", hello.Table, path, &FormatError{path, err})
	}
	a.watching.Add(1)
	go a.watch()
	return a, nil
}

// open maps what came with the reply.
func (a *FillAttachment) open(r *descriptorReader) (err error) {
	if len(r.fds) != 4 {
		return fmt.Errorf("%d descriptors came with the reply, want 4", len(r.fds))
	}
	c := &a.accepted
	if a.segment, err = mapFillable(r.fds[0], c.SegmentBytes); err != nil {
		return err
	}
	if a.view, err = ring.OpenView(a.segment.Bytes()); err != nil {
		return err
	}
	l, fingerprint := a.view.Layout(), c.Spec.Fingerprint()
	if l.Fingerprint != fingerprint || int64(l.BatchSize) != c.BatchSize || int64(l.Batches) != c.Batches || !slices.Equal(l.Columns, c.Spec.LeafBytes()) {
		return fmt.Errorf("the segment (%d batches of %d, columns of %d bytes, fingerprint %x) is not the one announced (%d of %d, %d, %x)",
			l.Batches, l.BatchSize, l.Columns, l.Fingerprint, c.Batches, c.BatchSize, c.Spec.LeafBytes(), fingerprint)
	}
	if c.ChannelBytes > channelBytesMax {
		return fmt.Errorf("a channel of %d bytes was announced, the largest has %d", c.ChannelBytes, channelBytesMax)
	}
	if a.channel, err = mapShared(r.fds[1], c.ChannelBytes); err != nil {
		return err
	}
	deliver, giveback, capacity, err := openChannel(a.channel.Bytes())
	if err != nil {
		return err
	}
	a.counts = make([]uint64, countsFor(capacity))
	if a.deliver, err = spsc.NewConsumer(deliver, capacity); err != nil {
		return err
	}
	if a.giveback, err = spsc.NewProducer(giveback, capacity); err != nil {
		return err
	}
	if a.toUs, err = openBell(r.take(2)); err != nil {
		return err
	}
	a.toDaemon, err = openDaemonsBell(r.take(3))
	return err
}

// watch reads notes from the socket until its end, or a notice, ends the attachment.
func (a *FillAttachment) watch() {
	defer a.watching.Done()
	var err error
	for err == nil {
		err = a.listen()
	}
	if a.closing.Load() {
		err = os.ErrClosed
	}
	a.gone.Store(&err)
	a.hearing.set(false)
	a.toUs.signal()
	if a.ended != nil {
		a.ended()
	}
}

// listen reads one thing that the daemon says, and returns what ends the attachment.
func (a *FillAttachment) listen() error {
	var mark [1]byte
	a.hearing.set(true)
	_, err := io.ReadFull(a.conn, mark[:])
	a.hearing.set(false)
	if err == io.EOF { // which to our caller means the end of the stream, and this is not
		return &PeerGoneError{a.path, io.ErrUnexpectedEOF}
	} else if err != nil {
		return &PeerGoneError{a.path, err}
	}
	switch mark[0] {
	case wire.NoteMark:
		note, err := wire.ReadNote(a.conn)
		if err != nil {
			return &PeerGoneError{a.path, fmt.Errorf("its note was cut short: %v", err)}
		}
		if note.Code == wire.NoteStepRefused {
			a.refused.Store(note)
		} else {
			a.note.Store(note)
		}
		return nil
	case wire.NoticeMark:
		notice, err := wire.ReadNotice(a.conn)
		if err != nil {
			return &PeerGoneError{a.path, fmt.Errorf("its notice was cut short: %v", err)}
		}
		return notice
	}
	return &FormatError{a.path, fmt.Errorf("byte %#02x on the socket, where only a note or a closing notice may come", mark[0])}
}

// Accepted returns what the daemon said of the table and of this producer.
func (a *FillAttachment) Accepted() wire.AcceptedFill { return a.accepted }

// Err returns why the attachment has ended from the daemon's side, or nil: a *wire.Notice, a *PeerGoneError or a *FormatError; os.ErrClosed after Close.
func (a *FillAttachment) Err() error {
	if err := a.gone.Load(); err != nil {
		return *err
	}
	return nil
}

// Note returns what the daemon last said it waits for, nil if it said nothing since the last place came.
func (a *FillAttachment) Note() *wire.Note { return a.note.Load() }

// TryPlace returns the next place that was lent, or false when none has come yet. It returns io.EOF when the table has ended, and else the errors of Err,
// *FormatError for what makes no sense.
func (a *FillAttachment) TryPlace() (LentPlace, bool, error) {
	if a.next.Lease == 0 {
		if err := a.fetch(); err != nil {
			return LentPlace{}, false, err
		}
	}
	p := a.next
	if a.next.Lease = 0; p.Lease == 0 {
		return LentPlace{}, false, nil
	}
	a.note.Store(nil)
	return p, true, nil
}

// fetch takes the next place from the queue, if one is there.
func (a *FillAttachment) fetch() error {
	if a.bad != nil {
		return a.bad
	}
	if err := a.Err(); err != nil { // first: what lies in the queue when the daemon has given us up is no longer ours
		return err
	}
	ended := a.deliver.Closed()
	var one [1]spsc.Desc
	n, err := a.deliver.TryPop(one[:])
	switch {
	case err != nil:
		return &FormatError{a.path, err}
	case n == 0 && ended:
		return io.EOF
	case n == 0:
		return nil
	}
	d := one[0]
	if d.A != a.lease+1 || d.B >= uint64(a.view.Batches()) {
		a.bad = &FormatError{a.path, fmt.Errorf("lease %d of place %d came after lease %d, in a segment of %d places", d.A, d.B, a.lease, a.view.Batches())}
		return a.bad
	}
	if st := a.view.BatchState(int(d.B)); st.State != ring.Lent || st.Stream != a.accepted.Stream {
		// The daemon that lent it died, which its socket tells us in a moment, and its successor has taken the segment up.
		a.bad = &PeerGoneError{a.path, fmt.Errorf("place %d was lent to us, stream %d, and is %v to stream %d", d.B, a.accepted.Stream, st.State, st.Stream)}
		return a.bad
	}
	a.lease++
	a.next = LentPlace{Lease: d.A, Place: ring.Place{Index: uint32(d.B)}}
	return nil
}

// Column returns the bytes of one leaf for all rows of a place.
func (a *FillAttachment) Column(p ring.Place, leaf int) []byte { return a.view.PlaceColumn(p, leaf) }

// Ours tells whether a place is still as it was when it was lent to our stream, by this daemon or one before it: nothing but this stream's rows has been there.
func (a *FillAttachment) Ours(p ring.Place) bool {
	st := a.view.BatchState(int(p.Index))
	return st.Stream == a.accepted.Stream && (st.State == ring.Lent || st.State == ring.Published || st.State == ring.Leased)
}

// SameMemory tells whether two attachments are to the same segment, and not to one that was made anew.
func (a *FillAttachment) SameMemory(other *FillAttachment) bool { return a.segment.same(other.segment) }

// HasRoom tells whether one more descriptor can be handed over now. The error is a *FormatError.
func (a *FillAttachment) HasRoom() (bool, error) {
	if a.giveback.Pushed()-a.seen < uint64(len(a.counts)/2) {
		return true, nil
	}
	var err error
	if a.seen, err = a.giveback.Taken(); err != nil {
		return false, &FormatError{a.path, err}
	}
	return a.giveback.Pushed()-a.seen < uint64(len(a.counts)/2), nil
}

// Complete tells the daemon that so many further rows of a place are complete. There must be room for it. The error is a *FormatError.
func (a *FillAttachment) Complete(p LentPlace, rows int) error {
	a.handed += uint64(rows)
	return a.hand(spsc.Desc{A: p.Lease, B: verbComplete<<verbBits | uint64(rows)})
}

// Settle asks the daemon to copy what is complete of a place, and not to wait for the rest. There must be room for it.
func (a *FillAttachment) Settle(p LentPlace) error {
	return a.hand(spsc.Desc{A: p.Lease, B: verbSettle << verbBits})
}

// Resumed tells the daemon that nothing of earlier connections of the session is needed. There must be room for it.
func (a *FillAttachment) Resumed() error { return a.hand(spsc.Desc{B: verbResumed << verbBits}) }

// countsFor is how many counts are kept for a queue of that capacity: twice as many, so that a descriptor that was taken keeps its count while the queue is full of later ones.
func countsFor(capacity int) int { return 2 * capacity }

func (a *FillAttachment) hand(d spsc.Desc) error {
	one := [1]spsc.Desc{d}
	a.counts[a.giveback.Pushed()%uint64(len(a.counts))] = a.handed
	n, err := a.giveback.TryPush(one[:])
	if err != nil {
		return &FormatError{a.path, err}
	}
	if n == 0 {
		panic("shm: a descriptor was handed over without room for it")
	}
	// What it has taken already needs no bell. While it has not taken what it was last rung for, it is yet to wake, and finds this too, since it looks again
	// after it has taken something.
	taken, err := a.giveback.Taken()
	if err != nil {
		return &FormatError{a.path, err}
	}
	if taken < a.giveback.Pushed() && (!a.rung || taken != a.rungAt) && a.giveback.ConsumerWaiting() {
		a.rung, a.rungAt = true, taken
		a.toDaemon.signal()
	}
	return nil
}

// Handed returns how many rows were called complete.
func (a *FillAttachment) Handed() uint64 { return a.handed }

// Taken returns how many of them the daemon has taken: those are in the ring, whatever happens to us. all says that it has done everything it was asked
// for. The error is a *FormatError. It can be asked as long as the memory is mapped, also after the end.
func (a *FillAttachment) Taken() (rows uint64, all bool, err error) {
	if a.seen, err = a.giveback.Taken(); err != nil {
		return a.taken, false, &FormatError{a.path, err}
	}
	if a.seen > 0 {
		a.taken = a.counts[(a.seen-1)%uint64(len(a.counts))]
	}
	return a.taken, a.seen == a.giveback.Pushed(), nil
}

// Wait returns when ready does not say false any more, or the attachment has ended; with the context's error when that ended first. ready is called again
// and again, from this goroutine; what it waits for must be something that the daemon does.
func (a *FillAttachment) Wait(ctx context.Context, ready func() bool) error {
	for round := 0; ; round++ {
		if ready() || a.gone.Load() != nil {
			return nil
		}
		if round < spins {
			pause(round)
			continue
		}
		if err := a.follows.follow(ctx, a.toUs); err != nil {
			return err
		}
		var err error
		a.deliver.SetWaiting(true)
		if !ready() && a.gone.Load() == nil && ctx.Err() == nil {
			err = a.toUs.wait()
		}
		a.deliver.SetWaiting(false)
		if err != nil {
			return err
		}
	}
}

// PlaceCame tells whether TryPlace has something to say.
func (a *FillAttachment) PlaceCame() bool {
	return a.next.Lease != 0 || a.fetch() != nil || a.next.Lease != 0
}

// Close ends the attachment: the daemon takes what was called complete, and the places back. A Wait under way ends. The memory stays mapped. Closing twice
// is no error.
func (a *FillAttachment) Close() error {
	if a.closing.Swap(true) {
		a.watching.Wait()
		return nil
	}
	err := a.conn.Close()
	a.watching.Wait()
	return err
}

// Unmap frees the memory and all else, after Close. Nobody uses the attachment any more.
func (a *FillAttachment) Unmap() error {
	a.follows.leave()
	var errs []error
	for _, b := range [...]*bell{a.toUs, a.toDaemon} {
		if b != nil {
			errs = append(errs, b.close())
		}
	}
	for _, m := range [...]*Mapping{a.segment, a.channel} {
		if m != nil {
			errs = append(errs, m.Close())
		}
	}
	return errors.Join(errs...)
}
