//go:build linux

package client

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"sync"
	"time"

	"github.com/ingestd/ingestd/wire"
)

// RemoteTrainerStats is what a trainer over a connection has done so far.
type RemoteTrainerStats struct {
	Batches    uint64 // received whole
	Bytes      uint64 // of those
	Dropped    uint64 // batches that came, and that the daemon took back before Next gave them out: they come again
	Reconnects uint64 // connections made after the first
	Buffers    int    // batches there is memory for, but for those that callers hold of earlier connections
}

// remoteTrainer receives batches over a connection, each into memory of its own that nobody uses. One goroutine receives and connects anew.
type remoteTrainer struct {
	addr, network, address string
	cfg                    TrainerConfig
	session                string          // by which the daemon knows this trainer when it comes again: at random
	layout                 *receivedLayout // of the first connection; later ones must have the same

	life  context.Context // ends with close
	die   context.CancelFunc
	ended chan struct{} // closed when the goroutine has returned
	wake  chan struct{} // capacity 1: next may look again

	mu         sync.Mutex
	accepted   wire.AcceptedRemoteTrain // of the newest connection
	link       *trainerLink             // nil: there is none
	connection uint64                   // how many there were
	arrived    []arrival                // not given out yet, oldest first
	unanswered int                      // batches of this connection
	begun      uint64                   // batches of this connection that next has given out
	stoodFrom  time.Time                // when the newest connection was made
	free       []*receivedBatch
	outage     outage
	down       bool  // there is no connection
	over       bool  // the daemon said that there will be no more batches
	err        error // why the trainer has ended
	closed     bool
	stats      RemoteTrainerStats
	parting    time.Duration // partingTimeout
}

// arrival is a batch, or the news of a loss.
type arrival struct {
	batch *receivedBatch // nil: none
	lost  LostBatchesError
}

// openRemoteTrainer joins a table over a connection. ctx bounds that only.
func openRemoteTrainer(ctx context.Context, addr, network, address string, cfg TrainerConfig) (*remoteTrainer, error) {
	r := &remoteTrainer{
		addr: addr, network: network, address: address, cfg: cfg,
		session: newTrainerSession(), ended: make(chan struct{}), wake: make(chan struct{}, 1), parting: partingTimeout,
	}
	conn, accepted, err := r.connect(ctx)
	if err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	r.life, r.die = context.WithCancel(context.WithoutCancel(ctx)) // what a Dialer may look up in ctx, but not its end
	r.begin(conn, accepted)
	go r.run()
	return r, nil
}

func newTrainerSession() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// connect makes a connection and says hello.
func (r *remoteTrainer) connect(ctx context.Context) (net.Conn, *wire.AcceptedRemoteTrain, error) {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.HandshakeTimeout)
	defer cancel()
	conn, err := r.cfg.Dialer(ctx, r.network, r.address)
	if err != nil {
		if ctx.Err() != nil {
			return nil, nil, &waitError{ctx, fmt.Sprintf("dial %s: no connection in time (%v)", r.addr, err)}
		}
		return nil, nil, fmt.Errorf("dial %s: %w; %s", r.addr, err, dialAdvice(err))
	}
	if _, ok := socketOf(conn); !ok {
		conn.Close()
		return nil, nil, fmt.Errorf("dial %s: %w", r.addr, errNoSocket)
	}
	hello := &wire.Hello{
		Role: wire.RoleTrain, Table: r.cfg.Table, Spec: r.cfg.Spec, Prefetch: int64(r.cfg.Prefetch), Group: r.cfg.Group, Client: r.cfg.Client,
		Stream: r.network == "unix", Session: r.session,
	}
	hello.SetToken(r.cfg.Token)
	accepted := new(wire.AcceptedRemoteTrain)
	if err = greet(ctx, conn, hello, accepted); err == nil {
		err = r.agree(accepted)
	}
	if err != nil {
		conn.Close()
		if ctx.Err() != nil {
			return nil, nil, &waitError{ctx, fmt.Sprintf("dial %s, table %q: connected, but no reply in time", r.addr, r.cfg.Table)}
		}
		return nil, nil, fmt.Errorf("dial %s, table %q: %w", r.addr, r.cfg.Table, named(err))
	}
	return conn, accepted, nil
}

// errNoSocket is about a Dialer that gives a trainer a connection it cannot use.
var errNoSocket = errors.New("TrainerConfig.Dialer returned a connection that is neither encrypted nor a socket (net.TCPConn, or one that has SyscallConn or NetConn): " +
	"it could not be seen whether a batch was taken back while it came; use tls:// through a tunnel")

// agree judges what the daemon says of its batches.
func (r *remoteTrainer) agree(a *wire.AcceptedRemoteTrain) error {
	l, err := newReceivedLayout(a.Spec, a.BatchSize)
	switch {
	case err != nil:
		return err
	case r.layout != nil && r.layout.shape != l.shape:
		return fmt.Errorf("%w: table %q was made anew with batches of %d rows instead of %d: attach again", wire.ErrProtocol, a.Table, l.shape.BatchSize, r.layout.shape.BatchSize)
	case r.cfg.Prefetch > 0 && a.Prefetch > int64(r.cfg.Prefetch):
		return fmt.Errorf("%w: prefetch %d was granted, and %d asked for", wire.ErrProtocol, a.Prefetch, r.cfg.Prefetch)
	case a.Prefetch > r.cfg.MemoryBytes/l.bytes:
		return fmt.Errorf("%d batches of table %q may come at once, of %d bytes each, and TrainerConfig.MemoryBytes is %d: ask for a smaller Prefetch, or raise it",
			a.Prefetch, a.Table, l.bytes, r.cfg.MemoryBytes)
	}
	if r.layout == nil {
		r.layout, r.cfg.Spec = l, a.Spec // later connections must have it
	}
	return nil
}

// begin takes a connection into use. It wants mu, but for the first.
func (r *remoteTrainer) begin(conn net.Conn, accepted *wire.AcceptedRemoteTrain) {
	r.link = newTrainerLink(conn)
	r.accepted, r.down, r.unanswered, r.begun, r.stoodFrom = *accepted, false, 0, 0, time.Now()
	r.connection++
	r.stats.Buffers = len(r.free)
}

// run receives, and makes another connection when one has ended, until the trainer ends for good.
func (r *remoteTrainer) run() {
	defer close(r.ended)
	for {
		err := r.receiveAll()
		r.mu.Lock()
		link, closed := r.link, r.closed
		r.mu.Unlock()
		if closed { // the daemon goes first: closing over what was not read would throw away the last answers
			_, _ = io.Copy(io.Discard, link.in)
		}
		if !r.broken(err) || !r.reconnect() {
			return
		}
	}
}

// receiveAll receives batches until the connection ends.
func (r *remoteTrainer) receiveAll() error {
	r.mu.Lock()
	link := r.link
	r.mu.Unlock()
	var h wire.BatchHeader
	headers := wire.BatchReader{R: link.in, Shape: r.layout.shape}
	for {
		if err := headers.Next(&h); err != nil {
			if codeOf(err) == wire.CodeEndOfStream {
				err = r.stayOn(link)
			}
			return err
		}
		if h.LostCount > 0 {
			r.arrive(arrival{lost: LostBatchesError{Group: r.accepted.Group, First: h.LostFirst, N: int(min(h.LostCount, math.MaxInt))}}, false)
		}
		if h.Count == 0 {
			continue
		}
		b, err := r.buffer()
		if err != nil {
			return err
		}
		if err := r.layout.read(link.in, &h, b); err != nil {
			r.mu.Lock()
			r.recycle(b)
			r.mu.Unlock()
			return err
		}
		r.arrive(arrival{batch: b}, link.hungUp())
	}
}

// buffer returns memory for one more batch. There is some for as many as the daemon may send without an answer.
func (r *remoteTrainer) buffer() (*receivedBatch, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, os.ErrClosed
	}
	if int64(r.unanswered) >= r.accepted.Prefetch {
		return nil, fmt.Errorf("%w: the daemon sent more than the %d batches that it may without an answer", wire.ErrProtocol, r.accepted.Prefetch)
	}
	r.unanswered++
	if k := len(r.free) - 1; k >= 0 {
		b := r.free[k]
		r.free = r.free[:k]
		b.connection, b.created = r.connection, r.accepted.Created
		return b, nil
	}
	r.stats.Buffers++
	b := r.layout.newBuffer()
	b.connection, b.created = r.connection, r.accepted.Created
	return b, nil
}

// arrive puts something where next finds it. A batch whose connection had ended when it was all here does not count: its memory may have been others' already when it was
// read, and it comes again.
func (r *remoteTrainer) arrive(a arrival, ended bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if a.batch != nil && ended {
		r.stats.Dropped++
		r.recycle(a.batch)
		return
	}
	if a.batch != nil {
		r.stats.Batches++
		r.stats.Bytes += uint64(r.layout.shape.PayloadBytes(int64(a.batch.count)))
	}
	r.line(a)
	r.rouse()
}

// line puts something behind what has arrived. A loss that follows a loss is one with it, so that no daemon can make the line long. It wants mu.
func (r *remoteTrainer) line(a arrival) {
	if k := len(r.arrived) - 1; k >= 0 && a.batch == nil && r.arrived[k].batch == nil {
		last := &r.arrived[k].lost
		last.N += min(a.lost.N, math.MaxInt-last.N)
		return
	}
	r.arrived = append(r.arrived, a)
}

// rouse makes next look again. It wants mu.
func (r *remoteTrainer) rouse() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// stayOn waits for the connection's end after the end of the stream: answers still go out. It returns io.EOF if this trainer has had everything.
func (r *remoteTrainer) stayOn(link *trainerLink) error {
	r.mu.Lock()
	r.over = true
	r.rouse()
	r.mu.Unlock()
	var one [1]byte
	n, err := link.in.Read(one[:])
	if n > 0 {
		err = fmt.Errorf("%w: byte %#02x after the end of the stream", wire.ErrProtocol, one[0])
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, a := range r.arrived {
		if a.batch != nil { // which was taken back, and is offered again by whoever has it
			r.over = false
			return err
		}
	}
	return io.EOF
}

// broken says whether to make another connection now that one has ended. What came over it and was not given out the daemon offers again, so it is dropped.
func (r *remoteTrainer) broken(err error) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.link.conn.Close()
	r.link = nil
	all := r.arrived
	r.arrived = nil
	for _, a := range all {
		if a.batch == nil {
			r.line(a)
			continue
		}
		r.stats.Dropped++
		r.recycle(a.batch)
	}
	switch {
	case r.closed:
		return r.finish(os.ErrClosed)
	case r.over:
		return r.finish(io.EOF)
	case !answered(err):
		err = fmt.Errorf("%w: %w", ErrDaemonGone, err)
	}
	err = named(err)
	if r.cfg.ReconnectFor < 0 || !passing(err) || codeOf(err) == wire.CodeBadPeer {
		return r.finish(err)
	}
	r.down = true
	r.outage.begin(err, time.Since(r.stoodFrom) >= r.cfg.ReconnectFor)
	return true
}

// finish ends the trainer. It wants mu, and returns false.
func (r *remoteTrainer) finish(err error) bool {
	r.err = err
	r.rouse()
	return false
}

// reconnect makes another connection; false: the trainer has ended for good.
func (r *remoteTrainer) reconnect() bool {
	for {
		if !r.pause() {
			return false
		}
		conn, accepted, err := r.connect(r.life)
		r.mu.Lock()
		r.outage.tries++
		switch {
		case r.closed:
			if err == nil {
				conn.Close()
			}
			r.finish(os.ErrClosed)
		case err == nil:
			r.stats.Reconnects++
			r.outage.spent += time.Since(r.outage.began)
			r.begin(conn, accepted)
			r.mu.Unlock()
			return true
		case !passing(err):
			r.finish(err)
		default:
			r.outage.last = err
		}
		ended := r.err != nil
		r.mu.Unlock()
		if ended {
			return false
		}
	}
}

// pause waits before the next try; false: patience is out, or the trainer was closed.
func (r *remoteTrainer) pause() bool {
	r.mu.Lock()
	o := r.outage
	r.mu.Unlock()
	err := o.rest(r.life, r.cfg.ReconnectFor, r.cfg.ReconnectFrom, r.cfg.ReconnectTo)
	if err == nil {
		return true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.finish(err)
}

// next waits for a batch, or the news of a loss as a *LostBatchesError.
func (r *remoteTrainer) next(ctx context.Context) (*receivedBatch, error) {
	for {
		r.mu.Lock()
		a, ok, err := r.take()
		r.mu.Unlock()
		switch {
		case ok && a.batch == nil:
			lost := a.lost
			return nil, &lost
		case ok:
			return a.batch, nil
		case err != nil:
			return nil, err
		}
		select {
		case <-r.wake:
		case <-ctx.Done():
			return nil, r.waited(ctx)
		}
	}
}

// take takes what arrived first. It wants mu.
func (r *remoteTrainer) take() (arrival, bool, error) {
	switch {
	case r.closed:
		return arrival{}, false, os.ErrClosed
	case len(r.arrived) > 0:
		a := r.arrived[0]
		k := copy(r.arrived, r.arrived[1:])
		r.arrived[k] = arrival{}
		r.arrived = r.arrived[:k]
		if a.batch != nil {
			r.begun++
			r.outage.over = true
		}
		return a, true, nil
	case r.err != nil:
		return arrival{}, false, r.err
	case r.over:
		return arrival{}, false, io.EOF
	}
	return arrival{}, false, nil
}

// waited says what the call was waiting for when its context ended.
func (r *remoteTrainer) waited(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	what := fmt.Sprintf("client: no batch of table %q", r.cfg.Table)
	switch {
	case r.down:
		return &ReconnectingError{r.outage.began, r.outage.tries, r.outage.last, what, ctx}
	case int64(r.unanswered) >= r.accepted.Prefetch:
		what += fmt.Sprintf(": this trainer holds %d batches, all it may: release some", r.unanswered)
	}
	return &waitError{ctx, what}
}

// release gives a batch back. If it is of an earlier connection, the daemon has taken it back long since.
func (r *remoteTrainer) release(b *receivedBatch) {
	r.mu.Lock()
	link := r.link
	if b.connection != r.connection || r.closed { // closed: the last word was said
		link = nil
	}
	if link != nil {
		r.unanswered--
	}
	number := b.number
	r.recycle(b)
	r.mu.Unlock()
	if link != nil {
		link.answer(number)
	}
}

// recycle keeps memory for the batches to come. It wants mu.
func (r *remoteTrainer) recycle(b *receivedBatch) {
	if int64(len(r.free)) < r.accepted.Prefetch && !r.closed {
		r.free = append(r.free, b)
	}
}

func (r *remoteTrainer) prefetch() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return int(r.accepted.Prefetch)
}

func (r *remoteTrainer) statistics() RemoteTrainerStats {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stats
}

// partingTimeout is how long a daemon that does not end a connection in its turn holds up the end of a Trainer.
const partingTimeout = time.Second

// close detaches. The memory of what callers hold stays theirs.
func (r *remoteTrainer) close() error {
	r.die()
	r.mu.Lock()
	link, begun := r.link, r.begun
	if r.closed {
		link = nil
	}
	r.closed, r.free = true, nil
	r.rouse()
	r.mu.Unlock()
	if link != nil {
		link.leave(begun)
		timer := time.NewTimer(r.parting)
		defer timer.Stop()
		select {
		case <-r.ended:
		case <-timer.C:
			link.conn.Close()
		}
	}
	<-r.ended
	return nil
}
