package client

import (
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/ingestd/ingestd/weights"
	"github.com/ingestd/ingestd/wire"
)

// What a reader answers when a generation has come.
const (
	answerShown = 1
	answerBad   = 2
)

// receiveBytes is read at once: it is summed while it is in the cache.
const receiveBytes = 256 << 10

// receiveAll receives generations until the connection ends, and returns why.
func (r *remoteWeights) receiveAll(conn net.Conn) error {
	stalls := &stallReader{conn: conn, timeout: r.cfg.StallTimeout}
	for {
		if err := r.receiveNext(conn, stalls); err != nil {
			return err
		}
	}
}

// receiveNext receives one generation, shows it if it is whole, and answers.
func (r *remoteWeights) receiveNext(conn net.Conn, in *stallReader) error {
	in.patient()
	length, chunk, err := wire.ReadMessageLength(in)
	switch {
	case err != nil:
		return err
	case chunk:
		return fmt.Errorf("%w: a chunk came where a generation was due", wire.ErrProtocol)
	case length == 0:
		return readClosing(in)
	}
	in.strict()
	var a weights.Announcement
	if err := wire.ReadMessageBody(in, length, weights.AnnouncementBytesMax, &a); err != nil {
		return err
	}
	if err := a.Check(r.tensors); err != nil {
		return err
	}
	g, err := r.prepare(&a)
	if err != nil {
		return err
	}
	if err := r.receive(in, g); err != nil {
		r.keepPartial(g)
		return err
	}
	answer, bad := [1]byte{answerShown}, g.verify()
	r.answering.Lock() // whoever was shown it may leave at once
	defer r.answering.Unlock()
	if bad >= 0 {
		answer[0] = answerBad
		r.discard(g, &BadSumError{r.cfg.Table, a.Generation, r.tensors.Tensor(bad).Name, g.check.badSum, g.sums[bad]})
	} else {
		r.show(g)
	}
	_ = conn.SetWriteDeadline(time.Now().Add(r.cfg.StallTimeout))
	_, err = conn.Write(answer[:])
	return err
}

// readClosing reads the notice that follows a length of 0.
func readClosing(in io.Reader) error {
	var mark [1]byte
	if _, err := io.ReadFull(in, mark[:]); err != nil {
		return err
	}
	if mark[0] != wire.NoticeMark {
		return fmt.Errorf("%w: a closing notice starts with %#x", wire.ErrProtocol, mark[0])
	}
	n, err := wire.ReadNotice(in)
	if err != nil {
		return err
	}
	return n
}

// prepare finds memory for a generation: that which has a part of it, or some that nobody uses.
func (r *remoteWeights) prepare(a *weights.Announcement) (*incoming, error) {
	p := r.partial
	if p != nil && a.From > 0 && a.From == p.at && a.Generation == p.announced.Generation && a.Digest == p.announced.Digest {
		r.partial = nil
		r.mu.Lock()
		defer r.mu.Unlock()
		r.stats.Resumed++
		r.receiving(p)
		return p, nil
	}
	if a.From != 0 {
		return nil, fmt.Errorf("%w: generation %d is announced from byte %d on, which is not what was asked for", wire.ErrProtocol, a.Generation, a.From)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if p != nil { // the daemon has something newer
		r.partial = nil
		r.recycle(p.received)
	}
	g := &incoming{announced: *a, check: sumCheck{manifest: r.tensors, bad: -1}}
	if a.Base != 0 {
		if r.newest == nil || r.newest.generation != a.Base {
			return nil, fmt.Errorf("%w: generation %d is announced as what differs from generation %d, which is not here", wire.ErrProtocol, a.Generation, a.Base)
		}
		g.base = r.newest // only this goroutine replaces it
	}
	if g.received = r.take(); g.received == nil {
		return nil, errNoRoom
	}
	g.check.sums = g.sums
	r.receiving(g)
	return g, nil
}

// take returns memory for a generation, or nil if there may be no more. It wants mu.
func (r *remoteWeights) take() *received {
	g := r.spare
	switch {
	case g != nil:
		r.spare = nil
	case r.buffers < r.cfg.Generations:
		r.buffers++
		g = newReceived(r.tensors)
	default:
		select { // what was let go before does not count any more
		case <-r.room:
		default:
		}
	}
	return g
}

// receiving notes for Stats what is being received. It wants mu.
func (r *remoteWeights) receiving(g *incoming) {
	r.stats.Receiving, r.stats.ReceivingBytes, r.stats.ReceivingTotal = g.announced.Generation, g.at, g.announced.Bytes
}

// receive reads sums and bytes, and copies from the base what is not sent.
func (r *remoteWeights) receive(in *stallReader, g *incoming) error {
	text := make([]byte, 4*r.tensors.Len())
	if _, err := io.ReadFull(in, text); err != nil {
		return err
	}
	if !g.setSums(text, r.tensors) {
		return fmt.Errorf("%w: the digest of generation %d is not that of its sums", wire.ErrProtocol, g.announced.Generation)
	}
	came, copied := int64(0), int64(0)
	if g.base != nil {
		copied = g.copyBase()
	}
	for {
		b, flat := g.next(receiveBytes)
		if len(b) == 0 {
			break
		}
		n, err := in.Read(b)
		g.came(b[:n], flat)
		r.mu.Lock()
		r.stats.Bytes += uint64(n)
		r.stats.ReceivingBytes = g.at
		if came += int64(n); came >= receiveBytes {
			r.outage.over = true // a connection that brings so much is worth another
		}
		r.mu.Unlock()
		if err != nil {
			return err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stats.CopiedBytes += uint64(copied)
	return nil
}

// keepPartial keeps what came of a whole generation for the next connection. What differs from another is sent again: it is little.
func (r *remoteWeights) keepPartial(g *incoming) {
	if g.base == nil && g.at > 0 {
		r.partial = g
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.recycle(g.received)
}

// discard throws away what came damaged.
func (r *remoteWeights) discard(g *incoming, why error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stats.BadSums++
	r.stats.Receiving = 0
	r.damage = why
	r.recycle(g.received)
}

// show makes a generation the newest.
func (r *remoteWeights) show(g *incoming) {
	r.mu.Lock()
	defer r.mu.Unlock()
	a, old := &g.announced, r.newest
	g.generation, g.digest, g.published = a.Generation, a.Digest, time.Unix(0, a.Published)
	r.outage.over = true
	r.stats.Generations++
	r.stats.Receiving = 0
	if g.base != nil {
		r.stats.Deltas++
	}
	switch {
	case old == nil:
	case a.Generation <= old.generation: // numbers begin anew with every life of the daemon
		r.before = max(r.before, old.generation)
	default:
		r.stats.Skipped += a.Generation - old.generation - 1
	}
	r.newest, r.damage = g.received, nil
	if old != nil && old.holds == 0 {
		r.recycle(old)
	}
	r.change()
}

// stallReader reads from a connection, and fails when no byte came for timeout; between generations it waits for as long as it takes.
type stallReader struct {
	conn    net.Conn
	timeout time.Duration
	until   time.Time // the deadline in force; zero: none
	wait    bool
}

func (s *stallReader) patient() {
	s.wait, s.until = true, time.Time{}
	_ = s.conn.SetReadDeadline(time.Time{})
}

func (s *stallReader) strict() { s.wait = false }

func (s *stallReader) Read(b []byte) (int, error) {
	if now := time.Now(); !s.wait && s.until.Sub(now) < s.timeout*7/8 { // a deadline costs a timer, so one that is near enough stays
		s.until = now.Add(s.timeout)
		_ = s.conn.SetReadDeadline(s.until)
	}
	n, err := s.conn.Read(b)
	if err != nil && deadlineExceeded(err) {
		err = errStalledTransfer
	}
	return n, err
}

// errStalledTransfer is a transfer of which no byte came in time. It is no timeout of a call.
var errStalledTransfer = errors.New("a transfer stalled")
