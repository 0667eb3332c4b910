package client

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ingestd/ingestd/wire"
)

var modelSeed = flag.Uint64("model-seed", 0, "run the session model with this seed only")

// numbered is sample n of the session model: its number, then bytes that follow from it.
func numbered(n, sampleBytes int) []byte {
	b := makeSamples(n, 1, sampleBytes)
	binary.LittleEndian.PutUint64(b, uint64(n))
	return b
}

// numberOf is the number of a sample, or -1 if it is torn.
func numberOf(b []byte) int {
	n := int(binary.LittleEndian.Uint64(b))
	for i := 8; i < len(b); i++ {
		if b[i] != sampleByte(n, i) {
			return -1
		}
	}
	return n
}

// sessionDaemon is a daemon that holds one session over any number of connections, one after the other, and ends them as its
// faults say. When they are used up it serves well.
type sessionDaemon struct {
	t      testing.TB
	rng    *rand.Rand
	window int64 // samples; each connection has one between 1 and this
	faults int   // connections left that end badly
	lossy  bool  // a fault may drop samples it holds, but not once it holds them all: the producer may have closed then
	all    int

	mu      sync.Mutex
	held    []int // numbers of the samples
	dropped int
	conns   int
}

// serve listens until the test ends and returns the address.
func (d *sessionDaemon) serve(t *testing.T, network string) string {
	ignore := goleak.IgnoreCurrent()
	address := "127.0.0.1:0"
	if network == "unix" {
		address = filepath.Join(t.TempDir(), "s")
	}
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			d.connection(conn)
			conn.Close()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
		goleak.VerifyNone(t, ignore)
	})
	return network + "://" + l.Addr().String()
}

// connection serves one connection, one fault at most.
func (d *sessionDaemon) connection(conn net.Conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.conns++
	fault := "none"
	if d.faults > 0 {
		d.faults--
		fault = []string{"hello", "no reply", "half a reply", "refusal", "samples", "samples", "samples", "samples", "samples"}[d.rng.IntN(9)]
	}
	if fault == "hello" {
		io.CopyN(io.Discard, conn, d.rng.Int64N(100))
		return
	}
	hello, err := wire.ReadHello(conn)
	if err != nil {
		return // the producer's dialer cut it
	}
	reply, err := wire.AppendAccepted(nil, &wire.AcceptedPush{Table: hello.Table, Fingerprint: hello.Spec.Fingerprint(), Stream: 1, Ack: hello.Ack,
		WindowSamples: 1 + d.rng.Int64N(d.window), WindowBytes: 1 << 40, Held: uint64(len(d.held))})
	if err != nil {
		d.t.Error(err)
	}
	switch fault {
	case "no reply":
		return
	case "half a reply":
		conn.Write(reply[:d.rng.IntN(len(reply))])
		return
	case "refusal":
		codes := []wire.Code{wire.CodeShuttingDown, wire.CodeTooManyConnections}
		wire.WriteRefusal(conn, wire.Refuse(codes[d.rng.IntN(2)], "later"))
		return
	}
	if _, err := conn.Write(reply); err != nil {
		return
	}
	size := int(hello.Spec.SampleBytes())
	d.samples(conn, size, fault == "samples")
	if d.lossy && fault == "samples" && d.rng.IntN(3) == 0 && len(d.held) > 0 && d.held[len(d.held)-1] != d.all-1 {
		n := 1 + d.rng.IntN(min(len(d.held), 2*int(d.window)))
		d.held = d.held[:len(d.held)-n]
		d.dropped += n
	}
}

// samples takes samples until the producer's end or, with a fault, until some byte, and acks them sooner or later.
func (d *sessionDaemon) samples(conn net.Conn, size int, fault bool) {
	left := 1 << 40
	if fault {
		left = d.rng.IntN(2 * int(d.window) * size)
	}
	buf := make([]byte, 0, max(64<<10, 2*size))
	unacked := 0
	ack := func(n int) {
		unacked -= n
		for ; n > 0; n-- {
			if d.rng.IntN(50) == 0 {
				conn.Write(wire.AppendNote(nil, &wire.Note{Code: wire.NoteRingFull, Reason: "busy"}))
			}
			conn.Write([]byte{wire.Ack})
		}
	}
	for left > 0 {
		if fault { // acks that are held back must not be waited for for ever
			conn.SetReadDeadline(time.Now().Add(time.Duration(d.rng.IntN(2000)) * time.Microsecond))
		}
		n, err := conn.Read(buf[len(buf):min(cap(buf), len(buf)+left)])
		buf, left = buf[:len(buf)+n], left-n
		whole := len(buf) / size
		for i := range whole {
			d.held = append(d.held, numberOf(buf[i*size:(i+1)*size]))
		}
		buf = buf[:copy(buf, buf[whole*size:])]
		unacked += whole
		if deadlineExceeded(err) {
			ack(unacked)
			continue
		}
		if err != nil {
			ack(unacked) // to a dead connection, unless it closed its side only
			return
		}
		if !fault || left > 0 && d.rng.IntN(2) == 0 {
			ack(unacked)
		}
	}
	ack(d.rng.IntN(unacked + 1))
	switch d.rng.IntN(4) {
	case 0:
		codes := []wire.Code{wire.CodeShuttingDown, wire.CodeStalled, wire.CodeIdleTimeout, wire.CodeAckTimeout, wire.CodeCutShort, wire.CodeInternal}
		conn.Write(wire.AppendNotice(nil, &wire.Notice{Code: codes[d.rng.IntN(len(codes))], Reason: "enough"}))
	case 1:
		notice := wire.AppendNotice(nil, &wire.Notice{Code: wire.CodeShuttingDown, Reason: "enough"})
		conn.Write(notice[:d.rng.IntN(len(notice))])
	case 2:
		note := wire.AppendNote(nil, &wire.Note{Code: wire.NoteRingFull, Reason: "busy"})
		conn.Write(note[:1+d.rng.IntN(len(note))])
	}
}

// cutConn is a connection that breaks on our side after some bytes.
type cutConn struct {
	net.Conn
	left int
}

func (c *cutConn) Write(b []byte) (int, error) {
	if len(b) <= c.left {
		c.left -= len(b)
		return c.Conn.Write(b)
	}
	n, err := c.Conn.Write(b[:c.left])
	c.left -= n
	if err == nil {
		c.Close()
		err = errors.New("cut")
	}
	return n, err
}

// model is one run of a producer against a sessionDaemon.
type model struct {
	seed    uint64
	rng     *rand.Rand
	size    int
	samples int
	first   int
	d       *sessionDaemon
	p       *Producer
}

func newModel(t *testing.T, seed uint64, lossy bool) *model {
	m := &model{seed: seed, rng: rand.New(rand.NewPCG(seed, 1))}
	m.size = 8 + m.rng.IntN(200)
	m.samples = 200 + m.rng.IntN(2000)
	if m.rng.IntN(4) == 0 { // on either side of the limits for large ones
		m.size = directBytes - 4 + 8*m.rng.IntN(2)
		m.samples = 20 + m.rng.IntN(100)
	}
	if m.rng.IntN(8) == 0 {
		m.size = 2*pieceBytes + 8*m.rng.IntN(100)
		m.samples = 10 + m.rng.IntN(20)
	}
	m.first = m.rng.IntN(3) * m.rng.IntN(100)
	m.d = &sessionDaemon{t: t, rng: rand.New(rand.NewPCG(seed, 2)), window: 1 + m.rng.Int64N(60), faults: 5 + m.rng.IntN(40), lossy: lossy,
		all: m.first + m.samples}
	for n := range m.first {
		m.d.held = append(m.d.held, n)
	}
	network := []string{"tcp", "unix"}[m.rng.IntN(2)]
	addr := m.d.serve(t, network)
	dials := rand.New(rand.NewPCG(seed, 3))
	cfg := Config{
		Table: "t", Spec: specOf(t, fmt.Sprintf("a:U8[%d],b:U8[%d]", m.size/2, m.size-m.size/2)), Session: "s", Ack: wire.AckCommitted,
		BufferBytes: 1 + m.rng.IntN(2000), ReconnectFrom: 1, ReconnectTo: time.Millisecond, ContinueAfterLoss: lossy,
		Dialer: func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, network, address)
			if err == nil && dials.IntN(4) == 0 {
				return &cutConn{conn, dials.IntN(20 * m.size)}, nil
			}
			return conn, err
		},
	}
	for m.p == nil { // the first connection has to be made by hand
		m.p, _ = Dial(t.Context(), addr, cfg)
	}
	t.Cleanup(m.p.Abort)
	m.first = int(m.p.Held()) // it may have lost some already
	m.samples = m.d.all - m.first
	return m
}

// run pushes all samples in all ways, with calls that are interrupted, and closes.
func (m *model) run(t *testing.T) {
	for n := m.first; n < m.first+m.samples; {
		ctx, cancel := t.Context(), context.CancelFunc(func() {})
		if m.rng.IntN(10) == 0 {
			ctx, cancel = context.WithTimeout(ctx, time.Duration(m.rng.IntN(300))*time.Microsecond)
		}
		var err error
		switch m.rng.IntN(10) {
		case 0:
			many := min(1+m.rng.IntN(100), m.first+m.samples-n)
			var data []byte
			for i := range many {
				data = append(data, numbered(n+i, m.size)...)
			}
			var took int
			took, err = m.p.PushMany(ctx, many, data)
			n += took
			clear(data) // it is ours again
		case 1:
			if m.rng.IntN(10) == 0 {
				err = m.p.Flush(ctx)
			}
		default:
			sample := numbered(n, m.size)
			if err = m.p.Push(ctx, sample[:m.size/2], sample[m.size/2:]); err == nil {
				n++
			}
			clear(sample)
		}
		cancel()
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("seed %d, sample %d: %v", m.seed, n, err)
		}
		if s := m.p.Stats(); s.UnackedBytes > s.KeptBytes || s.Sent != uint64(n-m.first) {
			t.Fatalf("seed %d, sample %d: %+v", m.seed, n, s)
		}
	}
	if err := m.p.Close(t.Context()); err != nil {
		t.Fatalf("seed %d: close: %v", m.seed, err)
	}
}

func modelSeeds() []uint64 {
	if *modelSeed != 0 {
		return []uint64{*modelSeed}
	}
	seeds := make([]uint64, 25)
	for i := range seeds {
		seeds[i] = rand.Uint64()
	}
	return seeds
}

// TestSessionModel: under cuts of every kind the daemon holds samples 0 to n-1, each once and whole. A failure prints its seed; run it
// again with -model-seed.
func TestSessionModel(t *testing.T) {
	var total Stats
	for _, seed := range modelSeeds() {
		m := newModel(t, seed, false)
		m.run(t)
		s := m.p.Stats()
		if len(m.d.held) != m.d.all || s.Lost != 0 || s.Acked != uint64(m.samples) {
			t.Fatalf("seed %d: the daemon holds %d samples of %d; %+v", seed, len(m.d.held), m.d.all, s)
		}
		for i, n := range m.d.held {
			if n != i {
				t.Fatalf("seed %d: sample %d is in place %d", seed, n, i)
			}
		}
		total.Reconnects += s.Reconnects
		total.Resent += s.Resent
	}
	if total.Reconnects == 0 || total.Resent == 0 {
		t.Errorf("nothing was tried: %+v", total)
	}
	t.Logf("%d reconnects, %d samples written again", total.Reconnects, total.Resent)
}

// TestSessionModelWithLoss: the same with a daemon that loses some of what it holds. What it holds in the end has no second copy and
// is in order, and what is missing is what the producer says is lost.
func TestSessionModelWithLoss(t *testing.T) {
	lost := uint64(0)
	for _, seed := range modelSeeds() {
		m := newModel(t, seed, true)
		m.run(t)
		s := m.p.Stats()
		missing := m.d.all - len(m.d.held)
		if s.Lost != uint64(missing) || missing > m.d.dropped {
			t.Fatalf("seed %d: %d samples are missing, the daemon dropped %d; %+v", seed, missing, m.d.dropped, s)
		}
		inGaps := 0
		for last, i := -1, 0; i < len(m.d.held); last, i = m.d.held[i], i+1 {
			n := m.d.held[i]
			if n <= last {
				t.Fatalf("seed %d: sample %d comes after %d", seed, n, last)
			}
		}
		for _, gap := range m.p.gaps {
			inGaps += int(gap.To - gap.From)
			for _, n := range m.d.held {
				if uint64(n) >= gap.From && uint64(n) < gap.To {
					t.Fatalf("seed %d: sample %d is held, but %+v", seed, n, gap)
				}
			}
		}
		if inGaps != missing {
			t.Fatalf("seed %d: %d samples are missing, the gaps are %+v", seed, missing, m.p.gaps)
		}
		lost += s.Lost
	}
	if lost == 0 {
		t.Error("nothing was lost")
	}
}
