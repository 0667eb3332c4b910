package client

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync/atomic"
	"time"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

// streamConfig is what a PublisherConfig says of a publisher over a connection, with its defaults.
type streamConfig struct {
	Table, Client    string
	Manifest         *tensor.Manifest
	HandshakeTimeout time.Duration
	StallTimeout     time.Duration // for the daemon to take a chunk
	Dialer           func(ctx context.Context, network, address string) (net.Conn, error)
}

// streamed is a publisher that sends its generations in chunks, straight from the caller's memory. One goroutine at a time uses it; sentBytes may be asked by any.
//
// When its connection has ended, begin makes another: nothing of a generation outlives the connection over which it was begun.
type streamed struct {
	addr, network, address string
	cfg                    streamConfig

	talk       talk // conn nil: there is none
	accepted   wire.AcceptedPublish
	cutter     *tensor.Cutter
	generation uint64 // under way; 0: none
	closed     bool
	sent       atomic.Int64 // bytes of tensors in the generation under way, or in the last one

	prefix [4 + tensor.HeaderBytes]byte
	vector net.Buffers
	room   [][]byte
}

// openStreamed becomes the table's publisher over a connection. ctx bounds the connecting only, and the daemon makes the table's memory meanwhile.
func openStreamed(ctx context.Context, addr string, cfg streamConfig) (*streamed, error) {
	network, address, err := splitAddress(addr)
	if err != nil {
		return nil, err
	}
	p := &streamed{addr: addr, network: network, address: address, cfg: cfg}
	if err := p.connect(ctx); err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	return p, nil
}

func (p *streamed) connect(ctx context.Context) error {
	limited, cancel := context.WithTimeout(ctx, p.cfg.HandshakeTimeout)
	defer cancel()
	conn, err := p.cfg.Dialer(limited, p.network, p.address)
	if err != nil {
		if limited.Err() != nil {
			return &waitError{limited, fmt.Sprintf("dial %s: no connection in time (%v)", p.addr, err)}
		}
		return fmt.Errorf("dial %s: %w; is the daemon running, and is this its address?", p.addr, err)
	}
	hello := &wire.Hello{Role: wire.RolePublish, Table: p.cfg.Table, Manifest: p.cfg.Manifest.JSON(), Client: p.cfg.Client}
	accepted := wire.AcceptedPublish{}
	err = exchange(ctx, conn, hello, &accepted) // a large table's memory takes its time
	if err == nil && accepted.ChunkBytes > tensor.ChunkBytesMax {
		err = fmt.Errorf("%w: chunks of %d bytes are offered", wire.ErrProtocol, accepted.ChunkBytes)
	}
	if err == nil {
		if no := tensor.CheckChunkBytes(int(accepted.ChunkBytes)); no != nil {
			err = fmt.Errorf("%w: %w", wire.ErrProtocol, no)
		}
	}
	if err != nil {
		conn.Close()
		if ctx.Err() != nil {
			return &waitError{ctx, fmt.Sprintf("dial %s, table %q: connected, but no reply in time", p.addr, p.cfg.Table)}
		}
		return fmt.Errorf("dial %s, table %q: %w", p.addr, p.cfg.Table, named(err))
	}
	p.talk, p.accepted = talk{conn: conn, table: p.cfg.Table}, accepted
	p.cutter = tensor.NewCutter(p.cfg.Manifest, int(accepted.ChunkBytes), accepted.Publisher, 0, p.chunk)
	return nil
}

// begin takes a place for generation want, or for the next one if that is 0.
func (p *streamed) begin(ctx context.Context, want uint64) (uint64, error) {
	switch {
	case p.closed:
		return 0, fmt.Errorf("client: publish: %w", os.ErrClosed)
	case p.generation != 0:
		return 0, fmt.Errorf("client: publish: generation %d is under way: commit or abort it first", p.generation)
	}
	generation, again, err := uint64(0), p.talk.conn != nil, error(nil)
	for {
		if p.talk.conn == nil {
			if err := p.connect(ctx); err != nil {
				return 0, fmt.Errorf("client: publish: %w", err)
			}
		}
		generation, _, err = p.talk.begin(ctx, want)
		if err == nil {
			break
		}
		p.after(err)
		// The connection may have ended long ago, while nothing was to be said.
		if p.talk.conn != nil || !again || ctx.Err() != nil || errors.Is(err, wire.ErrProtocol) {
			return 0, err
		}
		again = false
	}
	p.generation = generation
	p.sent.Store(0)
	p.cutter.Begin(generation)
	return generation, nil
}

// after drops the connection, unless the error leaves it usable.
func (p *streamed) after(err error) {
	pinned, failed := (*PinnedError)(nil), (*FailedError)(nil)
	if err == nil || errors.As(err, &failed) || errors.As(err, &pinned) && pinned.Reason != "" {
		return
	}
	if p.talk.conn != nil {
		p.talk.conn.Close()
		p.talk.conn = nil
	}
	p.generation = 0
}

// errNotBegun is for what needs a generation that Begin gave.
var errNotBegun = errors.New("client: publish: no generation is under way: begin one")

// put sends the encoded bytes of a tensor, or a part of them. Parts of tensors that share a chunk with the next ones are kept until that is full, so data must stay as it is until
// the commit.
func (p *streamed) put(i int, offset int64, data []byte) error {
	if p.generation == 0 {
		return errNotBegun
	}
	err := p.cutter.PutAt(i, offset, data)
	place := (*tensor.PlaceError)(nil)
	if err != nil && !errors.As(err, &place) {
		p.after(err)
	}
	return err
}

// chunk writes one chunk.
func (p *streamed) chunk(header []byte, data [][]byte) error {
	length := tensor.HeaderBytes
	p.vector = append(p.room[:0], p.prefix[:])
	for _, b := range data {
		length += len(b)
		p.vector = append(p.vector, b)
	}
	p.room = p.vector
	binary.LittleEndian.PutUint32(p.prefix[:], uint32(length)|wire.ChunkMark)
	copy(p.prefix[4:], header)
	_ = p.talk.conn.SetWriteDeadline(time.Now().Add(p.cfg.StallTimeout))
	if _, err := p.vector.WriteTo(p.talk.conn); err != nil {
		if deadlineExceeded(err) {
			return fmt.Errorf("client: publish: %w: it took nothing for %v", ErrDaemonGone, p.cfg.StallTimeout)
		}
		return fmt.Errorf("client: publish: %w", named(p.talk.ended(err)))
	}
	p.sent.Add(int64(length - tensor.HeaderBytes))
	return nil
}

// commit publishes the generation. A *tensor.IncompleteError says what was not put; the generation is still under way then.
func (p *streamed) commit(ctx context.Context) (spec.Fingerprint, error) {
	if p.generation == 0 {
		return spec.Fingerprint{}, errNotBegun
	}
	if err := p.cutter.Finish(); err != nil {
		part := (*tensor.IncompleteError)(nil)
		if !errors.As(err, &part) {
			p.after(err)
		}
		return spec.Fingerprint{}, err
	}
	digest, err := p.talk.commit(ctx, p.generation)
	p.generation = 0
	p.after(err)
	return digest, err
}

// abort gives the generation up.
func (p *streamed) abort(ctx context.Context) error {
	if p.generation == 0 {
		return nil
	}
	p.generation = 0
	err := p.talk.abort(ctx)
	p.after(err)
	return err
}

func (p *streamed) sentBytes() int64 { return p.sent.Load() }

// close ends the publisher: a generation that is under way is given up.
func (p *streamed) close() error {
	if p.closed {
		return nil
	}
	p.closed = true
	if p.talk.conn == nil {
		return nil
	}
	return p.talk.conn.Close()
}
