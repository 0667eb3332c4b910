package ingesttest

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/engine"
	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// Conn is the client's end of one stream.
type Conn interface {
	io.ReadWriteCloser
	CloseWrite() error
	SetDeadline(time.Time) error
}

// Compressing is a Conn that compresses what is written to it after Begin.
type Compressing interface {
	Conn
	Compression() wire.Compression // what its hello asks for
	Begin(s *spec.Spec) error      // the hello was accepted
}

// Limits are what a transport is started with. Zero fields: its defaults.
type Limits struct {
	MaxConnections                                          int
	HandshakeTimeout, IdleTimeout, StallTimeout, AckTimeout time.Duration
}

// Start starts a transport that serves tables. dial makes a new stream to it, before any handshake.
type Start func(t *testing.T, tables ingest.Tables, limits Limits) (tr ingest.Transport, dial func(ctx context.Context) (Conn, error))

// Tables is a fixed set of tables.
type Tables map[string]*engine.Table

// Lookup implements ingest.Tables.
func (ts Tables) Lookup(name string) (ingest.Table, bool) {
	t, ok := ts[name]
	return t, ok
}

// Names implements ingest.Tables.
func (ts Tables) Names() []string {
	var names []string
	for n := range ts {
		names = append(names, n)
	}
	return names
}

// Kind implements ingest.Tables.
func (ts Tables) Kind(name string) ingest.Kind {
	switch t, ok := ts[name]; {
	case !ok:
		return ""
	case t.Steps() != nil:
		return ingest.KindTensors
	}
	return ingest.KindSamples
}

// rig is one transport with one table, a trainer that checks what comes, and a way to dial.
type rig struct {
	t         *testing.T
	table     *engine.Table
	transport ingest.Transport
	dial      func(ctx context.Context) (Conn, error)

	stopPool context.CancelFunc
	pool     sync.WaitGroup
	trainer  sync.WaitGroup
	taken    map[uint64]uint64 // by client: samples delivered; the trainer's until it ends
}

const tableName = "samples"

func mustSpec(t testing.TB, text string) *spec.Spec {
	t.Helper()
	s, err := spec.ParseText(text)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newRig(t *testing.T, start Start, text string, batchSize, batches int, limits Limits, change ...func(*engine.Config)) *rig {
	t.Helper()
	pool := drainer.NewPool(2)
	cfg := engine.Config{Name: tableName, Spec: mustSpec(t, text), BatchSize: batchSize, Batches: batches, Drainers: pool}
	for _, c := range change {
		c(&cfg)
	}
	table, err := engine.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, table: table, taken: map[uint64]uint64{}}
	ctx, cancel := context.WithCancel(context.Background())
	r.stopPool = cancel
	r.pool.Go(func() { _ = pool.Run(ctx) })
	r.transport, r.dial = start(t, Tables{tableName: table}, limits)
	return r
}

// train starts the trainer.
func (r *rig) train() {
	trainer := r.table.NewTrainer()
	r.trainer.Go(func() {
		defer trainer.Close()
		for {
			b, err := trainer.Next(context.Background())
			if err == io.EOF {
				return
			}
			if err == nil {
				err = r.check(b)
			}
			if err != nil {
				r.t.Error(err)
				return
			}
			trainer.Release(b)
		}
	})
}

// check verifies every byte of a batch, and that each client's samples come in order.
func (r *rig) check(b ring.Batch) error {
	s := r.table.Spec()
	want := make([]byte, s.SampleBytes())
	for row := range b.Count {
		first := b.Column(0)[int64(row)*s.Leaf(0).Bytes():]
		client, number := binary.LittleEndian.Uint64(first), b.Numbers()[row]
		if number != r.taken[client] {
			return fmt.Errorf("client %d: sample %d came when %d was due", client, number, r.taken[client])
		}
		r.taken[client]++
		fillSample(want, client, number)
		for leaf := range s.NumLeaves() {
			size := s.Leaf(leaf).Bytes()
			got := b.Column(leaf)[int64(row)*size : int64(row+1)*size]
			if string(got) != string(want[s.Offset(leaf):s.Offset(leaf)+size]) {
				return fmt.Errorf("client %d sample %d leaf %d: torn or wrong", client, number, leaf)
			}
		}
	}
	return nil
}

// fillSample writes sample number of client. The client stands in the first 8 bytes, so the first leaf has at least those.
func fillSample(b []byte, client, number uint64) {
	seed := client*0x9E3779B97F4A7C15 ^ number*0xC2B2AE3D27D4EB4F
	for i := range b {
		b[i] = byte(seed>>(8*(uint(i)%8))) + byte(i/8)
	}
	binary.LittleEndian.PutUint64(b, client)
}

// finish shuts everything down, in the daemon's order, and waits for the trainer to have had everything.
func (r *rig) finish() {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := r.transport.Shutdown(ctx); err != nil {
		r.t.Error(err)
	}
	if err := r.table.Close(ctx); err != nil {
		r.t.Error(err)
	}
	r.trainer.Wait()
	r.stopPool()
	r.pool.Wait()
}

// client is a producer under test control: it can be as rude as it likes.
type client struct {
	Conn
	t        *testing.T
	rig      *rig
	id       uint64
	accepted wire.AcceptedPush
	sent     uint64
}

func (r *rig) hello() *wire.Hello {
	return &wire.Hello{Role: wire.RolePush, Table: tableName, Spec: r.table.Spec()}
}

// connect dials without a handshake.
func (r *rig) connect() *client {
	r.t.Helper()
	c, err := r.dial(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(3 * time.Minute)) // so that a broken transport fails and does not hang
	return &client{Conn: c, t: r.t, rig: r}
}

// join connects and shakes hands.
func (r *rig) join(id uint64, change func(*wire.Hello)) *client {
	r.t.Helper()
	c, err := r.ask(id, change)
	if err != nil {
		r.t.Fatal(err)
	}
	return c
}

// ask is join that may be refused.
func (r *rig) ask(id uint64, change func(*wire.Hello)) (*client, error) {
	r.t.Helper()
	c := r.connect()
	c.id = id
	h := r.hello()
	if change != nil {
		change(h)
	}
	compressing, ok := c.Conn.(Compressing)
	if ok {
		h.Compression = compressing.Compression()
	}
	if err := wire.WriteHello(c, h); err != nil {
		r.t.Fatal(err)
	}
	err := wire.ReadReply(c, &c.accepted)
	if err == nil && c.accepted.Compression != h.Compression {
		r.t.Errorf("asked for the compression %q, got %q", h.Compression, c.accepted.Compression)
	}
	if err == nil && ok {
		err = compressing.Begin(r.table.Spec())
	}
	if err != nil {
		_ = c.Close()
	}
	c.sent = c.accepted.Held
	return c, err
}

// send writes n samples in pieces of the given size (0: all at once).
func (c *client) send(n, piece int) error {
	size := int(c.rig.table.Spec().SampleBytes())
	buf := make([]byte, n*size)
	for i := range n {
		fillSample(buf[i*size:(i+1)*size], c.id, c.sent)
		c.sent++
	}
	if piece == 0 {
		piece = len(buf)
	}
	for len(buf) > 0 {
		k, err := c.Write(buf[:min(piece, len(buf))])
		if err != nil {
			return err
		}
		buf = buf[k:]
	}
	return nil
}

// ending reads acks and notes to the end and returns how many came and the closing notice, if one did.
func (c *client) ending() (acks uint64, notice *wire.Notice, err error) {
	one := make([]byte, 1)
	for {
		if _, err := io.ReadFull(c, one); err == io.EOF {
			return acks, nil, nil
		} else if err != nil {
			return acks, nil, err
		}
		switch one[0] {
		case wire.Ack:
			acks++
		case wire.NoteMark:
			if _, err := wire.ReadNote(c); err != nil {
				return acks, nil, err
			}
		case wire.NoticeMark:
			notice, err := wire.ReadNotice(c)
			return acks, notice, err
		default:
			return acks, nil, fmt.Errorf("byte %#x among the acks", one[0])
		}
	}
}

// wantAcks reads exactly n acks.
func (c *client) wantAcks(n int) {
	c.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c, b); err != nil {
		c.t.Fatalf("waiting for %d acks: %v", n, err)
	}
	for _, a := range b {
		if a != wire.Ack {
			c.t.Fatalf("byte %#x among the acks", a)
		}
	}
}
