package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

// ErrReplaced is wrapped when a table has generations of another manifest now. A Subscription over a connection ends with it; one that maps the memory
// attaches again by itself, and does not.
var ErrReplaced = errors.New("the weights have another manifest now")

// SubscribeConfig says which weights to read, and how. All but Table may be left zero.
type SubscribeConfig struct {
	// Table is the table's name. Required.
	Table string

	// Wait lets Subscribe wait until something was published. Without it a table in which nothing was is a *wire.Refusal with code no_generation.
	Wait bool

	// Client is free text for the daemon's status page and log. Default: ingestd-go.
	Client string

	// Stream has generations sent over a unix socket instead of mapping the daemon's memory.
	Stream bool

	// Generations is the most generations that a streamed subscription has memory for, those that are held included. Default 3.
	Generations int

	// CapacityBytes is the most bytes of one generation that a streamed subscription takes. Default 64 GiB.
	CapacityBytes int64

	// NoDelta has all of each generation sent, also when the one before is here. Streamed only.
	NoDelta bool

	// HandshakeTimeout is how long the daemon may take to answer, without Wait. Default DefaultHandshakeTimeout.
	HandshakeTimeout time.Duration

	// StallTimeout is how long a streamed generation may go without a byte. Default 30 s.
	StallTimeout time.Duration

	// ReconnectFor is how long to try to reach a daemon that is gone, before the subscription ends. Default DefaultReconnectFor; negative: it ends at once.
	ReconnectFor time.Duration

	// ReconnectFrom and ReconnectTo are the shortest and the longest pause between two tries. Default DefaultReconnectFrom and DefaultReconnectTo.
	ReconnectFrom, ReconnectTo time.Duration

	// TLS is for addresses tls:// and quic://.
	TLS TLS

	// Dialer makes connections, as in Config. Streamed only. Default: net.Dialer.
	Dialer func(ctx context.Context, network, address string) (net.Conn, error)

	// Token proves to the daemon who this is, and the daemon to this. Zero: none; on a unix socket the daemon asks the kernel which user this is.
	Token Token
}

func (c SubscribeConfig) withDefaults() SubscribeConfig {
	if c.Client == "" {
		c.Client = "ingestd-go"
	}
	if c.Generations == 0 {
		c.Generations = 3
	}
	if c.CapacityBytes == 0 {
		c.CapacityBytes = 64 << 30
	}
	for _, d := range [...]struct {
		field *time.Duration
		value time.Duration
	}{
		{&c.HandshakeTimeout, DefaultHandshakeTimeout}, {&c.StallTimeout, 30 * time.Second}, {&c.ReconnectFor, DefaultReconnectFor},
		{&c.ReconnectFrom, DefaultReconnectFrom}, {&c.ReconnectTo, max(DefaultReconnectTo, c.ReconnectFrom)},
	} {
		if *d.field == 0 {
			*d.field = d.value
		}
	}
	c.Dialer = c.TLS.dialer(c.Dialer)
	return c
}

func (c SubscribeConfig) check() error {
	switch {
	case c.Table == "":
		return errors.New("client: SubscribeConfig.Table is empty: name the table to read")
	case c.Generations < 2:
		return fmt.Errorf("client: SubscribeConfig.Generations is %d, must be at least 2: one is held while the next is received", c.Generations)
	case c.CapacityBytes < 0 || c.HandshakeTimeout < 0 || c.StallTimeout < 0 || c.ReconnectFrom < 0 || c.ReconnectTo < c.ReconnectFrom:
		return errors.New("client: SubscribeConfig: sizes and times may not be negative, nor ReconnectTo shorter than ReconnectFrom")
	}
	return nil
}

// Subscription reads the generations of a table of weights: always the newest, each whole, and unchanged for as long as it is held. All methods may be called
// from any goroutine.
type Subscription struct {
	table  string
	source source
}

// source is where generations come from: memory of the daemon, or a connection.
type source interface {
	// latest returns the newest generation, held for the caller, or nil if it is not newer; an error if there will be none.
	latest(newerThan uint64) (*heldWeights, error)
	// await is latest that waits.
	await(ctx context.Context, newerThan uint64) (*heldWeights, error)
	// manifest returns what tensors the newest generation has.
	manifest() *tensor.Manifest
	close() error
}

// heldWeights is a generation that a source holds for a caller.
type heldWeights struct {
	manifest   *tensor.Manifest
	generation uint64
	digest     spec.Fingerprint
	published  time.Time
	sum        func(i int) uint32 // CRC of a tensor
	data       []byte             // the flat bytes
	release    func()             // called once
}

// Subscribe opens a subscription. addr is unix:///path or shm:///path, which map the memory of a daemon on this machine, or tcp://host:port. ctx bounds the
// subscribing only, which with cfg.Wait lasts until something was published.
//
// A *wire.Refusal in the error says why the daemon would not.
func Subscribe(ctx context.Context, addr string, cfg SubscribeConfig) (*Subscription, error) {
	cfg = cfg.withDefaults()
	if err := cfg.check(); err != nil {
		return nil, err
	}
	addr = unixed(addr)
	network, path, err := splitAddress(addr)
	if err != nil {
		return nil, err
	}
	s := &Subscription{table: cfg.Table}
	if network == "unix" && !cfg.Stream {
		s.source, err = openMapped(ctx, path, cfg)
	} else {
		s.source, err = openRemoteSource(ctx, addr, cfg)
	}
	if err != nil {
		return nil, err
	}
	return s, nil
}

// unixed makes unix:// of shm://, which means the same.
func unixed(addr string) string {
	if rest, ok := strings.CutPrefix(addr, "shm://"); ok {
		return "unix://" + rest
	}
	return addr
}

// Table returns the table's name.
func (s *Subscription) Table() string { return s.table }

// Manifest returns what tensors the newest generation has. It changes when a publisher brings another manifest: that of a generation is Weights.Manifest.
func (s *Subscription) Manifest() *tensor.Manifest { return s.source.manifest() }

// Latest returns the newest generation that is here, to be released. Of memory that is mapped this takes no system call, whatever its size.
//
// Its errors: ErrDaemonGone, ErrShuttingDown, ErrReplaced; os.ErrClosed after Close.
func (s *Subscription) Latest() (*Weights, error) {
	held, err := s.source.latest(0)
	return s.weights(held, err)
}

// Wait returns the newest generation if it is above newerThan, or waits for one, to be released. If the daemon was restarted and numbers began anew, one of
// before the restart is older than all.
//
// Its errors are those of Latest, and the context's, which for a deadline is also os.ErrDeadlineExceeded, and after which Wait may be called again.
func (s *Subscription) Wait(ctx context.Context, newerThan uint64) (*Weights, error) {
	held, err := s.source.await(ctx, newerThan)
	return s.weights(held, err)
}

func (s *Subscription) weights(held *heldWeights, err error) (*Weights, error) {
	switch {
	case err != nil && codeOf(err) == wire.CodeReplaced:
		return nil, &said{ErrReplaced, err}
	case err != nil:
		return nil, err
	case held == nil:
		return nil, fmt.Errorf("client: weights of table %q: none is here yet: wait for one", s.table)
	}
	return &Weights{table: s.table, held: held}, nil
}

// Close ends the subscription: a Wait under way returns os.ErrClosed. What is held stays as it is until it is released, and the daemon keeps it pinned until
// then. Closing twice is no error.
func (s *Subscription) Close() error { return s.source.close() }
