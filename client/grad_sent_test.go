//go:build linux && !race

// The daemon's memory is mapped, which the race detector does not see: it misses races there and flags correct code.

package client_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/internal/daemon"
	"github.com/ingestd/ingestd/internal/devcert"
)

func noError(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestStepsOverTLSAndQUIC: producers and a reader that has what they sent sent to it, all with tokens: the sums are those of a reader that maps the memory.
func TestStepsOverTLSAndQUIC(t *testing.T) {
	const secret = "a-secret-of-more-than-thirty-two-characters"
	dir := t.TempDir()
	tokens := filepath.Join(dir, "tokens")
	noError(t, os.WriteFile(tokens, []byte("tokens:\n- {name: w, secret: \""+secret+"\", rights: [push, read], tables: [grads]}\n"), 0o600))
	ca, err := devcert.NewAuthority("test", time.Hour)
	noError(t, err)
	pair, err := ca.NewServer([]string{"127.0.0.1"}, time.Hour)
	noError(t, err)
	authorities, _, err := ca.Write(dir, "ca")
	noError(t, err)
	certificate, key, err := pair.Write(dir, "daemon")
	noError(t, err)
	token, err := client.ParseToken("w:" + secret)
	noError(t, err)
	m := manifestOf(t, f32("small", 3), f32("none", 0, 7), f32("large", 300, 1000))
	for _, scheme := range []string{"tls", "quic"} {
		t.Run(scheme, func(t *testing.T) {
			g := serveGrads(t, func(cfg *daemon.Config) {
				cfg.Listen = append(cfg.Listen, scheme+"://127.0.0.1:0")
				cfg.TLS.Cert, cfg.TLS.Key, cfg.Tokens = certificate, key, tokens
			})
			g.tls.Authorities, g.token = authorities, token
			addr := map[string]string{"tls": g.addr.TLS, "quic": g.addr.QUIC}[scheme]
			g.read = addr
			sent := openGrads(t, g, "sent")
			g.read = ""
			mapped := openGrads(t, g, "mapped")
			const producers, steps = 2, 3
			done := make(chan error, producers)
			for k := range producers {
				p := dialStepsWith(t, addr, client.StepsConfig{Table: "grads", Name: fmt.Sprintf("w%d", k), Manifest: m, TLS: g.tls, Token: g.token})
				go func() {
					for step := range uint64(steps) {
						if err := sendStep(t.Context(), p, k, step); err != nil {
							done <- err
							return
						}
					}
					done <- p.Close(t.Context())
				}()
			}
			var reading sync.WaitGroup
			for _, r := range []*client.GradReader{sent, mapped} { // at the same time: the ring is smaller than a step
				reading.Go(func() {
					out := outputs(m)
					for step := range uint64(steps) {
						s, err := r.Step(t.Context(), step, client.StepOptions{Quorum: producers, Into: out})
						if err = errors.Join(err, sumInto(s, out)); err != nil {
							t.Error(err)
							return
						}
						for i := range m.Len() {
							if tt := m.Tensor(i); !slices.Equal(out[tt.Name], sumOf([]int{0, 1}, step, i, tt.Elements())) {
								t.Errorf("step %d, tensor %q: another sum", step, tt.Name)
							}
						}
						s.Release()
					}
				})
			}
			reading.Wait()
			for range producers {
				noError(t, <-done)
			}
			noError(t, errors.Join(sent.Close(), mapped.Close()))
		})
	}
}

func sumInto(s *client.GradStep, out map[string][]float32) error {
	if s == nil {
		return nil
	}
	return s.Sum(out)
}

// cuttingRelay is a way to a daemon whose connections end after so many bytes from it, each after its own number; negative: never.
func cuttingRelay(t *testing.T, to string, after func(connection int) int64) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	noError(t, err)
	var all sync.WaitGroup
	all.Go(func() {
		for n := 0; ; n++ {
			down, err := l.Accept()
			if err != nil {
				return
			}
			up, err := net.Dial("tcp", strings.TrimPrefix(to, "tcp://"))
			if err != nil {
				_ = down.Close()
				continue
			}
			limit := after(n)
			all.Go(func() {
				var asking sync.WaitGroup
				asking.Go(func() {
					_, _ = io.Copy(up, down)
					_ = up.Close()
				})
				if limit < 0 {
					_, _ = io.Copy(down, up)
				} else {
					_, _ = io.CopyN(down, up, limit)
				}
				_, _ = down.Close(), up.Close()
				asking.Wait()
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		all.Wait()
	})
	return "tcp://" + l.Addr().String()
}

// TestStepsOverConnectionsThatBreak: whatever byte a reader's connections break after, each step comes whole, and once.
func TestStepsOverConnectionsThatBreak(t *testing.T) {
	m := manifestOf(t, f32("a", 40_000), f32("b", 70_000), f32("c", 3))
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			g := serveGrads(t, nil)
			r := rand.New(rand.NewPCG(seed, 1))
			var cuts [20]int64
			for i := range cuts {
				cuts[i] = r.Int64N([]int64{400, 10_000, 500_000}[r.IntN(3)])
			}
			relay := cuttingRelay(t, g.addr.TCP, func(n int) int64 {
				if n < len(cuts) {
					return cuts[n]
				}
				return -1
			})
			cfg := client.GradConfig{Table: "grads", ReconnectFrom: time.Microsecond, ReconnectTo: time.Millisecond, Prefetch: 8}
			var reader *client.GradReader
			for reader == nil { // the first one is made once
				var err error
				if reader, err = client.OpenGrads(t.Context(), relay, cfg); err != nil && !errors.Is(err, client.ErrDaemonGone) {
					t.Fatal(err)
				}
			}
			defer reader.Close()
			const producers, steps = 3, 8
			done := make(chan error, producers)
			for k := range producers {
				p := dialSteps(t, g.addr.TCP, fmt.Sprintf("w%d", k), m)
				go func() {
					for step := range uint64(steps) {
						if err := sendStep(t.Context(), p, k, step); err != nil {
							done <- err
							return
						}
					}
					done <- nil
				}()
			}
			out := outputs(m)
			for step := range uint64(steps) {
				s, err := reader.Step(t.Context(), step, client.StepOptions{Quorum: producers, Into: out})
				noError(t, err)
				noError(t, s.Sum(out))
				wantSum(t, out, m, []int{0, 1, 2}, step, 1)
				s.Release()
			}
			for range producers {
				noError(t, <-done)
			}
			if s := reader.Stats(); s.CompletedSteps != producers*steps || s.BadChunks+s.DroppedIncomplete+s.Lost != 0 {
				t.Errorf("%+v", s)
			}
			t.Logf("%+v", reader.Stats())
		})
	}
}

// network is a reader's way to daemons, which may be broken.
type network struct {
	mu     sync.Mutex
	made   []net.Conn
	broken bool
}

var errBroken = errors.New("the network is broken")

func (n *network) dial(ctx context.Context, kind, address string) (net.Conn, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.broken {
		return nil, errBroken
	}
	conn, err := new(net.Dialer).DialContext(ctx, kind, address)
	if err == nil {
		n.made = append(n.made, conn)
	}
	return conn, err
}

func (n *network) breakOff() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.broken = true
	for _, conn := range n.made {
		_ = conn.Close()
	}
}

func (n *network) mend() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.broken = false
}

// TestReaderOutlivesDaemon: a reader that has batches sent to it goes on with the next daemon: with what it has, whether the segment was kept or not.
func TestReaderOutlivesDaemon(t *testing.T) {
	m := manifestOf(t, f32("a", 30_000), f32("b", 60_000))
	for _, kept := range []bool{true, false} {
		t.Run(fmt.Sprintf("kept %v", kept), func(t *testing.T) {
			cfg := gradConfig(t)
			if kept {
				cfg.SegmentDir = t.TempDir()
				noError(t, os.Chmod(cfg.SegmentDir, 0o700))
			}
			g := runGrads(t, cfg)
			cfg.Listen[0] = g.addr.TCP // again
			var way network
			reader, err := client.OpenGrads(t.Context(), g.addr.TCP, client.GradConfig{Table: "grads", ReconnectTo: 10 * time.Millisecond, Dialer: way.dial})
			noError(t, err)
			defer reader.Close()
			v, w := dialSteps(t, g.addr.TCP, "v", m), dialSteps(t, g.addr.TCP, "w", m)
			noError(t, sendStep(t.Context(), v, 1, 0))
			noError(t, sendStep(t.Context(), w, 2, 0))
			mustStep(t, reader, 0, 2, "v", "w").Release()
			noError(t, sendStep(t.Context(), v, 1, 1))
			tx, err := w.Step(t.Context(), 1)
			noError(t, err)
			noError(t, tx.PutFloats("a", valuesOf(2, 1, 0, 30_000)))
			for have := 0; have < 1; { // the reader has all of one and a part of the other
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
				_, err := reader.Step(ctx, 1, client.StepOptions{Quorum: 3})
				cancel()
				timeout := (*client.StepTimeoutError)(nil)
				if !errors.As(err, &timeout) || timeout.Reconnecting != nil {
					t.Fatal(err)
				}
				have = len(timeout.Have)
			}
			way.breakOff() // before the daemon says that it stops
			g.stop()
			for known := false; !known; {
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
				_, err = reader.Step(ctx, 1, client.StepOptions{Quorum: 3})
				cancel()
				timeout := (*client.StepTimeoutError)(nil)
				if !errors.As(err, &timeout) {
					t.Fatal(err)
				}
				known = timeout.Reconnecting != nil && strings.Contains(err.Error(), "no connection")
			}
			runGrads(t, cfg)
			way.mend()
			noError(t, errors.Join(tx.PutFloats("b", valuesOf(2, 1, 1, 60_000)), tx.Commit(t.Context())))
			s := mustStep(t, reader, 1, 2, "v", "w")
			out := outputs(m)
			noError(t, s.Sum(out))
			wantSum(t, out, m, []int{1, 2}, 1, 1)
			s.Release()
			noError(t, sendStep(t.Context(), w, 2, 2))
			noError(t, sendStep(t.Context(), v, 1, 2))
			s = mustStep(t, reader, 2, 2, "v", "w")
			noError(t, s.Sum(out))
			wantSum(t, out, m, []int{1, 2}, 2, 1)
			s.Release()
		})
	}
}

// TestReaderGivesUp: without a daemon for too long, it ends as one that maps the memory does.
func TestReaderGivesUp(t *testing.T) {
	g := serveGrads(t, nil)
	reader, err := client.OpenGrads(t.Context(), g.addr.TCP, client.GradConfig{Table: "grads", ReconnectFor: -1})
	noError(t, err)
	defer reader.Close()
	g.stop()
	if _, err := reader.Step(t.Context(), 0, client.StepOptions{}); !errors.Is(err, client.ErrDaemonGone) && !errors.Is(err, client.ErrShuttingDown) {
		t.Error(err)
	}
}

// TestOpenGradsElsewhere: what cannot be read is said when it is opened.
func TestOpenGradsElsewhere(t *testing.T) {
	g := serveGrads(t, func(cfg *daemon.Config) {
		cfg.Tables = append(cfg.Tables, daemon.Table{Name: "samples", Spec: "x:U8", BatchSize: 1, Batches: 4})
	})
	for says, c := range map[string]struct {
		addr string
		cfg  client.GradConfig
	}{
		"kind tensors": {g.addr.TCP, client.GradConfig{Table: "samples"}},
		"MemoryBytes":  {g.addr.TCP, client.GradConfig{Table: "grads", MemoryBytes: 1}},
		"no table":     {g.addr.TCP, client.GradConfig{Table: "none"}},
		"not known":    {"ftp://x", client.GradConfig{Table: "grads"}},
		"host:port":    {"tls://x", client.GradConfig{Table: "grads"}},
	} {
		if r, err := client.OpenGrads(t.Context(), c.addr, c.cfg); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v, %v; want %q", r, err, says)
		}
	}
}
