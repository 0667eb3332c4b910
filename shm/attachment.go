//go:build linux

package shm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/sampler"
	"github.com/ingestd/ingestd/spsc"
	"github.com/ingestd/ingestd/wire"
)

// How long Next looks at the queue before it sleeps on the eventfd: 128 rounds of 0.35 µs, about 45 µs. Waking an idle core takes 27
// to 41 µs and the daemon a system call; a batch that comes within that time is taken in 0.3 µs instead.
const (
	spinRounds = 128
	spinTurns  = 1024
)

// Attachment is a trainer's side of a table in another process.
//
// One goroutine at a time calls Next; Release, Err and Close may be called from any.
type Attachment struct {
	path     string
	conn     *net.UnixConn
	accepted wire.AcceptedTrain

	segment  *Mapping
	view     *ring.View
	channel  *Mapping
	toUs     *bell
	toDaemon *bell
	deliver  *spsc.Consumer // used by the goroutine in Next

	gone     atomic.Pointer[error] // why the socket ended; written once, by watch
	closing  atomic.Bool
	watching sync.WaitGroup

	// The context that Next last slept with, and what ends its call to us. Kept from call to call: registering again for each
	// batch would allocate.
	followed <-chan struct{} // its Done
	unfollow func() bool

	mu       sync.Mutex
	giveback *spsc.Producer
	held     []uint64 // per place, 1 + the number of the batch that Next gave out from it, or 0
	holding  int      // how many those are
	inNext   bool
	closed   bool
	freed    bool
}

// LostError says that this trainer's group lost batches unread: producers needed their places, and the table lets the group lose what it is too slow for.
type LostError = sampler.LostError

// Accepted returns what the daemon said of the table and of this trainer.
func (a *Attachment) Accepted() wire.AcceptedTrain { return a.accepted }

// View returns the segment, for looking at; it must not be used after Close.
func (a *Attachment) View() *ring.View { return a.view }

// Err returns why the attachment has ended from the daemon's side, or nil: a *wire.Notice or a *PeerGoneError. The batches held then
// are no longer ours: the daemon may be filling them anew.
func (a *Attachment) Err() error {
	if err := a.gone.Load(); err != nil {
		return *err
	}
	return nil
}

// Next waits for a batch. It may be read until it is released, and was checked against the segment.
//
// It returns io.EOF when the stream has ended and every batch of it was delivered; a *LostError, once for every loss, when this trainer's group lost
// batches, and then Next may be called again; the context's error, which for a deadline is also
// os.ErrDeadlineExceeded, and then Next may be called again; a *wire.Notice when the daemon cut this trainer off; a *PeerGoneError
// when it died; a *FormatError when what it shared makes no sense; os.ErrClosed after Close.
func (a *Attachment) Next(ctx context.Context) (ring.Batch, error) {
	if !a.enter() {
		return ring.Batch{}, os.ErrClosed
	}
	defer a.leave()
	for round := 0; ; round++ {
		b, ok, err := a.try()
		if ok || err != nil {
			return b, err
		}
		if round < spins {
			pause(round)
			continue
		}
		if err := a.follow(ctx); err != nil {
			return ring.Batch{}, err
		}
		a.deliver.SetWaiting(true)
		b, ok, err = a.try()
		if !ok && err == nil && ctx.Err() == nil {
			err = a.toUs.wait()
		}
		a.deliver.SetWaiting(false)
		if ok || err != nil {
			return b, err
		}
	}
}

// try looks at everything that can end a wait but the context.
func (a *Attachment) try() (ring.Batch, bool, error) {
	if a.closing.Load() {
		return ring.Batch{}, false, os.ErrClosed
	}
	gone := a.gone.Load() // first: what lies in the queue when the daemon has given us up is no longer ours
	ended := a.deliver.Closed()
	if gone != nil && !ended {
		return ring.Batch{}, false, *gone
	}
	var one [1]spsc.Desc
	n, err := a.deliver.TryPop(one[:])
	switch {
	case err != nil:
		return ring.Batch{}, false, &FormatError{a.path, err}
	case n == 0 && ended:
		return ring.Batch{}, false, io.EOF
	case gone != nil:
		return ring.Batch{}, false, *gone
	case n == 0:
		return ring.Batch{}, false, nil
	}
	if lost := uint32(one[0].B); one[0].B>>32 == 0 && lost > 0 {
		return ring.Batch{}, false, &LostError{Group: a.accepted.Group, First: one[0].A, N: int(lost)}
	}
	b, err := a.view.Batch(one[0].A, uint32(one[0].B), int(one[0].B>>32))
	if err != nil && a.passedOn(one[0].A, uint32(one[0].B)) {
		return ring.Batch{}, false, &PeerGoneError{a.path, err}
	}
	if err == nil {
		err = a.hold(b)
	}
	if err != nil {
		return ring.Batch{}, false, &FormatError{a.path, err}
	}
	return b, true, nil
}

// passedOn tells whether the place of a batch holds it no more: the daemon that lent it died, which its socket tells us in a moment, and its successor has taken the segment
// up and given the place to others.
func (a *Attachment) passedOn(number uint64, index uint32) bool {
	if int64(index) >= int64(a.view.Batches()) {
		return false
	}
	st := a.view.BatchState(int(index))
	return st.State != ring.Leased || st.Number != number
}

func (a *Attachment) hold(b ring.Batch) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.held[b.Index] != 0 {
		return fmt.Errorf("batch %d was delivered in place %d, where batch %d is held", b.Number, b.Index, a.held[b.Index]-1)
	}
	a.held[b.Index] = b.Number + 1
	a.holding++
	return nil
}

// Release gives a batch back; nothing of it may be read any more. Releasing what Next did not give, or giving it back twice, panics.
func (a *Attachment) Release(b ring.Batch) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if int(b.Index) >= len(a.held) || a.held[b.Index] != b.Number+1 {
		panic(fmt.Sprintf("shm: batch %d in place %d is not held: released twice, or not from this attachment", b.Number, b.Index))
	}
	a.held[b.Index] = 0
	a.holding--
	if a.closed {
		_ = a.freeIfIdle()
		return
	}
	one := [1]spsc.Desc{{A: b.Number, B: uint64(b.Index)}}
	if n, err := a.giveback.TryPush(one[:]); err != nil || n == 0 {
		return // the daemon spoiled or stopped reading a queue that has a place for every batch: the next Next says what became of it
	}
	if a.giveback.ConsumerWaiting() {
		a.toDaemon.signal()
	}
}

// Close ends the attachment. The daemon offers what is still held to another trainer, so its content may change from now on; the
// memory stays mapped until the last held batch is released, so that a slice kept too long reads junk and does not crash. A Next
// under way returns os.ErrClosed. Closing twice is no error.
func (a *Attachment) Close() error {
	a.closing.Store(true)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return nil
	}
	a.closed = true
	a.giveback.Close() // so that we are not taken for dead
	err := a.conn.Close()
	a.watching.Wait()
	a.toUs.signal()
	return errors.Join(err, a.freeIfIdle())
}

// enter and leave keep the memory mapped while Next runs.
func (a *Attachment) enter() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return false
	}
	if a.inNext {
		panic("shm: two goroutines are in Attachment.Next at once")
	}
	a.inNext = true
	return true
}

func (a *Attachment) leave() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.inNext = false
	if a.closed {
		_ = a.freeIfIdle()
	}
}

// freeIfIdle frees everything once the attachment is closed and nobody uses the memory. Called under mu.
func (a *Attachment) freeIfIdle() error {
	if a.holding > 0 || a.inNext || a.freed {
		return nil
	}
	return a.free()
}

func (a *Attachment) free() error {
	a.freed = true
	var errs []error
	if a.unfollow != nil {
		a.unfollow()
	}
	_ = a.conn.Close()
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

// follow sees to it that the end of ctx rings our bell, and returns its error when it has ended.
func (a *Attachment) follow(ctx context.Context) error {
	if ctx.Err() != nil {
		return contextError(ctx)
	}
	if ctx.Done() == a.followed {
		return nil
	}
	if a.unfollow != nil {
		a.unfollow()
	}
	a.followed, a.unfollow = ctx.Done(), context.AfterFunc(ctx, a.toUs.signal)
	return nil
}

func contextError(ctx context.Context) error { return park.ContextError(ctx) }

// spins is 0 where a core is hardly ever free: with a producer, the daemon and this trainer on 2 cores, the spin took a tenth off the rate of all
// three and tripled the trainer's processor time.
var spins = func() int {
	if runtime.NumCPU() < 4 {
		return 0
	}
	return spinRounds
}()

// pause lets some time pass without touching what the daemon writes; now and then it lets other goroutines run.
func pause(round int) {
	if round%16 == 15 {
		runtime.Gosched()
		return
	}
	for range spinTurns {
	}
}
