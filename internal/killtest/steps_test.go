//go:build linux && !race

package killtest

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/internal/daemon"
	"github.com/ingestd/ingestd/internal/failpoint"
	"github.com/ingestd/ingestd/tensor"
)

// stepsWorld is a daemon with one table of tensors that is kept, and producers that send steps to it.
type stepsWorld struct {
	t      *testing.T
	r      *rand.Rand
	dir    string
	m      *tensor.Manifest
	daemon *process
	reader *client.GradReader
}

// stepsPeer is a producer, and the step after the last one that it said was committed.
type stepsPeer struct {
	*process
	name, role string
	next       atomic.Uint64
}

func newStepsWorld(t *testing.T, seed uint64) *stepsWorld {
	t.Helper()
	m, err := StepsManifest()
	check(t, err)
	w := &stepsWorld{t: t, r: rand.New(rand.NewPCG(seed, 0)), dir: t.TempDir(), m: m}
	cfg := daemon.DefaultConfig()
	cfg.Listen, cfg.Admin, cfg.ReadyFile = []string{w.addr()}, "off", filepath.Join(w.dir, "ready")
	cfg.SegmentDir = filepath.Join(w.dir, "segments")
	check(t, os.Mkdir(cfg.SegmentDir, 0o700))
	cfg.LocalProducers.Enabled = true
	cfg.Tables = []daemon.Table{{Name: "g", Kind: "tensors", ChunkBytes: tensor.ChunkBytesMin, Batches: 256}}
	check(t, os.WriteFile(filepath.Join(w.dir, "ingestd.yaml"), []byte(cfg.YAML()), 0o600))
	w.allow(0)
	w.serve()
	return w
}

// allow lets producers send steps up to this one. The file is changed as a whole.
func (w *stepsWorld) allow(step uint64) {
	w.t.Helper()
	check(w.t, os.WriteFile(w.allowed()+".new", []byte(fmt.Sprint(step)), 0o600))
	check(w.t, os.Rename(w.allowed()+".new", w.allowed()))
}

func (w *stepsWorld) allowed() string { return filepath.Join(w.dir, "allowed") }

func (w *stepsWorld) addr() string { return "unix://" + filepath.Join(w.dir, "s") }

func (w *stepsWorld) serve() {
	w.t.Helper()
	ready := filepath.Join(w.dir, "ready")
	_ = os.Remove(ready)
	d, err := spawn(ingestdPath, "", nil, "serve", "--config", filepath.Join(w.dir, "ingestd.yaml"))
	check(w.t, err)
	w.daemon = d
	if !within(patience, func() bool { _, err := os.Stat(ready); return err == nil || !d.running() }) || !d.running() {
		w.t.Fatalf("the daemon does not come up: %s", d.said.String())
	}
	if w.reader != nil {
		check(w.t, w.reader.Close())
	}
	w.reader, err = client.OpenGrads(w.t.Context(), w.addr(), client.GradConfig{Table: "g"})
	check(w.t, err)
}

// start starts a producer at a step; point may name a failpoint.
func (w *stepsWorld) start(name, role, point string, step uint64) *stepsPeer {
	w.t.Helper()
	p := &stepsPeer{name: name, role: role}
	p.next.Store(step)
	line := func(text string) {
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			w.t.Errorf("a peer wrote %q", text)
		}
		p.next.Store(n + 1)
	}
	var err error
	p.process, err = spawn(peerPath, point, line, "steps", "--addr", w.addr(), "--table", "g", "--name", name, "--role", role, "--session", fmt.Sprint(step),
		"--ledger", w.allowed(), "--seed", fmt.Sprint(w.r.Uint64()), "--pause", "1ms")
	check(w.t, err)
	return p
}

// step reads one step and compares the sum of each tensor with that of those whom the reader says it has, made here.
func (w *stepsWorld) step(step uint64, quorum int) (*client.GradStep, error) {
	out := map[string][]float32{}
	for i := range w.m.Len() {
		t := w.m.Tensor(i)
		out[t.Name] = make([]float32, t.Elements())
	}
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	s, err := w.reader.Step(ctx, step, client.StepOptions{Quorum: quorum, Into: out})
	if err != nil {
		return nil, err
	}
	if err := s.Sum(out); err != nil {
		s.Release()
		return nil, err
	}
	for i := range w.m.Len() {
		t := w.m.Tensor(i)
		sum, one := make([]float32, t.Elements()), make([]float32, t.Elements())
		for k, name := range s.Have {
			StepsContent(one, name, step, i)
			for at, x := range one {
				if k == 0 {
					sum[at] = x
				} else {
					sum[at] += x
				}
			}
		}
		for at, got := range out[t.Name] {
			if math.Float32bits(got) != math.Float32bits(sum[at]) {
				w.t.Fatalf("step %d of %q: element %d of %q is %v, want %v", step, s.Have, at, t.Name, got, sum[at])
			}
		}
	}
	return s, nil
}

// TestStepsOfTheKilled: producers, over a socket and in place, are killed at random moments and at the points of those in place, and come back at the step they had not
// committed; now and then the daemon is killed. A reader that wants those who live gets whole steps of them, and the sums are those of what they sent.
func TestStepsOfTheKilled(t *testing.T) {
	t.Parallel()
	seed := *seedFlag
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d", seed)
	w := newStepsWorld(t, seed)
	var points []string
	for _, name := range failpoint.Names {
		if strings.HasPrefix(name, "client/filler/") && name != "client/filler/copying" {
			points = append(points, name)
		}
	}
	if len(points) < 2 {
		t.Fatalf("points of producers in place: %q", points)
	}
	peers := []*stepsPeer{w.start("a", "push", "", 0), w.start("b", "place", "", 0), w.start("c", "push", "", 0), w.start("d", "place", "", 0)}
	whole, short, restarts := 0, 0, 0
	for step := uint64(0); step < 40; step++ {
		w.allow(step + 1)
		k := w.r.IntN(len(peers))
		switch p := peers[k]; {
		case step%10 == 7:
			w.daemon.kill()
			w.serve()
			restarts++
		case step%2 == 1 && p.running():
			wait := time.Duration(w.r.Int64N(int64(5 * time.Millisecond)))
			within(wait, func() bool { return false })
			p.kill()
		case !p.running():
			point := ""
			if p.role == "place" && w.r.IntN(2) == 0 {
				point = fmt.Sprintf("%s:%d", points[w.r.IntN(len(points))], 1+w.r.IntN(20))
			}
			peers[k] = w.start(p.name, p.role, point, max(p.next.Load(), step))
		}
		alive := 0
		for k, p := range peers {
			if !p.running() && w.r.IntN(2) == 0 {
				peers[k] = w.start(p.name, p.role, "", max(p.next.Load(), step))
			}
			if p.point == "" && peers[k].running() && peers[k].next.Load() <= step {
				alive++
			}
		}
		s, err := w.step(step, max(1, alive-1))
		switch {
		case errors.Is(err, client.ErrDaemonGone):
			t.Fatalf("step %d: the daemon is gone: %s", step, w.daemon.said.String())
		case err != nil:
			t.Fatalf("step %d: %v", step, err)
		}
		if len(s.Have) == len(peers) {
			whole++
		} else {
			short++
		}
		s.Release()
	}
	if whole == 0 || short == 0 || restarts == 0 {
		t.Errorf("%d steps of all, %d of some, %d restarts: something was not tried", whole, short, restarts)
	}
	stats := w.reader.Stats()
	t.Logf("%d steps of all, %d of some; since the last restart %+v", whole, short, stats)
	if stats.BadChunks > 0 {
		t.Errorf("%+v", stats)
	}
	for _, p := range peers {
		if p.running() {
			p.signal(termination)
			if err := p.ends(0); err != nil && !p.endedBy(termination) { // as one that was just started is
				t.Error(err)
			}
		} else if !p.struck() {
			t.Errorf("a producer was not killed, and ended: %s", p.ending())
		}
	}
	check(t, w.reader.Close())
}
