//go:build linux

package client

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/ingestd/ingestd/reduce"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
)

var gradSeed = flag.Uint64("grad-seed", 0, "run the model of the reader of steps with this seed only")

var inf, nan = math.Inf(1), math.NaN()

// plan is what one producer does in one step, and what must come of it.
type gradPlan struct {
	rows    []gradRow
	encoded [][]byte // complete: these are its tensors; nil: it is not
	subset  []uint32
}

// gradModel is a random life of some producers.
type gradModel struct {
	t         *testing.T
	r         *rand.Rand
	m         *tensor.Manifest
	ring      *fakeRing
	producers []*fakeProducer
	plans     [][]gradPlan // by producer, by step
}

func newGradModel(t *testing.T, seed uint64) *gradModel {
	r := rand.New(rand.NewPCG(seed, 1))
	g := &gradModel{t: t, r: r, m: randomManifest(t, r)}
	g.ring = newFakeRing(t, g.m)
	g.ring.prefetch = 2 + r.IntN(20)
	g.ring.perBatch = func() int { return 1 + r.IntN(3) }
	names := []string{"b", "a", "worker-10", "worker-9", "ä"}
	r.Shuffle(len(names), func(a, b int) { names[a], names[b] = names[b], names[a] })
	for k := range 1 + r.IntN(len(names)) {
		g.producers = append(g.producers, g.ring.producer(names[k], uint64(10+k), g.m))
	}
	steps := 1 + r.IntN(5)
	var queues [][]gradRow
	for _, p := range g.producers {
		var plans []gradPlan
		rows := []gradRow{p.opened()}
		for step := range steps {
			plan := g.plan(p, uint64(step))
			plans = append(plans, plan)
			rows = append(rows, plan.rows...)
		}
		if r.IntN(2) == 0 {
			rows = append(rows, p.closed())
		}
		g.plans = append(g.plans, plans)
		queues = append(queues, rows)
	}
	for len(queues) > 0 {
		k := r.IntN(len(queues))
		n := 1 + r.IntN(min(5, len(queues[k])))
		g.ring.rows = append(g.ring.rows, queues[k][:n]...)
		if queues[k] = queues[k][n:]; len(queues[k]) == 0 {
			queues = slices.Delete(queues, k, k+1)
		}
	}
	return g
}

// plan makes one step of a producer.
func (g *gradModel) plan(p *fakeProducer, step uint64) gradPlan {
	r := g.r
	encoded := randomTensors(g.t, r, g.m)
	flat := flatBytes(g.m, encoded)
	whole := func() []gradRow { return p.send(r, step, flat) }
	// begun is a part of a transaction that never becomes whole.
	begun := func() []gradRow {
		rows := p.send(r, step, flatBytes(g.m, randomTensors(g.t, r, g.m)))
		rows = rows[:r.IntN(len(rows))]
		p.next = rows0(rows, p.next)
		return rows
	}
	switch r.IntN(14) {
	case 0: // it is given up, and not sent again
		return gradPlan{rows: append(begun(), p.row(tensor.Header{Flags: tensor.FlagAbort, Step: step}, nil))}
	case 1: // it is given up, and sent again
		rows := append(begun(), p.row(tensor.Header{Flags: tensor.FlagAbort, Step: step}, nil))
		return gradPlan{rows: append(rows, whole()...), encoded: encoded}
	case 2: // the producer dies, and its successor begins anew
		rows := append(begun(), p.closed(), p.opened())
		return gradPlan{rows: append(rows, whole()...), encoded: encoded}
	case 3: // the connection ends in the midst, and it goes on
		rows := whole()
		at := r.IntN(len(rows))
		return gradPlan{rows: slices.Insert(rows, at, p.closed(), p.opened()), encoded: encoded}
	case 4: // a damaged chunk, and nothing after
		return gradPlan{rows: g.damage(p, whole())}
	case 5: // a damaged chunk, and then all of it again
		rows := g.damage(p, whole())
		return gradPlan{rows: append(rows, whole()...), encoded: encoded}
	case 6: // chunks come twice
		rows := whole()
		again := slices.Clone(rows[:r.IntN(len(rows))])
		return gradPlan{rows: g.renumber(p, append(rows, again...)), encoded: encoded}
	case 7: // all of it comes twice, the second time with other bytes, which are not looked at
		return gradPlan{rows: append(whole(), p.send(r, step, flatBytes(g.m, randomTensors(g.t, r, g.m)))...), encoded: encoded}
	case 8: // too old
		rows := whole()
		for i := range rows {
			tensor.MarkRefused(rows[i].header[:])
		}
		return gradPlan{rows: rows}
	case 9: // nothing at all
		return gradPlan{}
	case 10, 11: // some of the tensors
		subset := []uint32{}
		for i := range uint32(g.m.Len()) {
			if r.IntN(2) == 0 {
				subset = append(subset, i)
			}
		}
		if len(subset) < g.m.Len() {
			return gradPlan{rows: p.sendPart(r, step, flat, subset), encoded: encoded, subset: subset}
		}
	}
	return gradPlan{rows: whole(), encoded: encoded}
}

// rows0 is the number of the sample after some rows.
func rows0(rows []gradRow, next uint64) uint64 {
	if len(rows) == 0 {
		return next // none of what was made is used: the numbers have a hole, which is not in a transaction
	}
	return rows[len(rows)-1].number + 1
}

// renumber gives rows the numbers in which they come.
func (g *gradModel) renumber(p *fakeProducer, rows []gradRow) []gradRow {
	first := rows[0].number
	for i := range rows {
		rows[i].number = first + uint64(i)
	}
	p.next = first + uint64(len(rows))
	return rows
}

// damage flips a bit in what is summed of one row. The step cannot be complete without it.
func (g *gradModel) damage(p *fakeProducer, rows []gradRow) []gradRow {
	bad := &rows[g.r.IntN(len(rows))]
	if h, err := tensor.ParseHeader(bad.header[:]); err != nil || h.Length == 0 || h.Flags&tensor.FlagNoCRC != 0 || g.r.IntN(2) == 0 {
		bad.header[g.r.IntN(len(bad.header))] ^= 1 << g.r.IntN(8)
		if _, err := tensor.ParseHeader(bad.header[:]); err == nil { // the one bit that is not summed
			bad.header[0] ^= 1
		}
		return rows
	}
	bad.data = slices.Clone(bad.data)
	bad.data[g.r.IntN(len(bad.data))] ^= 1 << g.r.IntN(8)
	return rows
}

// wantSums computes the sum of each tensor as the docs say: decoded, one producer after the other in the order of names.
func (g *gradModel) wantSums(step int, mean bool) map[string][]float32 {
	order := slices.SortedFunc(maps.Keys(g.producersByIndex()), func(a, b int) int {
		if g.producers[a].name < g.producers[b].name {
			return -1
		}
		return 1
	})
	sums := map[string][]float32{}
	for i := range g.m.Len() {
		x := g.m.Tensor(i)
		if x.DType == spec.I32 {
			continue
		}
		sum, n := make([]float32, x.Elements()), 0
		for _, k := range order {
			plan := g.plans[k][step]
			if plan.encoded == nil || plan.subset != nil && !slices.Contains(plan.subset, uint32(i)) {
				continue
			}
			n++
			if b := plan.encoded[i]; x.Encoding.Kind == tensor.TopK {
				for at := 0; at < len(b); at += 8 {
					sum[word(b[at:])] += math.Float32frombits(word(b[at+4:]))
				}
				continue
			}
			for e, v := range decoded(&x, plan.encoded[i]) {
				if n == 1 {
					sum[e] = v
				} else {
					sum[e] += v
				}
			}
		}
		if mean && n > 1 {
			for e := range sum {
				sum[e] /= float32(n)
			}
		}
		sums[x.Name] = sum
	}
	return sums
}

func (g *gradModel) producersByIndex() map[int]*fakeProducer {
	all := map[int]*fakeProducer{}
	for k, p := range g.producers {
		all[k] = p
	}
	return all
}

// decoded are the elements of a tensor that is not sparse, as package reduce decodes them one by one.
func decoded(x *tensor.Tensor, b []byte) []float32 {
	values := make([]float32, x.Elements())
	kind, scale := kindOf(x), float32(1)
	if kind == reduce.F8E4M3 || kind == reduce.F8E5M2 {
		if len(b) == 0 {
			return nil
		}
		scale, b = math.Float32frombits(word(b)), b[tensor.ScaleBytes:]
	}
	for e := range values {
		reduce.Set(values[e:e+1], b[e*kind.Bytes():(e+1)*kind.Bytes()], kind, scale)
	}
	return values
}

// run reads all steps and compares.
func (g *gradModel) run() GradStats {
	reader := g.ring.reader()
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	for step := range g.plans[0] {
		var have []string
		for k, plans := range g.plans {
			if plans[step].encoded != nil {
				have = append(have, g.producers[k].name)
			}
		}
		slices.Sort(have)
		if len(have) == 0 || g.r.IntN(8) == 0 { // nobody asks for it
			continue
		}
		out := map[string][]float32{}
		for name, values := range g.wantSums(step, false) {
			if g.r.IntN(4) > 0 {
				out[name] = make([]float32, len(values))
			}
		}
		opt := StepOptions{Quorum: len(have)}
		if g.r.IntN(2) == 0 {
			opt.Into = out
		}
		if g.r.IntN(4) == 0 { // a call that ends early changes nothing
			if s, err := reader.Step(cancelled, uint64(step), StepOptions{Quorum: len(g.producers) + 1, Into: out}); !errors.Is(err, context.Canceled) {
				g.t.Fatalf("step %d: %v, %v", step, s, err)
			}
		}
		s, err := reader.Step(context.Background(), uint64(step), opt)
		if err != nil {
			g.t.Fatalf("step %d: %v; want %q", step, err, have)
		}
		if !slices.Equal(s.Have, have) {
			g.t.Fatalf("step %d: have %q, want %q; missing %v", step, s.Have, have, s.Missing)
		}
		g.check(s, step, out)
		s.Release()
	}
	return reader.Stats()
}

func (g *gradModel) check(s *GradStep, step int, out map[string][]float32) {
	for k, mean := range []bool{g.r.IntN(2) == 0, g.r.IntN(2) == 0} {
		for _, values := range out {
			for i := range values {
				if k > 0 { // the caller has used them
					values[i] = float32(i)
				}
			}
		}
		what, want := "sum", g.wantSums(step, mean)
		err := error(nil)
		if mean {
			what = "mean"
			err = s.Mean(out)
		} else {
			err = s.Sum(out)
		}
		if err != nil {
			g.t.Fatalf("step %d: %s: %v", step, what, err)
		}
		for name, values := range out {
			for e, got := range values {
				if w := want[name][e]; math.Float32bits(got) != math.Float32bits(w) && (got == got || w == w) {
					g.t.Fatalf("step %d of %q: %s of %s, element %d is %v, want %v", step, s.Have, what, name, e, got, w)
				}
			}
		}
	}
	for k, plans := range g.plans {
		plan := plans[step]
		for i := range g.m.Len() {
			if g.m.EncodedBytes(i) == 0 {
				continue // with or without it, a step with all bytes is complete
			}
			has := plan.encoded != nil && (plan.subset == nil || slices.Contains(plan.subset, uint32(i)))
			b, err := s.Tensor(g.producers[k].name, g.m.Tensor(i).Name)
			if has != (err == nil) || has && !slices.Equal(b, plan.encoded[i]) {
				g.t.Fatalf("step %d: tensor %q of %q: %v, %v", step, g.m.Tensor(i).Name, g.producers[k].name, b, err)
			}
		}
	}
}

// TestGradModel reads random lives of producers, in which transactions are given up, begun again, cut by the end of a connection, damaged, sent twice and sent in part, in any order, with batches
// of several rows and a reader that may hold only a few of them.
func TestGradModel(t *testing.T) {
	seeds := []uint64{*gradSeed}
	if *gradSeed == 0 {
		seeds = nil
		for range 400 {
			seeds = append(seeds, rand.Uint64())
		}
	}
	var total GradStats
	for _, seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { // go test -run 'TestGradModel' -grad-seed N
			s := newGradModel(t, seed).run()
			total.CompletedSteps += s.CompletedSteps
			total.DroppedIncomplete += s.DroppedIncomplete
			total.Unread += s.Unread
			total.Late += s.Late
			total.BadChunks += s.BadChunks
			total.Duplicates += s.Duplicates
			total.Refused += s.Refused
			total.SpilledBytes += s.SpilledBytes
		})
	}
	if *gradSeed == 0 && (total.CompletedSteps == 0 || total.DroppedIncomplete == 0 || total.Unread == 0 || total.Late == 0 || total.BadChunks == 0 || total.Duplicates == 0 ||
		total.Refused == 0 || total.SpilledBytes == 0) {
		t.Errorf("something was not tried: %+v", total)
	}
	t.Logf("%+v", total)
}
