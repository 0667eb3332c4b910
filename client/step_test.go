package client

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

var stepSeed = flag.Uint64("step-seed", 0, "run the model of the producer of steps with this seed only")

func stepsOf(t testing.TB, addr string, m *tensor.Manifest, change func(*StepsConfig)) *StepProducer {
	t.Helper()
	cfg := StepsConfig{Table: "t", Name: "worker", Manifest: m, ReconnectFrom: time.Microsecond, ReconnectTo: time.Millisecond}
	if change != nil {
		change(&cfg)
	}
	p, err := DialSteps(t.Context(), addr, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Abort)
	return p
}

func stepManifest(t testing.TB, tensors ...tensor.Tensor) *tensor.Manifest {
	t.Helper()
	m, err := tensor.NewManifest(tensors, nil)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func raw(name string, n int64) tensor.Tensor {
	return tensor.Tensor{Name: name, DType: spec.F32, Shape: []int64{n}}
}

// stepModel is a producer that sends steps in any way, to a daemon that loses connections.
type stepModel struct {
	t     *testing.T
	r     *rand.Rand
	m     *tensor.Manifest
	d     *stepDaemon
	p     *StepProducer
	want  map[uint64][][]float32 // by step: what was committed; nil tensors were left out
	arena [][]float32
}

func newStepModel(t *testing.T, seed uint64, lossy bool) *stepModel {
	r := rand.New(rand.NewPCG(seed, 7))
	var tensors []tensor.Tensor
	for i := range 1 + r.IntN(6) {
		n := r.Int64N(60_000)
		if r.IntN(3) == 0 {
			n = r.Int64N(5)
		}
		tensors = append(tensors, raw(fmt.Sprint("t", i), n))
	}
	m := stepManifest(t, tensors...)
	d := &stepDaemon{m: m, rng: rand.New(rand.NewPCG(seed, 8)), faults: r.IntN(8), lossy: lossy, window: 1 + r.Int64N(4)}
	g := &stepModel{t: t, r: r, m: m, d: d, want: map[uint64][][]float32{}}
	g.p = stepsOf(t, serveSteps(t, d, []string{"tcp", "unix"}[r.IntN(2)]), m, func(c *StepsConfig) { c.NoCRC = r.IntN(4) == 0 })
	for i := range m.Len() {
		x := m.Tensor(i)
		g.arena = append(g.arena, make([]float32, x.Elements()))
	}
	return g
}

// put puts a tensor as a whole or in slices.
func (g *stepModel) put(tx *StepTx, i int) {
	x, values := g.m.Tensor(i), g.arena[i]
	if len(values) == 0 || g.r.IntN(2) == 0 {
		if err := tx.PutFloats(x.Name, values); err != nil {
			g.t.Fatalf("put %s: %v", x.Name, err)
		}
		return
	}
	var cuts []int
	for at := 0; at < len(values); at += 64 * (1 + g.r.IntN(1000)) {
		cuts = append(cuts, at)
	}
	order := g.r.Perm(len(cuts))
	for _, k := range order {
		end := len(values)
		if k+1 < len(cuts) {
			end = cuts[k+1]
		}
		if err := tx.PutSlice(x.Name, bytesOfFloats(values[cuts[k]:end]), int64(cuts[k])); err != nil {
			g.t.Fatalf("put a slice of %s: %v", x.Name, err)
		}
	}
}

// step sends one step, and says in want what must have come of it.
func (g *stepModel) step(step uint64) {
	tx, err := g.p.Step(g.t.Context(), step)
	if err != nil {
		g.t.Fatal(err)
	}
	defer tx.Abort()
	for _, values := range g.arena {
		for k := range values {
			values[k] = float32(g.r.NormFloat64())
		}
	}
	want := make([][]float32, g.m.Len())
	partial := g.r.IntN(4) == 0
	for _, i := range g.r.Perm(g.m.Len()) {
		if partial && g.r.IntN(2) == 0 {
			continue
		}
		g.put(tx, i)
		want[i] = slices.Clone(g.arena[i])
		if g.r.IntN(12) == 0 { // given up: the arrays may change at once
			tx.Abort()
			for _, values := range g.arena {
				clear(values)
			}
			return
		}
	}
	for range g.r.IntN(3) { // some do not wait for long
		ctx, cancel := context.WithTimeout(g.t.Context(), time.Duration(g.r.Int64N(int64(time.Millisecond))))
		err := g.commit(ctx, tx, partial)
		cancel()
		if err == nil {
			g.want[step] = want
			return
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			g.t.Fatal(err)
		}
	}
	if g.r.IntN(8) == 0 {
		tx.Abort()
		for _, values := range g.arena {
			clear(values)
		}
		return
	}
	if err := g.commit(g.t.Context(), tx, partial); err != nil {
		g.t.Fatal(err)
	}
	g.want[step] = want
}

func (g *stepModel) commit(ctx context.Context, tx *StepTx, partial bool) error {
	if partial {
		return tx.CommitSubset(ctx)
	}
	return tx.Commit(ctx)
}

// TestStepModel sends steps of random tensors in random order, whole and in slices, to a daemon that ends connections at any sample, and in one of two kinds of lives loses what it had.
func TestStepModel(t *testing.T) {
	seeds := []uint64{*stepSeed}
	if *stepSeed == 0 {
		seeds = nil
		for range 60 {
			seeds = append(seeds, rand.Uint64())
		}
	}
	var total StepStats
	for _, lossy := range []bool{false, true} {
		for _, seed := range seeds {
			t.Run(fmt.Sprintf("%v/%d", lossy, seed), func(t *testing.T) {
				g := newStepModel(t, seed, lossy)
				for step := range uint64(6) {
					g.step(step)
				}
				if err := g.p.Close(t.Context()); err != nil {
					t.Error(err)
				}
				s := g.p.Stats()
				total.Reconnects += s.Reconnects
				total.Resent += s.Resent
				total.Replays += s.Replays
				total.Lost += s.Lost
				total.Steps += s.Steps
				if s.Steps != uint64(len(g.want)) || !lossy && (s.Replays != 0 || s.Lost != 0) {
					t.Errorf("%+v", s)
				}
				g.check()
			})
		}
	}
	if *stepSeed == 0 && (total.Reconnects == 0 || total.Resent == 0 || total.Replays == 0 || total.Lost == 0) {
		t.Errorf("something was not tried: %+v", total)
	}
	t.Logf("%+v", total)
}

// check compares what was committed with what came.
func (g *stepModel) check() {
	g.d.mu.Lock()
	defer g.d.mu.Unlock()
	for step, want := range g.want {
		got := g.d.complete[step]
		if got == nil {
			g.t.Fatalf("step %d was committed and is not complete", step)
		}
		for i, values := range want {
			has := got.subset == nil || slices.Contains(got.subset, uint32(i))
			if has != (values != nil) && g.m.EncodedBytes(i) > 0 {
				g.t.Fatalf("step %d: tensor %d is there: %v", step, i, has)
			}
			at := g.m.Offset(i)
			for k, bits := range floatsOf(got.flat[at : at+g.m.EncodedBytes(i)]) {
				if values != nil && bits != math.Float32bits(values[k]) {
					g.t.Fatalf("step %d, tensor %d: element %d is %#x, want %v", step, i, k, bits, values[k])
				}
			}
		}
	}
}

// TestStepErrors: what is wrong is said at once, and the transaction is as it was.
func TestStepErrors(t *testing.T) {
	m := stepManifest(t, raw("layers.0.weight", 1000), raw("layers.0.bias", 100), raw("none", 0),
		tensor.Tensor{Name: "half", DType: spec.F16, Shape: []int64{8}},
		tensor.Tensor{Name: "top", DType: spec.F32, Shape: []int64{50}, Encoding: tensor.Encoding{Kind: tensor.TopK, K: 3}})
	d := &stepDaemon{m: m, window: 4}
	p := stepsOf(t, serveSteps(t, d, "tcp"), m, nil)
	tx, err := p.Step(t.Context(), 5)
	if err != nil {
		t.Fatal(err)
	}
	values := func(n int) []float32 { return make([]float32, n) }
	for says, err := range map[string]error{
		`did you mean "layers.0.bias"`:          tx.PutFloats("layers.0.bais", values(100)),
		`no tensor "x" among the manifest's 5`:  tx.Put("x", nil),
		"5 values, but F32[100] has 100":        tx.PutFloats("layers.0.bias", values(5)),
		"not F32; give its bytes":               tx.PutFloats("half", values(8)),
		"has 12 bytes, the manifest says":       tx.Put("layers.0.bias", make([]byte, 12)),
		"3 bytes are no whole number":           tx.PutSlice("layers.0.bias", make([]byte, 3), 0),
		"starts at element 101 of 100":          tx.PutSlice("layers.0.bias", nil, 101),
		"starts at element -1 of 100":           tx.PutSlice("layers.0.bias", nil, -1),
		"must start on a multiple of 256 bytes": tx.PutSlice("layers.0.bias", make([]byte, 4), 1),
		"do not lie in the tensor's 400 bytes":  tx.PutSlice("layers.0.bias", make([]byte, 404), 0),
		"topk:3 are put as a whole":             tx.PutSlice("top", make([]byte, 8), 0),
	} {
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v; want %q", err, says)
		}
	}
	if _, err := p.Step(t.Context(), 6); err == nil || !strings.Contains(err.Error(), "step 5 is still open") {
		t.Error(err)
	}
	if err := tx.PutFloats("layers.0.weight", values(1000)); err != nil {
		t.Fatal(err)
	}
	if err := tx.PutFloats("layers.0.weight", values(1000)); err == nil || !strings.Contains(err.Error(), "put before") {
		t.Error(err)
	}
	if err := tx.PutFloats("top", values(50)); err != nil {
		t.Fatal(err)
	}
	if err := tx.PutFloats("top", values(50)); err == nil || !strings.Contains(err.Error(), "put before") {
		t.Error(err)
	}
	incomplete := (*tensor.IncompleteError)(nil)
	if err := tx.Commit(t.Context()); !errors.As(err, &incomplete) || len(incomplete.Missing) != 2 || !strings.Contains(err.Error(), `commit step 5`) {
		t.Error(err)
	}
	if err := errors.Join(tx.PutFloats("layers.0.bias", values(100)), tx.Put("half", make([]byte, 16)), tx.Commit(t.Context())); err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{"put": tx.Put("half", nil), "commit": tx.Commit(t.Context())} {
		if !errors.Is(err, errTxDone) {
			t.Errorf("%s after the end: %v", what, err)
		}
	}
	tx.Abort()
	order := (*StepOrderError)(nil)
	if _, err := p.Step(t.Context(), 4); !errors.As(err, &order) || order.Last != 5 {
		t.Error(err)
	}
	if again, err := p.Step(t.Context(), 5); err != nil {
		t.Error(err)
	} else {
		again.Abort()
	}
	if err := p.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if d.aborted[5] != 0 || d.complete[5] == nil {
		t.Errorf("%v: nothing of what was aborted had been sent", d.aborted)
	}
}

// TestStepRefused: the daemon does not want the step; the rest of it is not sent, and the next one is.
func TestStepRefused(t *testing.T) {
	m := stepManifest(t, raw("w", 100_000))
	d := &stepDaemon{m: m, window: 2, refuse: map[uint64]string{3: "max_lag is 2"}}
	p := stepsOf(t, serveSteps(t, d, "tcp"), m, nil)
	values := make([]float32, 100_000)
	send := func(step uint64) error {
		tx, err := p.Step(t.Context(), step)
		if err != nil {
			return err
		}
		defer tx.Abort()
		if err := tx.PutFloats("w", values); err != nil {
			return err
		}
		return tx.Commit(t.Context())
	}
	for range 2 {
		refused := (*StepRefusedError)(nil)
		if err := send(3); !errors.As(err, &refused) || refused.Step != 3 || refused.Reason != "max_lag is 2" {
			t.Fatal(err)
		}
	}
	if err := send(4); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if d.complete[4] == nil || d.complete[3] != nil {
		t.Errorf("complete: %v", d.complete)
	}
}

// TestAbortDoesNotWait: the daemon reads nothing, and a chunk is half written. The arrays are the caller's as soon as Abort returns, and what was begun comes as it was.
func TestAbortDoesNotWait(t *testing.T) {
	m := stepManifest(t, raw("w", 2_000_000))
	d := &stepDaemon{m: m, window: 1000, hold: make(chan struct{})}
	p := stepsOf(t, serveSteps(t, d, "unix"), m, nil)
	values := make([]float32, 2_000_000)
	for i := range values {
		values[i] = float32(i)
	}
	tx, err := p.Step(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := tx.PutFloats("w", values); err != nil {
		t.Fatal(err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	wantIs(t, tx.Commit(ended), context.Canceled)
	tx.Abort()
	clear(values)
	close(d.hold)
	if tx, err = p.Step(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(tx.PutFloats("w", values), tx.Commit(t.Context())); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if sent := p.Stats().Chunks; d.complete[0] != nil || d.complete[1] == nil || sent >= 2*uint64(len(values))*4/fakeStepChunk {
		t.Errorf("%d chunks sent, complete %v", sent, d.complete)
	}
}

// TestStepSessionTaken: another producer of the same name ends this one, and it does not come back.
func TestStepSessionTaken(t *testing.T) {
	m := stepManifest(t, raw("w", 10))
	d := &stepDaemon{m: m, notice: &wire.Notice{Code: wire.CodeSessionTaken, Reason: "another connection has opened it"}}
	p := stepsOf(t, serveSteps(t, d, "unix"), m, nil)
	tx, err := p.Step(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	values := make([]float32, 10)
	if err := tx.PutFloats("w", values); err != nil {
		t.Fatal(err)
	}
	wantIs(t, tx.Commit(t.Context()), ErrSessionTaken)
	tx.Abort()
	values[0] = 1 // ours again
	tx, err = p.Step(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	wantIs(t, errors.Join(tx.PutFloats("w", values), tx.Commit(t.Context())), ErrSessionTaken)
	p.Abort()
	wantIs(t, tx.Commit(t.Context()), ErrSessionTaken)
	if d.conns != 1 {
		t.Errorf("%d connections", d.conns)
	}
}

// TestStepsWithoutReconnecting: the end of the connection is the end of the producer.
func TestStepsWithoutReconnecting(t *testing.T) {
	m := stepManifest(t, raw("w", 100_000))
	d := &stepDaemon{m: m, window: 1, faults: 1}
	p := stepsOf(t, serveSteps(t, d, "tcp"), m, func(c *StepsConfig) { c.ReconnectFor, c.ReconnectFrom, c.ReconnectTo = -1, 0, 0 })
	for {
		tx, err := p.Step(t.Context(), p.last)
		if err != nil {
			t.Fatal(err)
		}
		err = errors.Join(tx.PutFloats("w", make([]float32, 100_000)), tx.Commit(t.Context()))
		tx.Abort()
		if err != nil {
			wantIs(t, err, ErrDaemonGone)
			break
		}
	}
	if d.conns != 1 {
		t.Errorf("%d connections", d.conns)
	}
}

// TestNotATableOfTensors: a daemon that says nothing sensible of chunks is not believed.
func TestNotATableOfTensors(t *testing.T) {
	m := stepManifest(t, raw("w", 1))
	for _, chunkBytes := range []int64{0, tensor.ChunkBytesMin - 1, tensor.ChunkBytesMin + 1, tensor.ChunkBytesMax + tensor.ChunkBytesUnit, 1 << 40} {
		addr := listen(t, "tcp", func(conn net.Conn) {
			if _, err := wire.ReadHello(conn); err != nil {
				t.Error(err)
			}
			s, _ := chunkSpec(tensor.ChunkBytesMin)
			_ = wire.WriteAccepted(conn, &wire.AcceptedPush{Table: "t", Fingerprint: s.Fingerprint(), Stream: 1, Ack: wire.AckCommitted, WindowSamples: 1, WindowBytes: 1, ChunkBytes: chunkBytes})
		})
		if _, err := DialSteps(t.Context(), addr, StepsConfig{Table: "t", Name: "n", Manifest: m}); !errors.Is(err, wire.ErrProtocol) {
			t.Errorf("%d: %v", chunkBytes, err)
		}
	}
}

// TestStepsConfigDefaults makes sure that no field is forgotten: each has a default, or a zero that means something.
func TestStepsConfigDefaults(t *testing.T) {
	m := stepManifest(t, raw("w", 1))
	cfg, err := StepsConfig{Table: "t", Name: "n", Manifest: m}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	zeroIsMeant := map[string]bool{"InPlace": true, "NoCRC": true, "WindowBytes": true, "Prefetch": true, "Token": true, "TLS": true}
	v := reflect.ValueOf(cfg)
	for i := range v.NumField() {
		if name := v.Type().Field(i).Name; v.Field(i).IsZero() != zeroIsMeant[name] {
			t.Errorf("StepsConfig.%s is %v after defaulting", name, v.Field(i))
		}
	}
	for says, cfg := range map[string]StepsConfig{
		"Table is empty": {Name: "n", Manifest: m}, "Name is empty": {Table: "t", Manifest: m}, "Manifest is nil": {Table: "t", Name: "n"},
		"may be negative": {Table: "t", Name: "n", Manifest: m, WindowBytes: -1}, "not for producers in place": {Table: "t", Name: "n", Manifest: m, WindowBytes: 1, InPlace: true},
		"is for producers in place": {Table: "t", Name: "n", Manifest: m, Prefetch: 1},
	} {
		if _, err := DialSteps(t.Context(), "tcp://127.0.0.1:1", cfg); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v; want %q", err, says)
		}
	}
}

func TestDistance(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"a", "", 1}, {"kitten", "sitting", 3}, {"abc", "abc", 0}, {"abc", "acb", 2}, {"abcdefgh", "ijklmnop", 5}, {"a", "abcdefg", 5}} {
		if got := distance(c.a, c.b, 4); got != c.want {
			t.Errorf("%q to %q: %d, want %d", c.a, c.b, got, c.want)
		}
	}
}
