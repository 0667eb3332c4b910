package killtest

import (
	"cmp"
	"fmt"
	"hash/maphash"
	"maps"
	"slices"
	"sync"
)

// History is the oracle: what was acked, what was delivered, and what of it cannot be. Its methods may be called from any goroutine.
type History struct {
	// KeepsStreams says that a session has one stream number for ever, and that this number is no other session's.
	KeepsStreams bool

	mu       sync.Mutex
	groups   []string
	sessions map[uint64]*sessionHistory
	streams  map[uint64]uint64 // stream to session
	batches  map[uint64]seenBatch
	hash     maphash.Seed
	faults   []string
	samples  uint64 // in the ring, each once
	again    uint64 // deliveries of a batch to a group that had had it
}

type seenBatch struct {
	content uint64
	groups  uint64 // bit per group
}

type sessionHistory struct {
	sent, acked uint64
	stream      uint64
	inRing      numberSet
	read        []numberSet // per group
	order       []placed    // the newest spans, by batch
	ordered     placed      // what lies below those
}

// placed is where a span lies.
type placed struct{ batch, first, end uint64 }

// faultsMax bounds the list: after so many, the rest adds nothing.
const faultsMax = 50

// NewHistory returns the oracle of a table that these groups read from the start.
func NewHistory(groups ...string) *History {
	return &History{
		groups: groups, sessions: map[uint64]*sessionHistory{}, streams: map[uint64]uint64{}, batches: map[uint64]seenBatch{}, hash: maphash.MakeSeed(),
	}
}

func (h *History) fault(format string, args ...any) {
	if len(h.faults) < faultsMax {
		h.faults = append(h.faults, fmt.Sprintf(format, args...))
	}
}

func (h *History) session(id uint64) *sessionHistory {
	s := h.sessions[id]
	if s == nil {
		s = &sessionHistory{read: make([]numberSet, len(h.groups))}
		h.sessions[id] = s
	}
	return s
}

// Sent says that a session has handed its first n samples to its client, and was told that the first acked of them are in the ring.
func (h *History) Sent(session, n, acked uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.session(session)
	s.sent, s.acked = max(s.sent, n), max(s.acked, acked)
	if acked > n {
		h.fault("session %d: %d samples acked, and only %d sent", session, acked, n)
	}
}

// Deliver says that a trainer of a group has read a batch.
func (h *History) Deliver(group string, d Delivery) {
	h.mu.Lock()
	defer h.mu.Unlock()
	g := slices.Index(h.groups, group)
	if g < 0 {
		h.fault("batch %d was delivered to group %q, which this history does not know", d.Batch, group)
		return
	}
	content := maphash.String(h.hash, d.String())
	seen, known := h.batches[d.Batch]
	switch {
	case known && seen.content != content:
		h.fault("batch %d came to group %q with other content than before: %v", d.Batch, group, d)
		return
	case known && seen.groups>>g&1 == 1:
		h.again++
	}
	h.batches[d.Batch] = seenBatch{content, seen.groups | 1<<g}
	for _, span := range d.Spans {
		s := h.session(span.Session)
		s.read[g].add(span.First, span.N)
		if !known {
			h.place(d.Batch, s, span)
		}
	}
}

// place notes a span of a batch that nobody has had before.
func (h *History) place(batch uint64, s *sessionHistory, span Span) {
	h.samples += span.N
	if again := s.inRing.add(span.First, span.N); again > 0 {
		h.fault("session %d: %d of the samples %d to %d are in the ring twice, the second time in batch %d", span.Session, again, span.First, span.First+span.N-1, batch)
	}
	if h.KeepsStreams {
		if owner, ok := h.streams[span.Stream]; ok && owner != span.Session || s.stream != 0 && s.stream != span.Stream {
			h.fault("batch %d: session %d has stream %d, and had stream %d; stream %d is session %d's", batch, span.Session, span.Stream, s.stream, span.Stream, owner)
		}
		h.streams[span.Stream], s.stream = span.Session, span.Stream
	}
	s.order = append(s.order, placed{batch, span.First, span.First + span.N})
	if len(s.order) > 2*orderKept {
		h.settle(span.Session, s, orderKept)
	}
}

// orderKept is how many spans of a session may come out of order of their batches, as trainers beside each other deliver them.
const orderKept = 1 << 13

// settle checks that all but the newest spans of a session are in order.
func (h *History) settle(session uint64, s *sessionHistory, keep int) {
	slices.SortStableFunc(s.order, func(a, b placed) int { return cmp.Compare(a.batch, b.batch) })
	n := max(0, len(s.order)-keep)
	for _, p := range s.order[:n] {
		if p.first < s.ordered.end {
			h.fault("session %d: samples %d to %d in batch %d come after sample %d in batch %d", session, p.first, p.end-1, p.batch, s.ordered.end-1, s.ordered.batch)
		}
		s.ordered = p
	}
	s.order = slices.Delete(s.order, 0, n)
}

// Missing says what was acked and not delivered to a group, a line per session; nothing when all is there.
func (h *History) Missing() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []string
	for _, id := range slices.Sorted(maps.Keys(h.sessions)) {
		s := h.sessions[id]
		for g, group := range h.groups {
			if have := s.read[g].prefix(); have < s.acked {
				out = append(out, fmt.Sprintf("session %d: %d samples acked, group %q has only the first %d without a gap, and %d in all", id, s.acked, group, have, s.read[g].size()))
			}
		}
	}
	return out
}

// Finish says everything that is wrong, after the last delivery.
func (h *History) Finish() []string {
	missing := h.Missing()
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(h.sessions)) {
		s := h.sessions[id]
		h.settle(id, s, 0)
		if s.inRing.end() > s.sent {
			h.fault("session %d: sample %d was delivered, and only %d were sent", id, s.inRing.end()-1, s.sent)
		}
		if len(s.inRing) > 1 {
			h.fault("session %d: the ring has a gap: %v", id, s.inRing[:min(len(s.inRing), 4)])
		}
	}
	return append(missing, h.faults...)
}

// Totals are what a history amounts to.
type Totals struct {
	Sessions int
	Acked    uint64 // samples
	InRing   uint64 // samples, each once
	Batches  uint64
	Again    uint64 // second deliveries
	Lost     uint64 // samples that were acked and are missing to a group, once for each group
}

// Totals counts.
func (h *History) Totals() Totals {
	h.mu.Lock()
	defer h.mu.Unlock()
	t := Totals{Sessions: len(h.sessions), InRing: h.samples, Batches: uint64(len(h.batches)), Again: h.again}
	for _, s := range h.sessions {
		t.Acked += s.acked
		for _, read := range s.read {
			t.Lost += s.acked - min(s.acked, read.prefix())
		}
	}
	return t
}
