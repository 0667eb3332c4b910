package drainer

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/ring"
)

// filler plays the producer of a Lender: it writes each row before it calls it complete.
type filler struct {
	t    *testing.T
	ring *ring.Ring
	l    *Lender
	next uint64 // number of the next sample
	row  int    // of the place being filled
	// places in its hands, oldest first
	leases []uint64
	places []ring.Place
}

func (f *filler) lend() bool {
	lease, p, ok := f.l.TryLend()
	if ok {
		f.leases, f.places = append(f.leases, lease), append(f.places, p)
	}
	return ok
}

// fill completes n rows of the place it is at and hands them over; true says that the place is full.
func (f *filler) fill(n int) bool {
	f.t.Helper()
	col := f.ring.PlaceColumn(f.places[0], 0)
	for range n {
		binary.LittleEndian.PutUint64(col[16*f.row:], f.l.ID())
		binary.LittleEndian.PutUint64(col[16*f.row+8:], f.next)
		f.row++
		f.next++
	}
	full, err := f.l.Commit(f.leases[0], n, f.next) // a time that tells which commit it was
	if err != nil {
		f.t.Fatal(err)
	}
	if full != (f.row == f.ring.BatchSize()) {
		f.t.Fatalf("full: %v after row %d", full, f.row)
	}
	if full {
		f.row, f.leases, f.places = 0, f.leases[1:], f.places[1:]
	}
	return full
}

func (f *filler) settle() {
	f.t.Helper()
	if err := f.l.Settle(f.t.Context()); err != nil {
		f.t.Fatal(err)
	}
}

// stray puts samples of another stream into the open batch.
func stray(r *ring.Ring, n int) {
	run, _ := r.TryReserve(n)
	for i := range uint64(run.N) {
		binary.LittleEndian.PutUint64(r.RunColumn(run, 0)[16*i:], 9)
		binary.LittleEndian.PutUint64(r.RunColumn(run, 0)[16*i+8:], i)
	}
	r.Commit(run, 9, 0, 1, ring.Mark{})
}

func newFiller(t *testing.T, r *ring.Ring, id LenderID) *filler {
	l := NewLender(r, id)
	return &filler{t: t, ring: r, l: l, next: l.Held()}
}

// rows leases the next batch, returns the numbers in it and gives it back.
func rows(t *testing.T, r *ring.Ring) string {
	t.Helper()
	b, ok := r.TryLease()
	if !ok {
		return "none"
	}
	defer r.Release(b)
	for i, n := range b.Numbers() {
		if cell := b.Column(0)[16*i:]; binary.LittleEndian.Uint64(cell) != b.Streams()[i] || binary.LittleEndian.Uint64(cell[8:]) != n {
			t.Fatalf("row %d of batch %d holds % x", i, b.Number, cell[:16])
		}
	}
	return fmt.Sprint(b.Numbers())
}

func want(t *testing.T, what, got, want string) {
	t.Helper()
	if got != want {
		t.Fatalf("%s: %s, want %s", what, got, want)
	}
}

func TestFullPlaceIsPublishedInPlace(t *testing.T) {
	r := newRing(t, 4, 4, 16)
	f := newFiller(t, r, LenderID{Stream: 7})
	if _, waiting := f.l.Unsettled(); waiting || f.l.WaitingSince().IsZero() {
		t.Fatal("without a place, rows wait, or it waits for no place")
	}
	f.lend()
	f.lend()
	where := f.places[0]
	if f.fill(3) {
		t.Fatal("3 of 4 rows are full")
	}
	want(t, "before it is full", rows(t, r), "none")
	if since, waiting := f.l.Unsettled(); !waiting || since.UnixNano() != 3 || !f.l.WaitingSince().IsZero() {
		t.Fatalf("3 rows wait since %v, %v; %v", since, waiting, f.l.WaitingSince())
	}
	f.fill(1)
	if !f.l.TryPublish() {
		t.Fatal("not published")
	}
	b, _ := r.TryLease()
	if b.Index != where.Index || b.Count != 4 || b.Streams()[3] != 7 || b.Numbers()[3] != 3 || b.Arrivals()[2] != 3 || b.Arrivals()[3] != 4 {
		t.Fatalf("%+v, streams %v, numbers %v, arrivals %v, want place %d", b, b.Streams(), b.Numbers(), b.Arrivals(), where.Index)
	}
	r.Release(b)
	if st := f.l.Stats(); st.Lent != 1 || st.Committed != 4 || st.Settled != 0 || st.Published != 1 {
		t.Fatalf("%+v", st)
	}
}

// Rows that were copied come before those that are published in place, whatever that takes.
func TestOrderOfSettledAndPublished(t *testing.T) {
	r := newRing(t, 4, 8, 16)
	f := newFiller(t, r, LenderID{Stream: 1})
	f.lend()
	f.fill(1)
	f.settle()
	f.settle() // nothing is left to copy
	if _, waiting := f.l.Unsettled(); waiting || r.Reserved() != 1 {
		t.Fatal("a copied row waits, or was copied twice")
	}
	f.fill(3)
	if f.l.TryPublish() {
		t.Fatal("a place of which a row was copied was published")
	}
	f.settle()
	want(t, "all copied", rows(t, r), "[0 1 2 3]")
	if f.l.Places() != 0 {
		t.Fatal("the copied place was not given back")
	}

	f.lend()
	f.fill(2)
	f.settle() // 4 and 5 lie in an open batch
	f.fill(2)
	if f.l.TryPublish() {
		t.Fatal("published although its first rows were copied")
	}
	f.settle()
	f.lend()
	f.fill(3)
	f.settle() // 8, 9, 10
	f.fill(1)
	f.l.TryPublish()
	f.settle()
	for _, numbers := range []string{"[4 5 6 7]", "[8 9 10 11]", "none"} {
		want(t, "copied", rows(t, r), numbers)
	}

	f.lend()
	f.fill(1)
	f.settle() // 12 stays in the open batch until it is full, or flushed
	f.fill(3)
	f.l.TryPublish()
	f.settle()
	stray(r, 3)
	f.lend()
	f.fill(4)
	if !f.l.TryPublish() {
		t.Fatal("everything before it is published, and it was not")
	}
}

// A producer that was slow once is not copied for ever: soon one batch is published short for it, and then its places are published as they are.
func TestFastAgain(t *testing.T) {
	r := newRing(t, 4, 8, 16)
	f := newFiller(t, r, LenderID{Stream: 1})
	f.lend()
	f.fill(1)
	f.settle()
	f.fill(3)
	f.l.TryPublish()
	f.settle()
	want(t, "the slow place", rows(t, r), "[0 1 2 3]")
	f.lend()
	f.fill(2)
	f.settle()
	f.fill(2)
	f.l.TryPublish()
	f.settle()
	want(t, "the slow place", rows(t, r), "[4 5 6 7]")

	stray(r, 1) // so that what is copied from now on never ends with a full batch
	f.lend()
	f.fill(1)
	f.settle()
	f.fill(3)
	f.l.TryPublish()
	f.settle() // 11 is alone in an open batch
	inPlace := 0
	for range 8 {
		f.lend()
		f.fill(4)
		if f.l.TryPublish() {
			inPlace++
		} else {
			f.settle()
		}
		for rows(t, r) != "none" {
			continue
		}
	}
	if inPlace < 6 {
		t.Fatalf("%d of 8 places were published as they were", inPlace)
	}
}

// A session's new connection does not overtake what the old one left in an open batch.
func TestTakenOverSessionKeepsItsOrder(t *testing.T) {
	r := newRing(t, 4, 6, 16)
	session, err := r.OpenSession("s", time.Unix(1, 0), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	run, _ := r.TryReserve(1)
	for leaf := range 2 {
		binary.LittleEndian.PutUint64(r.RunColumn(run, 0)[8*leaf:], []uint64{session.Stream(), 0}[leaf])
	}
	r.Commit(run, session.Stream(), 0, 1, session.Mark(1))
	f := newFiller(t, r, LenderID{Stream: session.Stream(), Session: session})
	if f.l.Held() != 1 || f.next != 1 {
		t.Fatalf("held %d", f.l.Held())
	}
	f.lend()
	f.fill(4)
	if f.l.TryPublish() {
		t.Fatal("published before sample 0")
	}
	f.settle()
	if session.Held() != 5 || f.l.Held() != 5 {
		t.Fatalf("the session holds %d, the lender %d", session.Held(), f.l.Held())
	}
	want(t, "first", rows(t, r), "[0 1 2 3]")
	f.lend()
	f.fill(2)
	if err := f.l.End(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	r.Flush()
	want(t, "then", rows(t, r), "[4 5 6]")
	f.l.Free()
}

func TestCommitRefuses(t *testing.T) {
	r := newRing(t, 4, 8, 16)
	l := NewLender(r, LenderID{Stream: 1})
	refused := func(lease uint64, n int, due uint64, left int) {
		t.Helper()
		var e *LeaseError
		if full, err := l.Commit(lease, n, 1); !errors.As(err, &e) || full || *e != (LeaseError{lease, due, n, left}) || e.Error() == "" {
			t.Fatalf("%d rows of lease %d: %v, %v", n, lease, full, err)
		}
	}
	refused(1, 1, 0, 0)
	for range 2 {
		l.TryLend()
	}
	refused(0, 1, 1, 4)
	refused(2, 1, 1, 4)
	refused(3, 1, 1, 4)
	refused(1, 0, 1, 4)
	refused(1, -1, 1, 4)
	refused(1, 5, 1, 4)
	if full, err := l.Commit(1, 1, 1); full || err != nil {
		t.Fatal(full, err)
	}
	refused(1, 4, 1, 3)
	if full, err := l.Commit(1, 3, 1); !full || err != nil {
		t.Fatal(full, err)
	}
	refused(1, 1, 1, 0)
	if l.Passed(1) || l.Passed(0) || l.Passed(2) {
		t.Fatal("a lease is over that is not")
	}
	l.TryPublish()
	if lease, ok := l.Current(); !l.Passed(1) || l.Passed(2) || l.Passed(3) || lease != 2 || !ok {
		t.Fatalf("after lease 1: current %d, %v", lease, ok)
	}
	refused(1, 1, 2, 4)
	if l.Stats().Committed != 4 {
		t.Fatalf("%+v", l.Stats())
	}
}

func TestEnd(t *testing.T) {
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	for name, test := range map[string]struct {
		settled, rows int
		full, inPlace bool // the ring is full; the daemon stops
		stranded      int
		batches       string
	}{
		"nothing":                           {0, 0, false, false, 0, "none"},
		"nothing, stopping":                 {0, 0, true, true, 0, "none"},
		"copied":                            {0, 2, false, false, 0, "[0 1]"},
		"the rest of it":                    {1, 3, false, false, 0, "[0 1 2]"},
		"in place":                          {0, 2, true, true, 0, "[0 1]"},
		"in place, as it cannot be copied":  {0, 2, true, false, 0, "[0 1]"},
		"all copied before":                 {2, 2, true, false, 0, "[0 1]"},
		"neither, as a part was copied":     {1, 3, true, true, 2, "[0]"},
		"copied, as a part was, stopping":   {1, 3, false, true, 0, "[0 1 2]"},
		"in place rather than into a batch": {0, 3, false, true, 0, "[0 1 2]"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRing(t, 4, 4, 16)
			f := newFiller(t, r, LenderID{Stream: 1, FlushAtEnd: true})
			f.lend()
			f.lend()
			if test.settled > 0 {
				f.fill(test.settled)
				f.settle()
			}
			if n := test.rows - test.settled; n > 0 {
				f.fill(n)
			}
			ctx := t.Context()
			if test.full { // somebody else holds what is left
				if test.stranded > 0 { // else it waits for nothing
					ctx = ended
				}
				r.Flush()
				for _, ok := r.TryLend(2); ok; _, ok = r.TryLend(2) {
					continue
				}
			}
			err := f.l.End(ctx, test.inPlace)
			<-f.l.Done()
			var stranded *StrandedError
			if errors.As(err, &stranded) != (test.stranded > 0) || stranded == nil && err != nil || stranded != nil && stranded.Samples != test.stranded {
				t.Fatalf("End: %v, want %d stranded", err, test.stranded)
			}
			want(t, "published", rows(t, r), test.batches)
			f.l.Free()
			left := 0
			if test.stranded > 0 {
				left = 1
			}
			if got := f.l.Stats().Lent; got != left {
				t.Fatalf("%d places are still lent, want %d", got, left)
			}
		})
	}
}

func TestLendWaitsAndEnds(t *testing.T) {
	r := newRing(t, 4, 2, 16)
	l := NewLender(r, LenderID{Stream: 1})
	for range 2 {
		if _, _, err := l.Lend(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithDeadline(t.Context(), time.Unix(0, 0))
	defer cancel()
	if _, _, err := l.Lend(ctx); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("no place is free: %v", err)
	}
	if _, err := l.Commit(1, 4, 1); err != nil {
		t.Fatal(err)
	}
	got := make(chan error)
	go func() { _, _, err := l.Lend(t.Context()); got <- err }()
	l.TryPublish()
	b, _ := r.TryLease()
	r.Release(b)
	if err := <-got; err != nil {
		t.Fatal(err)
	}
	go func() { _, _, err := l.Lend(t.Context()); got <- err }()
	r.Close()
	if err := <-got; !errors.Is(err, os.ErrClosed) {
		t.Fatalf("after Close: %v", err)
	}
	if err := l.Settle(t.Context()); err != nil { // nothing to copy
		t.Fatal(err)
	}
}

// Lenders and other writers at once, rows settled at random, in rings so small that everything waits for everything: each stream comes whole and in order.
func TestManyLenders(t *testing.T) {
	const samples = 3000
	for _, batchSize := range []int{1, 3, 8} {
		t.Run(fmt.Sprint(batchSize), func(t *testing.T) {
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			r := newRing(t, batchSize, 7, 16)
			r.Poison = true
			var all sync.WaitGroup
			for id := range uint64(2) {
				all.Go(func() { lendAll(t, r, id+1, samples, rand.New(rand.NewPCG(seed, id))) })
			}
			all.Go(func() { // what a transport does
				rnd, seat := rand.New(rand.NewPCG(seed, 9)), park.NewWaiter()
				for n := uint64(0); n < samples; {
					run, err := r.Reserve(t.Context(), seat, 1+rnd.IntN(5))
					if err != nil {
						t.Error(err)
						return
					}
					if rnd.IntN(10) == 0 {
						r.Abandon(run)
						continue
					}
					for i := range uint64(run.N) {
						binary.LittleEndian.PutUint64(r.RunColumn(run, 0)[16*i:], 9)
						binary.LittleEndian.PutUint64(r.RunColumn(run, 0)[16*i+8:], n+i)
					}
					r.Commit(run, 9, n, 1, ring.Mark{})
					n += uint64(run.N)
				}
			})
			go func() {
				all.Wait()
				r.Flush()
				r.Close()
			}()
			got, err := receive(r)
			if err != nil {
				t.Fatal(err)
			}
			if got[1] != samples || got[2] != samples || got[9] < samples {
				t.Fatalf("%v", got)
			}
			for i := range r.Batches() {
				if st := r.BatchState(i); st.State != ring.Free {
					t.Errorf("place %d is %v at the end", i, st.State)
				}
			}
		})
	}
}

// lendAll is a producer with up to two places, in one goroutine.
func lendAll(t *testing.T, r *ring.Ring, id, samples uint64, rnd *rand.Rand) {
	f := newFiller(t, r, LenderID{Stream: id})
	for f.next < samples {
		if len(f.places) < 2 {
			f.lend()
		}
		if len(f.places) == 0 {
			lease, p, err := f.l.Lend(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			f.leases, f.places = append(f.leases, lease), append(f.places, p)
		}
		if f.fill(int(min(samples-f.next, uint64(1+rnd.IntN(r.BatchSize()-f.row))))) {
			if !f.l.TryPublish() {
				f.settle()
			}
		} else if rnd.IntN(4) == 0 {
			f.settle()
		}
	}
	if err := f.l.End(t.Context(), rnd.IntN(2) == 0); err != nil {
		t.Error(err)
	}
	f.l.Free()
	if st := f.l.Stats(); st.Committed != samples || st.Lent != 0 || st.Settled > samples {
		t.Errorf("%+v", st)
	}
}

func TestLenderAllocatesNothing(t *testing.T) {
	r := newRing(t, 4, 4, 16)
	f := newFiller(t, r, LenderID{Stream: 1})
	step := func(settle bool) {
		lease, _, ok := f.l.TryLend()
		if !ok {
			t.Fatal("no place")
		}
		for i := range 4 {
			full, err := f.l.Commit(lease, 1, 1)
			if err != nil {
				t.Fatal(err)
			}
			if i == 1 && settle {
				f.settle()
			}
			if full && !f.l.TryPublish() {
				f.settle()
			}
		}
		for b, ok := r.TryLease(); ok; b, ok = r.TryLease() {
			r.Release(b)
		}
	}
	for _, settle := range []bool{false, true} {
		step(settle)
		if n := testing.AllocsPerRun(1000, func() { step(settle) }); n != 0 {
			t.Errorf("settle %v: %v allocations per place, want 0", settle, n)
		}
	}
}

// TestStayLent: a Lender whose places outlive the process publishes none of them at its end: what is committed is copied, or stays; the places stay lent.
func TestStayLent(t *testing.T) {
	for name, full := range map[string]bool{"room to copy": false, "no room": true} {
		t.Run(name, func(t *testing.T) {
			r := newRing(t, 4, 2, 16)
			session, err := r.OpenSession("s", time.Now(), time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			f := newFiller(t, r, LenderID{Stream: session.Stream(), Session: session, FlushAtEnd: true})
			if !f.lend() {
				t.Fatal("no place")
			}
			place := int(f.places[0].Index)
			f.fill(2)
			if full {
				if _, ok := r.TryLend(99); !ok {
					t.Fatal("no place to take away")
				}
			}
			f.l.StayLent()
			ctx, cancel := context.WithDeadline(t.Context(), time.Unix(0, 0))
			defer cancel()
			var stranded *StrandedError
			if err := f.l.End(ctx, true); errors.As(err, &stranded) != full || err != nil && stranded.Samples != 2 {
				t.Errorf("End: %v", err)
			}
			want(t, "published", rows(t, r), map[bool]string{false: "[0 1]", true: "none"}[full])
			if s := r.BatchState(place); s.State != ring.Lent || s.Stream != session.Stream() || session.Held() != 2 {
				t.Errorf("the place is %v for stream %d, and %d samples are held", s.State, s.Stream, session.Held())
			}
		})
	}
}
