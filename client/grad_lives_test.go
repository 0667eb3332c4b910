//go:build linux && !race

// Chunks lie in mapped memory, which the race detector does not see: it misses races there and flags correct code.

package client_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/internal/daemon"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

// everyWay runs a test over TCP, a unix socket, and in place, and with readers that have their batches sent to them.
func everyWay(t *testing.T, change func(*daemon.Config), f func(t *testing.T, g *gradDaemon, addr string)) {
	for _, way := range []string{"tcp", "unix", "shm", "sent"} {
		t.Run(way, func(t *testing.T) {
			g := serveGrads(t, change).readSent(way)
			f(t, g, g.ways()[way])
		})
	}
}

func mustStep(t *testing.T, r *client.GradReader, step uint64, quorum int, want ...string) *client.GradStep {
	t.Helper()
	s, err := r.Step(t.Context(), step, client.StepOptions{Quorum: quorum})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(s.Have, want) {
		t.Fatalf("step %d: have %q, want %q; missing %v", step, s.Have, want, s.Missing)
	}
	return s
}

// TestProducerDiesInTheMidst: the others' step is read, it is named, and its successor of the same name begins anew.
func TestProducerDiesInTheMidst(t *testing.T) {
	m := manifestOf(t, f32("a", 40_000), f32("b", 40_000))
	everyWay(t, nil, func(t *testing.T, g *gradDaemon, addr string) {
		r := openGrads(t, g, "")
		producers := []*client.StepProducer{dialSteps(t, addr, "w0", m), dialSteps(t, addr, "w1", m), dialSteps(t, addr, "w2", m)}
		tx, err := producers[1].Step(t.Context(), 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := tx.PutFloats("a", valuesOf(9, 0, 0, 40_000)); err != nil {
			t.Fatal(err)
		}
		for _, k := range []int{0, 2} {
			if err := sendStep(t.Context(), producers[k], k, 0); err != nil {
				t.Fatal(err)
			}
		}
		producers[1].Abort()
		s := mustStep(t, r, 0, 2, "w0", "w2")
		if len(s.Missing) != 1 || s.Missing[0].Producer != "w1" || s.Missing[0].Reason != "connection ended" {
			t.Errorf("missing %v", s.Missing)
		}
		out := outputs(m)
		if err := s.Sum(out); err != nil {
			t.Fatal(err)
		}
		wantSum(t, out, m, []int{0, 2}, 0, 1)
		s.Release()
		producers[1] = dialSteps(t, addr, "w1", m)
		done := make(chan error, 3)
		for k, p := range producers {
			go func() { done <- sendStep(t.Context(), p, k, 1) }()
		}
		s = mustStep(t, r, 1, 3, "w0", "w1", "w2")
		if err := s.Mean(out); err != nil {
			t.Fatal(err)
		}
		wantSum(t, out, m, []int{0, 1, 2}, 1, 3)
		s.Release()
		for range producers {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	})
}

// TestReaderComesLate: the first group of a table gets what came before it; a later group gets whole steps from where it came on.
func TestReaderComesLate(t *testing.T) {
	m := manifestOf(t, f32("a", 30_000))
	everyWay(t, nil, func(t *testing.T, g *gradDaemon, addr string) {
		p := dialSteps(t, addr, "w", m)
		for step := range uint64(3) {
			if err := sendStep(t.Context(), p, 0, step); err != nil {
				t.Fatal(err)
			}
		}
		first := openGrads(t, g, "first")
		mustStep(t, first, 1, 1, "w").Release()
		tx, err := p.Step(t.Context(), 3)
		if err != nil {
			t.Fatal(err)
		}
		values := valuesOf(0, 3, 0, 30_000)
		if err := tx.PutSlice("a", bytesOf(values[:20_480]), 0); err != nil {
			t.Fatal(err)
		}
		for come := false; !come; { // the first chunk of step 3 is in the ring before the other group is
			ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			_, err := first.Step(ctx, 3, client.StepOptions{})
			cancel()
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal(err)
			}
			come = strings.Contains(err.Error(), "incomplete: 65536 of 120000 bytes")
		}
		late := openGrads(t, g, "late")
		if err := errors.Join(tx.PutSlice("a", bytesOf(values[20_480:]), 20_480), tx.Commit(t.Context()), sendStep(t.Context(), p, 0, 4)); err != nil {
			t.Fatal(err)
		}
		mustStep(t, first, 3, 1, "w").Release()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		_, err = late.Step(ctx, 3, client.StepOptions{})
		timeout := (*client.StepTimeoutError)(nil)
		if !errors.As(err, &timeout) || len(timeout.Missing) != 1 || timeout.Missing[0].Reason != "incomplete: its beginning did not come to this reader" {
			t.Fatal(err)
		}
		s := mustStep(t, late, 4, 1, "w")
		out := outputs(m)
		if err := s.Sum(out); err != nil {
			t.Fatal(err)
		}
		wantSum(t, out, m, []int{0}, 4, 1)
	})
}

func bytesOf(values []float32) []byte {
	var b []byte
	for _, x := range values {
		bits := math.Float32bits(x)
		b = append(b, byte(bits), byte(bits>>8), byte(bits>>16), byte(bits>>24))
	}
	return b
}

// TestStepIsAborted: readers drop it, the arrays may change at once, and it may be sent again.
func TestStepIsAborted(t *testing.T) {
	m := manifestOf(t, f32("a", 50_000), f32("b", 5))
	everyWay(t, nil, func(t *testing.T, g *gradDaemon, addr string) {
		r, p := openGrads(t, g, ""), dialSteps(t, addr, "w", m)
		tx, err := p.Step(t.Context(), 0)
		if err != nil {
			t.Fatal(err)
		}
		values := valuesOf(0, 0, 0, 50_000)
		if err := tx.PutFloats("a", values); err != nil {
			t.Fatal(err)
		}
		tx.Abort()
		clear(values)
		if err := sendStep(t.Context(), p, 0, 0); err != nil {
			t.Fatal(err)
		}
		s := mustStep(t, r, 0, 1, "w")
		out := outputs(m)
		if err := s.Sum(out); err != nil {
			t.Fatal(err)
		}
		wantSum(t, out, m, []int{0}, 0, 1)
		if st := r.Stats(); st.BadChunks != 0 {
			t.Errorf("%+v", st)
		}
	})
}

// TestTooOld: a step behind max_lag is refused with the reason, over every way, and the reader is not disturbed.
func TestTooOld(t *testing.T) {
	m := manifestOf(t, f32("a", 40_000))
	lag := func(cfg *daemon.Config) { cfg.Tables[0].MaxLag = 2 }
	everyWay(t, lag, func(t *testing.T, g *gradDaemon, addr string) {
		r := openGrads(t, g, "")
		fast, slow := dialSteps(t, addr, "fast", m), dialSteps(t, addr, "slow", m)
		if err := sendStep(t.Context(), fast, 0, 10); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			refused := (*client.StepRefusedError)(nil)
			if err := sendStep(t.Context(), slow, 1, 7); !errors.As(err, &refused) || refused.Step != 7 || !strings.Contains(refused.Reason, "max_lag") {
				t.Fatal(err)
			}
		}
		for _, step := range []uint64{8, 10} {
			if err := sendStep(t.Context(), slow, 1, step); err != nil {
				t.Fatal(err)
			}
		}
		mustStep(t, r, 10, 2, "fast", "slow").Release()
		if st := r.Stats(); st.Refused == 0 && st.Late == 0 || st.BadChunks != 0 {
			t.Errorf("%+v", st)
		}
		order := (*client.StepOrderError)(nil)
		if err := sendStep(t.Context(), slow, 1, 9); !errors.As(err, &order) {
			t.Error(err)
		}
	})
}

// TestTwoProducersOfOneName: the second has the name, the first is told and does not come back.
func TestTwoProducersOfOneName(t *testing.T) {
	m := manifestOf(t, f32("a", 10))
	everyWay(t, nil, func(t *testing.T, g *gradDaemon, addr string) {
		r := openGrads(t, g, "")
		first := dialSteps(t, addr, "w", m)
		if err := sendStep(t.Context(), first, 0, 0); err != nil {
			t.Fatal(err)
		}
		second := dialSteps(t, addr, "w", m)
		if err := sendStep(t.Context(), first, 0, 1); !errors.Is(err, client.ErrSessionTaken) {
			t.Fatal(err)
		}
		if err := sendStep(t.Context(), second, 1, 1); err != nil {
			t.Fatal(err)
		}
		mustStep(t, r, 0, 1, "w").Release()
		s := mustStep(t, r, 1, 1, "w")
		out := outputs(m)
		if err := s.Sum(out); err != nil {
			t.Fatal(err)
		}
		wantSum(t, out, m, []int{1}, 1, 1)
	})
}

// TestManifestMismatch: who sends other tensors than those who are there is told how they differ.
func TestManifestMismatch(t *testing.T) {
	m, other := manifestOf(t, f32("a", 10)), manifestOf(t, f32("a", 11))
	everyWay(t, nil, func(t *testing.T, g *gradDaemon, addr string) {
		dialSteps(t, addr, "w0", m)
		_, err := client.DialSteps(t.Context(), addr, client.StepsConfig{Table: "grads", Name: "w1", Manifest: other})
		refusal := (*wire.Refusal)(nil)
		if !errors.As(err, &refusal) || refusal.Code != wire.CodeManifestMismatch || len(refusal.Diff) != 1 || refusal.Diff[0].Leaf != "a" {
			t.Fatal(err)
		}
	})
}

// TestAllKindsOfTensors: encodings, many tiny tensors, tensors without elements, and numbers that are none.
func TestAllKindsOfTensors(t *testing.T) {
	var tensors []tensor.Tensor
	for i, encoding := range []string{"", "bf16", "f16", "f8_e4m3", "f8_e5m2", "topk:500"} {
		e, err := tensor.ParseEncoding(encoding)
		if err != nil {
			t.Fatal(err)
		}
		tensors = append(tensors, tensor.Tensor{Name: fmt.Sprint("encoded", i), DType: spec.F32, Shape: []int64{70_001}, Encoding: e}, f32(fmt.Sprint("none", i), 0, 3))
	}
	for i := range 10_000 {
		tensors = append(tensors, f32(fmt.Sprint("tiny", i), int64(i%4)))
	}
	m := manifestOf(t, tensors...)
	values := func(k, i int) []float32 {
		tt := m.Tensor(i)
		x := valuesOf(k, 0, i, tt.Elements())
		for at := range x {
			if at%997 == 0 {
				x[at] = []float32{float32(math.Inf(1)), float32(math.NaN()), float32(math.Inf(-1)), 1e-42}[at/997%4]
			}
		}
		return x
	}
	everyWay(t, nil, func(t *testing.T, g *gradDaemon, addr string) {
		r := openGrads(t, g, "")
		done := make(chan error, 2)
		for k := range 2 {
			p := dialSteps(t, addr, fmt.Sprint("w", k), m)
			go func() {
				tx, err := p.Step(t.Context(), 0)
				if err != nil {
					done <- err
					return
				}
				for i := range m.Len() {
					if err == nil {
						err = tx.PutFloats(m.Tensor(i).Name, values(k, i))
					}
				}
				done <- errors.Join(err, tx.Commit(t.Context()))
			}()
		}
		out := outputs(m)
		s, err := r.Step(t.Context(), 0, client.StepOptions{Quorum: 2, Into: out})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(<-done, <-done, s.Sum(out)); err != nil {
			t.Fatal(err)
		}
		for i := range m.Len() {
			tt := m.Tensor(i)
			a, b := received(t, s, "w0", &tt), received(t, s, "w1", &tt)
			for at, got := range out[tt.Name] {
				want := a[at] + b[at]
				if tt.Encoding.Kind == tensor.TopK {
					want = 0 + a[at] + b[at]
				}
				if math.Float32bits(got) != math.Float32bits(want) && (got == got || want == want) {
					t.Fatalf("%s, element %d: %v + %v is %v", tt.Name, at, a[at], b[at], got)
				}
			}
			if tt.Encoding.Kind == tensor.Raw {
				for at, want := range values(1, i) {
					if math.Float32bits(b[at]) != math.Float32bits(want) {
						t.Fatalf("%s, element %d came as %v, was %v", tt.Name, at, b[at], want)
					}
				}
			}
		}
	})
}

// received decodes one producer's tensor with package tensor, which knows nothing of how sums are made.
func received(t *testing.T, s *client.GradStep, producer string, tt *tensor.Tensor) []float32 {
	t.Helper()
	b, err := s.Tensor(producer, tt.Name)
	if err != nil {
		t.Fatal(err)
	}
	values := make([]float32, tt.Elements())
	if err := tensor.Decode(values, tt, b); err != nil {
		t.Fatal(err)
	}
	return values
}

// TestErrorFeedback: what a top-k encoding leaves out of a step comes with a later one; an aborted step changes nothing.
func TestErrorFeedback(t *testing.T) {
	m := manifestOf(t, tensor.Tensor{Name: "top", DType: spec.F32, Shape: []int64{4}, Encoding: tensor.Encoding{Kind: tensor.TopK, K: 1}})
	g := serveGrads(t, nil)
	r, p := openGrads(t, g, ""), dialSteps(t, g.addr.TCP, "w", m)
	for step, want := range [][]float32{{0, 0, -4, 0}, {0, 6, 0, 0}, {0, 0, -4, 0}, {3, 0, 0, 0}} {
		gradient := [][]float32{{1, 3, -4, 0}, {1, 3, 0, 0}, {1, 0, -4, 0}, {0, 0, 0, 0}}[step]
		for _, abort := range []bool{true, false} {
			tx, err := p.Step(t.Context(), uint64(step))
			if err != nil {
				t.Fatal(err)
			}
			if err := tx.PutFloats("top", gradient); err != nil {
				t.Fatal(err)
			}
			if abort {
				tx.Abort()
			} else if err := tx.Commit(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		s := mustStep(t, r, uint64(step), 1, "w")
		out := outputs(m)
		if err := s.Sum(out); err != nil || !slices.Equal(out["top"], want) {
			t.Fatalf("step %d: %v, want %v; %v", step, out["top"], want, err)
		}
		s.Release()
	}
}

// TestFullRing: in place, a Put waits for room, and says whom it waits for; pushed, the Commit does.
func TestFullRing(t *testing.T) {
	m := manifestOf(t, f32("a", 1_000_000))
	everyWay(t, nil, func(t *testing.T, g *gradDaemon, addr string) {
		p := dialSteps(t, addr, "w", m)
		for wait, told := 200*time.Millisecond, false; !told; wait *= 2 { // until the daemon had the time to say so
			ctx, cancel := context.WithTimeout(t.Context(), wait)
			err := sendStep(ctx, p, 0, 0)
			cancel()
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal(err)
			}
			told = errors.Is(err, client.ErrFull)
		}
		r := openGrads(t, g, "")
		done := make(chan error, 1)
		go func() { done <- sendStep(t.Context(), p, 0, 0) }()
		s := mustStep(t, r, 0, 1, "w")
		out := outputs(m)
		if err := errors.Join(s.Sum(out), <-done); err != nil {
			t.Fatal(err)
		}
		wantSum(t, out, m, []int{0}, 0, 1)
	})
}

// TestDaemonRestarts in the midst of a step, with its segment kept and without: the producer's Commit is not told of it, and the next reader gets the step.
func TestDaemonRestarts(t *testing.T) {
	m := manifestOf(t, f32("a", 30_000), f32("b", 60_000))
	for _, kept := range []bool{true, false} {
		for _, way := range []string{"unix", "shm"} {
			t.Run(fmt.Sprintf("%s, kept %v", way, kept), func(t *testing.T) {
				cfg := gradConfig(t)
				if kept {
					cfg.SegmentDir = t.TempDir()
					if err := os.Chmod(cfg.SegmentDir, 0o700); err != nil {
						t.Fatal(err)
					}
				}
				g := runGrads(t, cfg)
				p := dialSteps(t, g.ways()[way], "w", m)
				for step := range uint64(2) {
					if err := sendStep(t.Context(), p, 0, step); err != nil {
						t.Fatal(err)
					}
				}
				tx, err := p.Step(t.Context(), 2)
				if err != nil {
					t.Fatal(err)
				}
				if err := tx.PutFloats("a", valuesOf(0, 2, 0, 30_000)); err != nil {
					t.Fatal(err)
				}
				g.stop()
				g = runGrads(t, cfg)
				r := openGrads(t, g, "")
				if err := errors.Join(tx.PutFloats("b", valuesOf(0, 2, 1, 60_000)), tx.Commit(t.Context())); err != nil {
					t.Fatal(err)
				}
				if kept {
					mustStep(t, r, 1, 1, "w").Release()
				}
				s := mustStep(t, r, 2, 1, "w")
				out := outputs(m)
				if err := s.Sum(out); err != nil {
					t.Fatal(err)
				}
				wantSum(t, out, m, []int{0}, 2, 1)
				if st := p.Stats(); st.Reconnects == 0 || (st.Replays > 0) == kept {
					t.Errorf("%+v", st)
				}
			})
		}
	}
}
