package weights

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
)

// Reader reads the generations of one segment. Its pins lie in the daemon's own memory if it is the daemon that reads, for somebody elsewhere, or in a page
// that it shares with the process that does.
type Reader struct {
	store  *Store
	number uint64
	who    Who
	since  time.Time
	memory *memory
	pins   *Pins // of a reader in another process only the page is looked at
	page   backing
	bell   chan struct{} // capacity 1
	gone   atomic.Pointer[error]

	seen    [PlacesMax]Pin // what was last found pinned, and since when; under the store's mu, as what follows
	closing bool
	removed bool
}

// OpenReader makes a reader of the segment of the newest generation, for use in this process. *NoGenerationError: there is none yet, see Store.First;
// *TooManyReadersError.
func (s *Store) OpenReader(who Who) (*Reader, error) { return s.openReader(who, nil) }

// openReader takes the page over, if there is one.
func (s *Store) openReader(who Who, page backing) (*Reader, error) {
	b := alignedBytes(PinsBytes)
	if page != nil {
		b = page.Bytes()
	}
	pins, err := NewPins(b)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.unlock()
	switch {
	case s.closed:
		return nil, errClosed
	case s.current == nil:
		return nil, &NoGenerationError{s.cfg.Table}
	case len(s.readers) >= s.cfg.ReadersMax:
		return nil, &TooManyReadersError{len(s.readers)}
	}
	s.lastReader++
	r := &Reader{store: s, number: s.lastReader, who: who, since: time.Now(), memory: s.current, pins: pins, page: page, bell: make(chan struct{}, 1)}
	r.memory.uses++
	s.readers[r.number] = r
	return r, nil
}

// Number returns the reader's number in the store's life.
func (r *Reader) Number() uint64 { return r.number }

// Manifest returns what tensors its generations have.
func (r *Reader) Manifest() *tensor.Manifest { return r.memory.view.manifest }

// SegmentBytes returns the length of its segment.
func (r *Reader) SegmentBytes() int64 { return r.memory.view.layout.SegmentBytes }

// Newest returns the newest generation of the segment.
func (r *Reader) Newest() uint64 {
	r.store.mu.Lock()
	defer r.store.mu.Unlock()
	if r.memory.newest < 0 {
		return 0
	}
	return r.memory.places[r.memory.newest].generation
}

// Err returns why there will be no newer generation: *ReplacedError, or os.ErrClosed; nil while there may be.
func (r *Reader) Err() error {
	if err := r.gone.Load(); err != nil {
		return *err
	}
	return nil
}

// end says that no newer generation comes; the first reason stays.
func (r *Reader) end(err error) { r.gone.CompareAndSwap(nil, &err) }

// ring tells who waits that there is news.
func (r *Reader) ring() {
	select {
	case r.bell <- struct{}{}:
	default:
	}
}

// News receives a value after something was published or the reader's Err has become one; several may be merged into one. One goroutine at a time waits for
// it, here or in Wait.
func (r *Reader) News() <-chan struct{} { return r.bell }

// Latest pins the newest generation of the segment, if it is above newerThan; false: there is none. Any goroutine may call it.
func (r *Reader) Latest(newerThan uint64) (*Held, bool) {
	r.store.mu.Lock()
	defer r.store.unlock()
	if m := r.memory; !r.closing && m.newest >= 0 && m.places[m.newest].generation > newerThan {
		return r.hold(m.newest), true
	}
	return nil, false
}

// At pins a generation that may not be the newest, if it is still there with that digest.
func (r *Reader) At(generation uint64, digest spec.Fingerprint) (*Held, bool) {
	r.store.mu.Lock()
	defer r.store.unlock()
	for i, w := range r.memory.places {
		if !r.closing && w.generation == generation && w.generation != 0 && w.digest == digest {
			return r.hold(i), true
		}
	}
	return nil, false
}

// hold pins a place that holds something whole. Called under the store's mu, so no place can be taken meanwhile, and nothing that a publisher in place may have
// written matters.
func (r *Reader) hold(place int) *Held {
	w := r.memory.places[place]
	r.pins.hold(w.generation, place)
	r.memory.uses++
	return &Held{reader: r, place: place, whole: w}
}

// Wait is Latest that waits. It returns the context's error, which for a deadline is also os.ErrDeadlineExceeded; *ReplacedError; os.ErrClosed. One goroutine
// at a time may be in it.
func (r *Reader) Wait(ctx context.Context, newerThan uint64) (*Held, error) {
	for {
		gone := r.Err() // first: what was published before it ended is still given out
		if held, ok := r.Latest(newerThan); ok {
			return held, nil
		}
		if gone != nil {
			return nil, gone
		}
		select {
		case <-r.bell:
		case <-ctx.Done():
			return nil, park.ContextError(ctx)
		}
	}
}

// Close ends the reader. What it still holds stays pinned until it is released. Closing twice is no error.
func (r *Reader) Close() error {
	r.end(errClosed)
	r.ring()
	s := r.store
	s.mu.Lock()
	defer s.unlock()
	r.closing = true
	return r.remove()
}

// remove takes a reader that is closed and holds nothing off the list. A page shared with another process holds nothing more: its process is gone, or was
// told so. Called under the store's mu.
func (r *Reader) remove() error {
	if !r.closing || r.removed || r.page == nil && r.pins.Pinned() > 0 {
		return nil
	}
	r.removed = true
	delete(r.store.readers, r.number)
	r.store.release(r.memory)
	if r.page != nil {
		return r.page.Close()
	}
	return nil
}

// Held is a generation that a reader holds, in the segment's own memory.
type Held struct {
	reader   *Reader
	place    int
	whole    whole
	released atomic.Bool
}

// Generation returns its number.
func (h *Held) Generation() uint64 { return h.whole.generation }

// Published returns when it was published.
func (h *Held) Published() time.Time { return h.whole.published }

// Digest returns its digest.
func (h *Held) Digest() spec.Fingerprint { return h.whole.digest }

// Manifest returns what tensors it has.
func (h *Held) Manifest() *tensor.Manifest { return h.reader.Manifest() }

// Sums returns the CRC of each tensor. It must not be changed.
func (h *Held) Sums() []uint32 { return h.whole.sums }

// Data returns its data_bytes, in which each tensor has its flat offset. It must not be written, nor touched after Release.
func (h *Held) Data() []byte { return h.reader.memory.view.Data(h.place) }

// Place returns which place of the segment it is in.
func (h *Held) Place() int { return h.place }

// Descriptor returns a descriptor of the segment and where in it Data starts, for sendfile; false where it lies on the heap. It stays the store's own and must
// not be used after Release.
func (h *Held) Descriptor() (fd int, offset int64, ok bool) {
	if h.reader.memory.backing == nil {
		return -1, 0, false
	}
	return h.reader.memory.backing.Descriptor(), h.reader.memory.view.DataOffset(h.place), true
}

// Release lets go of it. Releasing twice is no error.
func (h *Held) Release() {
	if !h.released.CompareAndSwap(false, true) {
		return
	}
	h.reader.pins.Unpin(h.place)
	s := h.reader.store
	s.mu.Lock()
	defer s.unlock()
	s.release(h.reader.memory)
	_ = h.reader.remove() // a reader in this process has no page to close
}
