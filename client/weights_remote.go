package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

// RemoteStats is what a subscription over a connection has done so far.
type RemoteStats struct {
	Generations uint64 // shown
	Deltas      uint64 // of those, received as what differs from the one before
	Skipped     uint64 // generations that were published and never received, because newer ones were there
	Bytes       uint64 // received
	CopiedBytes uint64 // taken from the generation before instead
	Resumed     uint64 // transfers that went on where they had broken off
	BadSums     uint64 // generations that came damaged, and were asked for again
	Reconnects  uint64 // connections made after the first
	Buffers     int    // generations there is memory for

	Receiving      uint64 // the generation that is being received; 0: none
	ReceivingBytes int64  // of it, here
	ReceivingTotal int64  // of it, to come in all
}

// remoteWeights receives a table's generations over a connection, always the newest, each into memory of its own that no caller holds. One goroutine
// receives and connects anew; callers read what is shown.
type remoteWeights struct {
	addr, network, address string
	cfg                    SubscribeConfig
	tensors                *tensor.Manifest

	life  context.Context // ends with close
	die   context.CancelFunc
	ended chan struct{} // closed when the goroutine has returned
	room  chan struct{} // capacity 1: memory was let go

	// Of the goroutine alone.
	partial *incoming // a whole generation of which a part is here

	answering sync.Mutex // held from when a generation is shown until the daemon is told

	mu        sync.Mutex
	conn      net.Conn // that is being read; nil: there is none
	newest    *received
	before    uint64        // generations up to this one are of a daemon's life before this one: their numbers say nothing; 0: none
	spare     *received     // memory that nobody uses
	buffers   int           // memory there is: newest, spare, what is received into, and what callers hold
	changed   chan struct{} // closed, and made anew, when newest or err changes
	outage    outage
	down      bool      // there is no connection
	stoodFrom time.Time // when the newest connection was made
	blocked   bool      // there is none because callers hold all memory
	damage    error     // why the last generation that came was not shown; nil: it was
	err       error     // why the subscription has ended
	closed    bool
	stats     RemoteStats
}

// openRemoteSource subscribes over a connection. ctx bounds the subscribing only; with cfg.Wait that lasts until something was published.
func openRemoteSource(ctx context.Context, addr string, cfg SubscribeConfig) (source, error) {
	network, address, err := splitAddress(addr)
	if err != nil {
		return nil, err
	}
	r := &remoteWeights{
		addr: addr, network: network, address: address, cfg: cfg,
		ended: make(chan struct{}), room: make(chan struct{}, 1), changed: make(chan struct{}),
	}
	conn, err := r.connect(ctx)
	if err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	r.life, r.die = context.WithCancel(context.WithoutCancel(ctx)) // what a Dialer may look up in ctx, but not its end
	r.conn, r.stoodFrom = conn, time.Now()
	go r.run(conn)
	return r, nil
}

// connect makes a connection and says what this subscription has already.
func (r *remoteWeights) connect(ctx context.Context) (net.Conn, error) {
	limited, cancel := context.WithTimeout(ctx, r.cfg.HandshakeTimeout)
	defer cancel()
	conn, err := r.cfg.Dialer(limited, r.network, r.address)
	if err != nil {
		if limited.Err() != nil {
			return nil, &waitError{limited, fmt.Sprintf("dial %s: no connection in time (%v)", r.addr, err)}
		}
		return nil, fmt.Errorf("dial %s: %w; %s", r.addr, err, dialAdvice(err))
	}
	hello := r.hello()
	if hello.Wait { // the reply comes when something was published
		limited = ctx
	}
	var accepted wire.AcceptedSubscribe
	err = greet(limited, conn, hello, &accepted)
	if err == nil {
		err = r.agree(&accepted)
	}
	if err != nil {
		conn.Close()
		if limited.Err() != nil {
			return nil, &waitError{limited, fmt.Sprintf("dial %s, table %q: connected, but no reply in time", r.addr, r.cfg.Table)}
		}
		return nil, fmt.Errorf("dial %s, table %q: %w", r.addr, r.cfg.Table, named(err))
	}
	return conn, nil
}

func (r *remoteWeights) hello() *wire.Hello {
	h := &wire.Hello{
		Role: wire.RoleSubscribe, Table: r.cfg.Table, Stream: r.network == "unix", Wait: r.cfg.Wait || r.tensors != nil, Delta: !r.cfg.NoDelta,
		Client: r.cfg.Client,
	}
	h.SetToken(r.cfg.Token)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.newest != nil {
		h.Have, h.HaveDigest = int64(r.newest.generation), r.newest.digest
	}
	if p := r.partial; p != nil && p.at > 0 {
		h.Resume, h.ResumeDigest, h.ResumeOffset = int64(p.announced.Generation), p.announced.Digest, p.at
	}
	return h
}

// agree takes the manifest of the first reply; later ones must have the same.
func (r *remoteWeights) agree(a *wire.AcceptedSubscribe) error {
	if a.SegmentBytes > 0 {
		return fmt.Errorf("%w: the daemon offered a segment where a stream was asked for", wire.ErrProtocol)
	}
	m, err := tensor.ParseManifest(a.Manifest)
	switch {
	case err != nil:
		return fmt.Errorf("%w: the table's manifest: %w", wire.ErrProtocol, err)
	case r.tensors != nil && !r.tensors.Equal(m):
		return &wire.Notice{Code: wire.CodeReplaced, Reason: fmt.Sprintf("table %q has generations of another manifest now: subscribe again", r.cfg.Table)}
	case m.DataBytes() > r.cfg.CapacityBytes:
		return fmt.Errorf("one generation of table %q has %d bytes, and SubscribeConfig.CapacityBytes is %d: raise it",
			r.cfg.Table, m.DataBytes(), r.cfg.CapacityBytes)
	}
	if r.tensors == nil {
		r.tensors = m
	}
	return nil
}

// errNoRoom is why a connection is closed when callers hold all memory there may be: the daemon is not to wait for them.
var errNoRoom = errors.New("client: callers hold all generations there is memory for")

// run receives, and makes another connection when one has ended, until the subscription ends for good.
func (r *remoteWeights) run(conn net.Conn) {
	defer close(r.ended)
	for {
		err := r.receiveAll(conn)
		conn.Close()
		if err == errNoRoom && !r.awaitRoom() || !r.broken(err) {
			return
		}
		if conn = r.reconnect(err == errNoRoom); conn == nil {
			return
		}
	}
}

// broken says whether to make another connection now that one has ended.
func (r *remoteWeights) broken(err error) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.conn, r.stats.Receiving = nil, 0
	switch {
	case r.closed:
		r.finish(os.ErrClosed)
		return false
	case err == errNoRoom:
		return true
	case !answered(err):
		err = fmt.Errorf("%w: %w", ErrDaemonGone, err)
	}
	err = named(err)
	if r.cfg.ReconnectFor < 0 || !passing(err) || codeOf(err) == wire.CodeReplaced {
		r.finish(err)
		return false
	}
	r.down = true
	r.outage.begin(err, time.Since(r.stoodFrom) >= r.cfg.ReconnectFor)
	return true
}

// finish ends the subscription. It wants mu.
func (r *remoteWeights) finish(err error) {
	r.err = err
	r.change()
}

// change tells everybody who waits to look again. It wants mu.
func (r *remoteWeights) change() {
	close(r.changed)
	r.changed = make(chan struct{})
}

// awaitRoom waits until callers have let go of some memory. It says whether they have.
func (r *remoteWeights) awaitRoom() bool {
	r.mu.Lock()
	r.conn, r.blocked = nil, true
	full := r.spare == nil && r.buffers >= r.cfg.Generations
	r.mu.Unlock()
	if full {
		select {
		case <-r.room:
		case <-r.life.Done():
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.blocked = false
	if r.closed {
		r.finish(os.ErrClosed)
	}
	return !r.closed
}

// reconnect makes another connection and returns it; nil: the subscription has ended for good.
func (r *remoteWeights) reconnect(atOnce bool) net.Conn {
	for {
		if !atOnce && !r.pause() {
			return nil
		}
		atOnce = false
		conn, err := r.connect(r.life)
		r.mu.Lock()
		if err == nil && !r.closed {
			if r.down {
				r.outage.spent += time.Since(r.outage.began)
			}
			r.conn, r.down, r.stoodFrom = conn, false, time.Now()
			r.stats.Reconnects++
			r.mu.Unlock()
			return conn
		}
		if err == nil {
			conn.Close()
		}
		if !r.down {
			r.down = true
			r.outage.begin(nil, false)
		}
		r.outage.tries++
		r.outage.last = err
		if r.closed {
			r.finish(os.ErrClosed)
		} else if !passing(err) || codeOf(err) == wire.CodeReplaced {
			r.finish(err)
		}
		ended := r.err != nil
		r.mu.Unlock()
		if ended {
			return nil
		}
	}
}

// pause waits before the next try; false: patience is out, or the subscription was closed.
func (r *remoteWeights) pause() bool {
	r.mu.Lock()
	o := r.outage
	r.mu.Unlock()
	err := o.rest(r.life, r.cfg.ReconnectFor, r.cfg.ReconnectFrom, r.cfg.ReconnectTo)
	if err == nil {
		return true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.finish(err)
	return false
}

// latest returns the newest generation, held for the caller, if it is newer; an error if the subscription has ended.
func (r *remoteWeights) latest(newerThan uint64) (*heldWeights, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.closed:
		return nil, fmt.Errorf("client: weights of table %q: %w", r.cfg.Table, os.ErrClosed)
	case r.newest != nil && r.newer(newerThan):
		g := r.newest
		g.holds++
		return &heldWeights{
			manifest: r.tensors, generation: g.generation, digest: g.digest, published: g.published,
			sum: func(i int) uint32 { return g.sums[i] }, data: g.data, release: func() { r.release(g) },
		}, nil
	case r.err != nil:
		return nil, fmt.Errorf("client: weights of table %q: %w", r.cfg.Table, r.err)
	}
	return nil, nil
}

// newer says whether the newest is newer than that. Numbers from before a restart of the daemon are above those of the daemon that serves now, and older. It
// wants mu.
func (r *remoteWeights) newer(than uint64) bool {
	return r.newest.generation > than || than > r.newest.generation && than <= r.before
}

// await is latest that waits.
func (r *remoteWeights) await(ctx context.Context, newerThan uint64) (*heldWeights, error) {
	for {
		r.mu.Lock()
		changed := r.changed
		r.mu.Unlock()
		g, err := r.latest(newerThan)
		if g != nil || err != nil {
			return g, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, r.waited(ctx, newerThan)
		}
	}
}

// waited says what the call was waiting for when its context ended.
func (r *remoteWeights) waited(ctx context.Context, newerThan uint64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	what := fmt.Sprintf("client: weights of table %q: no generation newer than %d", r.cfg.Table, newerThan)
	switch {
	case r.down:
		return &ReconnectingError{r.outage.began, r.outage.tries, r.outage.last, what, ctx}
	case r.damage != nil:
		what += fmt.Sprintf(" that is whole: %v", r.damage)
	case r.blocked:
		what += fmt.Sprintf(": callers hold all %d generations that SubscribeConfig.Generations allows: release some", r.buffers)
	case r.stats.Receiving != 0:
		what += fmt.Sprintf("; of generation %d, %d bytes of %d are here", r.stats.Receiving, r.stats.ReceivingBytes, r.stats.ReceivingTotal)
	}
	return &waitError{ctx, what}
}

// release lets go of what latest returned.
func (r *remoteWeights) release(g *received) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if g.holds--; g.holds == 0 && g != r.newest {
		r.recycle(g)
	}
}

// recycle keeps memory that nobody uses for the next generation, or lets it go if there is some. It wants mu.
func (r *remoteWeights) recycle(g *received) {
	if r.spare == nil && !r.closed {
		r.spare = g
	} else {
		r.buffers--
	}
	select {
	case r.room <- struct{}{}:
	default:
	}
}

// manifest returns what tensors the generations have.
func (r *remoteWeights) manifest() *tensor.Manifest { return r.tensors }

// RemoteStats returns what a subscription over a connection has done so far; false if it maps the daemon's memory.
func (s *Subscription) RemoteStats() (RemoteStats, bool) {
	r, ok := s.source.(*remoteWeights)
	if !ok {
		return RemoteStats{}, false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	st := r.stats
	st.Buffers = r.buffers
	return st, true
}

// leavingTimeout is how long a daemon that does not end a connection in its turn holds up the end of a Subscription.
const leavingTimeout = time.Second

// close ends the subscription. What callers hold stays theirs. The daemon ends the connection first, so that it has the last answer by then: QUIC forgets what has not arrived when
// a connection is closed, and so does TCP where something was not read.
func (r *remoteWeights) close() error {
	r.die()
	r.mu.Lock()
	r.closed = true
	conn := r.conn
	r.change()
	r.mu.Unlock()
	if conn != nil {
		half, ok := conn.(interface{ CloseWrite() error })
		r.answering.Lock()
		ok = ok && half.CloseWrite() == nil
		r.answering.Unlock()
		if ok {
			timer := time.NewTimer(leavingTimeout)
			select {
			case <-r.ended:
			case <-timer.C:
			}
			timer.Stop()
		}
		conn.Close()
	}
	<-r.ended
	r.mu.Lock()
	defer r.mu.Unlock()
	r.spare = nil
	return nil
}
