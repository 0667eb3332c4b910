package ingesttest

import (
	"context"
	"io"
	"testing"

	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/engine"
)

// NewTable makes a table for tests beyond the suite, until the test ends.
func NewTable(t testing.TB, name, spec string, batchSize, batches int) *engine.Table {
	t.Helper()
	pool := drainer.NewPool(1)
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = pool.Run(ctx)
	}()
	t.Cleanup(func() {
		stop()
		<-ended
	})
	table, err := engine.New(engine.Config{Name: name, Spec: mustSpec(t, spec), BatchSize: batchSize, Batches: batches, Drainers: pool})
	if err != nil {
		t.Fatal(err)
	}
	return table
}

// Drain takes all samples of a table until it is closed, and counts those of each stream. They must come in order and without a gap. It runs beside the test; the function
// returned closes the table, when all transports have shut down, and waits for the counts.
func Drain(t testing.TB, table *engine.Table) (finish func() map[uint64]uint64) {
	t.Helper()
	taken := map[uint64]uint64{}
	trainer := table.NewTrainer()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer trainer.Close()
		for {
			b, err := trainer.Next(context.Background())
			if err != nil {
				if err != io.EOF {
					t.Error(err)
				}
				return
			}
			for row, stream := range b.Streams() {
				if n := b.Numbers()[row]; n != taken[stream] {
					t.Errorf("stream %d: sample %d came when %d was due", stream, n, taken[stream])
				}
				taken[stream]++
			}
			trainer.Release(b)
		}
	}()
	return func() map[uint64]uint64 {
		t.Helper()
		if err := table.Close(context.Background()); err != nil {
			t.Error(err)
		}
		<-ended
		return taken
	}
}
