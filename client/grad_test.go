//go:build linux

package client

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ingestd/ingestd/reduce"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
)

// smallManifest has two tensors that share chunks, and an empty one.
func smallManifest(t testing.TB) *tensor.Manifest {
	return fakeManifest(t, floatTensor("w", 100, tensor.Encoding{}), floatTensor("empty", 0, tensor.Encoding{}), floatTensor("b", 10, tensor.Encoding{}))
}

// ones are the flat bytes of smallManifest where every element is x.
func ones(m *tensor.Manifest, x float32) []byte {
	encoded := make([][]byte, m.Len())
	for i := range encoded {
		for range m.EncodedBytes(i) / 4 {
			encoded[i] = binary.LittleEndian.AppendUint32(encoded[i], math.Float32bits(x))
		}
	}
	return flatBytes(m, encoded)
}

// late is a context whose deadline has passed: what lies there is looked at, and nothing is waited for.
func late(t *testing.T) context.Context {
	ctx, cancel := context.WithDeadline(t.Context(), time.Unix(1, 0))
	t.Cleanup(cancel)
	return ctx
}

// wantReason reads a step that has no quorum, and returns why a producer is missing.
func wantReason(t *testing.T, r *GradReader, step uint64, producer string, want string) {
	t.Helper()
	s, err := r.Step(late(t), step, StepOptions{Quorum: 100})
	timeout := (*StepTimeoutError)(nil)
	if !errors.As(err, &timeout) {
		t.Fatalf("step %d: %v, %v", step, s, err)
	}
	wantIs(t, err, os.ErrDeadlineExceeded, context.DeadlineExceeded)
	k := slices.IndexFunc(timeout.Missing, func(m Missing) bool { return m.Producer == producer })
	if k < 0 {
		t.Fatalf("step %d: %q is not missing: %v", step, producer, err)
	}
	if got := timeout.Missing[k].Reason; !strings.HasPrefix(got, want) {
		t.Errorf("step %d: %q is missing because %q; want %q", step, producer, got, want)
	}
	if !strings.Contains(err.Error(), producer) {
		t.Errorf("the error does not name %q: %v", producer, err)
	}
}

func wantHave(t *testing.T, r *GradReader, step uint64, quorum int, want ...string) *GradStep {
	t.Helper()
	s, err := r.Step(late(t), step, StepOptions{Quorum: quorum})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(s.Have, want) {
		t.Fatalf("have %q, want %q; missing %v", s.Have, want, s.Missing)
	}
	return s
}

// TestEveryByteOfAChunkCounts flips each byte of a chunk: header, data, and the padding, which does not count.
func TestEveryByteOfAChunkCounts(t *testing.T) {
	m := fakeManifest(t, floatTensor("w", 70, tensor.Encoding{}))
	for at := range tensor.HeaderBytes + 300 {
		ring := newFakeRing(t, m)
		p := ring.producer("p", 1, m)
		rows := []gradRow{p.opened(), p.row(tensor.Header{Flags: tensor.FlagBegin, Step: 7}, nil), p.row(chunkAt(m, 7, span{0, 280}), ones(m, 1)[:280])}
		data := make([]byte, fakeChunkBytes)
		copy(data, rows[2].data)
		rows[2].data = data
		padding := at >= tensor.HeaderBytes+280
		if at < tensor.HeaderBytes {
			rows[2].header[at] ^= 0x40
		} else {
			data[at-tensor.HeaderBytes] ^= 0x40
		}
		ring.rows = rows
		r := ring.reader()
		if padding {
			wantHave(t, r, 7, 1, "p").Release()
			continue
		}
		want := "bad chunk: "
		if at >= tensor.HeaderBytes {
			want = `bad chunk of tensor "w" at byte 0: the data is damaged`
		}
		wantReason(t, r, 7, "p", want)
		if s := r.Stats(); s.BadChunks != 1 || s.CompletedSteps != 0 || s.DroppedIncomplete != 1 {
			t.Errorf("byte %d: %+v", at, s)
		}
	}
}

// TestWhyMissing: each reason, and that it is another one's step that counts where there is a quorum.
func TestWhyMissing(t *testing.T) {
	m := smallManifest(t)
	sparse := fakeManifest(t, floatTensor("s", 100, tensor.Encoding{Kind: tensor.TopK, K: 3}))
	other := fakeManifest(t, floatTensor("x", 1, tensor.Encoding{}))
	flat := ones(m, 1)
	part := func(p *fakeProducer, step uint64, flags uint16) gradRow {
		h := chunkAt(p.manifest, step, span{0, 256})
		h.Flags = flags
		return p.row(h, flat[:256])
	}
	for name, c := range map[string]struct {
		rows func(p *fakeProducer) []gradRow
		want string
	}{
		"nothing": {func(p *fakeProducer) []gradRow { return []gradRow{p.opened()} }, "incomplete: 0 of 440 bytes"},
		"a part":  {func(p *fakeProducer) []gradRow { return []gradRow{part(p, 5, tensor.FlagBegin)} }, "incomplete: 256 of 440 bytes"},
		"gone":    {func(p *fakeProducer) []gradRow { return []gradRow{p.opened(), p.closed()} }, "connection ended"},
		"a part, gone": {func(p *fakeProducer) []gradRow {
			return []gradRow{p.opened(), part(p, 5, tensor.FlagBegin), p.closed()}
		}, "connection ended"},
		"aborted": {func(p *fakeProducer) []gradRow {
			return []gradRow{part(p, 5, tensor.FlagBegin), p.row(tensor.Header{Flags: tensor.FlagAbort, Step: 5}, nil)}
		}, "aborted"},
		"too old": {func(p *fakeProducer) []gradRow {
			row := part(p, 5, tensor.FlagBegin)
			tensor.MarkRefused(row.header[:])
			return []gradRow{row, row}
		}, "too old"},
		"no beginning": {func(p *fakeProducer) []gradRow { return []gradRow{p.opened(), part(p, 5, 0)} }, "incomplete: its beginning did not come to this reader"},
		"a hole": {func(p *fakeProducer) []gradRow {
			row := part(p, 5, tensor.FlagBegin)
			p.next += 3
			return []gradRow{row, p.row(chunkAt(m, 5, span{256, 400}), flat[256:400])}
		}, "incomplete: 3 chunks did not come to this reader"},
		"ahead": {func(p *fakeProducer) []gradRow {
			return []gradRow{part(p, 4, tensor.FlagBegin), part(p, 6, tensor.FlagBegin)}
		}, "incomplete: 0 of 440 bytes, and it is at step 6"},
		"next begun": {func(p *fakeProducer) []gradRow {
			return []gradRow{part(p, 5, tensor.FlagBegin), part(p, 6, tensor.FlagBegin)}
		}, "incomplete: 256 of 440 bytes"},
		"another overlaps": {func(p *fakeProducer) []gradRow {
			return []gradRow{part(p, 5, tensor.FlagBegin), p.row(chunkAt(m, 5, span{0, 400}), flat[:400])}
		}, `bad chunk of tensor "w" at byte 0: overlap`},
		"other bytes, unsummed": {func(p *fakeProducer) []gradRow {
			a, b := chunkAt(m, 5, span{0, 256}), chunkAt(m, 5, span{0, 256})
			a.Flags, b.Flags = tensor.FlagBegin|tensor.FlagNoCRC, tensor.FlagNoCRC
			return []gradRow{p.row(a, flat[:256]), p.row(b, make([]byte, 256))}
		}, `bad chunk of tensor "w" at byte 0: other bytes`},
		"outside": {func(p *fakeProducer) []gradRow {
			h := tensor.Header{Step: 5, Tensor: 2, Offset: 256}
			return []gradRow{part(p, 5, tensor.FlagBegin), p.row(h, flat[:256])}
		}, `bad chunk: chunk of tensor "b" at byte 256: lies outside`},
		"not listed": {func(p *fakeProducer) []gradRow {
			return []gradRow{part(p, 5, tensor.FlagBegin), p.row(tensor.Header{Flags: tensor.FlagEnd, Step: 5}, tensor.AppendEnd(nil, []uint32{2}))}
		}, `bad chunk: the step's end does not list tensor "w"`},
		"comes after its end": {func(p *fakeProducer) []gradRow {
			return []gradRow{p.row(tensor.Header{Flags: tensor.FlagBegin | tensor.FlagEnd, Step: 5}, tensor.AppendEnd(nil, []uint32{2})), part(p, 5, 0)}
		}, `bad chunk: the step's end does not list tensor "w"`},
		"a list out of order": {func(p *fakeProducer) []gradRow {
			return []gradRow{part(p, 5, tensor.FlagBegin), p.row(tensor.Header{Flags: tensor.FlagEnd, Step: 5}, []byte{2, 0, 0, 0, 0, 0, 0, 0})}
		}, "bad chunk: the end of a step lists tensor 0 after 2"},
		"another's stream": {func(p *fakeProducer) []gradRow {
			row := part(p, 5, 0)
			q := p.ring.producer("q", 2, m)
			bad := part(q, 5, tensor.FlagBegin)
			bad.stream, bad.number = p.stream, row.number
			p.next = row.number + 1
			return []gradRow{p.opened(), bad, part(p, 5, 0)}
		}, "bad chunk: it came in stream 1 and says that it is of stream 2"},
		"says it is opened": {func(p *fakeProducer) []gradRow {
			row := part(p, 5, tensor.FlagBegin)
			forged := p.closed()
			forged.stream, forged.number = p.stream, p.next
			return []gradRow{row, forged}
		}, "bad chunk: it came in stream 1 and says that it is of stream 1"},
		"another's name": {func(p *fakeProducer) []gradRow {
			row, forged := part(p, 5, tensor.FlagBegin), tensor.Header{Step: 5, Stream: 1, Producer: 77, Manifest: m.ID()}
			r := gradRow{stream: 1, number: p.next}
			forged.Flags = tensor.FlagAbort
			forged.Put(r.header[:])
			return []gradRow{row, r}
		}, "bad chunk: it says that it is of producer 000000000000004d"},
		"an index outside": {func(p *fakeProducer) []gradRow {
			p.manifest = sparse
			pairs := make([]byte, 24)
			pairs[8] = 100
			h := chunkAt(sparse, 5, span{0, 24})
			h.Flags = tensor.FlagBegin
			return []gradRow{p.row(h, pairs)}
		}, `bad chunk of tensor "s" at byte 0: pairs from here on: entry 1 has index 100`},
		"unknown manifest": {func(p *fakeProducer) []gradRow {
			rows := []gradRow{p.opened()}
			p.manifest = fakeManifest(t, floatTensor("unknown", 64, tensor.Encoding{}))
			return append(rows, part(p, 5, tensor.FlagBegin), part(p, 5, 0))
		}, "incomplete: 0 of 440 bytes"},
		"manifest differs": {func(p *fakeProducer) []gradRow {
			rows := p.send(newRand(), 5, flat)
			q := p.ring.producer("q", 2, other)
			return append(rows, p.closed(), q.opened())
		}, "manifest differs"},
	} {
		t.Run(name, func(t *testing.T) {
			ring := newFakeRing(t, m, sparse, other)
			ring.rows = c.rows(ring.producer("p", 1, m))
			wantReason(t, ring.reader(), 5, "p", c.want)
		})
	}
}

// TestWhoIsWaitedFor: for those that are there and may still complete the step, and for a quorum. The script ends with the table, so that waiting shows as an error.
func TestWhoIsWaitedFor(t *testing.T) {
	m := smallManifest(t)
	flat := ones(m, 1)
	for name, c := range map[string]struct {
		rows   func(p, q *fakeProducer) []gradRow
		quorum int
		have   int // -1: the step is waited for
	}{
		"both have it": {func(p, q *fakeProducer) []gradRow {
			return slices.Concat(p.send(newRand(), 1, flat), q.send(newRand(), 1, flat))
		}, 2, 2},
		"no quorum": {func(p, q *fakeProducer) []gradRow { return p.send(newRand(), 1, flat) }, 2, -1},
		"nobody":    {func(p, q *fakeProducer) []gradRow { return nil }, 1, -1},
		"a quorum, one is to come": {func(p, q *fakeProducer) []gradRow {
			return append([]gradRow{q.opened()}, p.send(newRand(), 1, flat)...)
		}, 1, -1},
		"a quorum, one comes": {func(p, q *fakeProducer) []gradRow {
			return slices.Concat([]gradRow{q.opened()}, p.send(newRand(), 1, flat), q.send(newRand(), 1, flat))
		}, 1, 2},
		"a quorum, one is gone": {func(p, q *fakeProducer) []gradRow {
			return append([]gradRow{q.opened(), q.closed()}, p.send(newRand(), 1, flat)...)
		}, 1, 1},
		"one goes": {func(p, q *fakeProducer) []gradRow {
			return append(append([]gradRow{q.opened()}, p.send(newRand(), 1, flat)...), q.closed())
		}, 1, 1},
		"one goes in the midst and comes back": {func(p, q *fakeProducer) []gradRow {
			half := q.send(newRand(), 1, flat)
			return slices.Concat([]gradRow{p.opened()}, half[:1], []gradRow{q.closed()}, half[1:], p.send(newRand(), 1, flat))
		}, 1, 2},
		"one is past it": {func(p, q *fakeProducer) []gradRow {
			return append(q.send(newRand(), 2, flat), p.send(newRand(), 1, flat)...)
		}, 1, 1},
		"one gives it up": {func(p, q *fakeProducer) []gradRow {
			return append([]gradRow{q.row(tensor.Header{Flags: tensor.FlagBegin, Step: 1}, nil), q.row(tensor.Header{Flags: tensor.FlagAbort, Step: 1}, nil)},
				p.send(newRand(), 1, flat)...)
		}, 1, 1},
		"one gives it up and begins again": {func(p, q *fakeProducer) []gradRow {
			given := []gradRow{q.row(tensor.Header{Flags: tensor.FlagBegin, Step: 1}, nil), q.row(tensor.Header{Flags: tensor.FlagAbort, Step: 1}, nil)}
			again := q.send(newRand(), 1, flat)
			return slices.Concat(given, again[:1], p.send(newRand(), 1, flat), again[1:])
		}, 1, 2},
		"one complete, then gone": {func(p, q *fakeProducer) []gradRow {
			return slices.Concat(q.send(newRand(), 1, flat), []gradRow{q.closed()}, p.send(newRand(), 1, flat))
		}, 2, 2},
	} {
		t.Run(name, func(t *testing.T) {
			ring := newFakeRing(t, m)
			ring.rows = c.rows(ring.producer("p", 1, m), ring.producer("q", 2, m))
			r := ring.reader()
			ahead := len(ring.rows)
			s, err := r.Step(t.Context(), 1, StepOptions{Quorum: c.quorum})
			switch {
			case c.have < 0 && c.quorum > 1, c.have < 0 && ahead == 0:
				if wantIs(t, err, ErrShuttingDown); s != nil {
					t.Error(s.Have)
				}
			case c.have < 0: // the end of the table is as good as a deadline
				if err != nil || len(ring.rows) > 0 || len(s.Missing) != 1 {
					t.Errorf("%v, %d rows left", err, len(ring.rows))
				}
			case err != nil || len(s.Have) != c.have:
				t.Errorf("%v: %v", s, err)
			}
		})
	}
}

// TestOrderOfArrivalDoesNotMatter sums numbers whose sum depends on the order of additions, as they come in many orders.
func TestOrderOfArrivalDoesNotMatter(t *testing.T) {
	m := fakeManifest(t, floatTensor("w", 700, tensor.Encoding{}), floatTensor("h", 300, tensor.Encoding{Kind: tensor.BF16}))
	values := map[string][]byte{}
	for k, name := range []string{"d", "a", "c", "b"} {
		values[name] = flatBytes(m, randomTensors(t, rand.New(rand.NewPCG(9, uint64(k))), m))
	}
	var first map[string][]float32
	for order := range uint64(30) {
		r := rand.New(rand.NewPCG(3, order))
		ring := newFakeRing(t, m)
		var queues [][]gradRow
		for name, flat := range values {
			p := ring.producer(name, uint64(len(queues)+1), m)
			queues = append(queues, append([]gradRow{p.opened()}, p.send(r, 0, flat)...))
		}
		for len(queues) > 0 {
			k := r.IntN(len(queues))
			ring.rows = append(ring.rows, queues[k][0])
			if queues[k] = queues[k][1:]; len(queues[k]) == 0 {
				queues = slices.Delete(queues, k, k+1)
			}
		}
		ring.prefetch = 3
		out := map[string][]float32{"w": make([]float32, 700), "h": make([]float32, 300)}
		reader := ring.reader()
		s, err := reader.Step(t.Context(), 0, StepOptions{Quorum: 4, Into: out})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Sum(out); err != nil {
			t.Fatal(err)
		}
		if first == nil {
			first = out
		}
		for name := range out {
			for i := range out[name] {
				if math.Float32bits(out[name][i]) != math.Float32bits(first[name][i]) {
					t.Fatalf("order %d: element %d of %s is %v, was %v", order, i, name, out[name][i], first[name][i])
				}
			}
		}
	}
}

// TestManyProducers: more than are added in one pass over memory.
func TestManyProducers(t *testing.T) {
	const producers = 2*reduce.SumMax + 3
	m := fakeManifest(t, floatTensor("w", 700, tensor.Encoding{}), floatTensor("b", 65, tensor.Encoding{Kind: tensor.F16}))
	ring := newFakeRing(t, m)
	want := map[string][]float32{"w": make([]float32, 700), "b": make([]float32, 65)}
	for k := range producers {
		encoded := randomTensors(t, rand.New(rand.NewPCG(4, uint64(k))), m)
		ring.rows = append(ring.rows, ring.producer(fmt.Sprintf("w%02d", k), uint64(k+1), m).send(newRand(), 0, flatBytes(m, encoded))...)
		for i := range m.Len() {
			x := m.Tensor(i)
			for e, v := range decoded(&x, encoded[i]) {
				if k == 0 {
					want[x.Name][e] = v
				} else {
					want[x.Name][e] += v
				}
			}
		}
	}
	s, err := ring.reader().Step(t.Context(), 0, StepOptions{Quorum: producers})
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]float32{"w": make([]float32, 700), "b": make([]float32, 65)}
	if err := s.Sum(out); err != nil {
		t.Fatal(err)
	}
	for name := range out {
		for e, got := range out[name] {
			if w := want[name][e]; math.Float32bits(got) != math.Float32bits(w) && (got == got || w == w) {
				t.Fatalf("element %d of %s is %v, want %v", e, name, got, w)
			}
		}
	}
}

// TestNotANumberPasses: what one producer sent comes out bit by bit.
func TestNotANumberPasses(t *testing.T) {
	m := fakeManifest(t, floatTensor("w", 64, tensor.Encoding{}))
	flat := ones(m, 1)
	want := []uint32{0x7f800000, 0xff800000, 0x7fc12345, 0xffc00000, 1, 0x80000000}
	for i, bits := range want {
		binary.LittleEndian.PutUint32(flat[4*i:], bits)
	}
	ring := newFakeRing(t, m)
	ring.rows = ring.producer("p", 1, m).send(newRand(), 0, flat)
	s := wantHave(t, ring.reader(), 0, 1, "p")
	out := map[string][]float32{"w": make([]float32, 64)}
	if err := s.Sum(out); err != nil {
		t.Fatal(err)
	}
	for i, bits := range want {
		if got := math.Float32bits(out["w"][i]); got != bits {
			t.Errorf("%#x came out as %#x", bits, got)
		}
	}
}

func TestStepMisuse(t *testing.T) {
	m := fakeManifest(t, floatTensor("layers.0.weight", 4, tensor.Encoding{}), tensor.Tensor{Name: "ids", DType: spec.I64, Shape: []int64{2}})
	ring := newFakeRing(t, m)
	p := ring.producer("p", 1, m)
	flat := make([]byte, m.DataBytes())
	for step := range uint64(4) {
		ring.rows = append(ring.rows, p.send(newRand(), step, flat)...)
	}
	r := ring.reader()
	wantHave(t, r, 0, 1, "p").Release()
	for says, into := range map[string]map[string][]float32{
		`did you mean "layers.0.weight"`: {"layers.0.wieght": nil},
		"has 4 elements; 5 are given":    {"layers.0.weight": make([]float32, 5)},
		"I64[2], which cannot be summed": {"ids": make([]float32, 2)},
		`no tensor "quite other" among`:  {"quite other": nil},
	} {
		if s, err := r.Step(t.Context(), 1, StepOptions{Into: into}); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v, %v; want %q", s, err, says)
		}
	}
	s := wantHave(t, r, 1, 1, "p")
	if err := s.Sum(map[string][]float32{"ids": make([]float32, 2)}); err == nil {
		t.Error("a sum of integers was made")
	}
	if _, err := s.Tensor("nobody", "ids"); err == nil || !strings.Contains(err.Error(), `"nobody"`) {
		t.Error(err)
	}
	if _, err := r.Step(t.Context(), 2, StepOptions{}); err == nil || !strings.Contains(err.Error(), "Release it first") {
		t.Error(err)
	}
	s.Release()
	s.Release()
	wantIs(t, s.Sum(nil), os.ErrClosed)
	if _, err := s.Tensor("p", "ids"); !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
	if _, err := r.Step(t.Context(), 1, StepOptions{}); err == nil || !strings.Contains(err.Error(), "steps below 2") {
		t.Error(err)
	}
	if _, err := r.Step(t.Context(), 2, StepOptions{Quorum: -1}); err == nil {
		t.Error("a negative quorum was taken")
	}
	wantHave(t, r, 3, 1, "p") // step 2 is dropped, and 3 released by Close
	if err := r.Close(); err != nil || !ring.closed || ring.holding != 0 {
		t.Errorf("%v, closed %v, %d held", err, ring.closed, ring.holding)
	}
	if _, err := r.Step(t.Context(), 4, StepOptions{}); !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
	if s := r.Stats(); s.Late == 0 || s.CompletedSteps != 3 {
		t.Errorf("%+v", s)
	}
}

// TestIncompleteStepsAreDropped after a while, unless they are waited for, and producers that are gone are forgotten.
func TestIncompleteStepsAreDropped(t *testing.T) {
	m := smallManifest(t)
	ring := newFakeRing(t, m)
	p, q := ring.producer("p", 1, m), ring.producer("q", 2, m)
	half := p.send(newRand(), 5, ones(m, 1))[:1]
	ring.rows = slices.Concat([]gradRow{q.opened()}, half, []gradRow{q.closed()})
	r := ring.reader()
	now := time.Unix(1e9, 0)
	r.core.now = func() time.Time { return now }
	wantReason(t, r, 5, "p", "incomplete: ")
	now = now.Add(DefaultKeepIncomplete)
	wantReason(t, r, 5, "p", "incomplete: ") // waited for
	if s := r.Stats(); s.DroppedIncomplete != 0 || r.core.producers[2] != nil {
		t.Errorf("%+v, %v", s, r.core.producers)
	}
	r.core.waiting = false
	r.core.oldest = time.Time{}
	now = now.Add(-time.Nanosecond)
	if r.core.tidy(); r.Stats().DroppedIncomplete != 0 {
		t.Error("dropped too early")
	}
	now, r.core.oldest = now.Add(time.Nanosecond), time.Time{}
	if r.core.tidy(); r.Stats().DroppedIncomplete != 1 {
		t.Error("not dropped")
	}
}

// TestManifests: each is asked for once; where that fails the chunk waits; one that is not known may be known when its producer comes again.
func TestManifests(t *testing.T) {
	m := smallManifest(t)
	ring := newFakeRing(t)
	p := ring.producer("p", 1, m)
	flat := ones(m, 1)
	ring.rows = append([]gradRow{p.opened()}, p.send(newRand(), 1, flat)...)
	r := ring.reader()
	ring.fetchErr = io.ErrUnexpectedEOF
	for range 2 {
		if _, err := r.Step(t.Context(), 1, StepOptions{}); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatal(err)
		}
	}
	if r.Manifest() != nil {
		t.Error("there is a manifest")
	}
	ring.fetchErr, ring.fetched = nil, 0
	if _, err := r.Step(t.Context(), 1, StepOptions{}); !errors.Is(err, ErrShuttingDown) {
		t.Fatal(err)
	}
	if ring.fetched != 1 || r.Stats().BadChunks == 0 {
		t.Errorf("asked %d times for what is not known; %+v", ring.fetched, r.Stats())
	}
	ring.manifests[m.ID()] = m
	ring.rows = append([]gradRow{p.closed(), p.opened()}, p.send(newRand(), 1, flat)...)
	wantHave(t, r, 1, 1, "p").Release()
	if ring.fetched != 2 || !r.Manifest().Equal(m) { // of the chunk CLOSED it was known not to be known
		t.Errorf("asked %d times", ring.fetched)
	}
	for i := range 2 * layoutsMax { // a reader does not remember all there ever were
		other := fakeManifest(t, floatTensor(fmt.Sprint(i), 1, tensor.Encoding{}))
		ring.manifests[other.ID()] = other
		q := ring.producer("q", 2, other)
		ring.rows = append(ring.rows, q.opened())
	}
	wantReason(t, r, 2, "q", "incomplete: 0 of 4 bytes")
	if len(r.layouts) > layoutsMax {
		t.Errorf("%d manifests are remembered", len(r.layouts))
	}
}

// TestLostBatches: a reader whose group lost some goes on, and uses nothing that may have a hole.
func TestLostBatches(t *testing.T) {
	m := smallManifest(t)
	ring := newFakeRing(t, m)
	p := ring.producer("p", 1, m)
	flat := ones(m, 1)
	a := p.send(newRand(), 1, flat)
	b := p.send(newRand(), 1, flat) // the same step anew: its beginning is lost
	ring.rows = slices.Concat(a[:len(a)-1], b[1:], p.send(newRand(), 2, flat))
	ring.lost = &LostBatchesError{Group: "default", First: 3, N: 2}
	r := ring.reader()
	wantReason(t, r, 1, "p", "incomplete: 2 chunks did not come")
	wantHave(t, r, 2, 1, "p").Release()
	if s := r.Stats(); s.Lost != 2 {
		t.Errorf("%+v", s)
	}
}

// TestSpillLimit: beyond it the reader takes nothing more, until the context ends.
func TestSpillLimit(t *testing.T) {
	m := fakeManifest(t, floatTensor("w", 64*40, tensor.Encoding{}))
	ring := newFakeRing(t, m)
	ring.prefetch = 4
	p := ring.producer("p", 1, m)
	h := chunkAt(m, 1, span{0, 256})
	h.Flags = tensor.FlagBegin
	flat := ones(m, 1)
	ring.rows = append(ring.rows, p.row(h, flat[:256]))
	for at := int64(256); at < 40*256; at += 256 {
		ring.rows = append(ring.rows, p.row(chunkAt(m, 1, span{at, at + 256}), flat[at:at+256]))
	}
	r := ring.reader()
	r.cfg.SpillBytes = 10 * 256
	_, err := r.Step(soon(t), 1, StepOptions{})
	if !errors.Is(err, os.ErrDeadlineExceeded) || !strings.Contains(err.Error(), "p (incomplete: 3584 of 10240 bytes)") {
		t.Error(err)
	}
	if s := r.Stats(); s.HeapBytes != 10*256 || s.SpilledBytes != 10*256 {
		t.Errorf("%+v", s)
	}
	r.cfg.SpillBytes = 36 * 256
	s, err := r.Step(t.Context(), 1, StepOptions{})
	if err != nil {
		t.Fatal(err)
	}
	s.Release()
	if s := r.Stats(); s.HeapBytes != 0 || s.SpilledBytes != 36*256 {
		t.Errorf("%+v", s)
	}
}

// TestTornMemory: where the daemon died and its successor gave the memory to others, no sum is made of it.
func TestTornMemory(t *testing.T) {
	m := smallManifest(t)
	for _, spilled := range []bool{false, true} {
		ring := newFakeRing(t, m)
		p := ring.producer("p", 1, m)
		ring.rows = p.send(newRand(), 1, ones(m, 1))
		r := ring.reader()
		s := wantHave(t, r, 1, 1, "p")
		tear := func() {
			for _, b := range r.core.held {
				if b.lease != nil {
					b.lease.(*fakeLease).torn = true
				}
			}
		}
		tear()
		if spilled {
			s.Release()
			h := chunkAt(m, 2, span{0, 256})
			h.Flags = tensor.FlagBegin
			ring.rows = []gradRow{p.row(h, ones(m, 1)[:256])}
			wantReason(t, r, 2, "p", "incomplete")
			ring.prefetch = 1
			tear()
			_, err := r.Step(t.Context(), 2, StepOptions{})
			wantIs(t, err, ErrDaemonGone)
			continue
		}
		wantIs(t, s.Sum(map[string][]float32{"w": make([]float32, 100)}), ErrDaemonGone)
		_, err := s.Tensor("p", "w")
		wantIs(t, err, ErrDaemonGone)
	}
}

// TestStepsAhead: what is remembered of a producer is bounded, whatever it sends.
func TestStepsAhead(t *testing.T) {
	m := smallManifest(t)
	ring := newFakeRing(t, m)
	p := ring.producer("p", 1, m)
	for step := range uint64(aheadMax + 10) {
		flags := uint16(tensor.FlagBegin | tensor.FlagEnd) // complete with no tensor
		if step%2 == 0 {
			flags = tensor.FlagAbort
		}
		ring.rows = append(ring.rows, p.row(tensor.Header{Flags: flags, Step: step}, nil))
	}
	r := ring.reader()
	wantReason(t, r, 1, "p", "incomplete: 0 of 440 bytes, and it is at step")
	if n := len(r.core.producers[1].ends); n != aheadMax {
		t.Errorf("%d steps are remembered", n)
	}
	wantHave(t, r, 11, 1, "p").Release()
}

// TestForgottenSession: a name that comes back with another stream is one producer.
func TestForgottenSession(t *testing.T) {
	m := smallManifest(t)
	ring := newFakeRing(t, m)
	old, anew := ring.producer("p", 1, m), ring.producer("p", 2, m)
	ring.rows = slices.Concat(old.send(newRand(), 1, ones(m, 1)), anew.send(newRand(), 1, ones(m, 2)))
	s := wantHave(t, ring.reader(), 1, 1, "p")
	out := map[string][]float32{"w": make([]float32, 100), "b": make([]float32, 10), "empty": nil}
	if err := s.Sum(out); err != nil || out["w"][0] != 1 && out["w"][0] != 2 || out["b"][9] != out["w"][0] {
		t.Errorf("%v, %v", err, out)
	}
}

func TestGradConfigDefaults(t *testing.T) {
	for says, cfg := range map[string]GradConfig{
		"Table is empty": {}, "Prefetch is -1": {Table: "t", Prefetch: -1}, "SpillBytes -1": {Table: "t", SpillBytes: -1}, "MemoryBytes -1": {Table: "t", MemoryBytes: -1}, "KeepIncomplete -1ns": {Table: "t", KeepIncomplete: -1},
	} {
		if _, err := cfg.withDefaults(); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v; want %q", err, says)
		}
	}
}
