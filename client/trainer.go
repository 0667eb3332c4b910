//go:build linux

package client

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// TrainerConfig says what a Trainer reads.
type TrainerConfig struct {
	Table    string     // required
	Spec     *spec.Spec // what the samples must be; nil takes the table's
	Prefetch int        // most batches held at once; 0: the daemon's default
	Client   string     // free text for the daemon's status and logs
}

// Trainer reads the batches of a table from the daemon's memory, on the same machine. Next is for one goroutine at a time;
// batches may be released from any.
type Trainer struct {
	attached *shm.Attachment
	accepted wire.AcceptedTrain
}

// Attach joins the trainers of a table over the daemon's unix socket: unix:///path or shm:///path, which mean the same. The errors are those of the
// package, and *shm.PeerGoneError when the daemon goes away without an end of the stream.
func Attach(ctx context.Context, addr string, cfg TrainerConfig) (*Trainer, error) {
	path, ok := strings.CutPrefix(addr, "unix://")
	if !ok {
		path, ok = strings.CutPrefix(addr, "shm://")
	}
	if !ok || path == "" {
		return nil, fmt.Errorf("client: trainer's address %q: must be unix:///PATH or shm:///PATH, the daemon's unix socket, since trainers map its memory", addr)
	}
	if cfg.Table == "" {
		return nil, fmt.Errorf("client: TrainerConfig.Table is required")
	}
	a, err := shm.Attach(ctx, path, wire.Hello{
		Role: wire.RoleTrain, Table: cfg.Table, Spec: cfg.Spec, Prefetch: int64(cfg.Prefetch), Client: cfg.Client,
	})
	if err != nil {
		return nil, fmt.Errorf("attaching to table %q at %s: %w", cfg.Table, addr, err)
	}
	return &Trainer{attached: a, accepted: a.Accepted()}, nil
}

// Table returns the table's name.
func (t *Trainer) Table() string { return t.accepted.Table }

// Spec returns what a sample is.
func (t *Trainer) Spec() *spec.Spec { return t.accepted.Spec }

// BatchSize returns the samples in a full batch.
func (t *Trainer) BatchSize() int { return int(t.accepted.BatchSize) }

// Batches returns the table's capacity in batches.
func (t *Trainer) Batches() int { return int(t.accepted.Batches) }

// Prefetch returns how many batches may be held at once.
func (t *Trainer) Prefetch() int { return int(t.accepted.Prefetch) }

// Next returns the next batch. The error is io.EOF at the end of the stream, os.ErrDeadlineExceeded when ctx's deadline passed first, os.ErrClosed
// after Close, *wire.Notice when the daemon cut this trainer off, *shm.PeerGoneError when it is gone. With Prefetch batches held, Next waits for a release.
func (t *Trainer) Next(ctx context.Context) (*Batch, error) {
	b, err := t.attached.Next(ctx)
	if err != nil {
		return nil, err
	}
	return &Batch{Batch: b, trainer: t}, nil
}

// Close leaves. Batches still held are given to other trainers; their memory may be read until they are released.
func (t *Trainer) Close() error { return t.attached.Close() }

// Batch is a leased batch: its arrays are the ring's own memory, read-only, and are valid until Release.
type Batch struct {
	ring.Batch
	trainer  *Trainer
	released atomic.Bool
}

// Number returns the batch's number; it counts up by one with every batch of the table.
func (b *Batch) Number() uint64 { return b.Batch.Number }

// Count returns the rows that hold samples: the table's batch size, or fewer for a batch that was published early.
func (b *Batch) Count() int { return b.Batch.Count }

// Column returns one leaf of all rows: the array (Count, *shape), row-major, little-endian, starting on a multiple of 64 bytes. Writing to it faults.
func (b *Batch) Column(leaf int) []byte { return b.Batch.Column(leaf) }

// Spec returns what a sample is.
func (b *Batch) Spec() *spec.Spec { return b.trainer.Spec() }

// ColumnNamed is Column by the leaf's name.
func (b *Batch) ColumnNamed(name string) ([]byte, error) {
	leaf, err := b.leaf(name)
	if err != nil {
		return nil, err
	}
	return b.Column(leaf), nil
}

func (b *Batch) leaf(name string) (int, error) {
	s := b.Spec()
	for i := range s.NumLeaves() {
		if s.Leaf(i).Name == name {
			return i, nil
		}
	}
	return 0, fmt.Errorf("client: table %q has no leaf %q; its spec is %s", b.trainer.Table(), name, s)
}

// Release gives the batch back. Its arrays must not be touched afterwards. Releasing twice does nothing.
func (b *Batch) Release() {
	if !b.released.Swap(true) {
		b.trainer.attached.Release(b.Batch)
	}
}

// Copied is a batch in memory of its own.
type Copied struct {
	Number                     uint64
	Count                      int
	Columns                    [][]byte // in spec order
	Streams, Numbers, Arrivals []uint64
}

// Copy copies the next batch into into, whose slices are used again where they are large enough, and gives it back to the daemon. The errors are Next's.
func (t *Trainer) Copy(ctx context.Context, into *Copied) error {
	b, err := t.Next(ctx)
	if err != nil {
		return err
	}
	defer b.Release()
	into.Number, into.Count = b.Number(), b.Count()
	into.Columns = slices.Grow(into.Columns[:0], b.Columns())[:b.Columns()]
	for i := range into.Columns {
		into.Columns[i] = append(into.Columns[i][:0], b.Column(i)...)
	}
	into.Streams = append(into.Streams[:0], b.Streams()...)
	into.Numbers = append(into.Numbers[:0], b.Numbers()...)
	into.Arrivals = append(into.Arrivals[:0], b.Arrivals()...)
	return nil
}
