//go:build linux

package shm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"sync"
	"time"

	"github.com/ingestd/ingestd/internal/failpoint"
	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/sampler"
	"github.com/ingestd/ingestd/spsc"
	"github.com/ingestd/ingestd/wire"
)

// trainer is the daemon's side of one attachment. While it runs it has three goroutines: deliver pushes batches to the peer, giveback
// takes them back, and the caller of Serve watches the socket. A batch is in held from before the peer can learn of it until its
// lease has been passed on, so whatever happens it ends in the source exactly once.
type trainer struct {
	server   *Server
	id       uint64
	conn     *net.UnixConn
	table    Table
	client   string
	pid, uid int
	since    time.Time
	prefetch int
	log      *slog.Logger

	member *sampler.Member // in its group; nil before join, under server.mu

	live     bool    // what follows may be used by others than our goroutines; under server.mu
	memory   *Memory // the channel
	toPeer   *bell
	toUs     *bell
	deliver  *spsc.Producer // used by the deliver goroutine
	giveback *spsc.Consumer // used by the giveback goroutine
	room     chan struct{}  // capacity 1: something was given back

	mu         sync.Mutex
	held       []held // oldest first; written under mu
	state      TrainerState
	stateSince time.Time
	delivered  uint64
	givenBack  uint64
	returned   uint64
	lost       uint64
	outcome    Outcome
}

// held is a batch that the peer was given.
type held struct {
	batch ring.Batch
	at    uint64 // how many descriptors it has taken from its queue once it has taken this one
}

// errSocketEnded is the cause when the peer's side of the socket ended.
var errSocketEnded = errors.New("the peer's socket ended")

func newTrainer(s *Server, id uint64, conn *net.UnixConn, hello *wire.Hello, table Table, prefetch int, log *slog.Logger) *trainer {
	now := time.Now()
	return &trainer{
		server: s, id: id, conn: conn, table: table, client: hello.Client, since: now, prefetch: prefetch, log: log,
		room: make(chan struct{}, 1), held: make([]held, 0, prefetch), state: StateWaiting, stateSince: now,
	}
}

// join makes it a member of the group it names.
func (t *trainer) join(hello *wire.Hello) error {
	m, err := join(t.table, hello, sampler.Who{Trainer: t.id, Client: t.client, PID: t.pid})
	if err != nil {
		return err
	}
	t.log = t.log.With("group", m.Group())
	t.server.mu.Lock()
	defer t.server.mu.Unlock()
	t.member = m
	t.server.total.Attached++
	return nil
}

// capacity returns that of the channel's queues: neither can be full of honest descriptors. In a group that can lose batches, a note of those
// may come before each batch.
func (t *trainer) capacity() int {
	if t.member.Policies().OnLag == sampler.Lose {
		return channelCapacity(2 * t.prefetch)
	}
	return channelCapacity(t.prefetch)
}

// open makes the channel. What it made before an error is closed by close.
func (t *trainer) open() (err error) {
	capacity := t.capacity()
	t.memory, err = NewMemory(MemoryConfig{
		Name: fmt.Sprintf("ingestd channel %d", t.id), Size: channelBytes(capacity), PeersWrite: true,
	})
	if err != nil {
		return err
	}
	deliver, giveback, err := formatChannel(t.memory.Bytes(), capacity)
	if err != nil {
		return err
	}
	if t.deliver, err = spsc.NewProducer(deliver, capacity); err != nil {
		return err
	}
	if t.giveback, err = spsc.NewConsumer(giveback, capacity); err != nil {
		return err
	}
	if t.toPeer, err = newBell(); err != nil {
		return err
	}
	if t.toUs, err = newBell(); err != nil {
		return err
	}
	t.server.mu.Lock()
	t.live = true
	t.server.mu.Unlock()
	return nil
}

// close frees what open made. No goroutine of ours uses it any more.
func (t *trainer) close() {
	t.server.mu.Lock()
	t.live = false
	t.server.mu.Unlock()
	var errs []error
	for _, b := range [...]*bell{t.toPeer, t.toUs} {
		if b != nil {
			errs = append(errs, b.close())
		}
	}
	if t.memory != nil {
		errs = append(errs, t.memory.Close())
	}
	if err := errors.Join(errs...); err != nil {
		t.log.Error("closing a channel", "err", err)
	}
}

// reply accepts the trainer and passes it the four descriptors.
func (t *trainer) reply() error {
	layout := t.table.View.Layout()
	b, err := wire.AppendAccepted(nil, &wire.AcceptedTrain{
		Table: t.table.Name, Spec: t.table.Spec, Fingerprint: t.table.Spec.Fingerprint(), Trainer: t.id, Group: t.member.Group(),
		BatchSize: int64(layout.BatchSize), Batches: int64(layout.Batches), SegmentBytes: t.table.View.SegmentBytes(),
		ChannelBytes: channelBytes(t.capacity()), Prefetch: int64(t.prefetch),
	})
	if err != nil {
		return fmt.Errorf("making the reply: %w", err)
	}
	fds := [...]int{t.table.Memory.Descriptor(), t.memory.Descriptor(), -1, -1}
	var sent error
	err = t.toPeer.descriptor(func(fd int) {
		fds[2] = fd
		err := t.toUs.descriptor(func(fd int) {
			fds[3] = fd
			sent = sendWithDescriptors(t.conn, b, fds[:]...)
		})
		sent = errors.Join(sent, err)
	})
	return errors.Join(sent, err)
}

// run serves the trainer until it ends, and gives back all that it held.
func (t *trainer) run(ctx context.Context) error {
	t.log.Info("trainer attached", "prefetch", t.prefetch)
	running, cancel := context.WithCancelCause(ctx)
	var loops sync.WaitGroup
	loops.Go(func() {
		if err := t.deliverLoop(running); err != nil {
			cancel(err)
		}
	})
	loops.Go(func() {
		if err := t.givebackLoop(running); err != nil {
			cancel(err)
		}
	})
	stop := context.AfterFunc(running, func() { _ = t.conn.SetReadDeadline(time.Unix(1, 0)) })
	cancel(t.watch()) // the first cause counts
	stop()
	t.stopLoops(&loops)
	return t.end(ctx, context.Cause(running))
}

// watch returns when the socket says something: a trainer has nothing to say, and its end is the notice of its death.
func (t *trainer) watch() error {
	var one [1]byte
	n, err := t.conn.Read(one[:])
	if n > 0 {
		return wireNotice(wire.CodeBadPeer, "a trainer sends nothing after its hello, and this one sent byte %#02x", one[0])
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return err // the AfterFunc of run: the cause was set before
	}
	return errSocketEnded
}

func wireNotice(code wire.Code, format string, args ...any) *wire.Notice {
	return &wire.Notice{Code: code, Reason: fmt.Sprintf(format, args...)}
}

// stopLoops waits for the loops to see that the context has ended. A peer that turned its eventfd into a blocking one can have stopped a
// write to it, so that is let go again and again.
func (t *trainer) stopLoops(loops *sync.WaitGroup) {
	done := make(chan struct{})
	go func() { loops.Wait(); close(done) }()
	t.toUs.signal()
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for {
		select {
		case <-done:
			return
		case <-again.C:
			t.toPeer.unstick()
			t.toUs.signal()
		}
	}
}

// deliverLoop gives the peer batches as long as it may hold one more. It returns nil after the last batch and when ctx ended.
func (t *trainer) deliverLoop(ctx context.Context) error {
	w := park.NewWaiter()
	var lost sampler.LostError // not told yet: told with the next batch, or with the end
	for t.waitRoom(ctx) {
		b, err := t.member.Next(ctx, w)
		switch {
		case err == nil:
			t.lend(b, lost.N > 0)
			err = t.give(&lost, spsc.Desc{A: b.Number, B: uint64(b.Index) | uint64(b.Count)<<32})
		case err == io.EOF:
			t.setState(StateEnded)
			if err = t.give(&lost); err == nil {
				t.deliver.Close()
				t.ringPeer()
				return nil
			}
		case addLost(&lost, err):
			err = nil
		case ctx.Err() != nil:
			return nil
		default:
			err = fmt.Errorf("the next batch: %w", err)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// addLost adds what err says was lost, and tells whether it says that.
func addLost(lost *sampler.LostError, err error) bool {
	more := (*sampler.LostError)(nil)
	if !errors.As(err, &more) {
		return false
	}
	if lost.N == 0 || more.First < lost.First {
		lost.First = more.First
	}
	lost.N += more.N
	return true
}

// give pushes what was lost, if anything was, and the batch, if there is one.
func (t *trainer) give(lost *sampler.LostError, batch ...spsc.Desc) error {
	var both [2]spsc.Desc
	descs := both[:0]
	if lost.N > 0 {
		t.countLost(lost.N)
		descs = append(descs, spsc.Desc{A: lost.First, B: min(uint64(lost.N), math.MaxUint32)})
		*lost = sampler.LostError{}
	}
	descs = append(descs, batch...)
	failpoint.Hit("shm/trainer/giving")
	n, err := t.deliver.TryPush(descs)
	if err != nil {
		return wireNotice(wire.CodeBadPeer, "deliver queue: %v", err)
	}
	if n < len(descs) { // the queue has a place for every batch that it may hold, and for a loss before it
		return wireNotice(wire.CodeBadPeer, "deliver queue: batches were given back that were never taken from it")
	}
	t.ringPeer()
	return nil
}

func (t *trainer) ringPeer() {
	if t.deliver.ConsumerWaiting() {
		t.toPeer.signal()
	}
}

// waitRoom waits until the peer may hold one more batch and reports false when ctx ended first.
func (t *trainer) waitRoom(ctx context.Context) bool {
	for {
		t.mu.Lock()
		room := len(t.held) < t.prefetch
		t.mu.Unlock()
		if room {
			t.setState(StateWaiting)
			return ctx.Err() == nil
		}
		t.setState(StateAtLimit)
		select {
		case <-t.room:
		case <-ctx.Done():
			return false
		}
	}
}

func (t *trainer) setState(s TrainerState) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.state != s {
		t.state, t.stateSince = s, time.Now()
	}
}

func (t *trainer) lend(b ring.Batch, afterLoss bool) {
	at := t.deliver.Pushed() + 1
	if afterLoss {
		at++
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.held = append(t.held, held{b, at})
	t.delivered++
}

func (t *trainer) countLost(n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lost += uint64(n)
}

// givebackLoop takes back what the peer has read. It returns nil when ctx ended.
func (t *trainer) givebackLoop(ctx context.Context) error {
	var given [16]spsc.Desc
	for ctx.Err() == nil {
		n, err := t.takeBack(given[:])
		if err != nil {
			return err
		}
		if n > 0 {
			continue
		}
		t.giveback.SetWaiting(true)
		n, err = t.takeBack(given[:])
		if n == 0 && err == nil {
			err = t.toUs.wait()
		}
		t.giveback.SetWaiting(false)
		if err != nil {
			return err
		}
	}
	return nil
}

// takeBack releases what lies in the giveback queue, up to len(buf), after checking each descriptor against what was lent.
func (t *trainer) takeBack(buf []spsc.Desc) (int, error) {
	n, err := t.giveback.TryPop(buf)
	if err != nil {
		return 0, wireNotice(wire.CodeBadPeer, "giveback queue: %v", err)
	}
	for _, d := range buf[:n] {
		b, ok := t.unlend(d)
		if !ok {
			return 0, wireNotice(wire.CodeBadPeer, "giveback queue: descriptor %#x %#x is no batch that this trainer holds", d.A, d.B)
		}
		failpoint.Hit("shm/trainer/unlent")
		t.member.Release(b)
	}
	if n > 0 {
		select {
		case t.room <- struct{}{}:
		default:
		}
	}
	return n, nil
}

// heldMany is from how many batches on the list of those held is not moved up for the oldest.
const heldMany = 64

func (t *trainer) unlend(d spsc.Desc) (ring.Batch, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, h := range t.held {
		if h.batch.Number == d.A && uint64(h.batch.Index) == d.B {
			if i == 0 && len(t.held) > heldMany { // mostly the oldest comes back, and moving thousands would cost more than a batch
				t.held = t.held[1:]
			} else {
				t.held = append(t.held[:i], t.held[i+1:]...)
			}
			t.givenBack++
			return h.batch, true
		}
	}
	return ring.Batch{}, false
}

// end gives back what the peer still holds, tells it why if there is somebody to tell, and says what Serve returns.
func (t *trainer) end(ctx context.Context, cause error) error {
	var notice *wire.Notice
	if !errors.As(cause, &notice) { // what it gave back before its end was read, and is not offered again
		for buf := make([]spsc.Desc, 16); ; {
			n, err := t.takeBack(buf)
			if errors.As(err, &notice) || n == 0 {
				break
			}
		}
	}
	taken, _ := t.deliver.Taken() // of what makes no sense, the last that did
	t.mu.Lock()
	held := t.held
	t.held = nil
	t.returned += uint64(len(held))
	switch {
	case notice != nil:
		t.outcome = OutcomeBadPeer
	case errors.Is(cause, errSocketEnded) && (len(held) == 0 || t.giveback.Closed() && held[0].at > taken): // it left, and had begun none of what it held
		t.outcome = OutcomeDetached
	case errors.Is(cause, errSocketEnded):
		t.outcome = OutcomeDied
	case ctx.Err() != nil:
		t.outcome = OutcomeCutOff
	default:
		t.outcome = OutcomeFailed
	}
	result, log := t.outcome, t.log.With("delivered", t.delivered, "returned", len(held))
	t.mu.Unlock()
	t.giveUp(held, taken, result)
	switch {
	case result == OutcomeDetached:
		log.Info("trainer detached")
		return nil
	case result == OutcomeDied:
		if t.member.Policies().OnDeath == sampler.Drop {
			log.Warn("trainer died holding batches; its group drops those it had begun")
		} else {
			log.Warn("trainer died holding batches; they are offered to another")
		}
		return nil
	case result == OutcomeBadPeer:
	case result == OutcomeCutOff:
		notice = wireNotice(wire.CodeShuttingDown, "the daemon is stopping")
	default:
		notice = wireNotice(wire.CodeInternal, "the daemon failed; its log says why")
	}
	log.Warn("trainer cut off", "code", notice.Code, "reason", notice.Reason, "err", cause)
	_ = t.conn.SetWriteDeadline(time.Now().Add(t.server.cfg.WriteTimeout))
	_, _ = t.conn.Write(wire.AppendNotice(nil, notice))
	if notice.Code == wire.CodeInternal {
		return fmt.Errorf("table %q: trainer %d: %w", t.table.Name, t.id, cause)
	}
	return notice
}

// giveUp gives back what the peer held. A batch that it cannot have begun to read, or that we took away, is no reason to drop it, whatever the
// group's policy; the count by which that is told is the peer's own, which can harm its own group only.
func (t *trainer) giveUp(all []held, taken uint64, why Outcome) {
	for _, h := range all {
		if why == OutcomeCutOff || why == OutcomeFailed || h.at > taken {
			t.member.Offer(h.batch)
		} else {
			t.member.Return(h.batch)
		}
	}
}

// addTo adds what the trainer did to s.
func (t *trainer) addTo(s *Stats) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s.add(t.delivered, t.givenBack, t.returned, t.lost, t.outcome)
}

// stats is called under the server's mu.
func (t *trainer) stats() TrainerStats {
	t.mu.Lock()
	defer t.mu.Unlock()
	var held []LeaseStats
	group := ""
	if t.member != nil {
		group, held = t.member.Group(), t.member.Leases()
	}
	return TrainerStats{
		ID: t.id, Table: t.table.Name, Group: group, Client: t.client, PID: t.pid, UID: t.uid, Since: t.since, Prefetch: t.prefetch,
		Held: held, State: t.state, StateSince: t.stateSince, Sleeping: t.live && t.deliver.ConsumerWaiting(),
		Delivered: t.delivered, GivenBack: t.givenBack, Lost: t.lost,
	}
}
