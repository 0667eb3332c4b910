//go:build linux && !race

package shm

import (
	"context"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/internal/proof"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// fillHost is what a daemon has around its fillers; the trainer is the test itself, straight from the ring.
type fillHost struct {
	t       testing.TB
	spec    *spec.Spec
	ring    *ring.Ring
	memory  *Memory
	server  *Server
	path    string
	stop    context.CancelFunc
	served  chan error
	linger  time.Duration
	holder  func() (wire.Note, bool)
	resumed chan uint64 // streams that said so

	mu       sync.Mutex
	sessions map[string]*holding
	refuse   error // of the next stream that is opened
}

// holding is who has a session.
type holding struct {
	lender  *drainer.Lender
	session *ring.Session
	taken   func()
}

func (h *fillHost) Table(name string) (Table, bool) {
	t := Table{Name: name, Spec: h.spec, View: &h.ring.View, Memory: h.memory, Fill: h.open, Holder: h.holder, Linger: h.linger}
	if name == "pushed" {
		t.Fill = nil
	}
	return t, name == testTable || name == "pushed"
}

func (h *fillHost) Names() []string { return []string{testTable} }

// open opens a stream as a daemon does.
func (h *fillHost) open(ctx context.Context, hello *wire.Hello, taken func()) (*drainer.Lender, error) {
	name := hello.Session
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.refuse; err != nil {
		h.refuse = nil
		return nil, err
	}
	if name == "" {
		return drainer.NewLender(h.ring, drainer.LenderID{Stream: h.ring.NextStream()}), nil
	}
	if old := h.sessions[name]; old != nil {
		old.taken()
		select {
		case <-old.lender.Done():
			old.session.Close(time.Now())
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	session, err := h.ring.OpenSession(name, time.Now(), time.Hour)
	if err != nil {
		return nil, err
	}
	id := drainer.LenderID{Stream: session.Stream(), Session: session, Resumed: func() { h.resumed <- session.Stream() }}
	h.sessions[name] = &holding{drainer.NewLender(h.ring, id), session, taken}
	return h.sessions[name].lender, nil
}

type hostConfig struct {
	batchSize, batches int
	server             ServerConfig
	path               string // of the memory
	linger             time.Duration
	holder             func() (wire.Note, bool)
	sealed             bool // the memory is for readers only
}

func startHost(t testing.TB, cfg hostConfig) *fillHost {
	t.Helper()
	s, err := spec.ParseText(testSpec)
	check(t, err)
	h := &fillHost{
		t: t, spec: s, path: filepath.Join(t.TempDir(), "socket"), served: make(chan error, 1000), linger: cfg.linger, holder: cfg.holder,
		resumed: make(chan uint64, 16), sessions: map[string]*holding{},
	}
	layout := ring.Layout{
		BatchSize: cfg.batchSize, Batches: cfg.batches, Columns: s.LeafBytes(), Spec: s.JSON(), Fingerprint: s.Fingerprint(), Table: testTable, Created: time.Now(),
		Sessions: 4,
	}
	size, err := layout.Bytes()
	check(t, err)
	h.memory, err = NewMemory(MemoryConfig{Name: "ingestd " + testTable, Size: size, Fillable: !cfg.sealed, Path: cfg.path})
	check(t, err)
	h.ring, err = ring.Format(h.memory.Bytes(), layout)
	check(t, err)
	cfg.server.Tables = h
	h.server, err = NewServer(cfg.server)
	check(t, err)
	h.listen()
	return h
}

func (h *fillHost) listen() {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: h.path})
	check(h.t, err)
	ctx, stop := context.WithCancel(context.Background())
	h.stop = stop
	var all sync.WaitGroup
	all.Go(func() {
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			all.Go(func() {
				hello, err := wire.ReadHello(conn)
				if err != nil {
					conn.Close()
					h.served <- err
					return
				}
				h.served <- h.server.Serve(ctx, conn, hello)
			})
		}
	})
	h.t.Cleanup(func() {
		stop()
		l.Close()
		all.Wait()
		if st := h.server.Stats().Fill; len(st.Fillers) != 0 {
			h.t.Errorf("%d fillers are left in the server", len(st.Fillers))
		}
		check(h.t, h.memory.Close())
	})
}

func (h *fillHost) attach(hello wire.Hello) *FillAttachment {
	h.t.Helper()
	hello.Table = testTable
	a, err := AttachFill(h.t.Context(), h.path, hello, nil)
	check(h.t, err)
	h.t.Cleanup(func() {
		_ = a.Close()
		check(h.t, a.Unmap())
	})
	return a
}

// author is a producer that fills in place: it proves stream and number of each sample in its bytes.
type author struct {
	*FillAttachment
	place LentPlace
	row   int
	next  uint64
}

func newAuthor(a *FillAttachment) *author { return &author{FillAttachment: a, next: a.Accepted().Held} }

// need sees to it that there is a row to fill.
func (p *author) need(ctx context.Context) error {
	for p.place.Lease == 0 {
		place, ok, err := p.TryPlace()
		if err != nil {
			return err
		}
		if ok {
			p.place, p.row = place, 0
			break
		}
		if err := p.Wait(ctx, p.PlaceCame); err != nil {
			return err
		}
	}
	return nil
}

// write fills up to n rows of one place and hands them over.
func (p *author) write(ctx context.Context, n int) (int, error) {
	if err := p.need(ctx); err != nil {
		return 0, err
	}
	s, size := p.Accepted().Spec, int(p.Accepted().BatchSize)
	n = min(n, size-p.row)
	for leaf := range s.NumLeaves() {
		l, col := s.Leaf(leaf), p.Column(p.place.Place, leaf)
		for i := range n {
			at := int64(p.row+i) * l.Bytes()
			proof.Leaf(col[at:at+l.Bytes()], l.DType, p.Accepted().Stream, p.next+uint64(i), leaf)
		}
	}
	for {
		room, err := p.HasRoom()
		if err != nil || p.Err() != nil {
			return 0, firstOf(err, p.Err())
		}
		if room {
			break
		}
		if err := p.Wait(ctx, func() bool { room, err := p.HasRoom(); return room || err != nil }); err != nil {
			return 0, err
		}
	}
	if err := p.Complete(p.place, n); err != nil {
		return 0, err
	}
	p.next += uint64(n)
	if p.row += n; p.row == size {
		p.place = LentPlace{}
	}
	return n, nil
}

func firstOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func (p *author) writeAll(ctx context.Context, n int) error {
	for n > 0 {
		k, err := p.write(ctx, n)
		if err != nil {
			return err
		}
		n -= k
	}
	return nil
}

// flush asks for what is complete and waits until the daemon has it.
func (p *author) flush(ctx context.Context) error {
	if p.place.Lease != 0 {
		if err := p.Settle(p.place); err != nil {
			return err
		}
	}
	return p.await(ctx)
}

// await waits until the daemon has done all it was asked for.
func (p *author) await(ctx context.Context) error {
	return p.Wait(ctx, func() bool { _, all, err := p.Taken(); return all || err != nil })
}

// reader is the trainer: it checks every byte, and that each stream goes on where it was.
type reader struct {
	h    *fillHost
	next map[uint64]uint64
	seat *park.Waiter
}

func newReader(h *fillHost) *reader {
	return &reader{h, map[uint64]uint64{}, park.NewWaiter()}
}

// batch reads the next batch.
func (r *reader) batch(ctx context.Context) (int, error) {
	b, err := r.h.ring.Lease(ctx, r.seat)
	if err != nil {
		return 0, err
	}
	defer r.h.ring.Release(b)
	if err := verify(r.h.spec, b); err != nil {
		return 0, err
	}
	for i, stream := range b.Streams() {
		if got := b.Numbers()[i]; got != r.next[stream] {
			return 0, fmt.Errorf("batch %d row %d: sample %d of stream %d, due %d", b.Number, i, got, stream, r.next[stream])
		}
		r.next[stream]++
	}
	return b.Count, nil
}

// all reads until the end of the table.
func (r *reader) all() error {
	for {
		if _, err := r.batch(context.Background()); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// finish ends the table and reads what is there.
func (r *reader) finish() error {
	r.h.ring.Flush()
	r.h.ring.Close()
	return r.all()
}

// eventually waits until the server's state is as wanted, by looking again.
func (h *fillHost) eventually(what string, ok func(FillStats) bool) {
	h.t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok(h.server.Stats().Fill) {
		select {
		case <-tick.C:
		case <-h.t.Context().Done():
			h.t.Fatalf("never: %s: %+v", what, h.server.Stats().Fill)
		}
	}
}

// free sees that every place is free.
func (h *fillHost) free() {
	h.t.Helper()
	for i := range h.ring.Batches() {
		if st := h.ring.BatchState(i); st.State != ring.Free {
			h.t.Errorf("place %d is %v to stream %d at the end", i, st.State, st.Stream)
		}
	}
}
