//go:build linux

package main

import (
	"context"
	"time"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/internal/killtest"
)

// fill is produce for a producer that fills samples in place.
func (o *options) fill(ctx context.Context) error {
	book, err := killtest.OpenLedger(o.ledger)
	if err != nil {
		return err
	}
	defer book.Close()
	p := &producer{options: o, book: book}
	if _, p.acked, err = book.Read(); err != nil {
		return err
	}
	for {
		done, err := p.filling(ctx)
		if done || err != nil {
			return err
		}
		wait(ctx, again)
	}
}

// filling attaches and fills until the daemon is gone, or all is said. It tells which.
func (p *producer) filling(ctx context.Context) (done bool, err error) {
	f, err := client.AttachFiller(context.WithoutCancel(ctx), p.addr, client.FillerConfig{Table: p.table, Spec: p.spec, Session: p.name, Client: "peer"})
	if err != nil {
		return ctx.Err() != nil, comeback(err)
	}
	defer f.Abort()
	if p.name == "" && p.next > 0 {
		return true, nil // nobody would know which of its samples are there
	}
	if p.next = f.Held(); p.next < p.acked {
		return true, broken("%d samples of session %q were acked, and the daemon holds %d", p.acked, p.name, p.next)
	}
	base := p.next
	if err := p.note(base); err != nil {
		return true, err
	}
	stop := p.watch(f.Committed, base)
	for err == nil && ctx.Err() == nil {
		err = p.some(ctx, f)
		p.rest(ctx)
	}
	if ctx.Err() != nil { // asked to end
		limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = f.Close(limited)
		done = err == nil
	}
	if wrote := stop(); wrote != nil {
		return true, wrote
	}
	return done, comeback(err)
}

// some fills a few slots. Now and then it abandons them, half-filled, and begins anew.
func (p *producer) some(ctx context.Context, f *client.Filler) error {
	s, err := f.Reserve(ctx, 1+p.rnd.IntN(p.most))
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	for leaf := range p.spec.NumLeaves() {
		size, column := int(p.spec.Leaf(leaf).Bytes()), s.Column(leaf)
		for i := range s.N() {
			killtest.FillLeaf(column[i*size:(i+1)*size], p.spec, leaf, p.session, p.next+uint64(i))
		}
		if p.rnd.IntN(32) == 0 {
			s.Abandon()
			return nil
		}
	}
	if err := p.book.SetSent(p.next + uint64(s.N())); err != nil {
		return err
	}
	n := s.N()
	if err := s.Commit(); err != nil {
		return err
	}
	p.next += uint64(n)
	return nil
}
