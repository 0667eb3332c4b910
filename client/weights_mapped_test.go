//go:build linux && !race

package client

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"path"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/weights"
	"github.com/ingestd/ingestd/wire"
)

func have[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// inPlace opens a publisher in place.
func inPlace(t testing.TB, addr string, m *tensor.Manifest) *Publisher {
	t.Helper()
	p := have(OpenPublisher(patient(t), addr, PublisherConfig{Table: "w", Manifest: m}))(t)
	t.Cleanup(func() { _ = p.Close() })
	return p
}

// mappedOf subscribes without a stream.
func mappedOf(t testing.TB, addr string, cfg SubscribeConfig) *Subscription {
	t.Helper()
	cfg.Table = "w"
	s := have(Subscribe(patient(t), addr, cfg))(t)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func publishVersion(t testing.TB, p *Publisher, version uint64) Published {
	t.Helper()
	return have(p.Publish(patient(t), all(version).data(p.Manifest())))(t)
}

func TestMappedPublishAndRead(t *testing.T) {
	d := serveWeights(t, "unix", weights.ServerConfig{}, weights.StoreConfig{})
	m := vectors(t, 3*blockBytes+1, 0, 17, 256)
	p := inPlace(t, "shm"+d.addr[len("unix"):], m)
	_, err := OpenPublisher(patient(t), d.addr, PublisherConfig{Table: "w", Manifest: m})
	if !errors.Is(err, ErrPublisherActive) {
		t.Errorf("a second publisher: %v", err)
	}
	_, err = Subscribe(patient(t), d.addr, SubscribeConfig{Table: "w"})
	if codeOf(err) != wire.CodeNoGeneration {
		t.Errorf("a reader of nothing: %v", err)
	}
	waited := make(chan *Subscription)
	go func() {
		s, err := Subscribe(patient(t), d.addr, SubscribeConfig{Table: "w", Wait: true})
		if err != nil {
			t.Error(err)
		}
		waited <- s
	}()
	published := publishVersion(t, p, 1)
	s := <-waited
	defer s.Close()
	w := have(s.Latest())(t)
	wantWeights(t, w, all(1))
	if w.Generation() != 1 || w.Digest() != published.Digest || published.Generation != 1 || time.Since(w.Published()) > time.Minute || !s.Manifest().Equal(m) {
		t.Errorf("generation %d, digest %v; published %+v", w.Generation(), w.Digest(), published)
	}
	for version := uint64(2); version < 9; version++ { // w is held all the time
		publishVersion(t, p, version)
		n := have(s.Wait(patient(t), version-1))(t)
		wantWeights(t, n, all(version))
		n.Release()
	}
	wantWeights(t, w, all(1))
	w.Release()
	w.Release()
	defer func() {
		if recover() == nil {
			t.Error("a generation was used after its release, without a panic")
		}
	}()
	w.At(0)
}

// TestGenerationInPlace: tensors written where they lie, put, or forgotten.
func TestGenerationInPlace(t *testing.T) {
	d := serveWeights(t, "unix", weights.ServerConfig{}, weights.StoreConfig{})
	m := vectors(t, 100, 0, 200, 5)
	p := inPlace(t, d.addr, m)
	ctx := patient(t)
	g := have(p.Begin(ctx, 5))(t)
	if _, err := p.Begin(ctx, 0); err == nil {
		t.Error("a second Begin")
	}
	copy(have(g.Tensor("layers.0.w"))(t), tensorContent(1, 0, 100))
	if _, err := g.Tensor("none"); err == nil {
		t.Error("a tensor that is not there")
	}
	for _, wrong := range []int64{199, 201} {
		if err := g.Put(ctx, "layers.2.w", make([]byte, wrong)); err == nil {
			t.Errorf("%d bytes for a tensor of 200", wrong)
		}
	}
	var part *IncompleteError
	if _, err := g.Commit(ctx); !errors.As(err, &part) || part.Missing != 2 || part.Tensor != "layers.2.w" || part.Generation != 5 {
		t.Errorf("a commit without two tensors: %v", err)
	}
	for _, i := range []int{2, 3} {
		if err := g.PutAt(ctx, i, tensorContent(1, i, m.EncodedBytes(i))); err != nil {
			t.Fatal(err)
		}
	}
	if done := have(g.Commit(ctx))(t); done.Generation != 5 {
		t.Errorf("%+v", done)
	}
	for name, err := range map[string]error{
		"commit": func() error { _, err := g.Commit(ctx); return err }(), "put": g.PutAt(ctx, 0, make([]byte, 100)),
		"tensor": func() error { _, err := g.Tensor("layers.0.w"); return err }(),
	} {
		if !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s after the commit: %v", name, err)
		}
	}
	if err := g.Abort(); err != nil {
		t.Errorf("abort after the commit: %v", err)
	}
	s := mappedOf(t, d.addr, SubscribeConfig{})
	w := have(s.Latest())(t)
	wantWeights(t, w, all(1))
	w.Release()

	g = have(p.Begin(ctx, 0))(t)
	if err := g.PutAt(ctx, 0, tensorContent(2, 0, 100)); err != nil || g.Number() != 6 {
		t.Errorf("generation %d, %v", g.Number(), err)
	}
	if err := g.Abort(); err != nil {
		t.Error(err)
	}
	var old *OldGenerationError
	if _, err := p.Begin(ctx, 5); !errors.As(err, &old) || old.Wanted != 5 {
		t.Errorf("an old generation: %v", err)
	}
	g = have(p.Begin(ctx, 0))(t)
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if _, err := g.Commit(ctx); !errors.Is(err, os.ErrClosed) {
		t.Errorf("commit after close: %v", err)
	}
	if _, err := p.Begin(ctx, 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("begin after close: %v", err)
	}
	if w := have(s.Latest())(t); w.Generation() != 5 {
		t.Errorf("newest %d", w.Generation())
	} else {
		w.Release()
	}
}

// TestPinnedIsTold: a begin that cannot have a place ends by its deadline, or by a cancel, and says for whom it waited; then it may begin again.
func TestPinnedIsTold(t *testing.T) {
	d := serveWeights(t, "unix", weights.ServerConfig{}, weights.StoreConfig{Generations: 2})
	p := inPlace(t, d.addr, vectors(t, 10))
	publishVersion(t, p, 1)
	s := mappedOf(t, d.addr, SubscribeConfig{Client: "holder"})
	w := have(s.Latest())(t)
	publishVersion(t, p, 2)
	for name, limited := range map[string]func() (context.Context, context.CancelFunc){
		"deadline": func() (context.Context, context.CancelFunc) {
			return context.WithTimeout(t.Context(), 150*time.Millisecond)
		},
		"soon": func() (context.Context, context.CancelFunc) {
			return context.WithTimeout(t.Context(), time.Millisecond)
		},
		"cancel":        func() (context.Context, context.CancelFunc) { return cancelAfter(t, 150*time.Millisecond) },
		"cancel, early": func() (context.Context, context.CancelFunc) { return cancelAfter(t, time.Millisecond) },
	} {
		ctx, cancel := limited()
		_, err := p.Begin(ctx, 0)
		cancel()
		var pinned *PinnedError
		switch told := errors.As(err, &pinned); {
		case name == "cancel, early":
			if !errors.Is(err, context.Canceled) {
				t.Errorf("%s: %v", name, err)
			}
		case name == "soon" && !told && errors.Is(err, os.ErrDeadlineExceeded): // it had passed before anything was said
		case !told || len(pinned.Pins) != 1 || pinned.Pins[0].Who.Client != "holder" || pinned.Pins[0].Who.PID != os.Getpid() || pinned.Pins[0].Generation != 1:
			t.Errorf("%s: %v", name, err)
		case name != "cancel" && !errors.Is(err, os.ErrDeadlineExceeded), name == "cancel" && !errors.Is(err, context.Canceled):
			t.Errorf("%s: %v is not why it ended", name, err)
		}
	}
	wantWeights(t, w, all(1))
	w.Release()
	if got := publishVersion(t, p, 3); got.Generation != 3 {
		t.Errorf("%+v", got)
	}
}

func cancelAfter(t *testing.T, d time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(t.Context())
	timer := time.AfterFunc(d, cancel)
	return ctx, func() { timer.Stop(); cancel() }
}

// TestMappedReplaced: a subscription attaches again by itself when a table has another manifest; what it holds stays.
func TestMappedReplaced(t *testing.T) {
	for _, how := range []string{"latest", "wait"} {
		t.Run(how, func(t *testing.T) {
			d := serveWeights(t, "unix", weights.ServerConfig{}, weights.StoreConfig{})
			old, next := vectors(t, 10), vectors(t, 10, 20)
			p := inPlace(t, d.addr, old)
			publishVersion(t, p, 1)
			s := mappedOf(t, d.addr, SubscribeConfig{})
			w := have(s.Latest())(t)
			if err := p.Close(); err != nil {
				t.Fatal(err)
			}
			var q *Publisher
			for err := ErrPublisherActive; errors.Is(err, ErrPublisherActive); { // until the daemon has seen the end of the first
				q, err = OpenPublisher(patient(t), d.addr, PublisherConfig{Table: "w", Manifest: next})
				if err != nil && !errors.Is(err, ErrPublisherActive) {
					t.Fatal(err)
				}
			}
			defer q.Close()
			publishVersion(t, q, 2)
			var n *Weights
			if how == "wait" {
				n = have(s.Wait(patient(t), 1))(t)
			} else {
				for n = have(s.Latest())(t); n.Generation() == 1; n = have(s.Latest())(t) { // the news is on its way
					n.Release()
				}
			}
			wantWeights(t, n, all(2))
			wantWeights(t, w, all(1))
			if n.Generation() != 2 || n.Manifest().Len() != 2 || s.Manifest().Len() != 2 || w.Manifest().Len() != 1 {
				t.Errorf("generation %d with %d tensors", n.Generation(), n.Manifest().Len())
			}
			n.Release()
			w.Release()
		})
	}
}

func TestMappedWaitEnds(t *testing.T) {
	d := serveWeights(t, "unix", weights.ServerConfig{}, weights.StoreConfig{})
	p := inPlace(t, d.addr, vectors(t, 10))
	publishVersion(t, p, 1)
	s := mappedOf(t, d.addr, SubscribeConfig{})
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
	defer cancel()
	if _, err := s.Wait(ctx, 1); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a deadline: %v", err)
	}
	w := have(s.Latest())(t)
	got := make(chan error)
	go func() {
		_, err := s.Wait(patient(t), 1)
		got <- err
	}()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := <-got; !errors.Is(err, os.ErrClosed) {
		t.Errorf("a wait when it was closed: %v", err)
	}
	if _, err := s.Latest(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after close: %v", err)
	}
	for version := uint64(2); version < 6; version++ {
		publishVersion(t, p, version)
	}
	wantWeights(t, w, all(1)) // its pin lasts
	w.Release()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// runWeights runs a daemon at a path until stop is called.
func runWeights(t *testing.T, socket string) (stop func()) {
	t.Helper()
	store := have(weights.NewStore(weights.StoreConfig{Table: "w"}))(t)
	server := have(weights.NewServer(weights.ServerConfig{Stores: map[string]*weights.Store{"w": store}}))(t)
	l := have(net.Listen("unix", socket))(t)
	ctx, cancel := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				if hello, err := wire.ReadHello(conn); err == nil {
					_ = server.Serve(ctx, conn, hello)
				}
			})
		}
	})
	return sync.OnceFunc(func() {
		cancel()
		_ = l.Close()
		serving.Wait()
		_ = store.Close()
	})
}

// TestMappedDaemonRestarted: a subscription finds the next daemon, whose numbers begin anew; one that is not to reconnect ends.
func TestMappedDaemonRestarted(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	addr := "unix://" + socket
	stop := runWeights(t, socket)
	defer stop()
	m := vectors(t, 10)
	p := inPlace(t, addr, m)
	publishVersion(t, p, 1)
	publishVersion(t, p, 2)
	s := mappedOf(t, addr, SubscribeConfig{ReconnectTo: 20 * time.Millisecond})
	once := mappedOf(t, addr, SubscribeConfig{ReconnectFor: -1})
	w := have(s.Latest())(t)
	stop()
	if _, err := once.Wait(patient(t), 2); !errors.Is(err, ErrShuttingDown) {
		t.Errorf("one that does not reconnect: %v", err)
	}
	if _, err := p.Publish(patient(t), all(3).data(m)); !errors.Is(err, ErrShuttingDown) && !errors.Is(err, ErrDaemonGone) {
		t.Errorf("a publisher: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	_, err := s.Wait(ctx, 2)
	cancel()
	var again *ReconnectingError
	if !errors.As(err, &again) || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a wait without a daemon: %v", err)
	}
	if _, err := s.Latest(); err == nil {
		t.Error("the newest of a daemon that is not there")
	}
	stop2 := runWeights(t, socket)
	defer stop2()
	got := make(chan *Weights)
	go func() {
		w, err := s.Wait(patient(t), 2)
		if err != nil {
			t.Error(err)
		}
		got <- w
	}()
	publishVersion(t, p, 7)
	n := <-got
	wantWeights(t, n, all(7))
	wantWeights(t, w, all(1+1))
	if n.Generation() != 1 {
		t.Errorf("generation %d", n.Generation())
	}
	n.Release()
	w.Release()
	_ = s.Close()
	_ = p.Close()
}

func TestWeightsViews(t *testing.T) {
	d := serveWeights(t, "unix", weights.ServerConfig{}, weights.StoreConfig{})
	m := have(tensor.NewManifest([]tensor.Tensor{
		{Name: "layers.0.w", DType: spec.F32, Shape: []int64{3, 2}}, {Name: "layers.0.b", DType: spec.F64, Shape: []int64{2}},
		{Name: "layers.10.w", DType: spec.U8, Shape: []int64{0, 5}}, {Name: "head/w", DType: spec.I16, Shape: nil},
		{Name: "half", DType: spec.F32, Shape: []int64{4}, Encoding: have(tensor.ParseEncoding("bf16"))(t)},
	}, nil))(t)
	p := inPlace(t, d.addr, m)
	have(p.Publish(patient(t), func(i int) []byte {
		b := make([]byte, m.EncodedBytes(i))
		if i == 0 {
			for k := range 6 {
				binary.LittleEndian.PutUint32(b[4*k:], math.Float32bits(float32(k)))
			}
		}
		return b
	}))(t)
	w := have(mappedOf(t, d.addr, SubscribeConfig{}).Latest())(t)
	defer w.Release()
	if x := have(WeightsView[float32](w, "layers.0.w"))(t); len(x) != 6 || x[5] != 5 {
		t.Errorf("%v", x)
	}
	if x := have(WeightsView[uint8](w, "layers.10.w"))(t); len(x) != 0 {
		t.Errorf("%v", x)
	}
	for name, err := range map[string]error{
		"another type": func() error { _, err := WeightsView[float64](w, "layers.0.w"); return err }(),
		"encoded":      func() error { _, err := WeightsView[float32](w, "half"); return err }(),
		"not there":    func() error { _, err := WeightsView[float32](w, "x"); return err }(),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if b := have(w.Rows("layers.0.w", 1, 3))(t); len(b) != 16 || math.Float32frombits(binary.LittleEndian.Uint32(b)) != 2 {
		t.Errorf("rows % x", b)
	}
	for _, r := range [][2]int64{{-1, 1}, {0, 4}, {2, 1}} {
		if _, err := w.Rows("layers.0.w", r[0], r[1]); err == nil {
			t.Errorf("rows %v", r)
		}
	}
	for _, name := range []string{"head/w", "half"} {
		if _, err := w.Rows(name, 0, 0); err == nil {
			t.Errorf("rows of %q", name)
		}
	}
	if b := have(w.Rows("layers.10.w", 0, 0))(t); len(b) != 0 {
		t.Errorf("%v", b)
	}
	for pattern, want := range map[string][]string{
		"layers.0.*": {"layers.0.w", "layers.0.b"}, "*": {"layers.0.w", "layers.0.b", "layers.10.w", "head/w", "half"}, "*w": {"layers.0.w", "layers.10.w", "head/w"},
		"layers.?.[ab]": {"layers.0.b"}, "none": nil,
	} {
		var got []string
		for _, s := range have(w.Select(pattern))(t) {
			got = append(got, s.Name)
			if int64(len(s.Data)) != m.EncodedBytes(s.Index) {
				t.Errorf("%q: %d bytes", s.Name, len(s.Data))
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%q selects %v, want %v", pattern, got, want)
		}
	}
	if _, err := w.Select("["); !errors.Is(err, path.ErrBadPattern) {
		t.Errorf("%v", err)
	}
}

// TestSpoiltTensor: bytes that change after they were published are found by Verify and CopyInto, which names the tensor and copies nothing.
func TestSpoiltTensor(t *testing.T) {
	d := serveWeights(t, "unix", weights.ServerConfig{}, weights.StoreConfig{})
	m := vectors(t, 100, 0, blockBytes+9)
	p := inPlace(t, d.addr, m)
	publishVersion(t, p, 1)
	w := have(mappedOf(t, d.addr, SubscribeConfig{}).Latest())(t)
	defer w.Release()
	into := map[string][]byte{"layers.0.w": make([]byte, 100), "layers.1.w": {}}
	if err := w.CopyInto(into); err != nil || string(into["layers.0.w"]) != string(w.At(0)) {
		t.Fatalf("%v", err)
	}
	for _, bad := range []map[string][]byte{{"layers.0.w": make([]byte, 99)}, {"x": nil}} {
		if err := w.CopyInto(bad); err == nil {
			t.Errorf("%v was taken", bad)
		}
	}
	segment := p.sink.(*mappedSink).attachment.Segment() // whoever publishes can write everywhere
	for _, at := range []int64{0, 99, m.Offset(2) + blockBytes + 8} {
		segment.Data(0)[at] ^= 0x10
		clear(into["layers.0.w"])
		var bad *BadSumError
		if err := w.CopyInto(into); !errors.As(err, &bad) || bad.Tensor != m.Tensor(m.At(at)).Name || bad.Generation != 1 {
			t.Errorf("byte %d: %v", at, err)
		}
		if string(into["layers.0.w"]) != string(make([]byte, 100)) {
			t.Error("something was copied")
		}
		segment.Data(0)[at] ^= 0x10
	}
	segment.SumBytes(0)[0] ^= 1
	var bad *BadSumError
	if err := w.Verify(); !errors.As(err, &bad) || bad.Tensor != "" {
		t.Errorf("a sum that was changed: %v", err)
	}
	segment.SumBytes(0)[0] ^= 1
	if err := w.Verify(); err != nil {
		t.Error(err)
	}
}

// TestLatestCostsTheSame: what it takes to see a generation does not grow with its tensors.
func TestLatestCostsTheSame(t *testing.T) {
	allocations := map[int]float64{}
	for _, tensors := range []int{1, 10_000} {
		t.Run(fmt.Sprint(tensors), func(t *testing.T) {
			d := serveWeights(t, "unix", weights.ServerConfig{}, weights.StoreConfig{})
			p := inPlace(t, d.addr, vectors(t, make([]int64, tensors)...))
			publishVersion(t, p, 1)
			s := mappedOf(t, d.addr, SubscribeConfig{})
			allocations[tensors] = testing.AllocsPerRun(100, func() {
				w, err := s.Latest()
				if err != nil {
					t.Fatal(err)
				}
				_ = w.At(0)
				w.Release()
			})
		})
	}
	if allocations[1] != allocations[10_000] || allocations[1] > 6 {
		t.Errorf("allocations by number of tensors: %v", allocations)
	}
}

// BenchmarkMapped: a publication beside one memcpy of its size, and the first view of a generation.
func BenchmarkMapped(b *testing.B) {
	const n = 64 << 20
	d := serveWeights(b, "unix", weights.ServerConfig{}, weights.StoreConfig{})
	m := vectors(b, n/2, n/4, n/4)
	p := inPlace(b, d.addr, m)
	source := tensorContent(1, 0, m.DataBytes())
	publish := func(b *testing.B) {
		_, err := p.Publish(b.Context(), func(i int) []byte { return source[m.Offset(i):][:m.EncodedBytes(i)] })
		if err != nil {
			b.Fatal(err)
		}
	}
	publish(b)
	s := mappedOf(b, d.addr, SubscribeConfig{})
	dst := make([]byte, n)
	b.Run("memcpy", func(b *testing.B) {
		b.SetBytes(n)
		for b.Loop() {
			copy(dst, source)
		}
	})
	b.Run("publish", func(b *testing.B) {
		b.SetBytes(n)
		for b.Loop() {
			publish(b)
		}
	})
	b.Run("latest", func(b *testing.B) {
		for b.Loop() {
			w, err := s.Latest()
			if err != nil {
				b.Fatal(err)
			}
			_ = w.At(0)[0]
			w.Release()
		}
	})
}
