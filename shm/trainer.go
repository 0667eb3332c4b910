//go:build linux

package shm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/ring"
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

	live     bool    // what follows may be used by others than our goroutines; under server.mu
	memory   *Memory // the channel
	toPeer   *bell
	toUs     *bell
	deliver  *spsc.Producer // used by the deliver goroutine
	giveback *spsc.Consumer // used by the giveback goroutine
	room     chan struct{}  // capacity 1: something was given back

	mu         sync.Mutex
	held       []lease // oldest first; written under mu
	state      TrainerState
	stateSince time.Time
	delivered  uint64
	givenBack  uint64
	returned   uint64
	outcome    outcome
}

type lease struct {
	batch ring.Batch
	since time.Time
}

type outcome int

const (
	attached outcome = iota
	detached
	died
	cutOff
	badPeer
)

// errSocketEnded is the cause when the peer's side of the socket ended.
var errSocketEnded = errors.New("the peer's socket ended")

func newTrainer(s *Server, id uint64, conn *net.UnixConn, hello *wire.Hello, table Table, prefetch int, log *slog.Logger) *trainer {
	now := time.Now()
	return &trainer{
		server: s, id: id, conn: conn, table: table, client: hello.Client, since: now, prefetch: prefetch, log: log,
		room: make(chan struct{}, 1), held: make([]lease, 0, prefetch), state: StateWaiting, stateSince: now,
	}
}

// open makes the channel. What it made before an error is closed by close.
func (t *trainer) open() (err error) {
	capacity := channelCapacity(t.prefetch)
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
		Table: t.table.Name, Spec: t.table.Spec, Fingerprint: t.table.Spec.Fingerprint(), Trainer: t.id,
		BatchSize: int64(layout.BatchSize), Batches: int64(layout.Batches), SegmentBytes: t.table.View.SegmentBytes(),
		ChannelBytes: channelBytes(channelCapacity(t.prefetch)), Prefetch: int64(t.prefetch),
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
	t.join(&loops)
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

// join waits for the loops to see that the context has ended. A peer that turned its eventfd into a blocking one can have stopped a
// write to it, so that is let go again and again.
func (t *trainer) join(loops *sync.WaitGroup) {
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
	var one [1]spsc.Desc
	for t.waitRoom(ctx) {
		b, err := t.table.Source.Next(ctx, w)
		switch {
		case err == io.EOF:
			t.setState(StateEnded)
			t.deliver.Close()
			t.ringPeer()
			return nil
		case ctx.Err() != nil && err != nil:
			return nil
		case err != nil:
			return fmt.Errorf("the next batch: %w", err)
		}
		t.lend(b)
		one[0] = spsc.Desc{A: b.Number, B: uint64(b.Index) | uint64(b.Count)<<32}
		n, err := t.deliver.TryPush(one[:])
		if err != nil {
			return wireNotice(wire.CodeBadPeer, "deliver queue: %v", err)
		}
		if n == 0 { // the queue has a place for every batch that it may hold
			return wireNotice(wire.CodeBadPeer, "deliver queue: batches were given back that were never taken from it")
		}
		t.ringPeer()
	}
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

func (t *trainer) lend(b ring.Batch) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.held = append(t.held, lease{b, time.Now()})
	t.delivered++
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
		t.table.Source.Release(b)
	}
	if n > 0 {
		select {
		case t.room <- struct{}{}:
		default:
		}
	}
	return n, nil
}

func (t *trainer) unlend(d spsc.Desc) (ring.Batch, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, l := range t.held {
		if l.batch.Number == d.A && uint64(l.batch.Index) == d.B {
			t.held = append(t.held[:i], t.held[i+1:]...)
			t.givenBack++
			return l.batch, true
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
	t.mu.Lock()
	held := t.held
	t.held = nil
	t.returned += uint64(len(held))
	switch {
	case notice != nil:
		t.outcome = badPeer
	case errors.Is(cause, errSocketEnded) && len(held) == 0:
		t.outcome = detached
	case errors.Is(cause, errSocketEnded):
		t.outcome = died
	default:
		t.outcome = cutOff
	}
	result, log := t.outcome, t.log.With("delivered", t.delivered, "returned", len(held))
	t.mu.Unlock()
	for _, l := range held {
		t.table.Source.Return(l.batch)
	}
	switch {
	case result == detached:
		log.Info("trainer detached")
		return nil
	case result == died:
		log.Warn("trainer died holding batches; they are offered to another")
		return nil
	case result == badPeer:
	case ctx.Err() != nil:
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

// addTo adds what the trainer did to s.
func (t *trainer) addTo(s *Stats) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s.Delivered += t.delivered
	s.GivenBack += t.givenBack
	s.Returned += t.returned
	switch t.outcome {
	case detached:
		s.Detached++
	case died:
		s.Died++
	case cutOff:
		s.CutOff++
	case badPeer:
		s.BadPeers++
	}
}

// stats is called under the server's mu.
func (t *trainer) stats() TrainerStats {
	t.mu.Lock()
	defer t.mu.Unlock()
	held := make([]LeaseStats, len(t.held))
	for i, l := range t.held {
		held[i] = LeaseStats{Number: l.batch.Number, Index: l.batch.Index, Since: l.since}
	}
	return TrainerStats{
		ID: t.id, Table: t.table.Name, Client: t.client, PID: t.pid, UID: t.uid, Since: t.since, Prefetch: t.prefetch,
		Held: held, State: t.state, StateSince: t.stateSince, Sleeping: t.live && t.deliver.ConsumerWaiting(),
		Delivered: t.delivered, GivenBack: t.givenBack,
	}
}
