package steps

import (
	"context"
	"errors"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/tensor"
)

// announcement is what is to be said of one stream.
type announcement struct {
	stream, producer, manifest uint64
	flag                       uint16 // tensor.FlagOpened or FlagClosed
}

// herald writes announcements into the ring. Whoever holds the turn writes.
type herald struct {
	ring   *ring.Ring
	stream uint64 // the daemon's own
	seat   *park.Waiter
	next   uint64        // number of the next chunk; the turn holder's
	turn   chan struct{} // holds one token while nobody writes
	wake   chan struct{}

	mu      sync.Mutex
	unsaid  []announcement // one per stream at most, in the order in which they came
	written uint64
}

func newHerald(r *ring.Ring) *herald {
	h := &herald{ring: r, stream: r.NextStream(), seat: park.NewWaiter(), turn: make(chan struct{}, 1), wake: make(chan struct{}, 1)}
	h.turn <- struct{}{}
	return h
}

// say adds an announcement, and writes it if there is a slot at once: what a producer sends then lies behind it. One of the same stream that was not written
// yet is replaced: a chunk CLOSED lies behind all that the stream sent wherever it comes, and a producer that is back is not said to have been away.
func (h *herald) say(a announcement) {
	h.add(a)
	if !h.tryWrite() {
		h.later()
	}
}

func (h *herald) add(a announcement) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if i := slices.IndexFunc(h.unsaid, func(b announcement) bool { return b.stream == a.stream }); i >= 0 {
		h.unsaid[i] = a
	} else {
		h.unsaid = append(h.unsaid, a)
	}
}

// later leaves what is unsaid to Run.
func (h *herald) later() {
	select {
	case h.wake <- struct{}{}:
	default:
	}
}

// tryWrite writes what there is a slot for, and tells whether nothing is left to say.
func (h *herald) tryWrite() bool {
	for {
		select {
		case <-h.turn:
		default:
			return false
		}
		full := false
		for !full && h.any() {
			run, ok := h.ring.TryReserveInTurn(1)
			if full = !ok; ok {
				h.fill(run)
			}
		}
		h.turn <- struct{}{}
		if full || !h.any() { // else it came while we had the turn
			return !full
		}
	}
}

func (h *herald) any() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.unsaid) > 0
}

func (h *herald) stats() (written uint64, unsaid int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.written, len(h.unsaid)
}

// write writes all that is to be said. It returns os.ErrClosed when the ring is closed, or the context's error.
func (h *herald) write(ctx context.Context) error {
	select {
	case <-h.turn:
	case <-ctx.Done():
		return park.ContextError(ctx)
	}
	defer func() { h.turn <- struct{}{} }()
	for {
		if !h.any() {
			return nil
		}
		run, err := h.ring.Reserve(ctx, h.seat, 1)
		if err != nil {
			return err
		}
		h.fill(run)
	}
}

// fill writes the first announcement as it is now, which is not as it was before there was a slot.
func (h *herald) fill(run ring.Run) {
	h.mu.Lock()
	a := h.unsaid[0]
	h.unsaid = slices.Delete(h.unsaid, 0, 1)
	h.written++
	h.mu.Unlock()
	header := tensor.Header{Flags: a.flag, Stream: a.stream, Producer: a.producer, Manifest: a.manifest}
	header.Put(h.ring.RunColumn(run, headerColumn))
	h.ring.Commit(run, h.stream, h.next, uint64(time.Now().UnixNano()), ring.Mark{})
	h.next++
	if h.ring.BatchSize() > 1 { // nobody waits for others to be told who is there
		h.ring.Flush()
	}
}

// Run announces producers as they come and go, until ctx ends or the ring is closed.
func (k *Keeper) Run(ctx context.Context) error {
	for {
		select {
		case <-k.herald.wake:
		case <-ctx.Done():
			return nil
		}
		if err := k.herald.write(ctx); errors.Is(err, os.ErrClosed) {
			return nil
		}
	}
}

// Flush writes what is still to be said, and waits for room in the ring until ctx ends. It returns os.ErrClosed when the ring is closed.
func (k *Keeper) Flush(ctx context.Context) error { return k.herald.write(ctx) }

// announceFound says of the producers whose chunks were found in a kept segment that they are gone, unless that is the last that was found of them.
func (k *Keeper) announceFound(found *ring.Recovery) {
	last := map[uint64]tensor.Header{} // by stream
	for _, b := range found.Batches {
		headers := b.Column(headerColumn)
		for row := range b.Count {
			if h, err := tensor.ParseHeader(headers[row*tensor.HeaderBytes:]); err == nil {
				last[h.Stream] = h
			}
		}
	}
	for _, s := range k.ring.Sessions() {
		if h, ok := last[s.Stream]; ok && h.Flags&tensor.FlagClosed == 0 {
			k.herald.add(announcement{stream: s.Stream, producer: h.Producer, manifest: h.Manifest, flag: tensor.FlagClosed})
			k.herald.later() // the ring has no sampler yet
		}
	}
}

// CountData counts the chunks that carry data that may be used, of a column of headers with so many rows.
func CountData(headers []byte, rows int) (n uint64) {
	for row := range rows {
		if h, err := tensor.ParseHeader(headers[row*tensor.HeaderBytes:]); err == nil && h.HasData() && h.Flags&tensor.FlagRefused == 0 {
			n++
		}
	}
	return n
}
