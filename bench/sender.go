package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"

	"github.com/spf13/cobra"

	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// senderOptions are the flags of the sender's process.
type senderOptions struct {
	address       string
	table         string
	spec          string
	connections   int
	writeBytes    int
	sendBuffer    int
	sourceBytes   int
	windowSamples int64
	windowBytes   int64
	authorities   string
	client        bool
}

// sender drives a receiver over its connections: as fast as the window allows until it is told a rate, then in an open loop.
type sender struct {
	opt    senderOptions
	spec   *spec.Spec
	conns  []*senderConn
	window ready

	failed chan error // the first failure
}

// senderConn is one connection. sent belongs to the goroutine that writes, acked to the one that counts acks.
type senderConn struct {
	conn      net.Conn
	sample    int
	window    uint64 // samples that may be without an ack
	perWrite  uint64 // most samples in one write
	leastFree uint64 // room that is worth a write: a window that opens by one sample is not
	source    []byte // the same bytes over and over; hot, if it is one part
	part      int    // of the source: what one write takes
	sent      uint64
	ackEvent  park.Event
	seat      *park.Waiter
	open      atomic.Pointer[schedule]
	_         [64]byte
	acked     atomic.Uint64
	ended     atomic.Bool // no more acks will come
}

// On the 2-core guest, few large writes into a socket buffer that the kernel does not grow (it doubles the size set) are the cheapest way to send: 0.15 to
// 0.2 CPU-seconds per GB instead of 0.3 with writes of 256 KiB and a buffer that grows to 4 MiB, because what is under way then stays in the cache.
const (
	senderWriteBytes = mib
	senderBuffer     = 512 * kib
)

func senderCommand() *cobra.Command {
	var opt senderOptions
	cmd := &cobra.Command{
		Use:    "_sender",
		Short:  "The sender of bench tcp; the bench starts it",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE:   func(cmd *cobra.Command, _ []string) error { return runSender(cmd.Context(), opt) },
	}
	f := cmd.Flags()
	f.StringVar(&opt.address, "address", "", "where to send: tcp://, tls:// or quic:// and host:port")
	f.StringVar(&opt.table, "table", "bench", "table to send to")
	f.StringVar(&opt.spec, "spec", "", "layout of a sample")
	f.IntVar(&opt.connections, "connections", 1, "connections to open")
	f.IntVar(&opt.writeBytes, "write-bytes", senderWriteBytes, "most bytes of one write")
	f.IntVar(&opt.sendBuffer, "send-buffer", senderBuffer, "SO_SNDBUF; 0: the kernel's choice")
	f.IntVar(&opt.sourceBytes, "source-bytes", 0, "memory to send from; less than a write: one write's, which stays in the cache")
	f.Int64Var(&opt.windowSamples, "window-samples", 0, "window to ask for; 0: the receiver's limit")
	f.Int64Var(&opt.windowBytes, "window-bytes", 0, "window to ask for; 0: the receiver's limit")
	f.StringVar(&opt.authorities, "tls-ca", "", "file of the authority that signed the receiver's certificate")
	f.BoolVar(&opt.client, "client", false, "send with the client library at full speed, not with this program's own loop")
	return cmd
}

func runSender(ctx context.Context, opt senderOptions) error {
	layout, err := spec.ParseText(opt.spec)
	if err != nil {
		return err
	}
	s := &sender{opt: opt, spec: layout, failed: make(chan error, 1)}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if opt.client {
		return runClientSender(ctx, s)
	}
	for range opt.connections {
		c, err := s.dial(ctx)
		if err != nil {
			return err
		}
		defer c.conn.Close()
		s.conns = append(s.conns, c)
	}
	var running sync.WaitGroup
	for _, c := range s.conns {
		running.Go(func() { s.fail(c.countAcks()) })
		running.Go(func() { s.fail(c.send(ctx)) })
	}
	err = serveControl(os.Stdin, os.Stdout, &s.window, s.handle)
	cancel()
	for _, c := range s.conns {
		c.conn.Close()
	}
	running.Wait()
	return err
}

// fail keeps the first failure; every request after it is answered with it.
func (s *sender) fail(err error) {
	if err == nil {
		return
	}
	select {
	case s.failed <- err:
	default:
	}
}

func (s *sender) failure() error {
	select {
	case err := <-s.failed:
		s.failed <- err
		return err
	default:
		return nil
	}
}

// dial opens one connection and agrees on the window.
func (s *sender) dial(ctx context.Context) (*senderConn, error) {
	conn, err := dialPeer(ctx, s.opt.address, s.opt.authorities, s.opt.sendBuffer)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", s.opt.address, err)
	}
	hello := &wire.Hello{
		VersionMin: wire.Version, VersionMax: wire.Version, Role: wire.RolePush, Table: s.opt.table, Spec: s.spec,
		WindowSamples: s.opt.windowSamples, WindowBytes: s.opt.windowBytes, Client: "ingestd-bench",
	}
	var accepted wire.AcceptedPush
	if err := wire.WriteHello(conn, hello); err != nil {
		return nil, errors.Join(fmt.Errorf("write the hello: %w", err), conn.Close())
	}
	if err := wire.ReadReply(conn, &accepted); err != nil {
		return nil, errors.Join(fmt.Errorf("read the reply: %w", err), conn.Close())
	}
	s.window.WindowSamples, s.window.WindowBytes = accepted.WindowSamples, accepted.WindowBytes
	return newSenderConn(conn, s.spec.SampleBytes(), &accepted, s.opt.writeBytes, s.opt.sourceBytes), nil
}

func newSenderConn(conn net.Conn, sample int64, accepted *wire.AcceptedPush, writeBytes, sourceBytes int) *senderConn {
	window := max(1, min(accepted.WindowSamples, accepted.WindowBytes/sample))
	perWrite := max(1, min(int64(writeBytes)/sample, window))
	part := max(min(perWrite*sample, int64(writeBytes)), stampBytes)
	if part != perWrite*sample {
		sourceBytes = 0 // a part is not made of whole samples
	}
	source := make([]byte, part*max(1, int64(sourceBytes)/part))
	for i := range source {
		source[i] = byte(i * 7)
	}
	for at := int64(0); at < int64(len(source)); at += sample {
		putStamp(source[at:], closedStamp)
	}
	return &senderConn{
		conn: conn, sample: int(sample), window: uint64(window), perWrite: uint64(perWrite), leastFree: uint64(max(1, min(perWrite, window/4))),
		source: source, part: int(part), seat: park.NewWaiter(),
	}
}

// countAcks reads acks until the connection ends. What is not an ack is the start of a closing notice.
func (c *senderConn) countAcks() error {
	defer func() {
		c.ended.Store(true)
		c.ackEvent.Wake()
	}()
	buf := make([]byte, 64*kib)
	for {
		n, err := c.conn.Read(buf)
		if acks := bytes.Count(buf[:n], []byte{wire.Ack}); acks != n {
			return c.readNotice(buf[:n])
		}
		c.acked.Add(uint64(n))
		c.ackEvent.Wake()
		if err != nil {
			return closedByUs(err)
		}
	}
}

func (c *senderConn) readNotice(seen []byte) error {
	at := 0
	for seen[at] == wire.Ack {
		at++
	}
	if seen[at] != wire.NoticeMark {
		return fmt.Errorf("byte %#02x among the acks", seen[at])
	}
	notice, err := wire.ReadNotice(&prefixReader{seen: seen[at+1:], conn: c.conn})
	if err != nil {
		return fmt.Errorf("read the closing notice: %w", err)
	}
	return notice
}

// prefixReader gives back what was read too far.
type prefixReader struct {
	seen []byte
	conn net.Conn
}

func (r *prefixReader) Read(b []byte) (int, error) {
	if len(r.seen) == 0 {
		return r.conn.Read(b)
	}
	n := copy(b, r.seen)
	r.seen = r.seen[n:]
	return n, nil
}

func closedByUs(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return fmt.Errorf("read acks: %w", err)
}

var errAcksEnded = errors.New("the receiver ended the connection")

// awaitRoom waits until at least least samples may be sent, and returns how many may.
func (c *senderConn) awaitRoom(ctx context.Context, least uint64) (uint64, error) {
	for {
		if room := c.window - (c.sent - c.acked.Load()); room >= least {
			return room, nil
		}
		c.ackEvent.Add(c.seat)
		if c.window-(c.sent-c.acked.Load()) >= least || c.ended.Load() {
			c.ackEvent.Remove(c.seat)
			if c.ended.Load() {
				return 0, errAcksEnded
			}
			continue
		}
		if err := c.seat.Wait(ctx); err != nil {
			c.ackEvent.Remove(c.seat)
			return 0, err
		}
	}
}

// send writes samples until the process is told to stop: at full speed, then by the schedule if one comes.
func (c *senderConn) send(ctx context.Context) error {
	err := c.sendClosed(ctx)
	if err == nil {
		err = c.sendOpen(ctx, c.open.Load())
	}
	if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func (c *senderConn) sendClosed(ctx context.Context) error {
	for at := 0; c.open.Load() == nil; {
		room, err := c.awaitRoom(ctx, c.leastFree)
		if err != nil {
			return err
		}
		if err := c.write(c.source[at:at+c.part], min(room, c.perWrite)); err != nil {
			return err
		}
		if at += c.part; at == len(c.source) {
			at = 0
		}
	}
	return nil
}

// write sends n samples from buf, which holds them all, or the beginning of a sample that is larger.
func (c *senderConn) write(buf []byte, n uint64) error {
	left := int(n) * c.sample
	for left > 0 {
		k, err := c.conn.Write(buf[:min(left, len(buf))])
		if err != nil {
			return fmt.Errorf("write samples: %w", err)
		}
		left -= k
	}
	c.sent += n
	return nil
}

// handle answers the parent.
func (s *sender) handle(ask request) (reply, error) {
	if err := s.failure(); err != nil {
		return reply{}, err
	}
	switch ask.Do {
	case doSnapshot:
		snap, err := takeSnapshot(ask.Pids)
		if err != nil {
			return reply{}, err
		}
		for _, c := range s.conns {
			n := c.acked.Load()
			snap.Samples += n
			snap.Streams = append(snap.Streams, n)
		}
		return reply{Snapshot: snap}, nil
	case doOpen:
		s.startOpen(ask.Rate)
		return reply{}, nil
	default:
		return reply{}, unknownRequest(ask)
	}
}
