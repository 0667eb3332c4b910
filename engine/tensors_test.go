package engine_test

import (
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/engine"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/steps"
	"github.com/ingestd/ingestd/tensor"
)

// gradTable is a table of kind tensors with its goroutines; end stops them.
func gradTable(t *testing.T, batches int) (table *engine.Table, end func()) {
	t.Helper()
	layout, err := steps.Spec(tensor.ChunkBytesMin)
	if err != nil {
		t.Fatal(err)
	}
	pool := drainer.NewPool(1)
	table, err = engine.New(engine.Config{
		Name: "grads", Spec: layout, BatchSize: 1, Batches: batches, Drainers: pool, Steps: &steps.Config{ChunkBytes: tensor.ChunkBytesMin},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = pool.Run(ctx) })
	running.Go(func() { _ = table.Run(ctx) })
	return table, func() {
		stop()
		running.Wait()
	}
}

func gradManifest(t *testing.T, elements int64) *tensor.Manifest {
	t.Helper()
	m, err := tensor.NewManifest([]tensor.Tensor{{Name: "w", DType: spec.F32, Shape: []int64{elements}}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// TestTableOfTensors: a stream of it needs a manifest and a session, and is announced until it has drained; an end that comes while the ring is full is said
// when the table closes.
func TestTableOfTensors(t *testing.T) {
	table, end := gradTable(t, 2)
	defer end()
	m := gradManifest(t, 4)
	for name, cfg := range map[string]engine.StreamConfig{"no manifest": {Session: "w"}, "no session": {Manifest: m}} {
		if _, err := table.OpenStream(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "a manifest and a session") {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := table.OpenLender(t.Context(), cfg); err == nil {
			t.Errorf("%s, in place: opened", name)
		}
	}
	s, err := table.OpenStream(t.Context(), engine.StreamConfig{Session: "w", Manifest: m})
	if err != nil {
		t.Fatal(err)
	}
	var mismatch *steps.MismatchError
	if _, err := table.OpenLender(t.Context(), engine.StreamConfig{Session: "v", Manifest: gradManifest(t, 5)}); !errors.As(err, &mismatch) {
		t.Errorf("another manifest: %v", err)
	}
	l, err := table.OpenLender(t.Context(), engine.StreamConfig{Session: "v", Manifest: m})
	if err != nil {
		t.Fatal(err)
	}
	if st := table.Stats().Steps; len(st.Producers) != 2 || st.Announced != 2 {
		t.Errorf("%+v", st)
	}
	s.Close() // the ring is full of announcements, and nobody reads
	<-s.Done()
	if err := l.End(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	closed := make(chan error, 1)
	go func() { closed <- table.Close(t.Context()) }()
	trainer := table.NewTrainer()
	var said []uint16
	for {
		b, err := trainer.Next(t.Context())
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		h, err := tensor.ParseHeader(b.Column(0))
		if err != nil {
			t.Error(err)
		}
		said = append(said, h.Flags)
		trainer.Release(b)
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if len(said) != 4 || said[0]|said[1] != tensor.FlagOpened || said[2]|said[3] != tensor.FlagClosed {
		t.Errorf("announced with the flags %v", said)
	}
	if _, err := table.OpenStream(t.Context(), engine.StreamConfig{Session: "w", Manifest: m}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after the end: %v", err)
	}
}

// TestCloseOfAFullTableOfTensors says that readers were not told.
func TestCloseOfAFullTableOfTensors(t *testing.T) {
	table, end := gradTable(t, 2)
	defer end()
	for _, name := range []string{"a", "b", "c"} {
		s, err := table.OpenStream(t.Context(), engine.StreamConfig{Session: name, Manifest: gradManifest(t, 4)})
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
		<-s.Done()
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := table.Close(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if err := table.Close(t.Context()); err != nil {
		t.Errorf("closed twice: %v", err)
	}
}

func TestTablesThatAreNot(t *testing.T) {
	pool := drainer.NewPool(1)
	other := mustSpec(t, "x:U8")
	for name, of := range map[string]*steps.Config{"another spec": {ChunkBytes: tensor.ChunkBytesMin}, "odd chunks": {ChunkBytes: 7}} {
		if _, err := engine.New(engine.Config{Name: "t", Spec: other, BatchSize: 1, Batches: 2, Drainers: pool, Steps: of}); err == nil {
			t.Errorf("%s: made", name)
		}
	}
	table, err := engine.New(engine.Config{Name: "t", Spec: other, BatchSize: 1, Batches: 2, Drainers: pool})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := table.OpenStream(t.Context(), engine.StreamConfig{Session: "w", Manifest: gradManifest(t, 1)}); err == nil || !strings.Contains(err.Error(), "no chunks") {
		t.Errorf("a manifest for a table of samples: %v", err)
	}
}
