package bench

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/internal/pollfd"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// bareOptions are the flags of the bare loop's process.
type bareOptions struct {
	spec          string
	memoryBytes   int64
	connections   int
	readBytes     int
	windowSamples int64
	windowBytes   int64
	transport     string
	host          string
	certs         string
}

// bareServer is the baseline: it accepts connections, speaks the handshake, and then only reads them into mapped memory and answers with acks.
type bareServer struct {
	opt       bareOptions
	spec      *spec.Spec
	listener  net.Listener
	memory    []byte
	latency   *recorder
	recording atomic.Bool

	mu    sync.Mutex
	conns []*bareConn
}

// bareConn is one connection with its own part of the memory. Its counter has one writer, the connection's goroutine.
type bareConn struct {
	server  *bareServer
	memory  []byte // whole samples
	sample  int
	at      int    // where the next byte goes
	partial int    // bytes of the sample that is under way
	owed    int    // acks not yet sent
	ackAt   int    // send them at this many, or when the socket is empty
	acks    []byte // wire.Ack, repeated
	first   int    // where the next sample to be completed begins
	err     error
	wrong   atomic.Uint64
	samples atomic.Uint64
	_       [64]byte
}

func bareCommand() *cobra.Command {
	var opt bareOptions
	cmd := &cobra.Command{
		Use:    "_bare",
		Short:  "The bare loop of bench tcp; the bench starts it",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE:   func(cmd *cobra.Command, _ []string) error { return runBare(cmd.Context(), opt) },
	}
	f := cmd.Flags()
	f.StringVar(&opt.spec, "spec", "", "layout of a sample")
	f.Int64Var(&opt.memoryBytes, "memory-bytes", 32*mib, "memory to read into, for all connections together")
	f.IntVar(&opt.connections, "connections", 1, "connections that will come")
	f.IntVar(&opt.readBytes, "read-bytes", bareReadBytes, "most bytes of one read")
	f.Int64Var(&opt.windowSamples, "window-samples", 1<<16, "largest window to grant")
	f.Int64Var(&opt.windowBytes, "window-bytes", 16*mib, "largest window to grant")
	f.StringVar(&opt.transport, "transport", transportTCP, "tcp, tls or quic")
	f.StringVar(&opt.host, "host", "127.0.0.1", "address to listen at")
	f.StringVar(&opt.certs, "certs", "", "folder of the certificates for tls and quic")
	return cmd
}

// bareReadBytes is the size of one read: up to 256 KiB straight over many contiguous samples is the cheapest way for every size of sample (0.13 CPU-seconds
// per GB at 1 KiB, 0.2 at 4 MiB, on the 2-core guest where the targets were set; a read per sample costs 2.1 at 1 KiB and 0.23 at 4 MiB).
const bareReadBytes = 256 * kib

func runBare(ctx context.Context, opt bareOptions) error {
	s, err := newBareServer(ctx, opt)
	if err != nil {
		return err
	}
	go s.accept()
	first := &ready{Address: opt.transport + "://" + s.listener.Addr().String(), WindowSamples: opt.windowSamples, WindowBytes: opt.windowBytes}
	return serveControl(os.Stdin, os.Stdout, first, s.handle)
}

func newBareServer(ctx context.Context, opt bareOptions) (*bareServer, error) {
	layout, err := spec.ParseText(opt.spec)
	if err != nil {
		return nil, err
	}
	size := max(opt.memoryBytes, layout.SampleBytes()*int64(opt.connections))
	memory, err := newMemory(size)
	if err != nil {
		return nil, err
	}
	listener, err := listenBare(ctx, opt.transport, opt.host, certificates(opt.certs))
	if err != nil {
		return nil, fmt.Errorf("listen for the bare loop: %w", err)
	}
	return &bareServer{opt: opt, spec: layout, listener: listener, memory: memory.Bytes()[:size], latency: newRecorder()}, nil
}

func (s *bareServer) accept() {
	for {
		conn, err := s.listener.Accept()
		if err != nil {
			return
		}
		go func() {
			if err := s.serve(conn); err != nil {
				fmt.Fprintln(os.Stderr, "bare loop:", err)
			}
			conn.Close()
		}()
	}
}

// serve runs one connection to its end.
func (s *bareServer) serve(conn net.Conn) error {
	hello, err := wire.ReadHello(conn)
	if err != nil {
		return fmt.Errorf("read the hello: %w", err)
	}
	if refusal := hello.CheckSpec(s.spec); refusal != nil {
		return errors.Join(refusal, wire.WriteRefusal(conn, refusal))
	}
	windowSamples, windowBytes := granted(hello.WindowSamples, s.opt.windowSamples), granted(hello.WindowBytes, s.opt.windowBytes)
	c := s.add(windowSamples, windowBytes)
	if c == nil {
		refusal := wire.Refuse(wire.CodeTooManyConnections, "the bare loop was started for %d connections", s.opt.connections)
		return errors.Join(refusal, wire.WriteRefusal(conn, refusal))
	}
	accepted := &wire.AcceptedPush{
		Table: hello.Table, Fingerprint: s.spec.Fingerprint(), Stream: 1, Ack: wire.AckQueued,
		WindowSamples: windowSamples, WindowBytes: windowBytes,
	}
	if err := wire.WriteAccepted(conn, accepted); err != nil {
		return fmt.Errorf("write the reply: %w", err)
	}
	socket, ok := conn.(*net.TCPConn)
	if !ok {
		return c.stream(conn)
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	if err := raw.Read(c.run); err != nil {
		return err
	}
	return c.err
}

// granted is what was asked for, up to the limit; 0 asks for the limit.
func granted(asked, limit int64) int64 {
	if asked == 0 {
		return limit
	}
	return min(asked, limit)
}

// add gives a new connection its part of the memory, or nil if all parts are taken.
func (s *bareServer) add(windowSamples, windowBytes int64) *bareConn {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(s.conns)
	if n == s.opt.connections {
		return nil
	}
	sample := int(s.spec.SampleBytes())
	part := len(s.memory) / s.opt.connections / sample * sample
	window := max(1, min(windowSamples, windowBytes/int64(sample)))
	c := &bareConn{
		server: s,
		memory: s.memory[n*part : (n+1)*part],
		sample: sample,
		ackAt:  max(1, int(window/4)),
		acks:   bytes.Repeat([]byte{wire.Ack}, 64*kib),
	}
	s.conns = append(s.conns, c)
	return c
}

// run reads until the socket is empty, and is called again when it is not. It returns true at the connection's end.
func (c *bareConn) run(socket uintptr) bool {
	fd := int(socket)
	for {
		end := min(c.at+c.server.opt.readBytes, len(c.memory))
		n, err := unix.Read(fd, c.memory[c.at:end])
		switch {
		case n > 0:
			c.took(n)
			if c.owed >= c.ackAt {
				c.ack(fd)
			}
		case err == syscall.EAGAIN:
			c.ack(fd)
			return c.err != nil
		case err == syscall.EINTR:
		case err == nil: // the end: acks that are due, then close
			c.ack(fd)
			if c.partial != 0 {
				c.err = errors.Join(c.err, io.ErrUnexpectedEOF)
			}
			return true
		default:
			c.err = err
			return true
		}
		if c.err != nil {
			return true
		}
	}
}

// stream is run for what is no socket of the kernel's. As in run, acks go out when a quarter of the window is due, or nothing more has come; of QUIC a read takes all that has.
func (c *bareConn) stream(conn net.Conn) error {
	more := func() bool { return false }
	if secure, ok := conn.(*tls.Conn); ok {
		raw, err := secure.NetConn().(*net.TCPConn).SyscallConn()
		if err != nil {
			return err
		}
		more = func() bool { return pollfd.Conn(raw, unix.POLLIN)&unix.POLLIN != 0 }
	}
	for {
		n, err := conn.Read(c.memory[c.at:min(c.at+c.server.opt.readBytes, len(c.memory))])
		c.took(n)
		if c.owed > 0 && (c.owed >= c.ackAt || err != nil || !more()) {
			for c.owed > 0 {
				k, failed := conn.Write(c.acks[:min(c.owed, len(c.acks))])
				c.owed -= k
				if failed != nil {
					return errors.Join(err, fmt.Errorf("write acks: %w", failed))
				}
			}
		}
		switch {
		case err == io.EOF && c.partial == 0:
			return nil
		case err == io.EOF:
			return io.ErrUnexpectedEOF
		case err != nil:
			return err
		}
	}
}

// took counts n bytes that were read.
func (c *bareConn) took(n int) {
	c.at += n
	if c.at == len(c.memory) {
		c.at = 0
	}
	c.partial += n
	if c.partial < c.sample {
		return
	}
	k := c.partial / c.sample
	c.partial -= k * c.sample
	c.owed += k
	if c.server.recording.Load() {
		c.note(k)
	} else {
		c.first = (c.first + k*c.sample) % len(c.memory)
	}
	c.samples.Store(c.samples.Load() + uint64(k))
}

// note records the latencies of k samples that are now complete; only in the open loop.
func (c *bareConn) note(k int) {
	now := time.Now().UnixNano()
	r := c.server.latency
	r.mu.Lock()
	defer r.mu.Unlock()
	for range k {
		switch v := readStamp(c.memory[c.first:]); {
		case v < timeMax:
			record(r.intended, now-int64(v), 1)
		case v != closedStamp:
			c.wrong.Add(1)
		}
		c.first += c.sample
		if c.first == len(c.memory) {
			c.first = 0
		}
	}
}

// ack sends the acks that are owed. A sender that keeps its window never fills the socket with them.
func (c *bareConn) ack(fd int) {
	for c.owed > 0 {
		n, err := unix.Write(fd, c.acks[:min(c.owed, len(c.acks))])
		switch {
		case err == syscall.EINTR:
		case err != nil:
			c.err = fmt.Errorf("write acks: %w", err)
			return
		default:
			c.owed -= n
		}
	}
}

// handle answers the parent.
func (s *bareServer) handle(ask request) (reply, error) {
	switch ask.Do {
	case doSnapshot:
		snap, err := takeSnapshot(ask.Pids)
		if err != nil {
			return reply{}, err
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, c := range s.conns {
			n := c.samples.Load()
			snap.Samples += n
			snap.Wrong += c.wrong.Load()
			snap.Streams = append(snap.Streams, n)
		}
		return reply{Snapshot: snap}, nil
	case doRecord:
		s.recording.Store(true)
		return reply{}, nil
	case doHistograms:
		h, err := s.latency.encode()
		return reply{Histograms: h}, err
	default:
		return reply{}, unknownRequest(ask)
	}
}
