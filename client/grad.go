//go:build linux

package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

// Defaults of GradConfig.
const (
	DefaultKeepIncomplete = time.Minute
	DefaultSpillBytes     = 16 << 30
)

const (
	// gradPrefetch is how many batches a GradReader asks for that maps them: as many as it can get.
	gradPrefetch = 1 << 15
	// sentPrefetch is how many it asks for over a connection: enough for one of 100 Gb/s with 5 ms, and chunks of 1 MiB.
	sentPrefetch = 64
	// sentBytes is GradConfig.MemoryBytes by default.
	sentBytes = 8 << 30
)

// layoutsMax is how many manifests a reader remembers.
const layoutsMax = 32

// GradConfig says which steps a GradReader reads and how.
type GradConfig struct {
	Table string // required: a table of kind tensors

	// Group is the group of trainers to join; default "default". All readers of a group share its chunks, so each GradReader needs a group of its own.
	Group string

	// Prefetch is the most chunks to hold where they lie, in the ring; default: as many as the daemon gives, at most half of the ring. Others are copied. Over a
	// connection it is the most that are sent without an answer, half of which may be held, default 64.
	Prefetch int

	// KeepIncomplete is how long an incomplete step is kept after its last chunk when nobody asks for it; default DefaultKeepIncomplete.
	KeepIncomplete time.Duration

	// MemoryBytes is the most memory for batches that are received over a connection: OpenGrads fails where Prefetch of them may need more. Default 8 GiB. What is held of earlier
	// connections comes on top.
	MemoryBytes int64

	// SpillBytes is the most memory that chunks are copied to when the ring has no room for all that is needed for a step. What is beyond it waits in the ring, and then
	// producers wait. Default DefaultSpillBytes.
	SpillBytes int64

	// Client is free text for the daemon's status page and log. Default: ingestd-go.
	Client string

	// Stream has batches sent over a unix socket, too, instead of mapping the daemon's memory.
	Stream bool

	// HandshakeTimeout bounds each connecting. Default DefaultHandshakeTimeout. This and what follows is for readers over connections.
	HandshakeTimeout time.Duration

	// ReconnectFor is how long to try to reach a daemon that is gone, before the reader ends. Default DefaultReconnectFor; negative: it ends at once.
	ReconnectFor time.Duration

	// ReconnectFrom and ReconnectTo are the shortest and the longest pause between two tries. Default DefaultReconnectFrom and DefaultReconnectTo.
	ReconnectFrom, ReconnectTo time.Duration

	TLS TLS // for addresses tls:// and quic://

	// Dialer makes connections, as in TrainerConfig.
	Dialer func(ctx context.Context, network, address string) (net.Conn, error)

	// Token proves to the daemon who this is, and the daemon to this. Zero: none; on a unix socket the daemon asks the kernel which user this is.
	Token Token
}

func (c GradConfig) withDefaults() (GradConfig, error) {
	switch {
	case c.Table == "":
		return c, errors.New("client: GradConfig.Table is empty; name the table of tensors")
	case c.Prefetch < 0 || c.KeepIncomplete < 0 || c.SpillBytes < 0 || c.MemoryBytes < 0:
		return c, fmt.Errorf("client: GradConfig.Prefetch is %d, KeepIncomplete %v, SpillBytes %d and MemoryBytes %d; none may be negative",
			c.Prefetch, c.KeepIncomplete, c.SpillBytes, c.MemoryBytes)
	}
	if c.Group == "" {
		c.Group = wire.GroupDefault
	}
	if c.KeepIncomplete == 0 {
		c.KeepIncomplete = DefaultKeepIncomplete
	}
	if c.SpillBytes == 0 {
		c.SpillBytes = DefaultSpillBytes
	}
	if c.MemoryBytes == 0 {
		c.MemoryBytes = sentBytes
	}
	if c.Client == "" {
		c.Client = "ingestd-go"
	}
	return c, nil
}

// GradReader reads the steps of a table's producers. One goroutine at a time uses it and its GradStep; Stats is for any. To end a Step that waits, end its context.
type GradReader struct {
	cfg        GradConfig
	source     gradSource
	core       *gradCore
	chunkBytes int
	layouts    map[uint64]*gradLayout // nil: the daemon does not know that manifest
	fetching   context.Context        // of the call that is under way
	created    int64                  // when the ring was made from which the last batch came; 0: none came

	rows gradArrival // being looked at, in batch
	row  int
	in   *gradBatch
	step *GradStep // that is open
	over bool
}

// OpenGrads joins a table of tensors as the reader of a group. addr is unix:///path or shm:///path, which mean the same: the socket of a daemon on this machine, whose memory is mapped;
// or tcp://, tls:// or quic://host:port of a daemon anywhere, which sends its batches. ctx bounds the joining only.
//
// A reader that ends, or whose process does, gives back what it holds in the ring, and the next one of the group gets that. What it had copied to the heap is lost with it, and so are the steps to which
// that belonged; so let a table be large enough for the steps that may be under way.
//
// Over a connection a reader makes another one by itself when one breaks, and goes on with what it has: what the daemon sends again is not looked at twice. Where the daemon was started anew without the
// segment that it had, steps that are not complete are dropped, and their producers send them again.
func OpenGrads(ctx context.Context, addr string, cfg GradConfig) (*GradReader, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	network, address, err := splitAddress(unixed(addr))
	if err != nil {
		return nil, err
	}
	of := TrainerConfig{
		Table: cfg.Table, Prefetch: cfg.Prefetch, Group: cfg.Group, Client: cfg.Client, Stream: cfg.Stream, MemoryBytes: cfg.MemoryBytes, HandshakeTimeout: cfg.HandshakeTimeout,
		ReconnectFor: cfg.ReconnectFor, ReconnectFrom: cfg.ReconnectFrom, ReconnectTo: cfg.ReconnectTo, TLS: cfg.TLS, Dialer: cfg.Dialer, Token: cfg.Token,
	}
	if of.Prefetch == 0 {
		of.Prefetch = sentPrefetch
		if network == "unix" && !cfg.Stream {
			of.Prefetch = gradPrefetch
		}
	}
	t, err := Attach(ctx, addr, of)
	if err != nil {
		return nil, err
	}
	chunkBytes := t.Spec().LeafBytes()[t.Spec().NumLeaves()-1]
	want, err := chunkSpec(chunkBytes)
	if err == nil && want.Fingerprint() != t.Spec().Fingerprint() {
		err = fmt.Errorf("the samples of table %q are %s, which are no chunks: its kind must be tensors", cfg.Table, brief(t.Spec()))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("client: %w", err), t.Close())
	}
	return newGradReader(cfg, &ringSource{t: t, cfg: of.withDefaults(), network: network, address: address, names: map[uint64]string{}}, int(chunkBytes)), nil
}

func newGradReader(cfg GradConfig, source gradSource, chunkBytes int) *GradReader {
	r := &GradReader{cfg: cfg, source: source, core: newGradCore(chunkBytes, cfg.KeepIncomplete), chunkBytes: chunkBytes, layouts: map[uint64]*gradLayout{}}
	r.core.name, r.core.manifest = r.name, r.layout
	return r
}

// name returns the name of the producer that has a stream, "" if none has.
func (r *GradReader) name(stream uint64) (string, error) {
	name, err := r.source.name(r.fetching, stream)
	if err != nil {
		return "", fmt.Errorf("client: ask who has stream %d of table %q: %w", stream, r.cfg.Table, err)
	}
	return name, nil
}

// layout returns the manifest of an id, nil if the daemon does not know it.
func (r *GradReader) layout(id uint64, again bool) (*gradLayout, error) {
	l, known := r.layouts[id]
	if l != nil || known && !again {
		return l, nil
	}
	m, err := r.source.fetch(r.fetching, id)
	if err != nil {
		return nil, fmt.Errorf("client: ask for manifest %016x of table %q: %w", id, r.cfg.Table, err)
	}
	if m != nil {
		l = newGradLayout(m)
	}
	for other := range r.layouts { // whoever uses one has a pointer to it
		if len(r.layouts) >= layoutsMax && other != r.core.newest {
			delete(r.layouts, other)
		}
	}
	r.layouts[id] = l
	return l, nil
}

// Manifest returns the tensors of the producer that came last, nil as long as none did.
func (r *GradReader) Manifest() *tensor.Manifest {
	if l := r.layouts[r.core.newest]; l != nil {
		return l.m
	}
	return nil
}

// StepOptions says what to wait for, and what to do meanwhile.
type StepOptions struct {
	// Quorum is how many producers must have the step complete; default 1.
	Quorum int

	// Into sums tensors into these slices, by name, while chunks come in. What is in them is not defined until GradStep.Sum or Mean, given the same slices, returns.
	Into map[string][]float32
}

// Step waits until every producer that is there has completed the step, or cannot any more, and at least Quorum have; or until the context's deadline, when Quorum are enough. Steps may only grow: those
// below are dropped. The GradStep is to be released before the next call.
//
// Errors: *StepTimeoutError when the deadline passed without a quorum: it says who is missing and why, and Step may be called again; the context's, which for a deadline is also os.ErrDeadlineExceeded; of Into:
// *UnknownTensorError and others, which leave everything as it was; ErrShuttingDown when the table has ended; ErrDaemonGone and *wire.Notice when the reader was cut off; os.ErrClosed after Close.
func (r *GradReader) Step(ctx context.Context, step uint64, opt StepOptions) (*GradStep, error) {
	c := r.core
	switch {
	case r.over:
		return nil, fmt.Errorf("client: step %d: %w", step, os.ErrClosed)
	case r.step != nil:
		return nil, fmt.Errorf("client: step %d: step %d is still open; Release it first", step, r.step.step)
	case step < c.floor:
		return nil, fmt.Errorf("client: step %d: steps below %d were dropped when that was asked for, or released", step, c.floor)
	case opt.Quorum < 0:
		return nil, fmt.Errorf("client: step %d: a quorum of %d; it may not be negative", step, opt.Quorum)
	}
	opt.Quorum = max(1, opt.Quorum)
	c.below(step)
	c.asked, c.changed = nil, true
	c.waiting, c.step, r.fetching = true, step, ctx
	defer func() { c.waiting, r.fetching = false, nil }()
	for late := 0; ; {
		c.tidy()
		done, err := r.judge(step, opt)
		if err != nil {
			c.asked = nil
			return nil, err
		}
		if done {
			return r.open(step, opt), nil
		}
		if ctx.Err() != nil { // what lies there is taken all the same, but not for ever
			late++
		}
		if late <= r.source.most() {
			err = r.pump(ctx)
		} else {
			err = ctx.Err()
		}
		if err == nil {
			continue
		}
		have := r.completed(step)
		over := errors.Is(ctx.Err(), context.DeadlineExceeded)
		switch {
		case (over || errors.Is(err, io.EOF)) && len(have) >= opt.Quorum:
			return r.open(step, opt), nil
		case over:
			return nil, r.timeout(ctx, step, opt.Quorum, err)
		case ctx.Err() != nil:
			return nil, &waitError{ctx, fmt.Sprintf("client: step %d: %d producers have it, %d are wanted", step, len(have), opt.Quorum)}
		case errors.Is(err, io.EOF):
			return nil, fmt.Errorf("client: step %d: %d producers have it, %d are wanted: %w", step, len(have), opt.Quorum,
				&said{ErrShuttingDown, errors.New("the daemon has closed the table")})
		}
		return nil, fmt.Errorf("client: step %d: %w", step, err)
	}
}

// judge brings the sum up to date with who may be part of it, and says whether the step need not be waited for any longer.
func (r *GradReader) judge(step uint64, opt StepOptions) (done bool, err error) {
	c := r.core
	if !c.changed {
		return false, nil
	}
	c.changed = false
	layout := r.layouts[c.newest]
	if opt.Into != nil && layout != nil && (c.asked == nil || c.asked.layout != layout) {
		if c.asked, err = newGradSum(step, opt.Quorum, layout, opt.Into, r.chunkBytes); err != nil {
			return false, err
		}
	}
	have, coming := 0, 0
	var members []*gradTx
	var missing []*gradProducer
	for _, p := range c.byName() {
		switch t := c.complete(p, step); {
		case t != nil:
			have++
			members = append(members, t)
		case !c.mayCome(p, step):
		case p.tx != nil && p.tx.step == step:
			coming++
			members = append(members, p.tx)
		default:
			coming++
			missing = append(missing, p)
		}
	}
	if c.asked != nil {
		c.asked.expect(members, missing)
	}
	return coming == 0 && have >= opt.Quorum, nil
}

// pump takes one batch, or what is left of one.
func (r *GradReader) pump(ctx context.Context) error {
	c := r.core
	for r.in == nil {
		if err := r.makeRoom(ctx); err != nil {
			return err
		}
		rows, err := r.source.next(ctx)
		if lost := (*LostBatchesError)(nil); errors.As(err, &lost) {
			c.counts.lost.Add(uint64(lost.N)) // the numbers of the next chunks tell which streams had some in them
			continue
		}
		if err != nil {
			return err
		}
		if r.created != rows.created && r.created != 0 {
			c.anew()
		}
		r.created = rows.created
		r.rows, r.row, r.in = rows, 0, c.add(rows.lease, len(rows.streams))
	}
	for ; r.row < len(r.rows.streams); r.row++ {
		i := r.row
		header := r.rows.headers[i*tensor.HeaderBytes : (i+1)*tensor.HeaderBytes]
		data := r.rows.data[i*r.chunkBytes : (i+1)*r.chunkBytes]
		if err := c.take(r.in, header, data, r.rows.streams[i], r.rows.numbers[i]); err != nil {
			return err
		}
	}
	r.in, r.rows = nil, gradArrival{}
	return nil
}

// makeRoom copies chunks out of the ring until another batch may come.
func (r *GradReader) makeRoom(ctx context.Context) error {
	c := r.core
	for c.holding >= r.source.most() {
		if c.counts.spilled.Load() >= r.cfg.SpillBytes {
			<-ctx.Done()
			return ctx.Err()
		}
		if _, ok := c.spill(); !ok {
			return fmt.Errorf("%w while a chunk was copied, and another one has its memory", ErrDaemonGone)
		}
	}
	return nil
}

// completed returns what is complete of a step, in the order of names.
func (r *GradReader) completed(step uint64) []*gradTx {
	var all []*gradTx
	for _, p := range r.core.byName() {
		if t := r.core.complete(p, step); t != nil {
			all = append(all, t)
		}
	}
	return all
}

// missing says who has no complete step, and why.
func (r *GradReader) missing(step uint64) []Missing {
	var all []Missing
	for _, p := range r.core.byName() {
		if r.core.complete(p, step) == nil {
			all = append(all, Missing{p.name, r.core.why(p, step)})
		}
	}
	return all
}

func (r *GradReader) timeout(ctx context.Context, step uint64, quorum int, err error) error {
	e := &StepTimeoutError{Step: step, Quorum: quorum, Missing: r.missing(step), ctx: ctx}
	_ = errors.As(err, &e.Reconnecting)
	for _, t := range r.completed(step) {
		e.Have = append(e.Have, t.producer.name)
	}
	return e
}

// open makes the GradStep of a step that is waited for no longer.
func (r *GradReader) open(step uint64, opt StepOptions) *GradStep {
	s := &GradStep{reader: r, step: step, members: r.completed(step), Missing: r.missing(step), layout: r.layouts[r.core.newest], sum: r.core.asked}
	for _, t := range s.members {
		s.Have = append(s.Have, t.producer.name)
	}
	if s.sum != nil {
		s.into = opt.Into
		s.sum.expect(s.members, nil)
	}
	r.step = s
	return s
}

// Close ends the reader and releases its step: what it held is offered to the next reader of the group. Closing twice is no error.
func (r *GradReader) Close() error {
	if r.over {
		return nil
	}
	if r.step != nil {
		r.step.Release()
	}
	r.over = true
	err := r.source.close()
	r.core.release()
	return err
}

// errReleased is for calls on a step that is over.
func errReleased(what string) error {
	return fmt.Errorf("client: %s: the step was released: %w", what, os.ErrClosed)
}
