//go:build linux

package client

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/ingestd/ingestd/tensor"
)

// The columns of a table of tensors.
const (
	headerColumn = iota
	dataColumn
)

// stepFill writes chunks into places of the ring.
type stepFill struct {
	addr string
	cfg  StepsConfig
	open []stepChunk // all of the transaction that is open: written again where the daemon lost what it had

	mu     sync.Mutex
	filler *Filler   // changed by the goroutine that uses the producer
	before StepStats // of fillers before this one
	closed bool
}

// stepChunk is a chunk whose data lies with the caller.
type stepChunk struct {
	header tensor.Header
	data   [][]byte
}

func fillSteps(ctx context.Context, addr string, cfg StepsConfig) (stepWay, int, error) {
	w := &stepFill{addr: addr, cfg: cfg}
	f, err := w.attach(ctx)
	if err != nil {
		return nil, 0, err
	}
	chunkBytes := f.leafBytes[len(f.leafBytes)-1]
	want, err := chunkSpec(chunkBytes)
	if err == nil && want.Fingerprint() != f.Spec().Fingerprint() {
		err = fmt.Errorf("the samples of table %q are %s, which are no chunks: its kind must be tensors", cfg.Table, brief(f.Spec()))
	}
	if err != nil {
		f.Abort()
		return nil, 0, fmt.Errorf("client: attach to %s: %w", addr, err)
	}
	w.filler = f
	return w, int(chunkBytes), nil
}

func (w *stepFill) attach(ctx context.Context) (*Filler, error) {
	c := &w.cfg
	return joinFiller(ctx, w.addr, FillerConfig{
		Table: c.Table, Session: c.Name, Prefetch: c.Prefetch, HandshakeTimeout: c.HandshakeTimeout, Client: c.Client, Token: c.Token,
		ReconnectFor: c.ReconnectFor, ReconnectFrom: c.ReconnectFrom, ReconnectTo: c.ReconnectTo,
	}, c.Manifest.JSON())
}

func (w *stepFill) begin() { w.open = nil }

func (w *stepFill) send(ctx context.Context, op string, h tensor.Header, data [][]byte) error {
	c := stepChunk{h, slices.Clone(data)}
	w.open = append(w.open, c)
	err := w.write(ctx, op, &c)
	if err != nil && w.lost(err) {
		return w.replay(ctx, op)
	}
	return err
}

// lost tells whether the filler ended because the daemon lost what was in its ring, or because it was started anew in the midst of it, so that
// the chunks not taken yet are of another stream. Both are mended by writing the transaction again.
func (w *stepFill) lost(err error) bool {
	return w.cfg.ReconnectFor > 0 && errors.As(err, new(*LostError))
}

// replay attaches anew and writes the transaction from its beginning.
func (w *stepFill) replay(ctx context.Context, op string) error {
	for {
		f, err := w.attach(ctx)
		if err != nil {
			return err
		}
		w.mu.Lock()
		s := w.filler.Stats()
		w.before.Reconnects += s.Reconnects + 1
		w.before.Chunks += s.Filled
		w.before.Acked += s.Committed
		w.before.Resent += s.Copied
		w.before.Lost += s.Lost
		w.before.Replays++
		old := w.filler
		w.filler = f
		closed := w.closed
		w.mu.Unlock()
		old.Abort()
		if closed {
			f.Abort()
		}
		err = nil
		for i := range w.open {
			if err = w.write(ctx, op, &w.open[i]); err != nil {
				break
			}
		}
		if err == nil || !w.lost(err) {
			return err
		}
	}
}

// write copies one chunk into a place and sums it on the way.
func (w *stepFill) write(ctx context.Context, op string, c *stepChunk) error {
	f := w.filler
	f.mu.Lock()
	slot, err := f.reserve(ctx, op, 1)
	refused := f.refusedStep(c.header.Step)
	f.mu.Unlock()
	switch {
	case err != nil:
		return err
	case refused != nil && c.header.Flags&tensor.FlagAbort == 0:
		slot.Abandon()
		return refused
	}
	h, to := c.header, slot.Column(dataColumn)
	h.Stream = slot.in.Accepted().Stream
	if w.cfg.NoCRC {
		h.Flags |= tensor.FlagNoCRC
	}
	copying, at := tensor.CopyCRC, 0
	if w.cfg.Manifest.DataBytes() >= pastBytes {
		copying = tensor.CopyPastCRC
	}
	for _, data := range c.data {
		if w.cfg.NoCRC {
			copy(to[at:], data)
		} else {
			h.DataCRC = copying(h.DataCRC, to[at:], data)
		}
		at += len(data)
	}
	clear(to[at:])
	h.Put(slot.Column(headerColumn))
	return slot.Commit()
}

func (w *stepFill) commit(ctx context.Context, step uint64) error {
	for {
		err := w.filler.Flush(ctx)
		if err == nil {
			err = w.filler.heard(ctx)
		}
		switch {
		case err == nil:
			if err := w.refused(step); err != nil {
				return err
			}
			w.open = nil
			return nil
		case !w.lost(err):
			return err
		}
		if err := w.replay(ctx, "commit"); err != nil {
			return err
		}
	}
}

func (w *stepFill) refused(step uint64) error {
	w.filler.mu.Lock()
	defer w.filler.mu.Unlock()
	return w.filler.refusedStep(step)
}

// takeBack has nothing to free: what was sent was copied.
func (w *stepFill) takeBack() bool {
	seen := len(w.open) > 0
	w.open = nil
	return seen
}

func (w *stepFill) stats() StepStats {
	w.mu.Lock()
	defer w.mu.Unlock()
	f, s := w.filler.Stats(), w.before
	s.Chunks += f.Filled
	s.Acked += f.Committed
	s.Reconnects += f.Reconnects
	s.Resent += f.Copied
	s.Lost += f.Lost
	return s
}

func (w *stepFill) close(ctx context.Context) error { return w.filler.Close(ctx) }

func (w *stepFill) abort() {
	w.mu.Lock()
	w.closed = true
	f := w.filler
	w.mu.Unlock()
	f.Abort()
}

// learnRefused remembers what the current attachment was told of refused steps. It wants mu.
func (p *Filler) learnRefused() {
	if p.cur == nil {
		return
	}
	if note := p.cur.Refused(); note != nil {
		p.refused = note
	}
}

// refusedStep returns the refusal of a step, if that was the last one refused. It wants mu.
func (p *Filler) refusedStep(step uint64) error {
	p.learnRefused()
	if p.refused == nil || p.refused.Step != step {
		return nil
	}
	return &StepRefusedError{step, p.refused.Reason}
}

// heard returns when the daemon's words about the samples that are in the ring have come.
func (p *Filler) heard(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state != fillerLive || p.using {
		return nil // what it said came, or will never come
	}
	p.using = true
	cur := p.cur
	p.mu.Unlock()
	err := cur.Heard(ctx)
	p.mu.Lock()
	p.using = false
	if p.state != fillerLive || p.life.Err() != nil {
		p.notify()
	}
	if err != nil {
		return p.waited(ctx, "commit")
	}
	return nil
}
