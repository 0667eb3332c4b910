package weights

import (
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"time"

	"github.com/ingestd/ingestd/internal/failpoint"
	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
)

// Publishing is the one publisher of a store. One goroutine at a time uses it and the place that it has begun.
type Publishing struct {
	store    *Store
	number   uint64
	who      Who
	since    time.Time
	manifest *tensor.Manifest

	memory *memory // under the store's mu, as what follows
	place  *Place  // begun and not ended
	closed bool
}

// Number returns the publisher's number in the store's life.
func (p *Publishing) Number() uint64 { return p.number }

// Manifest returns what it publishes.
func (p *Publishing) Manifest() *tensor.Manifest { return p.manifest }

// SegmentBytes returns the length of the segment.
func (p *Publishing) SegmentBytes() int64 { return p.memory.view.layout.SegmentBytes }

// Descriptor returns the descriptor of the segment through which it can be mapped writable; false where there is none. It stays the store's own.
func (p *Publishing) Descriptor() (int, bool) {
	if p.memory.backing == nil {
		return -1, false
	}
	return p.memory.backing.Writable()
}

// How often a publisher that waits looks at the pins: readers let go of them without a word.
const (
	lookFirst = 200 * time.Microsecond
	lookLast  = 5 * time.Millisecond
)

// Begin takes a place for the next generation, or for generation want if that is not 0. While readers pin all places but the newest, it waits.
//
// *PinnedError, which wraps the context's error: all still were when ctx ended; *OldGenerationError: want is not above the newest; ErrBegun; os.ErrClosed.
func (p *Publishing) Begin(ctx context.Context, want uint64) (*Place, error) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for pause := lookFirst; ; pause = min(2*pause, lookLast) {
		place, err := p.TryBegin(want)
		busy := (*PinnedError)(nil)
		if !errors.As(err, &busy) {
			return place, err
		}
		if ctx.Err() == nil {
			timer.Reset(pause)
			select {
			case <-timer.C:
				continue
			case <-ctx.Done():
			}
		}
		p.store.fail(FailedPinned)
		busy.Cause = park.ContextError(ctx)
		return nil, busy
	}
}

// TryBegin is Begin without the wait.
func (p *Publishing) TryBegin(want uint64) (*Place, error) {
	s := p.store
	s.mu.Lock()
	defer s.unlock()
	switch {
	case p.closed || s.closed:
		return nil, errClosed
	case p.place != nil:
		return nil, ErrBegun
	}
	generation := s.newest + 1
	if want != 0 {
		generation = want
	}
	if generation <= s.newest || generation > GenerationMax {
		s.total.failed[FailedOldGeneration]++
		return nil, &OldGenerationError{generation, s.newest}
	}
	i := p.memory.take(s.readers)
	if i < 0 {
		return nil, &PinnedError{Places: len(p.memory.places), Pins: slices.DeleteFunc(s.pins(p.memory), func(pin Pin) bool { return pin.Place == p.memory.newest })}
	}
	s.total.begun++
	p.place = &Place{publishing: p, index: i, generation: generation, view: p.memory.view, summed: make([]bool, p.manifest.Len())}
	for t := range p.place.summed {
		if p.manifest.EncodedBytes(t) == 0 {
			p.place.SetSum(t, 0)
		}
	}
	return p.place, nil
}

// Close ends the publisher. A place that it has begun holds nothing; the table is free for another one. Closing twice is no error.
func (p *Publishing) Close() {
	s := p.store
	s.mu.Lock()
	defer s.unlock()
	if p.closed {
		return
	}
	p.closed = true
	if p.place != nil {
		p.giveBack(FailedEnded)
	}
	if s.publisher == p {
		s.publisher = nil
	}
	s.release(p.memory)
}

// giveBack makes the place free again. Called under the store's mu.
func (p *Publishing) giveBack(why Failure) {
	p.place.done = true
	p.place, p.memory.writing = nil, -1
	p.store.total.failed[why]++
}

// Place is a generation that is being written. Nobody else reads or writes its bytes until Commit, Abort or Close of its publisher.
type Place struct {
	publishing *Publishing
	view       *Segment
	index      int
	generation uint64
	summed     []bool // tensors whose sum was set
	done       bool
}

// Generation returns its number.
func (pl *Place) Generation() uint64 { return pl.generation }

// Index returns which place of the segment it is.
func (pl *Place) Index() int { return pl.index }

// Data returns its data_bytes, in which each tensor has its flat offset; the bytes between must be zero, and are not what they were. It must not be touched
// after Commit, Abort or Close.
func (pl *Place) Data() []byte { return pl.view.Data(pl.index) }

// SetSum says what CRC the bytes of a tensor have. Those of empty tensors are known.
func (pl *Place) SetSum(i int, crc uint32) {
	binary.LittleEndian.PutUint32(pl.view.SumBytes(pl.index)[4*i:], crc)
	pl.summed[i] = true
}

// Sums returns the sums that were set, or written by whoever has the segment mapped.
func (pl *Place) Sums() []uint32 { return decodeSums(pl.view.SumBytes(pl.index)) }

// Missing returns why the place is not whole: *IncompleteError if the sums of some tensors were not set, or nil.
func (pl *Place) Missing() error {
	missing, first := 0, 0
	for i := len(pl.summed) - 1; i >= 0; i-- {
		if !pl.summed[i] {
			missing, first = missing+1, i
		}
	}
	if missing == 0 {
		return nil
	}
	return &IncompleteError{pl.generation, pl.publishing.manifest.Tensor(first).Name, missing}
}

// Commit makes the generation the newest and returns its digest. The sums of all tensors must have been set: *IncompleteError, after which the place is still
// there.
func (pl *Place) Commit() (spec.Fingerprint, error) {
	if err := pl.Missing(); err != nil {
		pl.publishing.store.fail(FailedIncomplete)
		return spec.Fingerprint{}, err
	}
	return pl.CommitWritten()
}

// CommitWritten is Commit of a place into which another process has written tensors and sums.
func (pl *Place) CommitWritten() (spec.Fingerprint, error) {
	p, s := pl.publishing, pl.publishing.store
	sums := pl.Sums() // once: it may still be writing
	st := whole{
		generation: pl.generation, published: s.now().Round(0), publisher: p.number, sums: sums, digest: Digest(p.manifest, sums),
	}
	s.mu.Lock()
	defer s.unlock()
	switch {
	case s.closed || p.closed:
		return spec.Fingerprint{}, errClosed
	case pl.done:
		return spec.Fingerprint{}, ErrNotBegun
	}
	at := func(off, n int64) []byte { return pl.view.at(pl.index, off, n) }
	binary.LittleEndian.PutUint64(at(placePublished, 8), uint64(st.published.UnixNano()))
	copy(at(placeDigest, 32), st.digest[:])
	binary.LittleEndian.PutUint64(at(placePublisher, 8), st.publisher)
	failpoint.Hit("weights/commit/written")
	pl.done = true
	p.place, p.memory.writing = nil, -1
	s.show(p, pl.index, st)
	failpoint.Hit("weights/commit/shown")
	s.total.published++
	s.total.bytes += uint64(pl.view.layout.DataBytes)
	s.look()
	return st.digest, nil
}

// Abort gives the place back. After Commit it does nothing.
func (pl *Place) Abort() { pl.Fail(FailedAborted) }

// Fail is Abort that counts another reason.
func (pl *Place) Fail(why Failure) {
	s := pl.publishing.store
	s.mu.Lock()
	defer s.unlock()
	if !pl.done {
		pl.publishing.giveBack(why)
	}
}
