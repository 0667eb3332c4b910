package engine

import (
	"context"

	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/sampler"
)

// GroupDefault is the group of a trainer that names none.
const GroupDefault = "default"

// Trainer takes a table's batches in the table's own process. Next belongs to one goroutine; Release and Close may be called from any. A table may have any
// number of them: those of one group share the batches, and every group gets every batch.
type Trainer struct {
	member *sampler.Member
	err    error // why it is none
	seat   *park.Waiter
}

// NewTrainer returns a trainer of the table, in the group GroupDefault. That group may not exist and be one too many: then Next says so.
func (t *Table) NewTrainer() *Trainer {
	tr, err := t.NewTrainerIn(GroupDefault)
	if err != nil {
		return &Trainer{err: err}
	}
	return tr
}

// NewTrainerIn returns a trainer of the table in a group, which is made if there is none of that name. A *ring.GroupsFullError in the error says that there can
// be no more groups.
func (t *Table) NewTrainerIn(group string) (*Trainer, error) {
	m, err := t.sampler.Join(group, sampler.Who{})
	if err != nil {
		return nil, err
	}
	return &Trainer{member: m, seat: park.NewWaiter()}, nil
}

// Next waits for the next batch, which the caller may read until Release. It may hold several. It returns io.EOF when the table was closed and every batch is
// out, os.ErrClosed after Close, or the context's error (a deadline also matches os.ErrDeadlineExceeded). A *sampler.LostError says that the group lost batches that it
// was too slow for, where the table lets it; after it Next goes on.
func (tr *Trainer) Next(ctx context.Context) (ring.Batch, error) {
	if tr.err != nil {
		return ring.Batch{}, tr.err
	}
	return tr.member.Next(ctx, tr.seat)
}

// Release gives a batch back: not a byte of it may be read after that. Giving it back twice, or after Close, panics.
func (tr *Trainer) Release(b ring.Batch) { tr.member.Release(b) }

// Close leaves the group. Batches still held go to another trainer of it, or to none if that is the group's policy, and must not be read any more. A Next under
// way returns os.ErrClosed. Closing twice is no error.
func (tr *Trainer) Close() {
	if tr.member != nil {
		tr.member.Leave()
	}
}
