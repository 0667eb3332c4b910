//go:build linux && !race

package killtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/internal/daemon"
	"github.com/ingestd/ingestd/internal/failpoint"
	"github.com/ingestd/ingestd/weights"
	"github.com/ingestd/ingestd/wire"
)

// weightsWorld is a daemon with one table of weights.
type weightsWorld struct {
	t      *testing.T
	dir    string
	daemon *process
}

func newWeightsWorld(t *testing.T, generations int, point string) *weightsWorld {
	t.Helper()
	w := &weightsWorld{t: t, dir: t.TempDir()}
	cfg := daemon.DefaultConfig()
	cfg.Listen, cfg.Admin, cfg.ReadyFile = []string{"unix://" + w.socket()}, "off", filepath.Join(w.dir, "ready")
	cfg.Tables = []daemon.Table{{Name: "w", Kind: "weights", Generations: generations}}
	check(t, os.WriteFile(filepath.Join(w.dir, "ingestd.yaml"), []byte(cfg.YAML()), 0o600))
	w.serve(point)
	return w
}

func (w *weightsWorld) socket() string { return filepath.Join(w.dir, "s") }
func (w *weightsWorld) addr() string   { return "unix://" + w.socket() }

// serve starts the daemon and waits until it serves.
func (w *weightsWorld) serve(point string) {
	w.t.Helper()
	ready := filepath.Join(w.dir, "ready")
	_ = os.Remove(ready)
	d, err := spawn(ingestdPath, point, nil, "serve", "--config", filepath.Join(w.dir, "ingestd.yaml"))
	check(w.t, err)
	w.daemon = d
	if !within(patience, func() bool { _, err := os.Stat(ready); return err == nil || !d.running() }) || !d.running() {
		w.t.Fatalf("the daemon does not come up: %s", d.said.String())
	}
}

// weightsPeer is a publisher or a subscriber, and the last generation that it wrote of.
type weightsPeer struct {
	*process
	last  atomic.Uint64
	lines atomic.Uint64
}

func (w *weightsWorld) peer(point string, args ...string) *weightsPeer {
	w.t.Helper()
	p := &weightsPeer{}
	line := func(text string) {
		generation, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			w.t.Errorf("a peer wrote %q", text)
		}
		p.last.Store(generation)
		p.lines.Add(1)
	}
	var err error
	p.process, err = spawn(peerPath, point, line, append(args, "--addr", w.addr(), "--table", "w", "--name", strings.Join(args, " "))...)
	check(w.t, err)
	return p
}

// ended sends SIGTERM to peers and sees that they end in order: a subscriber that saw a torn generation ends with code 3.
func (w *weightsWorld) ended(peers ...*weightsPeer) {
	w.t.Helper()
	for _, p := range peers {
		p.signal(termination)
		if err := p.ends(0); err != nil {
			w.t.Error(err)
		}
	}
}

// wrong says what is wrong with a generation, or "".
func wrongWeights(s *weights.Segment, generation uint64, place int) string {
	m, data := s.Manifest(), s.Data(place)
	for i := range m.Len() {
		want := make([]byte, m.EncodedBytes(i))
		WeightsContent(want, generation, i)
		if !bytes.Equal(want, data[m.Offset(i):][:len(want)]) {
			return fmt.Sprintf("generation %d: tensor %d is not its own", generation, i)
		}
	}
	return ""
}

// TestPublisherKilled: a publisher is killed at each of its stages, in place. What it had not published is not there, the next one goes on, and readers see
// whole generations only.
func TestPublisherKilled(t *testing.T) {
	t.Parallel()
	w := newWeightsWorld(t, 3, "")
	readers := []*weightsPeer{w.peer("", "subscribe"), w.peer("", "subscribe", "--pause", "3ms")}
	published := uint64(0)
	points := 0
	for _, name := range failpoint.Names {
		if !strings.HasPrefix(name, "client/publisher/") {
			continue
		}
		points++
		for _, count := range []int{1, 30} { // 22 blocks and places to pass in a generation
			p := w.peer(fmt.Sprintf("%s:%d", name, count), "publish")
			if !within(patience, func() bool { return !p.running() }) || !p.struck() {
				t.Fatalf("a publisher was not killed at %s: %s", name, p.ending())
			}
			published = max(published, p.last.Load())
			w.settled()
			newest := w.newest()
			switch {
			case name == "client/publisher/committed" && newest == published+1: // the daemon had heard it
				published = newest
			case newest != published:
				t.Fatalf("killed at %s: the newest generation is %d, and %d was published", name, newest, published)
			}
		}
	}
	if points < 5 {
		t.Errorf("only %d points of publishers", points)
	}
	p := w.peer("", "publish")
	for _, r := range readers {
		if !within(patience, func() bool { return r.last.Load() > published+3 || !r.running() }) || !r.running() {
			t.Errorf("a reader is at generation %d: %s", r.last.Load(), r.said.String())
		}
	}
	w.ended(append(readers, p)...)
}

// settled returns when the daemon has seen the end of the last publisher, and with it all that this had said.
func (w *weightsWorld) settled() {
	w.t.Helper()
	m, err := WeightsManifest()
	check(w.t, err)
	if !within(patience, func() bool {
		p, err := client.OpenPublisher(w.t.Context(), w.addr(), client.PublisherConfig{Table: "w", Manifest: m})
		if errors.Is(err, client.ErrPublisherActive) {
			return false
		}
		check(w.t, err)
		check(w.t, p.Close())
		return true
	}) {
		w.t.Fatal("a publisher that is dead still has the table")
	}
}

// newest returns the newest generation, after looking at every byte of it; 0: none.
func (w *weightsWorld) newest() uint64 {
	w.t.Helper()
	a, err := weights.Attach(w.t.Context(), w.socket(), wire.Hello{Table: "w"})
	var refusal *wire.Refusal
	if errors.As(err, &refusal) && refusal.Code == wire.CodeNoGeneration {
		return 0
	}
	check(w.t, err)
	defer a.Close()
	generation, place, ok := a.Pin(0)
	if !ok {
		w.t.Fatal("a table that takes readers has no generation")
	}
	defer a.Unpin(place)
	if text := wrongWeights(a.Segment(), generation, place); text != "" {
		w.t.Error(text)
	}
	return generation
}

// TestDaemonKilledAtCommit: the daemon is killed at each point of a publication. What readers have mapped is whole, before and after; publisher and readers
// go on with the next daemon.
func TestDaemonKilledAtCommit(t *testing.T) {
	t.Parallel()
	for _, name := range failpoint.Names {
		if !strings.HasPrefix(name, "weights/") {
			continue
		}
		t.Run(name, func(t *testing.T) {
			w := newWeightsWorld(t, 3, name+":40")
			publisher, reader := w.peer("", "publish"), w.peer("", "subscribe")
			a, err := weights.Attach(t.Context(), w.socket(), wire.Hello{Table: "w", Wait: true})
			check(t, err)
			defer a.Close()
			held, heldPlace, ok := a.Pin(0)
			if !within(patience, func() bool { return !w.daemon.running() }) || !w.daemon.struck() || !ok {
				t.Fatalf("the daemon was not killed: %s", w.daemon.said.String())
			}
			newest, place, ok := a.Pin(0)
			if !ok || newest < 39 || newest > 40 {
				t.Errorf("the newest generation is %d, %v; want 39 or 40", newest, ok)
			}
			for generation, place := range map[uint64]int{held: heldPlace, newest: place} {
				if text := wrongWeights(a.Segment(), generation, place); text != "" {
					t.Error(text)
				}
			}
			from := reader.lines.Load()
			w.serve("")
			if !within(patience, func() bool { return reader.lines.Load() > from+3 || !reader.running() }) || !reader.running() {
				t.Errorf("a reader wrote %d lines, and %d before the daemon was killed: %s", reader.lines.Load(), from, reader.said.String())
			}
			if text := wrongWeights(a.Segment(), held, heldPlace); text != "" {
				t.Errorf("after the restart: %s", text)
			}
			w.ended(publisher, reader)
		})
	}
}

// TestReaderStoppedWhilePinned: a publisher that waits for a stopped reader is told who that is; when it is killed, its pin is gone.
func TestReaderStoppedWhilePinned(t *testing.T) {
	t.Parallel()
	w := newWeightsWorld(t, 2, "")
	m, err := WeightsManifest()
	check(t, err)
	p, err := client.OpenPublisher(t.Context(), w.addr(), client.PublisherConfig{Table: "w", Manifest: m})
	check(t, err)
	defer p.Close()
	publish := func(patience time.Duration) (uint64, error) {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		g, err := p.Begin(ctx, 0)
		if err != nil {
			return 0, err
		}
		for i := range m.Len() {
			b := make([]byte, m.EncodedBytes(i))
			WeightsContent(b, g.Number(), i)
			check(t, g.PutAt(ctx, i, b))
		}
		done, err := g.Commit(ctx)
		return done.Generation, err
	}
	for round := range 3 {
		generation, err := publish(patience)
		check(t, err)
		reader := w.peer("", "subscribe", "--role", "hold")
		if !within(patience, func() bool { return reader.last.Load() == generation }) {
			t.Fatalf("the reader does not read generation %d: %s", generation, reader.said.String())
		}
		if round > 0 {
			reader.signal(syscall.SIGSTOP)
			if !within(patience, reader.stopped) {
				t.Fatal("the process does not stop")
			}
		}
		_, err = publish(patience) // to the other place
		check(t, err)
		_, err = publish(200 * time.Millisecond)
		var pinned *client.PinnedError
		if !errors.As(err, &pinned) || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("published over a pin, or: %v", err)
		}
		if len(pinned.Pins) != 1 || pinned.Pins[0].Who.PID != reader.pid() || pinned.Pins[0].Generation != generation ||
			pinned.Pins[0].Who.Client != "subscribe --role hold" || time.Since(pinned.Pins[0].Since) > patience {
			t.Errorf("told %v, want process %d with generation %d", pinned.Pins, reader.pid(), generation)
		}
		if round == 1 { // it goes on, and nothing has changed under it
			reader.signal(syscall.SIGCONT)
			w.ended(reader)
			continue
		}
		reader.kill()
		if _, err := publish(patience); err != nil {
			t.Errorf("after the reader was killed: %v", err)
		}
	}
}
