package fuzz

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/auth"
	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/engine"
	"github.com/ingestd/ingestd/ingest/ingesttest"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tcpingest"
	"github.com/ingestd/ingestd/wire"
)

const connectionTable = "samples"

// connectionShapes reach each way of receiving, with rings so small that the sender waits for the trainer.
var connectionShapes = []struct {
	spec               string
	batchSize, batches int
}{
	{"a:U64", 3, 2},
	{"a:U8[5]", 4, 3},
	{"a:U8,b:F32[3],c:I16", 3, 2},
	{"a:U8[1500],b:U8[1100]", 2, 3},
	{"a:U8[66000],b:U8[40]", 1, 2},
	{"a:U8[70001]", 2, 2},
}

// How a conversation ends; the low bits of how say it.
const (
	endHalfClose = iota // all was said: the peer closes its writing side and reads to the end
	endClose            // the peer is gone
	endShutdown         // the daemon stops while the peer is talking
	ends

	rawHandshake  = 1 << 2 // what is said begins with whatever the input holds
	committedAcks = 1 << 3
	narrowWindow  = 1 << 4
	withToken     = 1 << 5 // the daemon has tokens, and the peer proves one
)

// A conversation is cut to what keeps a run short: the input's own bytes, and as many more as two samples have, or a few reads' worth of small ones.
const (
	inputMax        = 256 << 10
	conversationMin = 12 << 10
)

// conversation is one connection, from its first byte to its last.
type conversation struct {
	t      *testing.T
	how    byte
	spec   *spec.Spec
	table  *engine.Table
	server *tcpingest.Server
	peer   *net.UnixConn
	serve  sync.WaitGroup

	said      []byte // all that the peer wants to say, but for a proof
	unsaid    []byte // of that, and the proof, what is said after the handshake has begun
	heard     []byte // all that it was answered
	delivered []byte // samples as the trainer got them, leaves in order
	streams   map[uint64]int
}

// FuzzConnection serves one real connection and its table. Whatever is said and however it is cut: a sample that was acked is delivered, once, in order and
// byte for byte, and nothing else is; a peer that stays to the end has an ack for each whole sample, then the reason if the end was no good one; and no
// place of the ring is lost.
func FuzzConnection(f *testing.F) {
	for shape := range connectionShapes {
		for end := range byte(ends) {
			f.Add(end, byte(shape), []byte{3, 90, 1}, []byte("a few samples of something or other"), uint16(7001))
			f.Add(end|committedAcks|narrowWindow, byte(shape), []byte{200, 255}, []byte{}, uint16(65535))
			f.Add(end|withToken, byte(shape), []byte{2, 7, 90}, []byte("a few samples of something or other"), uint16(7001))
		}
		f.Add(byte(0), byte(shape), []byte{}, []byte{}, uint16(0))
	}
	hello := must(wire.AppendHello(nil, &wire.Hello{Role: wire.RolePush, Table: connectionTable, Spec: mustSpec(f, connectionShapes[0].spec)}))
	f.Add(byte(rawHandshake), byte(0), []byte{1}, append(hello, "eight by"...), uint16(80))
	f.Add(byte(rawHandshake), byte(1), []byte{9}, hello, uint16(0))
	f.Add(byte(rawHandshake|endClose), byte(0), []byte{9}, hello[:20], uint16(0))
	f.Add(byte(rawHandshake|endShutdown), byte(0), []byte{9}, hello[:20], uint16(9))
	f.Add(byte(rawHandshake), byte(0), []byte{}, []byte("GET / HTTP/1.1\r\n\r\n"), uint16(60000))
	f.Add(byte(rawHandshake), byte(0), []byte{}, []byte{}, uint16(0))
	f.Add(byte(rawHandshake|withToken), byte(0), []byte{1}, append(hello, "eight by"...), uint16(80)) // of the daemon's own user
	asking := &wire.Hello{Role: wire.RolePush, Table: connectionTable, Spec: mustSpec(f, connectionShapes[0].spec), Token: "worker", Nonce: wire.Nonce{1}}
	named := must(wire.AppendHello(nil, asking))
	for end := range byte(ends) {
		f.Add(rawHandshake|withToken|end, byte(0), []byte{9}, append(bytes.Clone(named), wire.AppendProof(nil, wire.Proof{1})...), uint16(8))
		f.Add(rawHandshake|withToken|end, byte(0), []byte{9}, named, uint16(0))
		f.Add(rawHandshake|end, byte(0), []byte{9}, named, uint16(9))
	}
	asking.Token, asking.Nonce, asking.Compression = "", wire.Nonce{}, wire.CompressionZstd
	f.Add(byte(rawHandshake), byte(0), []byte{9}, must(wire.AppendHello(nil, asking)), uint16(9))

	pool := drainer.NewPool(1)
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = pool.Run(ctx) })
	f.Cleanup(func() { stop(); running.Wait() })

	f.Fuzz(func(t *testing.T, how, shape byte, cuts, said []byte, more uint16) {
		c := newConversation(t, pool, how, shape)
		if how&rawHandshake == 0 {
			c.said = c.hello()
		}
		c.said = append(c.said, said[:min(len(said), inputMax)]...)
		for i := range min(2*int(more), max(conversationMin, 2*int(c.spec.SampleBytes()))) { // more than an input should hold
			c.said = append(c.said, byte(i^i>>8))
		}
		c.unsaid = c.said
		if how&(rawHandshake|withToken) == withToken {
			c.authenticate()
		}
		c.talk(cuts)
		c.check()
	})
}

func newConversation(t *testing.T, pool *drainer.Pool, how, shape byte) *conversation {
	s := connectionShapes[int(shape)%len(connectionShapes)]
	c := &conversation{t: t, how: how, spec: mustSpec(t, s.spec), streams: map[uint64]int{}}
	var err error
	c.table, err = engine.New(engine.Config{Name: connectionTable, Spec: c.spec, BatchSize: s.batchSize, Batches: s.batches, Drainers: pool})
	if err != nil {
		t.Fatal(err)
	}
	c.table.Ring().Poison = true
	var gate *auth.Gate
	if how&withToken != 0 {
		gate = auth.NewGate(auth.GateConfig{Tokens: must(auth.Parse([]byte(`tokens: [{name: worker, secret: ` + fuzzSecret + `, rights: [push], tables: ["*"]}]`)))})
	}
	c.server, err = tcpingest.New(tcpingest.Config{Tables: ingesttest.Tables{connectionTable: c.table}, StagingBuffers: 1, Gate: gate})
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := socketPair(t)
	c.peer = theirs
	_ = theirs.SetDeadline(time.Now().Add(time.Minute)) // so that a server that forgets its peer fails and does not hang
	l := &oneConnection{conn: make(chan net.Conn, 1), closed: make(chan struct{})}
	l.conn <- ours
	c.serve.Go(func() {
		if err := c.server.Serve(context.Background(), l); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	for len(l.conn) > 0 { // until it is accepted
		runtime.Gosched()
	}
	return c
}

func (c *conversation) hello() []byte {
	h := &wire.Hello{Role: wire.RolePush, Table: connectionTable, Spec: c.spec}
	if c.how&committedAcks != 0 {
		h.Ack = wire.AckCommitted
	}
	if c.how&narrowWindow != 0 {
		h.WindowSamples = 3
	}
	if c.how&withToken != 0 {
		h.SetToken(fuzzToken())
		h.Nonce = wire.Nonce{1}
	}
	return must(wire.AppendHello(nil, h))
}

// authenticate says the hello and hears the challenge. The proof is left to be said, in front of the samples.
func (c *conversation) authenticate() {
	hello := c.hello()
	var asked *wire.Challenge
	if _, err := c.peer.Write(hello); err != nil {
		c.t.Fatal(err)
	}
	if err := wire.ReadReply(c.peer, new(wire.AcceptedPush)); !errors.As(err, &asked) {
		c.t.Fatalf("no challenge: %v", err)
	}
	t := wire.NewTranscript(hello, asked.Nonce, nil)
	if !asked.Proves(t, fuzzToken().Secret) {
		c.t.Fatal("the daemon does not know its own token")
	}
	c.unsaid = append(wire.AppendProof(nil, t.ClientProof(fuzzToken().Secret)), c.said[len(hello):]...)
}

// end is how the conversation ends.
func (c *conversation) end() int { return int(c.how) % 4 % ends }

// talk lives through the whole connection, and through the end of its table.
func (c *conversation) talk(cuts []byte) {
	var listening, training sync.WaitGroup
	listening.Go(c.listen)
	training.Go(c.train)
	c.say(cuts)
	if c.end() == endClose {
		_ = c.peer.Close()
	} else if err := c.peer.CloseWrite(); err != nil && !errors.Is(err, unix.ENOTCONN) && !errors.Is(err, unix.EPIPE) {
		c.t.Error(err)
	}
	if c.end() == endHalfClose {
		listening.Wait() // the daemon ends it by itself
	}
	if err := c.server.Shutdown(context.Background()); err != nil {
		c.t.Error(err)
	}
	c.serve.Wait()
	if err := c.table.Close(context.Background()); err != nil {
		c.t.Error(err)
	}
	listening.Wait()
	training.Wait()
	_ = c.peer.Close()
}

// say sends what is to be said, cut as the input wants. Writes fail once the daemon has had enough.
func (c *conversation) say(cuts []byte) {
	left := c.unsaid
	for i := 0; len(left) > 0; i++ {
		if c.end() == endShutdown && i == len(cuts) {
			// The rest is said while the daemon stops.
			c.serve.Go(func() { _ = c.server.Shutdown(context.Background()) })
		}
		piece := len(left)
		if i < len(cuts) {
			piece = min(piece, 1+int(cuts[i])*int(cuts[i])/4)
		}
		if _, err := c.peer.Write(left[:piece]); err != nil {
			return
		}
		left = left[piece:]
		if i < len(cuts) {
			c.letItBeRead()
		}
	}
}

// letItBeRead gives the daemon the time to find what was sent so far and no more. It may be waiting for a slot, or be held up: so not for ever.
func (c *conversation) letItBeRead() {
	raw, err := c.peer.SyscallConn()
	for range 5000 {
		unread := 0
		if err == nil {
			err = raw.Control(func(fd uintptr) { unread, _ = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
		}
		if unread == 0 || err != nil {
			return
		}
		runtime.Gosched()
	}
}

// listen hears the daemon out.
func (c *conversation) listen() {
	b := make([]byte, 4096)
	for {
		n, err := c.peer.Read(b)
		c.heard = append(c.heard, b[:n]...)
		if err != nil {
			if err != io.EOF && !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, net.ErrClosed) {
				c.t.Errorf("hearing: %v", err)
			}
			return
		}
	}
}

// train takes every batch to the end and writes the samples down as they were sent.
func (c *conversation) train() {
	trainer, next := c.table.NewTrainer(), uint64(0)
	for {
		b, err := trainer.Next(context.Background())
		if err != nil {
			if err != io.EOF {
				c.t.Errorf("Next: %v", err)
			}
			return
		}
		for row := range b.Count {
			c.streams[b.Streams()[row]]++
			if b.Numbers()[row] != next || b.Arrivals()[row] == 0 {
				c.t.Errorf("batch %d row %d is sample %d, %d was due; arrived %d", b.Number, row, b.Numbers()[row], next, b.Arrivals()[row])
			}
			next++
			for leaf, size := range c.spec.LeafBytes() {
				c.delivered = append(c.delivered, b.Column(leaf)[int64(row)*size:int64(row+1)*size]...)
			}
		}
		trainer.Release(b)
	}
}

// answer is what the peer was told, taken apart.
type answer struct {
	accepted *wire.AcceptedPush
	refusal  *wire.Refusal
	acks     int
	notice   *wire.Notice
}

// understand takes heard apart. A connection that broke may have cut it anywhere.
func (c *conversation) understand() (answer, error) {
	var a answer
	r := bytes.NewReader(c.heard)
	if r.Len() == 0 {
		return a, nil
	}
	accepted, asked := new(wire.AcceptedPush), (*wire.Challenge)(nil)
	err := wire.ReadReply(r, accepted)
	if errors.As(err, &asked) { // a raw hello with a token; what follows it is no proof
		if err = wire.ReadReply(r, accepted); err == nil {
			return a, errors.New("let in without a proof")
		}
	}
	if errors.As(err, &a.refusal) {
		return a, atEnd(r)
	} else if err != nil {
		return a, err
	}
	a.accepted = accepted
	for {
		switch b, err := r.ReadByte(); {
		case err == io.EOF:
			return a, nil
		case b == wire.Ack:
			a.acks++
		case b == wire.NoticeMark:
			if a.notice, err = wire.ReadNotice(r); err != nil {
				return a, err
			}
			return a, atEnd(r)
		default:
			return a, fmt.Errorf("byte %#x among the acks", b)
		}
	}
}

func atEnd(r *bytes.Reader) error {
	if r.Len() > 0 {
		return fmt.Errorf("%d bytes after the last word", r.Len())
	}
	return nil
}

// check compares what was said, what was answered and what was delivered.
func (c *conversation) check() {
	t := c.t
	told, err := c.understand()
	if err != nil && !(c.end() == endClose && errors.Is(err, io.ErrUnexpectedEOF)) {
		t.Fatalf("the answer makes no sense: %v\n%q", err, c.heard)
	}
	r := bytes.NewReader(c.said)
	hello, helloErr := wire.ReadHello(r)
	welcome := helloErr == nil && hello.Role == wire.RolePush && hello.Table == connectionTable && hello.CheckSpec(c.spec) == nil && hello.Manifest == nil &&
		hello.Compression == wire.CompressionNone && (hello.Token == "" || c.how&rawHandshake == 0)
	samples := c.said[len(c.said)-r.Len():]
	size := int(c.spec.SampleBytes())
	whole, got := len(samples)/size, len(c.delivered)/size
	switch {
	case !welcome && (got > 0 || told.accepted != nil):
		t.Fatalf("a peer that is not welcome was told %+v, and %d samples of it came", told, got)
	case got > whole || !bytes.Equal(c.delivered, samples[:got*size]):
		t.Fatalf("%d samples were delivered of %d, or other bytes than were sent", got, whole)
	case told.acks > got:
		t.Fatalf("%d samples acked, %d delivered", told.acks, got)
	case len(c.streams) > 1 || told.accepted != nil && got > 0 && c.streams[told.accepted.Stream] != got:
		t.Fatalf("samples of streams %v, the stream is %+v", c.streams, told.accepted)
	}
	switch c.end() {
	case endHalfClose:
		c.checkHeardOut(told, welcome, whole, len(samples)%size > 0)
	case endShutdown:
		if told.acks != got {
			t.Fatalf("the daemon stopped: %d samples delivered and %d acked", got, told.acks)
		}
		if told.refusal == nil && told.notice == nil && told.acks < whole && len(c.heard) > 0 {
			t.Fatalf("the daemon stopped after %d of %d samples and did not say so", told.acks, whole)
		}
	}
	c.checkCounts(told, got)
}

// checkHeardOut: the peer stayed to the end.
func (c *conversation) checkHeardOut(told answer, welcome bool, whole int, cutShort bool) {
	t := c.t
	switch {
	case len(c.said) == 0 && len(c.heard) > 0:
		t.Fatalf("nothing was said, and %q answered", c.heard)
	case len(c.said) > 0 && !welcome && (told.refusal == nil || told.refusal.Code == "" || told.refusal.Reason == ""):
		t.Fatalf("a peer that is not welcome was told %+v", told)
	case !welcome:
		return
	case told.accepted == nil || told.acks != whole:
		t.Fatalf("%d whole samples, told %+v (%v)", whole, told, told.refusal)
	case cutShort != (told.notice != nil) || cutShort && told.notice.Code != wire.CodeCutShort:
		t.Fatalf("cut short is %v, the notice was %v", cutShort, told.notice)
	}
	if st := c.server.Stats(); (st.CutShort == 1) != cutShort || st.Ended["clean"] == 1 == cutShort {
		t.Fatalf("cut short is %v, counted %+v", cutShort, st)
	}
	if c.how&(rawHandshake|committedAcks) == committedAcks && told.accepted.Ack != wire.AckCommitted {
		t.Fatalf("asked for committed acks, agreed was %+v", told.accepted)
	}
}

// checkCounts: everything was counted once, and nothing is left.
func (c *conversation) checkCounts(told answer, got int) {
	t := c.t
	st, ts := c.server.Stats(), c.table.Stats()
	if st.Samples != uint64(got) || st.Bytes != uint64(len(c.delivered)) || st.Open != 0 || len(st.Connections) != 0 || st.Accepted != 1 {
		t.Fatalf("%d samples delivered, counted %+v", got, st)
	}
	ended := uint64(0)
	for _, n := range st.Ended {
		ended += n
	}
	for _, n := range st.Refused {
		ended += n
	}
	if ended != 1 || told.refusal != nil && st.Refused[string(told.refusal.Code)] != 1 {
		t.Fatalf("the end was counted as %v, %v; told %+v", st.Ended, st.Refused, told)
	}
	if ts.Pushed != uint64(got) || ts.Committed != uint64(got) || ts.Opened > 1 || len(ts.Streams) != 0 {
		t.Fatalf("%d samples delivered, the table counts %+v", got, ts)
	}
	// A batch whose only slots were given back stays open, with nothing in it.
	empty := ts.Places["open"]
	if ts.Places["free"]+empty != ts.Batches || empty > 1 || empty == 1 && ts.Reserved%uint64(ts.BatchSize) != 0 || ts.Sampler.Leased != 0 {
		t.Fatalf("not all of %d places are free at the end: %+v", ts.Batches, ts)
	}
}

// oneConnection is a listener to which one peer has connected already.
type oneConnection struct {
	conn   chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *oneConnection) Accept() (net.Conn, error) {
	select {
	case c := <-l.conn:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *oneConnection) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *oneConnection) Addr() net.Addr { return &net.UnixAddr{Name: "fuzz", Net: "unix"} }

// socketPair returns two ends of a unix socket.
func socketPair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	end := func(fd int) *net.UnixConn {
		file := os.NewFile(uintptr(fd), "socketpair")
		defer file.Close()
		conn, err := net.FileConn(file)
		if err != nil {
			t.Fatal(err)
		}
		return conn.(*net.UnixConn)
	}
	return end(fds[0]), end(fds[1])
}
