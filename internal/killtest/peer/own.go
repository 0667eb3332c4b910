//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/internal/killtest"
	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/ring"
)

// owner is a whole daemon in small, without sockets: it owns a segment in a file, and its goroutines are two producers that reserve slots, one that fills lent
// places, and a trainer. Whatever is killed in it is killed inside ring or drainer, at any store.
type owner struct {
	*options
	ring *ring.Ring
}

// Shape of the owner's ring.
const (
	ownBatch   = 7
	ownBatches = 6
)

func (o *options) own(ctx context.Context) error {
	w := &owner{options: o}
	found, err := w.open()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var all sync.WaitGroup
	for k, run := range []func(context.Context, *book) error{w.reserving, w.reserving, w.filling} {
		b, err := w.book(uint64(k + 1))
		if err != nil {
			return err
		}
		all.Go(func() {
			if err := run(ctx, b); err != nil && ctx.Err() == nil {
				cancel(err)
			}
		})
	}
	trained := make(chan error, 1)
	go func() { trained <- w.training(found) }()
	<-ctx.Done()
	all.Wait()
	w.ring.Flush()
	w.ring.Close()
	err = <-trained
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
		err = errors.Join(err, cause)
	}
	return err
}

// open takes the segment up, or makes it.
func (w *owner) open() (*ring.Recovery, error) {
	layout := ring.Layout{
		BatchSize: ownBatch, Batches: ownBatches, Columns: w.spec.LeafBytes(), Spec: w.spec.JSON(), Fingerprint: w.spec.Fingerprint(), Table: w.table, Sessions: 4,
	}
	size, err := layout.Bytes()
	if err != nil {
		return nil, err
	}
	path := w.addr
	_, err = os.Stat(path)
	fresh := errors.Is(err, os.ErrNotExist)
	if fresh {
		path += ".new" // so that a segment is there only when it is whole
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		return nil, err
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	if fresh {
		if w.ring, err = ring.Format(mem, layout); err != nil {
			return nil, err
		}
		return &ring.Recovery{}, os.Rename(path, w.addr)
	}
	r, found, err := ring.Recover(mem, layout)
	if err != nil {
		return nil, broken("a segment that was left behind is not taken up: %v", err)
	}
	w.ring = r
	return found, nil
}

// book is one producer of an owner.
type book struct {
	*killtest.Ledger
	session *ring.Session
	id      uint64
	next    uint64
	rnd     *rand.Rand
}

func (w *owner) book(id uint64) (*book, error) {
	l, err := killtest.OpenLedger(fmt.Sprintf("%s-%d", w.ledger, id))
	if err != nil {
		return nil, err
	}
	_, acked, err := l.Read()
	if err != nil {
		return nil, err
	}
	s, err := w.ring.OpenSession(fmt.Sprintf("session-%d", id), time.Now(), time.Hour)
	if err != nil {
		return nil, err
	}
	if held := s.Held(); held < acked {
		return nil, broken("session %d: %d samples acked, and %d held", id, acked, held)
	}
	return &book{l, s, id, s.Held(), rand.New(rand.NewPCG(w.seed, id))}, nil
}

// fill makes the next n samples in columns that begin with their first row.
func (w *owner) fill(b *book, n int, column func(leaf int) []byte) error {
	for leaf := range w.spec.NumLeaves() {
		size := int(w.spec.Leaf(leaf).Bytes())
		c := column(leaf)
		for i := range n {
			killtest.FillLeaf(c[i*size:(i+1)*size], w.spec, leaf, b.id, b.next+uint64(i))
		}
	}
	return b.SetSent(b.next + uint64(n))
}

// took says that the next n samples are in the ring, as an ack does.
func (b *book) took(n int) error {
	b.next += uint64(n)
	return b.SetAcked(b.next)
}

// reserving is a producer whose samples go into shared batches. Now and then it gives slots back unfilled.
func (w *owner) reserving(ctx context.Context, b *book) error {
	seat := park.NewWaiter()
	for {
		run, err := w.ring.Reserve(ctx, seat, 1+b.rnd.IntN(ownBatch))
		if err != nil {
			return err
		}
		use, rest := run.Split(b.rnd.IntN(int(run.N) + 1))
		n := int(use.N)
		if b.rnd.IntN(4) > 0 {
			use, rest, n = run, ring.Run{}, int(run.N)
		}
		if n > 0 {
			if err := w.fill(b, n, func(leaf int) []byte { return w.ring.RunColumn(use, leaf) }); err != nil {
				return err
			}
			w.ring.Commit(use, b.session.Stream(), b.next, uint64(time.Now().UnixNano()), b.session.Mark(b.next+uint64(n)))
			if err := b.took(n); err != nil {
				return err
			}
		}
		if rest.N > 0 {
			w.ring.Abandon(rest)
		}
		if b.rnd.IntN(16) == 0 {
			w.ring.Flush()
		}
	}
}

// filling is a producer that fills lent places, and the daemon's side of it. Some places it leaves unfinished for a while, so that their rows are settled.
func (w *owner) filling(ctx context.Context, b *book) (err error) {
	l := drainer.NewLender(w.ring, drainer.LenderID{Stream: b.session.Stream(), Session: b.session, FlushAtEnd: true})
	defer func() {
		err = errors.Join(err, l.End(context.Background(), b.rnd.IntN(2) == 0))
		l.Free()
	}()
	type lease struct {
		number uint64
		place  ring.Place
	}
	var lent []lease
	for rows := 0; ; {
		for len(lent) == 0 || len(lent) < 2 && b.rnd.IntN(2) == 0 {
			number, p, err := l.Lend(ctx)
			if err != nil {
				return err
			}
			lent = append(lent, lease{number, p})
		}
		n := 1 + b.rnd.IntN(ownBatch-rows)
		if err := w.fill(b, n, func(leaf int) []byte {
			return w.ring.PlaceColumn(lent[0].place, leaf)[rows*int(w.spec.Leaf(leaf).Bytes()):]
		}); err != nil {
			return err
		}
		full, err := l.Commit(lent[0].number, n, uint64(time.Now().UnixNano()))
		if err != nil {
			return err
		}
		if err := b.took(n); err != nil {
			return err
		}
		rows += n
		switch {
		case full && l.TryPublish():
		case full, b.rnd.IntN(6) == 0:
			if err := l.Settle(context.WithoutCancel(ctx)); err != nil { // also at the end: a full place must be done with
				return err
			}
		}
		if full {
			lent, rows = lent[1:], 0
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// training reads what was recovered, then what is published, to the end of the stream.
func (w *owner) training(found *ring.Recovery) error {
	for _, b := range found.Batches {
		if b.Stream != 0 {
			w.ring.Unpin(b.Batch)
		}
		if err := w.take(b.Batch); err != nil {
			return err
		}
	}
	seat := park.NewWaiter()
	for {
		b, err := w.ring.Lease(context.Background(), seat)
		if err != nil {
			return nil // the end of the stream
		}
		if err := w.take(b); err != nil {
			return err
		}
	}
}

func (w *owner) take(b ring.Batch) error {
	if b.Count > 0 {
		rows := killtest.Rows{Streams: b.Streams(), Numbers: b.Numbers()}
		for leaf := range b.Columns() {
			rows.Columns = append(rows.Columns, b.Column(leaf))
		}
		spans, err := rows.Read(w.spec)
		if err != nil {
			return broken("batch %d: %v", b.Number, err)
		}
		if _, err := fmt.Fprintln(os.Stdout, killtest.Delivery{Batch: b.Number, Spans: spans}); err != nil {
			return err
		}
	}
	w.ring.Release(b)
	return nil
}
