package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/weights"
	"github.com/ingestd/ingestd/wire"
)

// The errors of publishers that carry data; package weights describes them.
type (
	// PinnedError says that readers pin every place but the newest generation's, and who they are.
	PinnedError = weights.PinnedError
	// OldGenerationError says that the number asked for is not above the newest.
	OldGenerationError = weights.OldGenerationError
	// IncompleteError says that a commit came before all tensors were written.
	IncompleteError = weights.IncompleteError
)

// ErrPublisherActive is wrapped when another publisher has the table.
var ErrPublisherActive = errors.New("the table has a publisher")

// PublisherConfig says what a publisher publishes. All but Table and Manifest may be left zero.
type PublisherConfig struct {
	// Table is the table's name. Required.
	Table string

	// Manifest says which tensors a generation has. Required.
	Manifest *tensor.Manifest

	// Client is free text for the daemon's status page and log. Default: ingestd-go.
	Client string

	// Stream sends generations over a unix socket instead of writing them into the daemon's memory.
	Stream bool

	// Timeout is how long the daemon may take to answer, but for a place that is waited for. Default DefaultHandshakeTimeout. To make a large segment takes it
	// 0.35 s per GiB.
	Timeout time.Duration

	// TLS is for addresses tls:// and quic://.
	TLS TLS

	// Dialer makes connections, as in Config. Streamed only. Default: net.Dialer.
	Dialer func(ctx context.Context, network, address string) (net.Conn, error)

	// Token proves to the daemon who this is, and the daemon to this. Zero: none; on a unix socket the daemon asks the kernel which user this is.
	Token Token
}

func (c PublisherConfig) withDefaults() PublisherConfig {
	if c.Client == "" {
		c.Client = "ingestd-go"
	}
	if c.Timeout == 0 {
		c.Timeout = DefaultHandshakeTimeout
	}
	c.Dialer = c.TLS.dialer(c.Dialer)
	return c
}

func (c PublisherConfig) check() error {
	switch {
	case c.Table == "":
		return errors.New("client: PublisherConfig.Table is empty: name the table to publish to")
	case c.Manifest == nil:
		return errors.New("client: PublisherConfig.Manifest is nil: say which tensors there are")
	case c.Timeout < 0:
		return fmt.Errorf("client: PublisherConfig.Timeout is %v, must be positive", c.Timeout)
	}
	return nil
}

// Publisher publishes generations of weights: readers see each whole, or not at all. One goroutine at a time uses it and what Begin gave; Close may be called
// from any.
type Publisher struct {
	cfg    PublisherConfig
	blocks *blocks
	now    *Generation // begun and not ended

	mu     sync.Mutex // one call at a time
	sink   sink
	closed bool
}

// sink is where generations go: memory of the daemon, or a connection.
type sink interface {
	// begin takes a place for the next generation, or for generation want if that is not 0.
	begin(ctx context.Context, want uint64) (*begun, error)
	// put sends a tensor of the generation that was begun. Only where begun has no data.
	put(ctx context.Context, i int, data []byte) error
	// commit publishes it. sums are those of all tensors, where begun has data.
	commit(ctx context.Context, generation uint64, sums []uint32) (spec.Fingerprint, error)
	abort() error
	close() error
}

// begun is a place.
type begun struct {
	generation uint64
	data       []byte // the flat bytes, to be written; nil: tensors are sent with put
}

// OpenPublisher becomes the publisher of a table. addr is unix:///path or shm:///path, through which generations are written into the memory of a daemon on
// this machine, or tcp://host:port. ctx bounds the opening only.
//
// A *wire.Refusal in the error says why the daemon would not; ErrPublisherActive that it has another one, which is worth another try.
func OpenPublisher(ctx context.Context, addr string, cfg PublisherConfig) (*Publisher, error) {
	cfg = cfg.withDefaults()
	if err := cfg.check(); err != nil {
		return nil, err
	}
	addr = unixed(addr)
	network, path, err := splitAddress(addr)
	if err != nil {
		return nil, err
	}
	p := &Publisher{cfg: cfg, blocks: newBlocks(cfg.Manifest)}
	if network == "unix" && !cfg.Stream {
		p.sink, err = openMappedSink(ctx, path, cfg)
	} else {
		p.sink, err = openStreamSink(ctx, addr, cfg)
	}
	if err != nil {
		return nil, err
	}
	return p, nil
}

// Manifest returns which tensors a generation has.
func (p *Publisher) Manifest() *tensor.Manifest { return p.cfg.Manifest }

// Published is what a commit made the newest generation.
type Published struct {
	Generation uint64
	Digest     spec.Fingerprint // which bytes it has
}

// Publish publishes the tensors that data returns, by their number in the manifest, as the next generation. In place it copies and sums them in blocks, on all
// cores, and reads them once.
//
// Its errors are those of Begin and Commit.
func (p *Publisher) Publish(ctx context.Context, data func(i int) []byte) (Published, error) {
	sources := make([][]byte, p.cfg.Manifest.Len())
	for i := range sources {
		sources[i] = data(i)
		if n := p.cfg.Manifest.EncodedBytes(i); int64(len(sources[i])) != n {
			return Published{}, fmt.Errorf("client: tensor %q has %d bytes, and there are %d to publish", p.cfg.Manifest.Tensor(i).Name, n, len(sources[i]))
		}
	}
	g, err := p.Begin(ctx, 0)
	if err != nil {
		return Published{}, err
	}
	for i, source := range sources {
		if err = g.PutAt(ctx, i, source); err != nil {
			return Published{}, errors.Join(err, g.Abort())
		}
	}
	return g.Commit(ctx)
}

// Begin begins the next generation, or generation want if that is not 0. While readers pin all places but the newest, it waits, and is told who they are.
// If the connection has ended since the last generation, it makes another.
//
// *PinnedError, which is os.ErrDeadlineExceeded where ctx had a deadline: they still did when ctx ended; *OldGenerationError; *wire.Notice when the daemon
// ended this publisher; ErrDaemonGone; os.ErrClosed.
func (p *Publisher) Begin(ctx context.Context, want uint64) (*Generation, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.closed:
		return nil, fmt.Errorf("client: publisher of table %q: %w", p.cfg.Table, os.ErrClosed)
	case p.now != nil:
		return nil, fmt.Errorf("client: generation %d is under way: commit or abort it first", p.now.begun.generation)
	}
	b, err := p.sink.begin(ctx, want)
	if err != nil {
		return nil, fmt.Errorf("client: publish to table %q: %w", p.cfg.Table, err)
	}
	p.now = &Generation{publisher: p, begun: b, written: make([]bool, p.cfg.Manifest.Len()), sources: make([][]byte, p.cfg.Manifest.Len())}
	return p.now, nil
}

// Close ends the publisher: a generation that is under way is not published. Closing twice is no error.
func (p *Publisher) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	p.closed = true
	if p.now != nil {
		p.now.done = true
		p.now = nil
	}
	return p.sink.close()
}

// Generation is a generation that is being written. Nobody sees it before Commit.
type Generation struct {
	publisher *Publisher
	begun     *begun
	written   []bool   // per tensor
	sources   [][]byte // per tensor, what Commit copies
	done      bool
}

// Number returns its number.
func (g *Generation) Number() uint64 { return g.begun.generation }

// Tensor returns the bytes of a tensor in the daemon's memory, to be written in place; what they are before is not specified. Only in place. They must not be
// touched after Commit or Abort, or Close of the publisher.
func (g *Generation) Tensor(name string) ([]byte, error) {
	i, err := g.index(name)
	if err != nil {
		return nil, err
	}
	if g.begun.data == nil {
		return nil, fmt.Errorf("client: tensor %q: this publisher sends generations, and has no memory to write them in: use Put", name)
	}
	g.written[i] = true
	from, n := g.publisher.cfg.Manifest.Offset(i), g.publisher.cfg.Manifest.EncodedBytes(i)
	return g.begun.data[from : from+n : from+n], nil
}

func (g *Generation) index(name string) (int, error) {
	i, ok := g.publisher.cfg.Manifest.Index(name)
	switch {
	case g.done:
		return 0, fmt.Errorf("client: generation %d was ended: %w", g.begun.generation, os.ErrClosed)
	case !ok:
		return 0, fmt.Errorf("client: the manifest has no tensor %q", name)
	}
	return i, nil
}

// Put gives a tensor its bytes, as the manifest's encoding has them. They are borrowed until Commit or Abort returns: in place they are copied by Commit, on
// all cores.
func (g *Generation) Put(ctx context.Context, name string, data []byte) error {
	i, err := g.index(name)
	if err != nil {
		return err
	}
	return g.PutAt(ctx, i, data)
}

// PutAt is Put by the tensor's number.
func (g *Generation) PutAt(ctx context.Context, i int, data []byte) error {
	m := g.publisher.cfg.Manifest
	switch n := m.EncodedBytes(i); {
	case g.done:
		return fmt.Errorf("client: generation %d was ended: %w", g.begun.generation, os.ErrClosed)
	case int64(len(data)) != n:
		return fmt.Errorf("client: tensor %q has %d bytes, and %d were put", m.Tensor(i).Name, n, len(data))
	}
	if g.begun.data == nil {
		if err := g.publisher.sink.put(ctx, i, data); err != nil {
			return err
		}
	}
	g.written[i], g.sources[i] = true, data
	return nil
}

// Commit publishes the generation, once every tensor was written: *IncompleteError if one was not, after which the generation is still under way. If another
// error comes back, it has ended; whether readers see it is then known only if the error is the daemon's answer.
func (g *Generation) Commit(ctx context.Context) (Published, error) {
	p := g.publisher
	p.mu.Lock()
	defer p.mu.Unlock()
	if g.done {
		return Published{}, fmt.Errorf("client: generation %d was ended: %w", g.begun.generation, os.ErrClosed)
	}
	if err := g.missing(); err != nil {
		return Published{}, err
	}
	if ctx.Err() != nil {
		return Published{}, &waitError{ctx, "client: commit"}
	}
	var sums []uint32
	if g.begun.data != nil {
		sums = p.blocks.run(g.begun.data, g.sources)
	}
	g.done, p.now = true, nil
	digest, err := p.sink.commit(ctx, g.begun.generation, sums)
	if err != nil {
		return Published{}, fmt.Errorf("client: publish generation %d to table %q: %w", g.begun.generation, p.cfg.Table, err)
	}
	return Published{g.begun.generation, digest}, nil
}

// missing returns an *IncompleteError if a tensor was not written. Empty ones need not be.
func (g *Generation) missing() error {
	m, e := g.publisher.cfg.Manifest, &IncompleteError{Generation: g.begun.generation}
	for i, written := range g.written {
		if !written && m.EncodedBytes(i) > 0 {
			if e.Missing++; e.Missing == 1 {
				e.Tensor = m.Tensor(i).Name
			}
		}
	}
	if e.Missing > 0 {
		return e
	}
	return nil
}

// Abort gives the generation up. After Commit or Abort it does nothing.
func (g *Generation) Abort() error {
	p := g.publisher
	p.mu.Lock()
	defer p.mu.Unlock()
	if g.done {
		return nil
	}
	g.done, p.now = true, nil
	return p.sink.abort()
}

// publisherError is why a publisher was not taken.
func publisherError(err error) error {
	if codeOf(err) == wire.CodePublisherActive {
		return fmt.Errorf("client: %w", &said{ErrPublisherActive, err})
	}
	return fmt.Errorf("client: %w", named(err))
}
