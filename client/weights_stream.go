package client

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

// streamed is a publisher that sends its generations in chunks, straight from the caller's memory. One goroutine at a time uses it.
//
// When its connection has ended, begin makes another: nothing of a generation outlives the connection over which it was begun.
type streamed struct {
	addr, network, address string
	cfg                    PublisherConfig

	dialog     *dialog // nil: there is no connection
	accepted   wire.AcceptedPublish
	cutter     *tensor.Cutter
	generation uint64       // under way; 0: none
	mu         sync.Mutex   // dialog changes under it
	sent       atomic.Int64 // bytes of tensors in the generation under way, or in the last one

	interrupted atomic.Bool // the context of a put has ended

	prefix [4 + tensor.HeaderBytes]byte
	vector net.Buffers
	room   [][]byte
}

// openStreamSink becomes the table's publisher over a connection. ctx bounds the connecting only.
func openStreamSink(ctx context.Context, addr string, cfg PublisherConfig) (sink, error) {
	network, address, err := splitAddress(addr)
	if err != nil {
		return nil, err
	}
	p := &streamed{addr: addr, network: network, address: address, cfg: cfg}
	if err := p.connect(ctx); err != nil {
		return nil, publisherError(err)
	}
	return p, nil
}

// segmentRate is how many bytes of one generation the daemon makes room for in a second, at the least.
const segmentRate = 100 << 20

func (p *streamed) connect(ctx context.Context) error {
	limited, cancel := context.WithTimeout(ctx, p.cfg.Timeout+time.Duration(p.cfg.Manifest.DataBytes()/segmentRate)*time.Second)
	defer cancel()
	conn, err := p.cfg.Dialer(limited, p.network, p.address)
	if err != nil {
		if limited.Err() != nil {
			return &waitError{limited, fmt.Sprintf("dial %s: no connection in time (%v)", p.addr, err)}
		}
		return fmt.Errorf("dial %s: %w; %s", p.addr, err, dialAdvice(err))
	}
	hello := &wire.Hello{Role: wire.RolePublish, Table: p.cfg.Table, Manifest: p.cfg.Manifest.JSON(), Client: p.cfg.Client}
	hello.SetToken(p.cfg.Token)
	accepted := wire.AcceptedPublish{}
	err = greet(limited, conn, hello, &accepted)
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
		if limited.Err() != nil {
			return &waitError{limited, fmt.Sprintf("dial %s, table %q: connected, but no reply in time", p.addr, p.cfg.Table)}
		}
		return fmt.Errorf("dial %s, table %q: %w", p.addr, p.cfg.Table, named(err))
	}
	p.mu.Lock()
	p.dialog, p.accepted = &dialog{conn: conn, timeout: p.cfg.Timeout}, accepted
	p.mu.Unlock()
	p.cutter = tensor.NewCutter(p.cfg.Manifest, int(accepted.ChunkBytes), accepted.Publisher, 0, p.chunk)
	return nil
}

// begin takes a place for generation want, or for the next one if that is 0.
func (p *streamed) begin(ctx context.Context, want uint64) (*begun, error) {
	generation, again, err := uint64(0), p.dialog != nil, error(nil)
	for {
		if p.dialog == nil {
			if err := p.connect(ctx); codeOf(err) == wire.CodePublisherActive {
				return nil, &said{ErrPublisherActive, err}
			} else if err != nil {
				return nil, err
			}
		}
		generation, _, err = p.dialog.begin(ctx, want)
		if err == nil {
			break
		}
		p.after()
		// The connection may have ended long ago, while nothing was to be said.
		if p.dialog != nil || !again || ctx.Err() != nil || errors.Is(err, wire.ErrProtocol) {
			return nil, err
		}
		again = false
	}
	p.generation = generation
	p.sent.Store(0)
	p.cutter.Begin(generation)
	return &begun{generation: generation}, nil
}

// after drops a connection that is of no more use, and with it the generation.
func (p *streamed) after() {
	if p.dialog.broken == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	_ = p.dialog.conn.Close()
	p.dialog, p.generation = nil, 0
}

// errNoConnection is for a generation whose connection has ended, and the generation with it.
var errNoConnection = fmt.Errorf("%w since the generation was begun, which is lost with the connection: begin another", ErrDaemonGone)

// put sends the encoded bytes of a tensor. What shares a chunk with the next tensor is kept until that is full, so data must stay as it is until the commit.
func (p *streamed) put(ctx context.Context, i int, data []byte) error {
	if p.generation == 0 {
		return errNoConnection
	}
	conn, fired := p.dialog.conn, make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		p.interrupted.Store(true)
		_ = conn.SetWriteDeadline(past)
		close(fired)
	})
	err := p.cutter.Put(i, data)
	if !stop() {
		<-fired
		p.interrupted.Store(false)
		if err != nil {
			err = &waitError{ctx, fmt.Sprintf("send tensor %q", p.cfg.Manifest.Tensor(i).Name)}
		}
	}
	if place := (*tensor.PlaceError)(nil); err != nil && !errors.As(err, &place) {
		p.dialog.broken = err // in the middle of a chunk
		p.after()
	}
	return err
}

// takeTimeout is how long the daemon may take for one chunk.
const takeTimeout = 30 * time.Second

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
	_ = p.dialog.conn.SetWriteDeadline(time.Now().Add(takeTimeout))
	if p.interrupted.Load() { // just before
		_ = p.dialog.conn.SetWriteDeadline(past)
	}
	if _, err := p.vector.WriteTo(p.dialog.conn); err != nil {
		if deadlineExceeded(err) {
			return fmt.Errorf("%w: it took nothing for %v", ErrDaemonGone, takeTimeout)
		}
		if answer := p.dialog.lastWords(); answer != nil {
			return answer
		}
		return fmt.Errorf("%w: %w", ErrDaemonGone, err)
	}
	p.sent.Add(int64(length - tensor.HeaderBytes))
	return nil
}

// commit publishes the generation that was begun.
func (p *streamed) commit(ctx context.Context, generation uint64, _ []uint32) (spec.Fingerprint, error) {
	if p.generation != generation {
		return spec.Fingerprint{}, errNoConnection
	}
	if err := p.cutter.Finish(); err != nil {
		part := (*tensor.IncompleteError)(nil)
		if errors.As(err, &part) {
			return spec.Fingerprint{}, errors.Join(err, p.abort())
		}
		p.dialog.broken = err
		p.after()
		return spec.Fingerprint{}, err
	}
	p.generation = 0
	digest, err := p.dialog.commit(ctx, generation)
	p.after()
	return digest, err
}

// abort gives the generation up.
func (p *streamed) abort() error {
	if p.generation == 0 {
		return nil
	}
	p.generation = 0
	err := p.dialog.abort()
	p.after()
	return err
}

// SentBytes returns how many bytes of tensors were sent of the generation under way, or of the last one; in place, how many Commit has copied. Any goroutine
// may call it.
func (p *Publisher) SentBytes() int64 {
	if s, ok := p.sink.(*streamed); ok {
		return s.sent.Load()
	}
	return p.blocks.moved.Load()
}

// close ends the publisher: a generation that is under way is given up.
func (p *streamed) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.dialog == nil {
		return nil
	}
	return p.dialog.conn.Close()
}
