//go:build linux

package client

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"

	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// TrainerConfig says what a trainer attaches to.
type TrainerConfig struct {
	// Table is the table's name. Required.
	Table string

	// Spec, when set, must be the table's: the daemon answers a difference with a *wire.Refusal that shows it. Nil takes the table's.
	Spec *spec.Spec

	// Prefetch is the most batches to hold at once; 0 takes the daemon's default. The daemon may grant fewer, see Trainer.Prefetch.
	Prefetch int

	// Group is the group of trainers to join, made if there is none of that name: those of one group share the table's batches, and every
	// group gets every batch. Default: "default".
	Group string

	// Client is free text for the daemon's status page and log. Default: ingestd-go.
	Client string

	// Token proves to the daemon who this is, and the daemon to this. Zero: none; on a unix socket the daemon asks the kernel which user this is.
	Token Token
}

func (c TrainerConfig) withDefaults() TrainerConfig {
	if c.Client == "" {
		c.Client = "ingestd-go"
	}
	return c
}

// Trainer reads the batches of a table from the daemon's own memory. One goroutine at a time calls Next and Copy; batches may be
// released, and the Trainer closed, from any.
type Trainer struct {
	attachment *shm.Attachment
	accepted   wire.AcceptedTrain
	leaves     map[string]int
}

// Attach joins a table as a trainer. addr is unix:///path or shm:///path, which mean the same: the socket of a daemon on this
// machine. ctx bounds the attaching only.
func Attach(ctx context.Context, addr string, cfg TrainerConfig) (*Trainer, error) {
	cfg = cfg.withDefaults()
	if cfg.Table == "" {
		return nil, fmt.Errorf("client: TrainerConfig.Table is empty: name the table to attach to")
	}
	if rest, ok := strings.CutPrefix(addr, "shm://"); ok {
		addr = "unix://" + rest
	}
	network, path, err := splitAddress(addr)
	if err != nil {
		return nil, err
	}
	if network != "unix" {
		return nil, fmt.Errorf("client: address %q: a trainer maps the daemon's memory, so it attaches on the same machine: write unix:///path/to/ingestd.sock", addr)
	}
	hello := wire.Hello{Table: cfg.Table, Spec: cfg.Spec, Prefetch: int64(cfg.Prefetch), Group: cfg.Group, Client: cfg.Client}
	hello.SetToken(cfg.Token)
	a, err := shm.Attach(ctx, path, hello)
	if err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	t := &Trainer{attachment: a, accepted: a.Accepted(), leaves: map[string]int{}}
	if cfg.Spec != nil {
		if err := spec.Check(t.accepted.Spec, cfg.Spec); err != nil {
			return nil, errors.Join(fmt.Errorf("client: the daemon accepted another spec than its table's: %w", err), a.Close())
		}
	}
	for i := range t.accepted.Spec.NumLeaves() {
		t.leaves[t.accepted.Spec.Leaf(i).Name] = i
	}
	return t, nil
}

// Spec returns the layout of the table's samples.
func (t *Trainer) Spec() *spec.Spec { return t.accepted.Spec }

// Table returns the table's name.
func (t *Trainer) Table() string { return t.accepted.Table }

// BatchSize returns the most rows of a batch.
func (t *Trainer) BatchSize() int { return int(t.accepted.BatchSize) }

// Batches returns the table's capacity in batches.
func (t *Trainer) Batches() int { return int(t.accepted.Batches) }

// Prefetch returns the most batches this trainer may hold at once: with that many held, the next one comes only after a Release.
func (t *Trainer) Prefetch() int { return int(t.accepted.Prefetch) }

// StreamName returns the name of the session that has a stream, as the segment's table of sessions has it; false if none has. It is for the goroutine that calls Next.
func (t *Trainer) StreamName(stream uint64) (string, bool) {
	for _, s := range t.attachment.View().Sessions() {
		if s.Stream == stream {
			return s.Name, true
		}
	}
	return "", false
}

// Group returns the name of the group this trainer is in.
func (t *Trainer) Group() string { return t.accepted.Group }

// LostBatchesError says that this trainer's group lost batches that nobody of it had begun to read: First is the number of the first, N how many they are. It
// comes only where the table lets the group lose what it is too slow for, and every trainer of the group is told.
type LostBatchesError = shm.LostError

// Next waits for a batch, which is this trainer's to read until it releases it. It may hold up to Prefetch of them at once. Nothing is copied.
//
// Its errors: *LostBatchesError when its group lost batches, once for every loss, after which Next goes on with the next; io.EOF when the stream has ended
// and this trainer has had its part of it; the context's, which for a deadline is also os.ErrDeadlineExceeded, and after which Next may be called again;
// *wire.Notice when the daemon cut this trainer off; ErrDaemonGone (and *shm.PeerGoneError) when it died; os.ErrClosed after Close.
func (t *Trainer) Next(ctx context.Context) (*Batch, error) {
	b, err := t.attachment.Next(ctx)
	if err != nil {
		return nil, t.explain(err)
	}
	return &Batch{trainer: t, batch: b}, nil
}

func (t *Trainer) explain(err error) error {
	if gone := (*shm.PeerGoneError)(nil); errors.As(err, &gone) {
		return fmt.Errorf("%w: %w", ErrDaemonGone, err)
	}
	return err
}

// Close detaches. What is still held is offered to another trainer, so it must not be read any more. A Next under way returns
// os.ErrClosed. Closing twice is no error.
func (t *Trainer) Close() error { return t.attachment.Close() }

// Batch is a batch in the daemon's memory, held until Release. Asking it for its arrays after that panics; the slices it gave out must
// not be used any more either, and show other data if they are. (A Batch is one small allocation: one that was used again for a later
// batch could not tell.)
type Batch struct {
	trainer  *Trainer
	batch    ring.Batch
	released atomic.Bool
}

// Release gives the batch back. Releasing twice is no error, so it can be deferred.
func (b *Batch) Release() {
	if b.released.CompareAndSwap(false, true) {
		b.trainer.attachment.Release(b.batch)
	}
}

func (b *Batch) held() ring.Batch {
	if b.released.Load() {
		panic(fmt.Sprintf("client: batch %d is used after its Release", b.batch.Number))
	}
	return b.batch
}

// Intact tells whether what was read of the batch so far was whole, and nobody else's. It is until Release, unless the daemon cut this trainer off, or died and its successor gave
// the memory to others: ask where daemons are restarted on segments that they keep, when the batch was read. If it was not, the batch is delivered again.
func (b *Batch) Intact() bool { return !b.released.Load() && b.batch.Intact() }

// Number returns the batch's number: 0 for the table's first, then up by one, also across restarts of a daemon that keeps its segments. A batch whose
// trainer died comes again under the same number, to another trainer of the group, before newer ones: a number that was finished before tells a second
// delivery from a first.
func (b *Batch) Number() uint64 { return b.batch.Number }

// Count returns how many rows hold samples; below the table's batch size only in a batch that was published early.
func (b *Batch) Count() int { return b.batch.Count }

// Spec returns the layout of the samples.
func (b *Batch) Spec() *spec.Spec { return b.trainer.accepted.Spec }

// Columns returns how many leaves there are.
func (b *Batch) Columns() int { return b.Spec().NumLeaves() }

// Column returns the bytes of one leaf for all rows: the array (Count, *shape), row-major, little-endian, starting on a multiple of
// 64. It is the ring's own memory and read-only: writing to it ends the process. A leaf that is not there panics.
func (b *Batch) Column(leaf int) []byte { return b.held().Column(leaf) }

// ColumnNamed is Column by the leaf's name.
func (b *Batch) ColumnNamed(name string) ([]byte, error) {
	leaf, err := b.leaf(name)
	if err != nil {
		return nil, err
	}
	return b.Column(leaf), nil
}

func (b *Batch) leaf(name string) (int, error) {
	leaf, ok := b.trainer.leaves[name]
	if !ok {
		return 0, fmt.Errorf("client: table %q has no leaf %q; its samples are %s", b.trainer.Table(), name, b.Spec().Text())
	}
	return leaf, nil
}

// Streams returns, for each row, the number of the stream that sent the sample.
func (b *Batch) Streams() []uint64 { return b.held().Streams() }

// Numbers returns, for each row, the sample's number in its stream.
func (b *Batch) Numbers() []uint64 { return b.held().Numbers() }

// Arrivals returns, for each row, when the sample's last byte was read, in Unix nanoseconds.
func (b *Batch) Arrivals() []uint64 { return b.held().Arrivals() }

// Copied is a batch that was copied out of the ring, for who would rather not mind leases.
type Copied struct {
	Number   uint64
	Count    int
	Columns  [][]byte // per leaf, as Batch.Column
	Streams  []uint64
	Numbers  []uint64
	Arrivals []uint64
}

// Copy waits for a batch, copies it into into, whose memory it uses again, and releases it. Its errors are those of Next.
func (t *Trainer) Copy(ctx context.Context, into *Copied) error {
	b, err := t.attachment.Next(ctx)
	if err != nil {
		return t.explain(err)
	}
	defer t.attachment.Release(b)
	into.Number, into.Count = b.Number, b.Count
	if n := b.Columns(); len(into.Columns) != n {
		into.Columns = make([][]byte, n)
	}
	for i := range into.Columns {
		into.Columns[i] = append(into.Columns[i][:0], b.Column(i)...)
	}
	into.Streams = append(into.Streams[:0], b.Streams()...)
	into.Numbers = append(into.Numbers[:0], b.Numbers()...)
	into.Arrivals = append(into.Arrivals[:0], b.Arrivals()...)
	if !b.Intact() { // taken back meanwhile: what was copied may be torn
		if err := t.attachment.Err(); err != nil {
			return t.explain(err)
		}
		return fmt.Errorf("%w while batch %d was copied, and another one has its memory", ErrDaemonGone, b.Number)
	}
	return nil
}
