//go:build linux

package client

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// FillerConfig says what a Filler fills and how.
type FillerConfig struct {
	Table string     // required
	Spec  *spec.Spec // must be the table's where set; nil takes the table's

	Prefetch         int           // most places of the segment lent at once; 0: the daemon's default
	HandshakeTimeout time.Duration // for connecting and the reply; default DefaultHandshakeTimeout
	Client           string        // name shown in the daemon's status; default ingestd-go/VERSION
	Token            Token         // see Config.Token; zero: the daemon asks the kernel which user this is

	// Session is the producer's identity that survives reconnects and restarts of the daemon. With one, a Filler whose daemon goes away attaches
	// again by itself, and copies over what it had filled and the daemon does not hold. Without, the daemon's end is the end of the Filler.
	Session       string
	ReconnectFor  time.Duration // most time without a daemon, if somebody waits for it; default DefaultReconnectFor; negative: do not reconnect
	ReconnectFrom time.Duration // least upper bound of a pause before a try; default DefaultReconnectFrom
	ReconnectTo   time.Duration // greatest one; default DefaultReconnectTo

	// ContinueAfterLoss goes on when the daemon does not hold samples that had been in its ring, since it does not keep its segment over a restart; Stats.Lost
	// counts them. By default the Filler ends with a *LostError.
	ContinueAfterLoss bool
}

func (c FillerConfig) withDefaults() (FillerConfig, error) {
	if c.Table == "" {
		return c, errors.New("client: FillerConfig.Table is empty; name the table to fill")
	}
	if c.Prefetch < 0 {
		return c, fmt.Errorf("client: FillerConfig.Prefetch is %d; it may not be negative", c.Prefetch)
	}
	same := Config{
		Table: c.Table, Spec: &spec.Spec{}, HandshakeTimeout: c.HandshakeTimeout, Client: c.Client, Token: c.Token, Session: c.Session, ReconnectFor: c.ReconnectFor,
		ReconnectFrom: c.ReconnectFrom, ReconnectTo: c.ReconnectTo, ContinueAfterLoss: c.ContinueAfterLoss,
	}
	same, err := same.withDefaults()
	c.HandshakeTimeout, c.Client = same.HandshakeTimeout, same.Client
	c.ReconnectFor, c.ReconnectFrom, c.ReconnectTo = same.ReconnectFor, same.ReconnectFrom, same.ReconnectTo
	return c, err
}

// Filler is a producer on the daemon's own machine that writes samples where trainers read them. Reserve gives slots to fill, Commit hands them over.
//
// Reserve, Push, Flush and Close, and the Slots, are for one goroutine at a time; the rest may be called from any.
type Filler struct {
	path      string
	cfg       FillerConfig
	manifest  []byte // of a producer of tensors
	spec      *spec.Spec
	leafBytes []int64
	leaves    map[string]int
	first     uint64 // samples of the session that the daemon held before us: the number of our first one

	life context.Context // ends with Close and Abort
	end  context.CancelFunc
	kick chan struct{} // capacity 1: there is something to do for the keeper
	kept chan struct{} // closed when the keeper has returned

	ready, drained func() bool // what a call waits for; made once

	mu      sync.Mutex
	changed chan struct{} // closed when state has changed; nil while nobody waits for that
	state   fillerState
	err     error // ended: why
	using   bool  // a call waits at the current attachment, without holding mu
	waiting int   // calls that wait for the keeper
	outage  outage
	cur     *held // the current attachment; nil while there is none
	slots   Slots

	// Samples are numbered as this Filler counts them, from first on. Those of the session that were lost in between have no number there.
	done  uint64 // number of the next one to be complete
	sent  uint64 // of the next one to be handed over to the current attachment
	base  uint64 // of the first one handed over to it
	acked uint64 // of the first one that is not known to be in the ring
	shift uint64 // what to take from the session's count to get ours; wraps

	place   shm.LentPlace // being filled; Lease 0: none
	row     int           // next row of it to hand over
	record  *record
	asked   uint64 // what was sent when settling was last asked for
	stream  uint64 // of the last attachment
	refused *wire.Note
	resumed bool // the daemon was told, or need not be, that we need nothing of earlier attachments
	reused  []uint32
	records []*record // oldest first: where the samples lie that are not known to be in the ring
	unused  []*record
	stats   FillerStats
}

type fillerState int

const (
	fillerLive fillerState = iota // the daemon has been handed all that is complete
	fillerBusy                    // the keeper attaches anew, or copies
	fillerEnded
)

// held is an attachment whose memory is in use.
type held struct {
	*shm.FillAttachment
	size int // rows of a place
	uses int
}

func hold(a *shm.FillAttachment) *held { return &held{a, int(a.Accepted().BatchSize), 1} }

// record says where samples lie: in the rows of a place from row 0 on.
type record struct {
	in    *held
	place ring.Place
	first uint64 // number of the sample in row 0
	rows  int    // complete
}

// FillerStats is what a Filler has done so far.
type FillerStats struct {
	Filled     uint64        // samples that were committed by Commit or Push
	Committed  uint64        // of those, in the ring
	Copied     uint64        // samples copied to new places after a reconnect
	Lost       uint64        // samples that were in the ring of a daemon that did not keep it
	Reconnects uint64        // attachments made after the first
	Places     uint64        // places that were lent
	Waits      uint64        // times a call slept
	Waited     time.Duration // how long they slept
}

// AttachFiller joins a table as a producer that fills in place. addr is unix:///path or shm:///path, which mean the same: the socket of a daemon on this
// machine, which must trust this process (see the daemon's configuration). ctx bounds the attaching only.
func AttachFiller(ctx context.Context, addr string, cfg FillerConfig) (*Filler, error) {
	return joinFiller(ctx, addr, cfg, nil)
}

func joinFiller(ctx context.Context, addr string, cfg FillerConfig, manifest []byte) (*Filler, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	if rest, ok := strings.CutPrefix(addr, "shm://"); ok {
		addr = "unix://" + rest
	}
	network, path, err := splitAddress(addr)
	if err != nil {
		return nil, err
	}
	if network != "unix" {
		return nil, fmt.Errorf("client: address %q: a Filler maps the daemon's memory, so it attaches on the same machine: write unix:///path/to/ingestd.sock, or use a Producer", addr)
	}
	p := &Filler{path: path, cfg: cfg, manifest: manifest, kick: make(chan struct{}, 1), kept: make(chan struct{}), resumed: true, leaves: map[string]int{}}
	a, err := p.attach(ctx, cfg.HandshakeTimeout)
	if err != nil {
		return nil, fmt.Errorf("client: %w", named(err))
	}
	c := a.Accepted()
	if cfg.Spec != nil {
		if err := spec.Check(c.Spec, cfg.Spec); err != nil {
			return nil, errors.Join(fmt.Errorf("client: the daemon accepted another spec than its table's: %w", err), a.Close(), a.Unmap())
		}
	}
	p.spec, p.leafBytes, p.first, p.stream = c.Spec, c.Spec.LeafBytes(), c.Held, c.Stream
	p.cfg.Spec = c.Spec // of the next daemon, too
	for i := range p.spec.NumLeaves() {
		p.leaves[p.spec.Leaf(i).Name] = i
	}
	p.done, p.sent, p.base, p.acked = p.first, p.first, p.first, p.first
	p.cur = hold(a)
	p.slots.filler = p
	p.ready, p.drained = p.canFill, p.allTaken
	p.life, p.end = context.WithCancel(context.Background())
	go p.keep()
	return p, nil
}

// attach makes an attachment, within a time.
func (p *Filler) attach(ctx context.Context, within time.Duration) (*shm.FillAttachment, error) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	hello := wire.Hello{
		Table: p.cfg.Table, Spec: p.cfg.Spec, Session: p.cfg.Session, Prefetch: int64(p.cfg.Prefetch), Notes: true, Client: p.cfg.Client, Manifest: p.manifest,
	}
	hello.SetToken(p.cfg.Token)
	return shm.AttachFill(ctx, p.path, hello, p.poke)
}

// poke tells the keeper that there may be something to do.
func (p *Filler) poke() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// Spec returns the layout of the samples.
func (p *Filler) Spec() *spec.Spec { return p.spec }

// Held returns the number of samples of the session that the daemon held before this Filler; fill those after them.
func (p *Filler) Held() uint64 { return p.first }

// Accepted returns what the daemon said when it was last attached to.
func (p *Filler) Accepted() wire.AcceptedFill {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cur == nil {
		return wire.AcceptedFill{Table: p.cfg.Table, Spec: p.spec, Fingerprint: p.spec.Fingerprint()}
	}
	return p.cur.Accepted()
}

// Committed returns how many of this Filler's samples are known to be in the ring: the first ones.
func (p *Filler) Committed() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state == fillerLive && !p.using {
		_ = p.learn()
	}
	return p.acked - p.first
}

// Stats returns the counts so far.
func (p *Filler) Stats() FillerStats {
	committed := p.Committed()
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.stats
	s.Filled, s.Committed = p.done-p.first, committed
	return s
}

// learn asks the current attachment how far the daemon is, and forgets where the samples lay that are in the ring. It wants mu, and no call in the attachment.
func (p *Filler) learn() error {
	rows, _, err := p.cur.Taken()
	if p.base+rows > p.acked {
		p.acked = p.base + rows
		p.outage.over = true
	}
	p.prune()
	return err
}

// prune forgets where samples lay that are in the ring.
func (p *Filler) prune() {
	n := 0
	for _, r := range p.records {
		if r == p.record || r == p.slots.record && p.slots.open || r.first+uint64(r.rows) > p.acked {
			p.records[n] = r
			n++
			continue
		}
		p.release(r.in)
		p.unused = append(p.unused, r)
	}
	clear(p.records[n:])
	p.records = p.records[:n]
}

// release ends one use of an attachment's memory.
func (p *Filler) release(h *held) {
	if h.uses--; h.uses == 0 {
		_ = h.Close()
		_ = h.Unmap()
	}
}

// newRecord notes that a place is filled from now on, beginning with sample first.
func (p *Filler) newRecord(first uint64) {
	var r *record
	if n := len(p.unused); n > 0 {
		r, p.unused = p.unused[n-1], p.unused[:n-1]
	} else {
		r = new(record)
	}
	*r = record{in: p.cur, place: p.place.Place, first: first}
	p.cur.uses++
	p.records = append(p.records, r)
	p.record = r
}

// canFill tells whether a wait for a place, and for room to hand it over, is at its end.
func (p *Filler) canFill() bool {
	room, err := p.cur.HasRoom()
	return err != nil || room && (p.place.Lease != 0 || p.cur.PlaceCame())
}

// allTaken tells whether the daemon has done all it was asked for.
func (p *Filler) allTaken() bool {
	_, all, err := p.cur.Taken()
	return all || err != nil
}

// Reserve waits for slots to fill: at least one, at most n, and at most what is left of the place. They are the caller's until Commit or Abandon. One
// reservation may be open at a time.
//
// Its errors: the context's, which for a deadline is also os.ErrDeadlineExceeded, and ErrFull where the daemon says whom it waits for (*FullError), and
// *ReconnectingError where there is no daemon, after all of which it may be called again; ErrDaemonGone, ErrShuttingDown, ErrSessionTaken, *wire.Notice,
// *LostError when the Filler has ended; os.ErrClosed after Close.
func (p *Filler) Reserve(ctx context.Context, n int) (*Slots, error) {
	if n < 1 {
		return nil, fmt.Errorf("client: reserve: %d slots were asked for; ask for at least 1", n)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.reserve(ctx, "reserve", n)
}

// reserve wants mu.
func (p *Filler) reserve(ctx context.Context, op string, n int) (*Slots, error) {
	s := &p.slots
	if s.open {
		return nil, fmt.Errorf("client: %s: the %d slots reserved before are still open; Commit or Abandon them first", op, s.n)
	}
	if err := p.usePlace(ctx, op); err != nil {
		return nil, err
	}
	if p.record == nil {
		p.newRecord(p.done)
	}
	s.open, s.in, s.record, s.place, s.row, s.n = true, p.cur, p.record, p.place.Place, p.row, min(n, p.cur.size-p.row)
	p.cur.uses++
	return s, nil
}

// usePlace waits until there is a row to fill, and room to hand it over. It wants mu.
func (p *Filler) usePlace(ctx context.Context, op string) error {
	for {
		if err := p.usable(ctx, op); err != nil {
			return err
		}
		room, err := p.cur.HasRoom()
		if err == nil && room && p.place.Lease == 0 {
			_, err = p.nextPlace()
		}
		switch {
		case err != nil:
			p.lose(err)
		case room && p.place.Lease != 0:
			return nil
		default:
			if err := p.sleep(ctx, op, p.ready); err != nil {
				return err
			}
		}
	}
}

// nextPlace takes the next place, if there is one. It wants mu.
func (p *Filler) nextPlace() (bool, error) {
	place, ok, err := p.cur.TryPlace()
	if !ok || err != nil {
		return false, err
	}
	p.place, p.row, p.record = place, 0, nil
	p.stats.Places++
	return true, p.learn()
}

// usable returns when the current attachment can be used, or why it cannot be. It wants mu.
func (p *Filler) usable(ctx context.Context, op string) error {
	for {
		switch {
		case p.state == fillerEnded:
			return fmt.Errorf("client: %s: %w", op, p.err)
		case p.life.Err() != nil:
			return fmt.Errorf("client: %s: %w", op, os.ErrClosed)
		case p.state == fillerLive:
			err := p.cur.Err()
			if err == nil {
				return nil
			}
			p.lose(err)
			continue
		}
		if p.changed == nil {
			p.changed = make(chan struct{})
		}
		changed := p.changed
		p.waiting++
		p.stats.Waits++
		began := time.Now()
		p.mu.Unlock()
		var err error
		select {
		case <-changed:
		case <-ctx.Done():
			err = ctx.Err()
		}
		p.mu.Lock()
		p.waiting--
		p.stats.Waited += time.Since(began)
		if err != nil {
			return p.waited(ctx, op)
		}
	}
}

// sleep waits at the current attachment, without mu. It wants mu, and no other call there.
func (p *Filler) sleep(ctx context.Context, op string, ready func() bool) error {
	p.using = true
	p.stats.Waits++
	cur, began := p.cur, time.Now()
	p.mu.Unlock()
	err := cur.Wait(ctx, ready)
	p.mu.Lock()
	p.using = false
	p.stats.Waited += time.Since(began)
	if p.state != fillerLive || p.life.Err() != nil { // the keeper waits for us to be out of it
		p.notify()
	}
	if err != nil && ctx.Err() != nil {
		return p.waited(ctx, op)
	}
	if err != nil && p.life.Err() == nil {
		p.lose(err)
	}
	return nil
}

// lose leaves the current attachment, which has ended with err, to the keeper. It wants mu.
func (p *Filler) lose(err error) {
	if p.state == fillerLive {
		p.state = fillerBusy
		p.outage.last = err
		p.poke()
	}
}

// notify wakes who waits for a change. It wants mu.
func (p *Filler) notify() {
	if p.changed != nil {
		close(p.changed)
		p.changed = nil
	}
}

// waited says what the call was waiting for when its context ended. It wants mu.
func (p *Filler) waited(ctx context.Context, op string) error {
	what := fmt.Sprintf("client: %s: %d samples filled, %d in the ring", op, p.done-p.first, p.acked-p.first)
	switch {
	case p.cur == nil:
		return &ReconnectingError{p.outage.began, p.outage.tries, p.outage.last, what, ctx}
	case p.cur.Note() != nil && timeout(ctx):
		return newFullError(ctx, p.cur.Note(), what)
	}
	return &waitError{ctx, what + "; the daemon has lent no further place: its ring may be full because nobody reads the table"}
}

// Push fills one slot with a sample, given as its leaves in spec order, and commits it. Its errors are those of Reserve; after one the sample was not taken.
func (p *Filler) Push(ctx context.Context, leaves ...[]byte) error {
	if err := checkLeaves(p.spec, p.leafBytes, leaves); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	s, err := p.reserve(ctx, "push", 1)
	if err != nil {
		return err
	}
	for i, leaf := range leaves {
		copy(s.column(i), leaf)
	}
	return s.commit("push")
}

// Flush returns when every sample committed so far is in the ring where trainers find it, or in the batch being filled. Its errors are those of Reserve.
func (p *Filler) Flush(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.flush(ctx, "flush")
}

func (p *Filler) flush(ctx context.Context, op string) error {
	for upTo := p.done; ; {
		if err := p.usable(ctx, op); err != nil {
			return err
		}
		_, all, err := p.cur.Taken()
		room := false
		if err == nil {
			room, err = p.cur.HasRoom()
		}
		switch partial := p.place.Lease != 0 && p.row > 0 && p.asked != p.sent; {
		case err != nil:
			p.lose(err)
			continue
		case partial && room:
			p.asked = p.sent
			err = p.cur.Settle(p.place)
		case all && !partial:
			err = p.learn()
			if err == nil && p.acked >= upTo {
				return nil
			}
		default:
			if err := p.sleep(ctx, op, p.drained); err != nil {
				return err
			}
		}
		if err != nil {
			p.lose(err)
		}
	}
}

// Close flushes, and frees the attachment whatever happens. An error says that samples may not be in the ring. Slots that are open can be written to until
// they are abandoned, and not committed any more. Closing again does nothing.
func (p *Filler) Close(ctx context.Context) error {
	p.mu.Lock()
	var err error
	if p.state == fillerLive && !p.using {
		_ = p.learn() // a daemon that has ended may have taken everything before
	}
	if p.life.Err() == nil && p.done > p.acked {
		err = p.flush(ctx, "close")
	}
	p.mu.Unlock()
	p.Abort()
	return err
}

// Abort ends the Filler at once: a call that waits returns an error that wraps os.ErrClosed. What was committed by Commit or Push is still taken by the
// daemon if it is attached. It may be called from any goroutine and more than once.
func (p *Filler) Abort() {
	p.end()
	p.poke()
	<-p.kept
}
