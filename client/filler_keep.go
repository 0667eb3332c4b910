//go:build linux

package client

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"time"

	"github.com/ingestd/ingestd/internal/failpoint"
	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/wire"
)

// keep is the Filler's goroutine: it makes another attachment when one ends, and copies over what the daemon does not hold.
func (p *Filler) keep() {
	defer close(p.kept)
	for p.life.Err() == nil {
		select {
		case <-p.kick:
		case <-p.life.Done():
		}
		p.mu.Lock()
		p.tend()
		p.mu.Unlock()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.leave()
	if p.state != fillerEnded {
		p.state, p.err = fillerEnded, os.ErrClosed
	}
	p.forget()
	p.notify()
}

// tend does what there is to do. It wants mu, which it lets go while it waits.
func (p *Filler) tend() {
	for p.state != fillerEnded && p.life.Err() == nil {
		switch {
		case p.cur == nil:
			p.reattach()
		case p.cur.Err() != nil || p.state == fillerBusy && p.outage.last != nil:
			p.part()
		case p.sent < p.done || p.owesWord():
			p.state = fillerBusy
			if err := p.copyOver(); err != nil && p.life.Err() == nil {
				p.outage.last = err
			}
		default:
			if p.state == fillerBusy {
				p.state = fillerLive
				p.notify()
			}
			return
		}
	}
}

// part ends the current attachment, after it has ended or broke the rules, and notes how far the daemon had come. It wants mu.
func (p *Filler) part() {
	p.state = fillerBusy
	err := p.cur.Err()
	if err == nil {
		err = p.outage.last
	}
	p.awaitOut()
	p.leave()
	if p.life.Err() != nil {
		return
	}
	err = explainEnd(err)
	if p.cfg.Session == "" || p.cfg.ReconnectFor < 0 || !passing(err) || codeOf(err) == wire.CodeBadPeer || errors.As(err, new(*shm.FormatError)) {
		p.finish(fmt.Errorf("%w: %d samples filled, %d in the ring", err, p.done-p.first, p.acked-p.first))
		return
	}
	o := &p.outage
	if o.over || p.acked == p.done {
		o.spent = 0
	}
	o.began, o.tries, o.last, o.over = time.Now(), 0, err, false
}

// awaitOut waits until no call of the user's is in the current attachment. It wants mu.
func (p *Filler) awaitOut() {
	for p.using {
		if p.changed == nil {
			p.changed = make(chan struct{})
		}
		changed := p.changed
		_ = p.cur.Close() // which ends its wait
		p.mu.Unlock()
		<-changed
		p.mu.Lock()
	}
}

// leave closes the current attachment; its memory stays as long as it is needed. It wants mu.
func (p *Filler) leave() {
	if p.cur == nil {
		return
	}
	p.awaitOut()
	_ = p.cur.Close()
	_ = p.learn()
	p.learnRefused()
	cur := p.cur
	p.cur, p.place.Lease, p.record = nil, 0, nil
	p.prune()
	p.release(cur)
}

// explainEnd gives the end of an attachment the error it stands for.
func explainEnd(err error) error {
	var gone *shm.PeerGoneError
	switch {
	case errors.Is(err, io.EOF): // the table has ended, which it does when the daemon stops
		return &said{ErrShuttingDown, errors.New("the daemon has closed the table")}
	case errors.As(err, &gone):
		return fmt.Errorf("%w (%w)", ErrDaemonGone, err)
	}
	return named(err)
}

// finish ends the Filler. It wants mu.
func (p *Filler) finish(err error) {
	p.state, p.err = fillerEnded, err
	p.leave()
	p.forget()
	p.notify()
}

// forget frees the memory of all but open slots. It wants mu.
func (p *Filler) forget() {
	for _, r := range p.records {
		p.release(r.in)
	}
	p.records, p.record = nil, nil
}

// reattach pauses and tries once to make another attachment. It wants mu, which it lets go meanwhile.
func (p *Filler) reattach() {
	o := &p.outage
	down := o.spent + time.Since(o.began)
	if down >= p.cfg.ReconnectFor && (p.acked < p.done || p.waiting > 0) {
		p.finish(p.gaveUp(down))
		return
	}
	pause := rand.N(o.upTo(down, p.cfg.ReconnectFrom, p.cfg.ReconnectTo))
	p.mu.Unlock()
	timer := time.NewTimer(pause)
	select {
	case <-timer.C:
	case <-p.life.Done():
		timer.Stop()
	}
	a, err := p.attach(p.life, p.cfg.HandshakeTimeout)
	p.mu.Lock()
	o.tries++
	switch {
	case err == nil:
		p.resume(a)
	case p.life.Err() != nil:
	case !passing(err) || errors.As(err, new(*shm.FormatError)):
		p.finish(named(err))
	default:
		o.last = err
	}
}

// gaveUp is the error of a Filler whose patience is out. It wants mu.
func (p *Filler) gaveUp(down time.Duration) error {
	o := &p.outage
	what := fmt.Sprintf("no daemon for %v in %d tries since %s, %d samples not in the ring", down.Round(time.Millisecond), o.tries,
		o.began.UTC().Format(time.RFC3339Nano), p.done-p.acked)
	if answered(o.last) {
		return fmt.Errorf("%s: %w", what, o.last)
	}
	return fmt.Errorf("%w: %s: %v", ErrDaemonGone, what, o.last) // not %w: a dial that timed out is no timeout of a call
}

// resume goes on at a new attachment with what the daemon does not hold. It wants mu.
func (p *Filler) resume(a *shm.FillAttachment) {
	held64 := int64(a.Accepted().Held - p.shift) // of ours; less than 0 if it lost samples from before us
	p.cur = hold(a)
	switch {
	case held64 > int64(p.done):
		p.finish(fmt.Errorf("%w: the daemon holds %d samples of session %q, %d more than this producer has filled: another one has used it meanwhile",
			ErrSessionTaken, a.Accepted().Held, p.cfg.Session, held64-int64(p.done)))
		return
	case held64 < int64(p.acked):
		lost := &LostError{From: uint64(max(held64, 0)), To: p.acked}
		p.stats.Lost += uint64(int64(p.acked) - held64)
		if !p.cfg.ContinueAfterLoss {
			p.finish(lost)
			return
		}
		p.shift = a.Accepted().Held - p.acked
		held64 = int64(p.acked)
	}
	if uint64(held64) > p.acked {
		p.acked = uint64(held64)
		p.outage.over = true
	}
	if stream := a.Accepted().Stream; stream != p.stream {
		if p.manifest != nil && p.acked < p.done { // the chunks say that they are of the other stream
			p.finish(&LostError{From: p.acked, To: p.done})
			return
		}
		p.stream = stream
	}
	p.base, p.sent, p.asked = p.acked, p.acked, p.acked
	p.resumed, p.reused = false, p.reused[:0]
	p.outage.spent += time.Since(p.outage.began)
	p.outage.last = nil
	p.stats.Reconnects++
	p.prune()
}

// copyOver hands the current attachment what is complete and lies in the memory of earlier ones, and tells the daemon when that is over. It wants mu, which
// it lets go while it waits for a place.
func (p *Filler) copyOver() error {
	for p.sent < p.done {
		if err := p.placeForCopy(); err != nil {
			return err
		}
		if p.life.Err() != nil {
			return os.ErrClosed
		}
		r := p.find(p.sent)
		if r == nil || !p.intact(r) {
			return p.gone()
		}
		if p.record == nil {
			p.newRecord(p.sent)
		}
		from := int(p.sent - r.first)
		n := min(r.rows-from, p.cur.size-p.row)
		for leaf, bytes := range p.leafBytes {
			copy(p.cur.Column(p.place.Place, leaf)[int64(p.row)*bytes:], r.in.Column(r.place, leaf)[int64(from)*bytes:int64(from+n)*bytes])
			failpoint.Hit("client/filler/copying")
		}
		if !p.intact(r) {
			return p.gone()
		}
		p.record.rows += n
		p.stats.Copied += uint64(n)
		if err := p.handOver(n); err != nil {
			return err
		}
	}
	if !p.owesWord() {
		return nil
	}
	if err := p.roomForCopy(); err != nil {
		return err
	}
	p.resumed = true
	return p.cur.Resumed()
}

// owesWord tells whether the daemon is to be told that we need nothing of earlier attachments. Slots of one that are open may be committed yet.
func (p *Filler) owesWord() bool { return !p.resumed && !(p.slots.open && p.slots.in != p.cur) }

// placeForCopy waits for a place and for room to hand it over. It wants mu, which it lets go meanwhile.
func (p *Filler) placeForCopy() error {
	for p.life.Err() == nil {
		if err := p.roomForCopy(); err != nil || p.place.Lease != 0 {
			return err
		}
		if ok, err := p.nextPlace(); err != nil {
			return err
		} else if ok {
			p.reused = append(p.reused, p.place.Index)
			return nil
		}
		if err := p.keeperWait(p.ready); err != nil {
			return err
		}
	}
	return nil
}

func (p *Filler) roomForCopy() error {
	for p.life.Err() == nil {
		if room, err := p.cur.HasRoom(); room || err != nil {
			return err
		}
		if err := p.keeperWait(p.ready); err != nil {
			return err
		}
	}
	return nil
}

func (p *Filler) keeperWait(ready func() bool) error {
	cur := p.cur
	p.mu.Unlock()
	err := cur.Wait(p.life, ready)
	p.mu.Lock()
	if err == nil {
		err = cur.Err()
	}
	return err
}

// find returns where a sample lies.
func (p *Filler) find(number uint64) *record {
	for _, r := range slices.Backward(p.records) {
		if r.in != p.cur && r.first <= number && number < r.first+uint64(r.rows) {
			return r
		}
	}
	return nil
}

// intact tells whether a place of an earlier attachment still holds what we wrote there. The memory of a daemon that is gone does; that of one that
// goes on with the same segment does until somebody else has the place.
func (p *Filler) intact(r *record) bool {
	if !r.in.SameMemory(p.cur.FillAttachment) {
		return true
	}
	return !slices.Contains(p.reused, r.place.Index) && p.cur.Ours(r.place)
}

// gone ends the Filler because the rows to be copied are no more. It wants mu.
func (p *Filler) gone() error {
	lost := &LostError{From: p.sent, To: p.done}
	p.stats.Lost += lost.To - lost.From
	p.finish(lost)
	return lost
}
