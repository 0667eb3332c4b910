package client

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"time"

	"github.com/ingestd/ingestd/wire"
)

// outage is the time without a connection. Its fields want Producer.mu.
type outage struct {
	spent time.Duration // without a connection since the last ack, in earlier outages
	began time.Time
	tries int
	last  error // why the last try failed; before the first, why the connection ended
	over  bool  // an ack came since: the next outage is one of its own
}

// begin notes that a connection ended, and why; anew says whether patience begins anew, too. Otherwise what was spent before counts on: a daemon that accepts and ends every
// connection is given up as one that is gone is.
func (o *outage) begin(why error, anew bool) {
	if o.over || anew {
		o.spent, o.tries = 0, 0
	}
	o.began, o.last, o.over = time.Now(), why, false
}

// upTo says how long the pause before the next try may be: a sixteenth of the outage so far, so that it adds little to it, but
// neither less than from nor more than to. The pause is a random part of that, so that producers who lost their daemon together do
// not come back together.
func (o *outage) upTo(down, from, to time.Duration) time.Duration {
	return min(max(down/16, from), to)
}

// rest waits before the next try. The error says why there is none: patience is out, or life has ended.
func (o outage) rest(life context.Context, patience, from, to time.Duration) error {
	down := o.spent + time.Since(o.began)
	if down >= patience {
		if answered(o.last) {
			return o.last
		}
		return fmt.Errorf("%w: no connection for %v in %d tries, now since %s: %v",
			ErrDaemonGone, down.Round(time.Millisecond), o.tries, o.began.UTC().Format(time.RFC3339Nano), o.last)
	}
	timer := time.NewTimer(min(patience-down, rand.N(o.upTo(down, from, to))))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-life.Done():
		return os.ErrClosed
	}
}

// attend reads acks and, where samples are kept, makes another connection when one ends, until the stream ends for good.
func (p *Producer) attend() {
	defer close(p.ended)
	buf := make([]byte, 16<<10)
	conn := p.conn // nobody else changes it
	for {
		if !p.broken(p.readAcks(conn, buf)) {
			return
		}
		if conn = p.reconnect(); conn == nil {
			return
		}
	}
}

// broken says whether to make another connection now that one has ended.
func (p *Producer) broken(err error) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conn.Close() // a write that blocks must return
	err = p.reasonOf(err)
	if p.kept == nil || p.closed || p.target.cfg.ReconnectFor < 0 || !passing(err) {
		p.finish(err)
		return false
	}
	p.down, p.note = true, nil
	o := &p.outage
	if o.over || p.acked == p.sent {
		o.spent = 0
	}
	o.began, o.tries, o.last, o.over = time.Now(), 0, err, false
	p.rouse() // who waits for acks may look what its context says
	return true
}

// passing says whether another connection may fare better: not if the daemon said that this producer is not wanted, or if it is no daemon, or none that is believed.
func passing(err error) bool {
	if errors.Is(err, wire.ErrProtocol) || errors.Is(err, ErrNotChallenged) || errors.Is(err, ErrDaemonUnproven) || unbelieved(err) || refusedTLS(err) != nil {
		return false
	}
	var refusal *wire.Refusal
	if errors.As(err, &refusal) {
		switch refusal.Code {
		case wire.CodeShuttingDown, wire.CodeTooManyConnections, wire.CodeHandshakeTimeout, wire.CodeBanned, wire.CodeInternal:
			return true
		}
		return false
	}
	return codeOf(err) != wire.CodeSessionTaken
}

// reconnect makes another connection and returns it; nil: the stream has ended for good.
func (p *Producer) reconnect() net.Conn {
	for {
		left, ok := p.pause()
		if !ok {
			return nil
		}
		conn, accepted, err := p.target.connect(p.life, min(left, p.target.cfg.HandshakeTimeout))
		p.mu.Lock()
		p.outage.tries++
		switch {
		case err == nil:
			if err = p.resume(conn, accepted); err == nil {
				p.mu.Unlock()
				return conn
			}
			conn.Close()
			p.finish(err)
		case p.closed || !passing(err):
			p.finish(err)
		default:
			p.outage.last = err
		}
		ended := p.err != nil
		p.mu.Unlock()
		if ended {
			return nil
		}
	}
}

// pause waits before the next try and returns how much patience is left. If none is, it gives up, or waits until it is needed
// if nothing is unacked. ok is false if the stream has ended.
func (p *Producer) pause() (left time.Duration, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	o, cfg := &p.outage, &p.target.cfg
	down := o.spent + time.Since(o.began)
	for down >= cfg.ReconnectFor && !p.closed {
		if p.acked < p.sent {
			p.finish(p.gaveUp(down))
			return 0, false
		}
		p.mu.Unlock()
		select {
		case <-p.use:
		case <-p.life.Done():
		}
		p.mu.Lock()
		if p.acked < p.sent {
			o.spent, o.began, o.tries, down = 0, time.Now(), 0, 0
		}
	}
	left = cfg.ReconnectFor - down
	wait := min(left, rand.N(o.upTo(down, cfg.ReconnectFrom, cfg.ReconnectTo)))
	p.mu.Unlock()
	timer := time.NewTimer(wait)
	select {
	case <-timer.C:
	case <-p.life.Done():
		timer.Stop()
	}
	p.mu.Lock()
	if p.closed {
		p.finish(os.ErrClosed)
		return 0, false
	}
	return max(left-wait, cfg.ReconnectFrom), true
}

// gaveUp is the error of a Producer whose patience is out. It wants mu.
func (p *Producer) gaveUp(down time.Duration) error {
	o := &p.outage
	what := fmt.Sprintf("no connection for %v in %d tries since %s, %d samples not acked", down.Round(time.Millisecond), o.tries,
		o.began.UTC().Format(time.RFC3339Nano), p.sent-p.acked)
	if answered(o.last) {
		return fmt.Errorf("%s: %w", what, o.last)
	}
	return fmt.Errorf("%w: %s: %v", ErrDaemonGone, what, o.last) // not %w: a dial that timed out is no timeout of a call
}

// resume goes on over a new connection with what the daemon does not hold. It wants mu.
func (p *Producer) resume(conn net.Conn, accepted wire.AcceptedPush) error {
	for p.writing { // over the old connection, which is closed
		p.quiet.Wait()
	}
	if p.closed {
		return os.ErrClosed
	}
	held := int64(accepted.Held - p.shift) // of ours; less than 0 if it lost samples from before us
	switch {
	case held > int64(p.begun):
		return fmt.Errorf("%w: the daemon holds %d samples of session %q, %d more than this producer has sent: another one has used it meanwhile",
			ErrSessionTaken, accepted.Held, p.target.cfg.Session, held-int64(p.begun))
	case held < int64(p.acked):
		if err := p.lose(held); err != nil {
			return err
		}
		p.shift = accepted.Held - p.acked
		held = int64(p.acked)
		if p.kept.lent != nil {
			p.replay()
		}
	}
	if uint64(held) > p.acked {
		p.acked = uint64(held)
		p.outage.over = true
		if p.kept.lent != nil {
			p.kept.lent.forget(p.acked)
		}
	}
	p.wired, p.kept.pos = p.acked, p.acked*p.kept.sample
	if p.window = windowOf(accepted, p.sampleBytes); p.kept.lent == nil {
		p.window = min(p.window, uint64(len(p.kept.mem))/p.kept.sample)
	}
	p.accepted, p.conn, p.down, p.writeErr = accepted, conn, false, nil
	p.outage.spent += time.Since(p.outage.began)
	p.stats.Reconnects++
	if p.sent > p.acked {
		p.kickWriter()
	}
	p.rouse()
	return nil
}

// lose notes that the daemon holds only the first held of our samples, fewer than it acked, and says whether to end. It wants mu.
func (p *Producer) lose(held int64) error {
	lost := LostError{To: p.first + p.acked}
	p.stats.Lost += uint64(int64(p.acked) - held)
	// held counts without the samples that were lost before.
	for n := len(p.gaps); n > 0 && held < int64(p.gaps[n-1].To-p.first); n-- {
		held -= int64(p.gaps[n-1].To - p.gaps[n-1].From)
		p.gaps = p.gaps[:n-1]
	}
	lost.From = p.first + uint64(held)
	p.gaps = append(p.gaps, lost)
	if p.target.cfg.ContinueAfterLoss {
		return nil
	}
	return &lost
}
