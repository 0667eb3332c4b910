package weights

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// lookOf opens what a reader in another process has: a segment of its own over the same memory, and a page of pins that the store looks at.
func lookOf(t testing.TB, s *Store) (*Segment, *Pins, *Reader) {
	t.Helper()
	page := heapPage{alignedBytes(PinsBytes)}
	r := must(s.openReader(Who{Client: "process"}, page))(t)
	return must(OpenSegment(r.memory.view.mem))(t), must(NewPins(page.b))(t), r
}

// heapPage is a page of pins that two sides share on the heap.
type heapPage struct{ b []byte }

func (p heapPage) Bytes() []byte         { return p.b }
func (p heapPage) Descriptor() int       { return -1 }
func (p heapPage) Writable() (int, bool) { return -1, false }
func (p heapPage) Close() error          { return nil }

// TestNoByteChangesUnderAPin: publishers that go as fast as places come free, and readers of both kinds. What is pinned is read twice and must be its
// generation's content, by which it proves itself; the race detector sees whether a place is ever written while it is read.
func TestNoByteChangesUnderAPin(t *testing.T) {
	for _, places := range []int{2, 3} {
		t.Run(fmt.Sprint(places), func(t *testing.T) {
			s := heapStore(t, places)
			m := manifestOf(t, 700, 0, 64, 1)
			p := must(s.OpenPublisher(m, Who{}))(t)
			publish(t, p)
			const generations = 300
			var stop atomic.Bool
			var readers sync.WaitGroup
			for n := range 3 {
				segment, pins, _ := lookOf(t, s)
				inside := must(s.OpenReader(Who{Client: "inside"}))(t)
				rng := rand.New(rand.NewPCG(uint64(n), uint64(places)))
				readers.Go(func() { readMapped(t, &stop, segment, pins) })
				readers.Go(func() { readInside(t, &stop, inside, rng) })
			}
			want := uint64(0)
			for s.Newest() < generations && !t.Failed() {
				ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
				pl, err := p.Begin(ctx, want)
				cancel()
				want = 0
				if err != nil {
					t.Error(err)
					break
				}
				write(pl)
				if pl.Generation()%17 == 0 { // a generation that is given up is never seen
					pl.Abort()
					want = pl.Generation() + 1
					continue
				}
				if _, err := pl.Commit(); err != nil {
					t.Error(err)
				}
			}
			stop.Store(true)
			readers.Wait()
			if st := s.Stats(); len(st.Generations[len(st.Generations)-1].Pins) != 0 || st.Failed[FailedAborted] == 0 {
				t.Errorf("in the end: %+v", st)
			}
		})
	}
}

func readMapped(t *testing.T, stop *atomic.Bool, s *Segment, pins *Pins) {
	for newest := uint64(0); !stop.Load(); {
		generation, place, ok := pins.Pin(s, 0)
		if !ok {
			t.Error("there is a generation, and it was not found")
			return
		}
		if generation < newest || generation%17 == 0 {
			t.Errorf("generation %d after %d; one that was given up must not be seen", generation, newest)
		}
		newest = generation
		again, samePlace, _ := pins.Pin(s, 0) // a second pin, perhaps of a newer one
		for range 2 {
			if i := wrongContent(s.Manifest(), s.Data(place), generation); i >= 0 {
				t.Errorf("generation %d, tensor %d: not its content", generation, i)
			}
			if i := wrongContent(s.Manifest(), s.Data(samePlace), again); i >= 0 {
				t.Errorf("generation %d, tensor %d: not its content", again, i)
			}
		}
		if got, want := s.Digest(place), Digest(s.Manifest(), decodeSums(s.SumBytes(place))); got != want {
			t.Errorf("generation %d has digest %v, its sums %v", generation, got, want)
		}
		pins.Unpin(samePlace)
		pins.Unpin(place)
	}
}

func readInside(t *testing.T, stop *atomic.Bool, r *Reader, rng *rand.Rand) {
	for !stop.Load() {
		held, ok := r.Latest(0)
		if !ok {
			t.Error("there is a generation, and it was not found")
			return
		}
		if rng.IntN(3) == 0 {
			if same, ok := r.At(held.Generation(), held.Digest()); !ok || same.Place() != held.Place() {
				t.Errorf("generation %d is held and was not found", held.Generation())
			} else {
				same.Release()
			}
		}
		if i := wrongContent(held.Manifest(), held.Data(), held.Generation()); i >= 0 {
			t.Errorf("generation %d, tensor %d: not its content", held.Generation(), i)
		}
		if Digest(held.Manifest(), held.Sums()) != held.Digest() {
			t.Errorf("generation %d: sums and digest differ", held.Generation())
		}
		held.Release()
	}
}

// TestPinOfALatecomer: a pin that comes after its place was taken does not hold, and what stands in a page and was never a pin keeps nobody waiting.
func TestPinOfALatecomer(t *testing.T) {
	s := heapStore(t, 2)
	p := must(s.OpenPublisher(manifestOf(t, 8), Who{}))(t)
	publish(t, p) // 1 in place 0
	segment, pins, r := lookOf(t, s)
	if !pins.try(segment, 1, 0) {
		t.Fatal("the newest generation was not pinned")
	}
	publish(t, p) // 2 in place 1
	as[*PinnedError](t, must1(p.TryBegin(0)))
	word(pins.page, 0).Store(0)
	pl := must(p.TryBegin(0))(t) // takes place 0
	if pins.try(segment, 1, 0) {
		t.Error("a place was pinned after it was taken")
	}
	if got := word(pins.page, 0).Load(); got != 0 {
		t.Errorf("a pin that did not hold left %d", got)
	}
	write(pl)
	must(pl.Commit())(t)
	for i := range PlacesMax { // junk: none is the generation of its place
		word(pins.page, int64(8*i)).Store(uint64(i)*1e9 + 77)
	}
	if pins := r.store.Stats().Generations[0].Pins; len(pins) != 0 {
		t.Errorf("junk is reported as %v", pins)
	}
	publish(t, p)
	publish(t, p)
	if generation, place := segment.Newest(); generation != 5 || segment.Generation(place) != 5 {
		t.Errorf("newest %d", generation)
	}
}

// TestUnpinTwicePanics: a pin that is let go of twice would take another one's away.
func TestUnpinTwicePanics(t *testing.T) {
	s := heapStore(t, 2)
	publish(t, must(s.OpenPublisher(manifestOf(t, 8), Who{}))(t))
	segment, pins, _ := lookOf(t, s)
	_, place, _ := pins.Pin(segment, 0)
	pins.Unpin(place)
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	pins.Unpin(place)
}

// TestSpoiltWords: a publisher in place can write any word of the segment. What it spoils is what readers of the mapping see; a store and its own readers go
// on.
func TestSpoiltWords(t *testing.T) {
	s := heapStore(t, 3)
	p := must(s.OpenPublisher(manifestOf(t, 8), Who{}))(t)
	publish(t, p)
	publish(t, p)
	segment, pins, _ := lookOf(t, s)
	inside := must(s.OpenReader(Who{}))(t)
	for _, newest := range []uint64{1<<64 - 1, 1<<64 - 64, 2*64 + 3, 2*64 + 63, 99 * 64, 64} {
		segment.newestWord().Store(newest)
		if generation, place, ok := pins.Pin(segment, 0); ok && segment.Generation(place) != generation {
			t.Errorf("newest %#x: pinned generation %d in place %d", newest, generation, place)
		} else if ok {
			pins.Unpin(place)
		}
		held, ok := inside.Latest(0)
		if !ok || held.Generation() != 2 {
			t.Fatalf("newest %#x: a reader inside found %v", newest, ok)
		}
		held.Release()
	}
	for i := range 3 {
		segment.generationWord(i).Store(1 << 60)
	}
	if g := publish(t, p); g != 3 {
		t.Errorf("generation %d, want 3", g)
	}
	if generation, place, ok := pins.Pin(segment, 2); !ok || generation != 3 || wrongContent(segment.Manifest(), segment.Data(place), 3) >= 0 {
		t.Error("the generation after the damage is not there")
	}
}
