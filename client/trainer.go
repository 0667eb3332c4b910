//go:build linux

package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"time"

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

	// Stream has batches sent over a unix socket, too, instead of mapping the daemon's memory; over other connections they always are.
	Stream bool

	// MemoryBytes is the most memory for batches that are received over a connection: Attach fails where Prefetch of them may need more. Default 4 GiB. What callers
	// hold of an earlier connection comes on top.
	MemoryBytes int64

	// HandshakeTimeout bounds each connecting. Default DefaultHandshakeTimeout. This and what follows is for trainers over connections.
	HandshakeTimeout time.Duration

	// ReconnectFor is how long there may be no connection, in all since the last batch, before the trainer ends. Default DefaultReconnectFor; negative: it ends at once.
	ReconnectFor time.Duration

	// ReconnectFrom and ReconnectTo are the shortest and the longest pause between two tries. Default DefaultReconnectFrom and DefaultReconnectTo.
	ReconnectFrom, ReconnectTo time.Duration

	TLS TLS // for addresses tls:// and quic://

	// Dialer connects, also from a goroutine of the Trainer; default net.Dialer. A test or a tunnel may bring its own. TLS goes over what it makes; quic:// does not use it. Without
	// TLS it must make sockets (net.TCPConn, net.UnixConn, or what has their SyscallConn, or a NetConn that returns one): they tell when the daemon has taken a batch back.
	Dialer func(ctx context.Context, network, address string) (net.Conn, error)

	// Token proves to the daemon who this is, and the daemon to this. Zero: none; on a unix socket the daemon asks the kernel which user this is.
	Token Token
}

func (c TrainerConfig) withDefaults() TrainerConfig {
	if c.Client == "" {
		c.Client = "ingestd-go"
	}
	if c.MemoryBytes == 0 {
		c.MemoryBytes = 4 << 30
	}
	for _, d := range [...]struct {
		value    *time.Duration
		standard time.Duration
	}{
		{&c.HandshakeTimeout, DefaultHandshakeTimeout}, {&c.ReconnectFor, DefaultReconnectFor},
		{&c.ReconnectFrom, DefaultReconnectFrom}, {&c.ReconnectTo, max(DefaultReconnectTo, c.ReconnectFrom)},
	} {
		if *d.value == 0 {
			*d.value = d.standard
		}
	}
	c.Dialer = c.TLS.dialer(c.Dialer)
	return c
}

func (c *TrainerConfig) check() error {
	switch {
	case c.Table == "":
		return errors.New("client: TrainerConfig.Table is empty: name the table to attach to")
	case c.Prefetch < 0 || c.MemoryBytes < 0 || c.HandshakeTimeout < 0 || c.ReconnectFrom < 0 || c.ReconnectTo < c.ReconnectFrom:
		return errors.New("client: TrainerConfig: numbers and times may not be negative, nor ReconnectTo shorter than ReconnectFrom")
	}
	if err := c.Token.Check(); err != nil {
		return fmt.Errorf("client: TrainerConfig.Token: %w", err)
	}
	return nil
}

// Trainer reads the batches of a table from the daemon's own memory, or has them sent over a connection. One goroutine at a time calls Next and Copy; batches may be
// released, and the Trainer closed, from any.
type Trainer struct {
	attachment *shm.Attachment    // nil: over a connection
	remote     *remoteTrainer     // nil: mapped
	accepted   wire.AcceptedTrain // over a connection: what there is of it in the first reply
	leaves     map[string]int
}

// Attach joins a table as a trainer. addr is unix:///path or shm:///path, which mean the same: the socket of a daemon on this
// machine, whose memory is mapped; or tcp://, tls:// or quic://host:port of a daemon anywhere, which sends its batches. ctx bounds the attaching only.
//
// Over a connection a Trainer makes another one by itself when one breaks. The daemon then offers the batches that were not released again to the group, so
// that this Trainer may get them a second time: Batch.Number tells. What it still holds stays readable.
func Attach(ctx context.Context, addr string, cfg TrainerConfig) (*Trainer, error) {
	cfg = cfg.withDefaults()
	if err := cfg.check(); err != nil {
		return nil, err
	}
	if rest, ok := strings.CutPrefix(addr, "shm://"); ok {
		if cfg.Stream {
			return nil, fmt.Errorf("client: address %q: shm:// maps the daemon's memory; with TrainerConfig.Stream write unix://", addr)
		}
		addr = "unix://" + rest
	}
	network, path, err := splitAddress(addr)
	if err != nil {
		return nil, err
	}
	if network == "unix" && !cfg.Stream {
		return attachLocal(ctx, path, cfg)
	}
	r, err := openRemoteTrainer(ctx, addr, network, path, cfg)
	if err != nil {
		return nil, err
	}
	a := &r.accepted
	t := &Trainer{remote: r, accepted: wire.AcceptedTrain{
		Table: a.Table, Spec: a.Spec, Fingerprint: a.Fingerprint, Trainer: a.Trainer, Group: a.Group, BatchSize: a.BatchSize, Prefetch: a.Prefetch,
	}}
	return t.checked(cfg.Spec)
}

func attachLocal(ctx context.Context, path string, cfg TrainerConfig) (*Trainer, error) {
	hello := wire.Hello{Table: cfg.Table, Spec: cfg.Spec, Prefetch: int64(cfg.Prefetch), Group: cfg.Group, Client: cfg.Client}
	hello.SetToken(cfg.Token)
	a, err := shm.Attach(ctx, path, hello)
	if err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	t := &Trainer{attachment: a, accepted: a.Accepted()}
	return t.checked(cfg.Spec)
}

// checked compares what the daemon accepted with what was asked for.
func (t *Trainer) checked(want *spec.Spec) (*Trainer, error) {
	if want != nil {
		if err := spec.Check(t.accepted.Spec, want); err != nil {
			return nil, errors.Join(fmt.Errorf("client: the daemon accepted another spec than its table's: %w", err), t.Close())
		}
	}
	t.leaves = map[string]int{}
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

// Batches returns the table's capacity in batches; 0 over a connection, where the daemon does not tell.
func (t *Trainer) Batches() int { return int(t.accepted.Batches) }

// Prefetch returns the most batches this trainer may hold at once: with that many held, the next one comes only after a Release. It may change
// with another connection.
func (t *Trainer) Prefetch() int {
	if t.remote != nil {
		return t.remote.prefetch()
	}
	return int(t.accepted.Prefetch)
}

// RemoteStats returns what a trainer over a connection has done so far; false if it maps the daemon's memory.
func (t *Trainer) RemoteStats() (RemoteTrainerStats, bool) {
	if t.remote == nil {
		return RemoteTrainerStats{}, false
	}
	return t.remote.statistics(), true
}

// StreamName returns the name of the session that has a stream, as the segment's table of sessions has it; false if none has, and over a connection. It is for the goroutine that calls Next.
func (t *Trainer) StreamName(stream uint64) (string, bool) {
	if t.remote != nil {
		return "", false
	}
	return t.attachment.View().SessionOf(stream)
}

// Group returns the name of the group this trainer is in.
func (t *Trainer) Group() string { return t.accepted.Group }

// LostBatchesError says that this trainer's group lost batches that nobody of it had begun to read: First is the number of the first, N how many they are. It
// comes only where the table lets the group lose what it is too slow for, and every trainer of the group is told.
type LostBatchesError = shm.LostError

// Next waits for a batch, which is this trainer's to read until it releases it. It may hold up to Prefetch of them at once. Nothing is copied, but over a connection.
//
// Its errors: *LostBatchesError when its group lost batches, once for every loss, after which Next goes on with the next; io.EOF when the stream has ended
// and this trainer has had its part of it; the context's, which for a deadline is also os.ErrDeadlineExceeded, and after which Next may be called again;
// *wire.Notice when the daemon cut this trainer off; ErrDaemonGone (and *shm.PeerGoneError) when it died; os.ErrClosed after Close.
//
// Over a connection ErrDaemonGone, ErrShuttingDown and *wire.Notice come only once patience is out (ReconnectFor), and at once where another connection would not fare better;
// a context that ends while there is none is a *ReconnectingError.
func (t *Trainer) Next(ctx context.Context) (*Batch, error) {
	if t.remote != nil {
		b, err := t.remote.next(ctx)
		if err != nil {
			return nil, err
		}
		return &Batch{trainer: t, received: b, number: b.number, count: b.count}, nil
	}
	b, err := t.attachment.Next(ctx)
	if err != nil {
		return nil, t.explain(err)
	}
	return &Batch{trainer: t, batch: b, number: b.Number, count: b.Count}, nil
}

func (t *Trainer) explain(err error) error {
	if gone := (*shm.PeerGoneError)(nil); errors.As(err, &gone) {
		return fmt.Errorf("%w: %w", ErrDaemonGone, err)
	}
	return err
}

// Close detaches. What is still held is offered to another trainer, so it must not be read any more. A Next under way returns
// os.ErrClosed. Closing twice is no error.
func (t *Trainer) Close() error {
	if t.remote != nil {
		return t.remote.close()
	}
	return t.attachment.Close()
}

// Batch is a batch in the daemon's memory, or received from it, held until Release. Asking it for its arrays after that panics; the slices it gave out must
// not be used any more either, and show other data if they are. (A Batch is one small allocation: one that was used again for a later
// batch could not tell.)
type Batch struct {
	trainer  *Trainer
	number   uint64
	count    int
	batch    ring.Batch     // where it is mapped
	received *receivedBatch // where it came over a connection; else nil
	released atomic.Bool
}

// Release gives the batch back. Releasing twice is no error, so it can be deferred.
func (b *Batch) Release() {
	switch {
	case !b.released.CompareAndSwap(false, true):
	case b.received != nil:
		b.trainer.remote.release(b.received)
	default:
		b.trainer.attachment.Release(b.batch)
	}
}

// check panics where the batch is not held any more.
func (b *Batch) check() {
	if b.released.Load() {
		panic(fmt.Sprintf("client: batch %d is used after its Release", b.number))
	}
}

// Intact tells whether what was read of the batch so far was whole, and nobody else's. It is until Release, unless the daemon cut this trainer off, or died and its successor gave
// the memory to others: ask where daemons are restarted on segments that they keep, when the batch was read. If it was not, the batch is delivered again.
// A batch that came over a connection always is: it was whole when Next returned it, and nobody else has its memory.
func (b *Batch) Intact() bool { return !b.released.Load() && (b.received != nil || b.batch.Intact()) }

// Number returns the batch's number: 0 for the table's first, then up by one, also across restarts of a daemon that keeps its segments. A batch whose
// trainer died comes again under the same number, to another trainer of the group, before newer ones: a number that was finished before tells a second
// delivery from a first.
func (b *Batch) Number() uint64 { return b.number }

// Count returns how many rows hold samples; below the table's batch size only in a batch that was published early.
func (b *Batch) Count() int { return b.count }

// Spec returns the layout of the samples.
func (b *Batch) Spec() *spec.Spec { return b.trainer.accepted.Spec }

// Columns returns how many leaves there are.
func (b *Batch) Columns() int { return b.Spec().NumLeaves() }

// Column returns the bytes of one leaf for all rows: the array (Count, *shape), row-major, little-endian, starting on a multiple of
// 64. It is the ring's own memory and read-only: writing to it ends the process (but not what came over a connection). A leaf that is not there panics.
func (b *Batch) Column(leaf int) []byte {
	b.check()
	if b.received != nil {
		return b.received.columns[leaf]
	}
	return b.batch.Column(leaf)
}

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
func (b *Batch) Streams() []uint64 {
	b.check()
	if b.received != nil {
		return b.received.own[0]
	}
	return b.batch.Streams()
}

// Numbers returns, for each row, the sample's number in its stream.
func (b *Batch) Numbers() []uint64 {
	b.check()
	if b.received != nil {
		return b.received.own[1]
	}
	return b.batch.Numbers()
}

// Arrivals returns, for each row, when the sample's last byte was read, in Unix nanoseconds.
func (b *Batch) Arrivals() []uint64 {
	b.check()
	if b.received != nil {
		return b.received.own[2]
	}
	return b.batch.Arrivals()
}

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
	if t.remote != nil {
		b, err := t.remote.next(ctx)
		if err != nil {
			return err
		}
		defer t.remote.release(b)
		into.take(b.number, b.count, b.own[0], b.own[1], b.own[2], b.columns)
		return nil
	}
	b, err := t.attachment.Next(ctx)
	if err != nil {
		return t.explain(err)
	}
	defer t.attachment.Release(b)
	into.take(b.Number, b.Count, b.Streams(), b.Numbers(), b.Arrivals(), nil)
	for i := range b.Columns() {
		into.column(i, b.Column(i))
	}
	into.Columns = into.Columns[:b.Columns()]
	if !b.Intact() { // taken back meanwhile: what was copied may be torn
		if err := t.attachment.Err(); err != nil {
			return t.explain(err)
		}
		return fmt.Errorf("%w while batch %d was copied, and another one has its memory", ErrDaemonGone, b.Number)
	}
	return nil
}

func (c *Copied) take(number uint64, count int, streams, numbers, arrivals []uint64, columns [][]byte) {
	c.Number, c.Count = number, count
	c.Streams = append(c.Streams[:0], streams...)
	c.Numbers = append(c.Numbers[:0], numbers...)
	c.Arrivals = append(c.Arrivals[:0], arrivals...)
	for i, column := range columns {
		c.column(i, column)
	}
	if columns != nil {
		c.Columns = c.Columns[:len(columns)]
	}
}

func (c *Copied) column(i int, from []byte) {
	if i == len(c.Columns) {
		c.Columns = append(c.Columns, nil)
	}
	c.Columns[i] = append(c.Columns[i][:0], from...)
}
