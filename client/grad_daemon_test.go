//go:build linux && !race

// Chunks lie in mapped memory, which the race detector does not see: it misses races there and flags correct code.

package client_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/internal/daemon"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
)

// gradDaemon is a daemon in this process with a table of tensors.
type gradDaemon struct {
	addr  daemon.Addresses
	tls   client.TLS // for addresses of TLS and QUIC, where it has them
	token client.Token
	read  string // where readers read; "": they map its memory
	stop  func()
}

func gradConfig(t testing.TB) daemon.Config {
	cfg := daemon.DefaultConfig()
	cfg.Listen = []string{"tcp://127.0.0.1:0", "unix://" + filepath.Join(t.TempDir(), "d.sock")}
	cfg.Admin = "off"
	cfg.DrainTimeout = daemon.Duration(time.Minute)
	cfg.LocalProducers.Enabled = true
	cfg.Tables = []daemon.Table{{Name: "grads", Kind: "tensors", ChunkBytes: tensor.ChunkBytesMin, Batches: 32}}
	return cfg
}

func serveGrads(t testing.TB, change func(*daemon.Config)) *gradDaemon {
	t.Helper()
	cfg := gradConfig(t)
	if change != nil {
		change(&cfg)
	}
	return runGrads(t, cfg)
}

func runGrads(t testing.TB, cfg daemon.Config) *gradDaemon {
	t.Helper()
	d, err := daemon.New(cfg, slog.New(slog.DiscardHandler), "test")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	stopped := false
	g := &gradDaemon{addr: d.Addresses()}
	g.stop = func() {
		if !stopped {
			stopped = true
			stop()
			d.StopNow()
			<-done
		}
	}
	t.Cleanup(g.stop)
	return g
}

// ways are the addresses of the ways to the daemon.
func (g *gradDaemon) ways() map[string]string {
	return map[string]string{"tcp": g.addr.TCP, "unix": g.addr.Unix, "shm": "shm://" + strings.TrimPrefix(g.addr.Unix, "unix://"), "sent": g.addr.TCP}
}

// readSent has a test's readers have their batches sent to them where a way is "sent": then they are, as their producers, elsewhere.
func (g *gradDaemon) readSent(way string) *gradDaemon {
	if way == "sent" {
		g.read = g.addr.TCP
	}
	return g
}

func manifestOf(t testing.TB, tensors ...tensor.Tensor) *tensor.Manifest {
	t.Helper()
	m, err := tensor.NewManifest(tensors, nil)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func f32(name string, shape ...int64) tensor.Tensor {
	return tensor.Tensor{Name: name, DType: spec.F32, Shape: shape}
}

// valuesOf are the values of a tensor that a producer sends in a step: they follow from all three.
func valuesOf(producer int, step uint64, i int, n int64) []float32 {
	r := rand.New(rand.NewPCG(uint64(producer)<<32|step, uint64(i)))
	values := make([]float32, n)
	for k := range values {
		values[k] = float32(r.NormFloat64())
	}
	return values
}

func dialSteps(t testing.TB, addr string, name string, m *tensor.Manifest) *client.StepProducer {
	t.Helper()
	return dialStepsWith(t, addr, client.StepsConfig{Table: "grads", Name: name, Manifest: m})
}

func dialStepsWith(t testing.TB, addr string, cfg client.StepsConfig) *client.StepProducer {
	t.Helper()
	p, err := client.DialSteps(t.Context(), addr, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Abort)
	return p
}

func openGrads(t testing.TB, g *gradDaemon, group string) *client.GradReader {
	t.Helper()
	addr := g.addr.Unix
	if g.read != "" {
		addr = g.read
	}
	r, err := client.OpenGrads(t.Context(), addr, client.GradConfig{Table: "grads", Group: group, TLS: g.tls, Token: g.token})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// sendStep sends a whole step of producer k.
func sendStep(ctx context.Context, p *client.StepProducer, k int, step uint64) error {
	tx, err := p.Step(ctx, step)
	if err != nil {
		return err
	}
	defer tx.Abort()
	for i := range p.Manifest().Len() {
		tt := p.Manifest().Tensor(i)
		if err := tx.PutFloats(tt.Name, valuesOf(k, step, i, tt.Elements())); err != nil {
			return err
		}
	}
	return tx.Commit(ctx)
}

// sumOf is the sum of a tensor over producers, made one addition after another.
func sumOf(producers []int, step uint64, i int, n int64) []float32 {
	sum := make([]float32, n)
	for k, p := range producers {
		for at, x := range valuesOf(p, step, i, n) {
			if k == 0 {
				sum[at] = x
			} else {
				sum[at] += x
			}
		}
	}
	return sum
}

func outputs(m *tensor.Manifest) map[string][]float32 {
	out := map[string][]float32{}
	for i := range m.Len() {
		tt := m.Tensor(i)
		out[tt.Name] = make([]float32, tt.Elements())
	}
	return out
}

func wantSum(t testing.TB, out map[string][]float32, m *tensor.Manifest, producers []int, step uint64, divide float32) {
	t.Helper()
	for i := range m.Len() {
		tt := m.Tensor(i)
		got := out[tt.Name]
		for at, want := range sumOf(producers, step, i, tt.Elements()) {
			if want /= divide; math.Float32bits(got[at]) != math.Float32bits(want) {
				t.Fatalf("step %d, tensor %q: element %d is %v, want %v", step, tt.Name, at, got[at], want)
			}
		}
	}
}

// TestStepsOverEveryWay: producers send steps at the same time, and a reader sums them, in and out of step with them. The tensors together are larger than the ring.
func TestStepsOverEveryWay(t *testing.T) {
	m := manifestOf(t, f32("small", 3), f32("none", 0, 7), f32("large", 500, 2000), f32("scalar"), f32("middle", 77, 33))
	for name := range (&gradDaemon{}).ways() {
		t.Run(name, func(t *testing.T) {
			g := serveGrads(t, nil).readSent(name)
			r := openGrads(t, g, "")
			const producers, steps = 3, 4
			done := make(chan error, producers)
			for k := range producers {
				p := dialSteps(t, g.ways()[name], fmt.Sprintf("w%d", k), m)
				go func() {
					for step := range uint64(steps) {
						if err := sendStep(t.Context(), p, k, step); err != nil {
							done <- fmt.Errorf("producer %d, step %d: %w", k, step, err)
							return
						}
					}
					done <- p.Close(t.Context())
				}()
			}
			out := outputs(m)
			for step := range uint64(steps) {
				s, err := r.Step(t.Context(), step, client.StepOptions{Quorum: producers, Into: out})
				if err != nil {
					t.Fatal(err)
				}
				if err := s.Sum(out); err != nil {
					t.Fatal(err)
				}
				wantSum(t, out, m, []int{0, 1, 2}, step, 1)
				if err := s.Mean(out); err != nil {
					t.Fatal(err)
				}
				wantSum(t, out, m, []int{0, 1, 2}, step, 3)
				b, err := s.Tensor("w1", "middle")
				if err != nil {
					t.Fatal(err)
				}
				for i, want := range valuesOf(1, step, 4, 77*33) {
					if got := math.Float32frombits(binary.LittleEndian.Uint32(b[4*i:])); got != want {
						t.Fatalf("tensor: element %d is %v, want %v", i, got, want)
					}
				}
				s.Release()
			}
			for range producers {
				if err := <-done; err != nil {
					t.Error(err)
				}
			}
			if s := r.Stats(); s.CompletedSteps != producers*steps || s.BadChunks+s.DroppedIncomplete+s.Duplicates+s.Late != 0 {
				t.Errorf("%+v", s)
			}
			t.Logf("%+v", r.Stats())
		})
	}
}
