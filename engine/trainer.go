package engine

import (
	"context"

	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/ring"
)

// Trainer takes a table's batches in the table's own process. Next belongs to one goroutine; Release may be called from any. A table may have any number of
// them, and each batch goes to one.
type Trainer struct {
	table *Table
	seat  *park.Waiter
}

// NewTrainer returns a trainer of the table. It holds nothing until Next, so there is nothing to close.
func (t *Table) NewTrainer() *Trainer { return &Trainer{table: t, seat: park.NewWaiter()} }

// Next waits for the next batch, which the caller may read until Release. It returns io.EOF when the table was closed and every batch is out, or the
// context's error (a deadline also matches os.ErrDeadlineExceeded).
func (tr *Trainer) Next(ctx context.Context) (ring.Batch, error) {
	return tr.table.sampler.Next(ctx, tr.seat)
}

// Release gives a batch back: not a byte of it may be read after that. Giving it back twice panics.
func (tr *Trainer) Release(b ring.Batch) { tr.table.sampler.Release(b) }
