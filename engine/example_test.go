package engine_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"math"
	"sync"
	"time"

	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/engine"
	"github.com/ingestd/ingestd/spec"
)

// Example embeds a table in one process, with no daemon and no socket: a producer writes samples where the trainer reads them.
func Example() {
	point, err := spec.ParseText("position:F32[2],label:I32")
	if err != nil {
		log.Fatal(err)
	}
	// One pool commits for all tables of the process. It stops after them.
	pool := drainer.NewPool(1)
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = pool.Run(ctx) })
	defer running.Wait()
	defer stop()

	table, err := engine.New(engine.Config{Name: "points", Spec: point, BatchSize: 4, Batches: 2, Drainers: pool})
	if err != nil {
		log.Fatal(err)
	}
	defer table.Free()

	var producer sync.WaitGroup
	producer.Go(func() {
		if err := produce(ctx, table, 10); err != nil {
			log.Fatal(err)
		}
		// Every stream has ended: publish what is left, and tell the trainers.
		if err := table.Close(ctx); err != nil {
			log.Fatal(err)
		}
	})
	defer producer.Wait()

	trainer := table.NewTrainer()
	for {
		batch, err := trainer.Next(ctx)
		if err == io.EOF {
			break
		}
		if err != nil {
			log.Fatal(err)
		}
		// A column is the array (batch.Count, *shape) of one leaf, in the ring's own memory.
		positions, labels, sum := batch.Column(0), batch.Column(1), float32(0)
		for at := 0; at < len(positions); at += 4 {
			sum += math.Float32frombits(binary.LittleEndian.Uint32(positions[at:]))
		}
		fmt.Printf("batch %d: %d samples, first label %d, sum of positions %g\n", batch.Number, batch.Count, binary.LittleEndian.Uint32(labels), sum)
		trainer.Release(batch)
	}
	// Output:
	// batch 0: 4 samples, first label 0, sum of positions 9
	// batch 1: 4 samples, first label 4, sum of positions 33
	// batch 2: 2 samples, first label 8, sum of positions 25.5
}

// produce pushes n samples through a stream of its own.
func produce(ctx context.Context, table *engine.Table, n int) error {
	stream, err := table.OpenStream(ctx, engine.StreamConfig{})
	if err != nil {
		return err
	}
	defer stream.Close()
	for sent := 0; sent < n; {
		run, err := stream.Reserve(ctx, n-sent) // waits while the ring is full; gives as many slots as the batch has left
		if err != nil {
			return err
		}
		positions, labels := stream.Column(run, 0), stream.Column(run, 1)
		for i := range int(run.N) {
			x := float32(sent + i)
			binary.LittleEndian.PutUint32(positions[8*i:], math.Float32bits(x))
			binary.LittleEndian.PutUint32(positions[8*i+4:], math.Float32bits(x/2))
			binary.LittleEndian.PutUint32(labels[4*i:], uint32(sent+i))
		}
		stream.Push(run, time.Now())
		sent += int(run.N)
	}
	return nil
}
