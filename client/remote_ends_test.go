//go:build linux && !race

package client

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/internal/pollfd"
	"github.com/ingestd/ingestd/sampler"
	"github.com/ingestd/ingestd/wire"
)

// left waits until the daemon has no trainer any more, and returns what it counted.
func (d *table) left() sampler.GroupStats {
	d.t.Helper()
	again := time.NewTicker(time.Millisecond)
	defer again.Stop()
	for len(d.server.Stats().Trainers) > 0 {
		<-again.C
	}
	return d.fifo.Stats().Groups[0]
}

// came waits until so many batches have come over a connection, or were put where a mapped trainer finds them.
func (d *table) came(tr *Trainer, n uint64) {
	d.t.Helper()
	if tr.remote == nil {
		again := time.NewTicker(time.Millisecond)
		defer again.Stop()
		for d.server.Stats().Delivered < n {
			<-again.C
		}
		return
	}
	for tr.remote.statistics().Batches < n {
		<-tr.remote.wake
	}
}

// TestTrainerLeaves: what a trainer had not begun when it was closed goes to another one, also in a group that drops what a dead trainer held, and is no death. What it held is
// dropped.
func TestTrainerLeaves(t *testing.T) {
	everyWay(t, func(t *testing.T, way string) {
		for _, holds := range []bool{false, true} {
			d := serveTable(t, "x:U8[5]", way)
			d.fifo = must[*sampler.FIFO](t)(sampler.New(d.ring, sampler.Config{Default: sampler.GroupConfig{OnDeath: sampler.Drop}}, nil))
			tr := d.attach(TrainerConfig{Prefetch: 4})
			d.push(4*trainerBatchSize, random)
			d.came(tr, 4)
			must[*Batch](t)(tr.Next(t.Context())).Release()
			var held *Batch
			if holds {
				held = must[*Batch](t)(tr.Next(t.Context()))
			}
			if err := tr.Close(); err != nil {
				t.Error(err)
			}
			if holds {
				held.Release() // it changes nothing any more
			}
			g, st := d.left(), d.server.Stats()
			died := map[bool]uint64{true: 1}[holds]
			if g.Released != 1 || g.Dropped != died || g.Unread != 3-int(died) || st.Died != died || st.Detached != 1-died || st.GivenBack != 1 {
				t.Errorf("holding one: %v: %+v; given back %d, died %d, detached %d", holds, g, st.GivenBack, st.Died, st.Detached)
			}
		}
	})
}

// TestRemoteLastAnswers: answers reach the daemon although batches that nobody reads any more lie in the trainer's socket when it is closed.
func TestRemoteLastAnswers(t *testing.T) {
	const rounds = 50
	d := serveTable(t, "x:U8[50000]", "tcp")
	d.push(5*trainerBatchSize, zero)
	for round := range uint64(rounds) {
		tr := d.attach(TrainerConfig{Prefetch: 3})
		d.push(trainerBatchSize, zero)
		must[*Batch](t)(tr.Next(t.Context())).Release()
		if err := tr.Close(); err != nil {
			t.Error(err)
		}
		if g := d.left(); g.Released != round+1 {
			t.Fatalf("round %d: %+v", round, g)
		}
	}
}

// TestRemoteGoesLast: a trainer that is closed says what it has begun and waits for the daemon to end the connection, reading and dropping what still comes: closing over that would reset it,
// and the last answers might never arrive.
func TestRemoteGoesLast(t *testing.T) {
	s := specOf(t, "a:U8,b:U16")
	l := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	defer l.Close()
	said := make(chan []byte, 1)
	var all sync.WaitGroup
	all.Go(func() {
		defer close(said)
		conn, err := l.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		if _, err = wire.ReadHello(conn); err == nil {
			err = wire.WriteAccepted(conn, &wire.AcceptedRemoteTrain{Table: "t", Spec: s, Fingerprint: s.Fingerprint(), Trainer: 1, Group: "default", BatchSize: 4, Prefetch: 3})
		}
		second := frame(1, 4)
		if err == nil {
			_, err = conn.Write(append(frame(0, 4), second[:70]...))
		}
		var text []byte
		if err == nil {
			text, err = io.ReadAll(conn)
		}
		if err == nil {
			_, err = conn.Write(append(second[70:], frame(2, 4)...))
		}
		raw, _ := socketOf(conn)
		if state := pollfd.Conn(raw, unix.POLLRDHUP); err != nil || state != unix.POLLRDHUP {
			t.Errorf("after the trainer's last word: %v, %#x", err, state)
		}
		said <- text
	})
	tr := must[*Trainer](t)(Attach(t.Context(), "tcp://"+l.Addr().String(), TrainerConfig{Table: "t", Prefetch: 3}))
	tr.remote.parting = time.Hour
	must[*Batch](t)(tr.Next(t.Context())).Release()
	if err := tr.Close(); err != nil {
		t.Error(err)
	}
	if got, want := <-said, binary.LittleEndian.AppendUint64(make([]byte, 8), wire.AnswerLeaves|1); !bytes.Equal(got, want) {
		t.Errorf("the trainer said %x, want %x", got, want)
	}
	all.Wait()
}

// TestRemoteAnswersCutAnywhere: the connection is cut after each byte of what the trainer says after its hello. Every batch comes whole, and in the end all are given back.
func TestRemoteAnswersCutAnywhere(t *testing.T) {
	d := serveTable(t, "a:U8[5],b:U16", "tcp")
	for cut := int64(0); cut <= 2*wire.AnswerBytes; cut++ {
		tr := must[*Trainer](t)(Attach(t.Context(), cuttingAnswers(t, d.tcp, cut), TrainerConfig{
			Table: "t", Prefetch: 2, ReconnectFrom: time.Microsecond, ReconnectTo: time.Millisecond,
		}))
		first := d.next / trainerBatchSize
		d.push(3*trainerBatchSize, random)
		want := map[uint64]bool{first: true, first + 1: true, first + 2: true}
		for g := d.fifo.Stats().Groups[0]; len(want) > 0 || g.Unread+g.Leased > 0; g = d.fifo.Stats().Groups[0] {
			soon, cancel := context.WithTimeout(t.Context(), 2*time.Millisecond) // the answer may be on its way, or lost: then the batch comes again
			b, err := tr.Next(soon)
			cancel()
			if err != nil {
				continue
			}
			proven(t, b)
			delete(want, b.Number())
			b.Release()
		}
		if st, _ := tr.RemoteStats(); st.Reconnects == 0 {
			t.Errorf("cut after %d bytes of answers: %+v", cut, st)
		}
		if err := tr.Close(); err != nil {
			t.Error(err)
		}
		if g := d.left(); g.Dropped != 0 || g.Released != 3*uint64(cut+1) || t.Failed() {
			t.Fatalf("cut after %d bytes of answers: %+v", cut, g)
		}
	}
}

// cuttingAnswers is a proxy that ends its first connection so many bytes after the trainer's hello. It returns its address.
func cuttingAnswers(t *testing.T, daemon string, cut int64) string {
	t.Helper()
	l := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	var running sync.WaitGroup
	running.Go(func() {
		for limit := cut; ; limit = -1 {
			down, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer down.Close()
				up, err := net.Dial("tcp", daemon)
				if err != nil {
					return
				}
				defer up.Close()
				running.Go(func() {
					_, _ = io.Copy(down, up)
					down.Close()
				})
				_, frame, err := wire.ReadHelloFrame(down)
				if err == nil {
					_, err = up.Write(frame)
				}
				switch {
				case err != nil:
				case limit >= 0:
					_, _ = io.CopyN(up, down, limit)
					_, _ = io.CopyN(io.Discard, down, 1) // the next byte is that at which it ends
				default:
					_, _ = io.Copy(up, down)
				}
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		running.Wait()
	})
	return "tcp://" + l.Addr().String()
}

// proven checks that the samples of a batch are what was pushed.
func proven(t *testing.T, b *Batch) {
	t.Helper()
	for row, number := range b.Numbers() {
		for leaf := range b.Columns() {
			column := b.Column(leaf)
			n := len(column) / b.Count()
			proof := make([]byte, n)
			random(number, leaf, proof)
			if !bytes.Equal(column[row*n:(row+1)*n], proof) {
				t.Errorf("sample %d, leaf %d is not what was pushed", number, leaf)
			}
		}
	}
}

// TestRemoteEndlessLosses: losses without end take no memory, and are told as one.
func TestRemoteEndlessLosses(t *testing.T) {
	const losses = 100_000
	var say []byte
	for k := range uint64(losses) {
		say = wire.AppendBatchHeader(say, &wire.BatchHeader{LostFirst: 10 + k, LostCount: 2})
	}
	say = append(say, wire.AppendBatchHeader(nil, &wire.BatchHeader{LostFirst: 7, LostCount: math.MaxUint64})...)
	addr, _ := speakingDaemon(t, append(append(say, frame(5, 4)...), say[:2*wire.BatchHeaderBytes]...))
	tr := must[*Trainer](t)(Attach(t.Context(), addr, TrainerConfig{Table: "t", Prefetch: 2}))
	defer tr.Close()
	r := tr.remote
	for long := 0; long < 3; {
		<-r.wake
		r.mu.Lock()
		if long = len(r.arrived); long > 3 || cap(r.arrived) > 16 {
			t.Fatalf("%d arrivals in line, room for %d", long, cap(r.arrived))
		}
		r.mu.Unlock()
	}
	var lost *LostBatchesError
	if _, err := tr.Next(t.Context()); !errors.As(err, &lost) || lost.First != 10 || lost.N != math.MaxInt {
		t.Errorf("%v", err)
	}
	b := must[*Batch](t)(tr.Next(t.Context()))
	if b.Number() != 5 {
		t.Errorf("batch %d", b.Number())
	}
	b.Release()
	if _, err := tr.Next(t.Context()); !errors.As(err, &lost) || lost.First != 10 || lost.N < 2 {
		t.Errorf("%v", err)
	}
}

// breakingDaemon lets in every trainer, says the same to each, and ends the connection. It counts them.
func breakingDaemon(t *testing.T, say []byte) (addr string, connections func() int) {
	t.Helper()
	s := specOf(t, "a:U8,b:U16")
	return breaking(t, func(conn net.Conn) {
		if _, err := wire.ReadHello(conn); err != nil {
			return
		}
		accepted := &wire.AcceptedRemoteTrain{Table: "t", Spec: s, Fingerprint: s.Fingerprint(), Trainer: 1, Group: "default", BatchSize: 4, Prefetch: 2}
		if err := wire.WriteAccepted(conn, accepted); err == nil {
			_, _ = conn.Write(say)
		}
	})
}

// TestRemotePatienceWithBreaks: a daemon that accepts and ends each connection, whatever it says before but whole batches, is given up as one that is gone is; the memory of what was cut is
// used again.
func TestRemotePatienceWithBreaks(t *testing.T) {
	for name, say := range map[string][]byte{
		"nothing": nil, "a part of a header": frame(0, 4)[:10], "a part of a batch": frame(0, 4)[:100],
		"a loss": wire.AppendBatchHeader(nil, &wire.BatchHeader{LostFirst: 1, LostCount: 1}), "trouble": wire.AppendNotice(nil, &wire.Notice{Code: wire.CodeInternal}),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			addr, connections := breakingDaemon(t, say)
			cfg := TrainerConfig{Table: "t", Prefetch: 2, ReconnectFor: time.Second, ReconnectFrom: time.Millisecond, ReconnectTo: 20 * time.Millisecond}
			tr := must[*Trainer](t)(Attach(t.Context(), addr, cfg))
			defer tr.Close()
			var err error
			for lost := (*LostBatchesError)(nil); err == nil || errors.As(err, &lost); {
				_, err = tr.Next(t.Context())
			}
			if !errors.Is(err, ErrDaemonGone) && codeOf(err) != wire.CodeInternal {
				t.Errorf("%v", err)
			}
			if st, _ := tr.RemoteStats(); st.Reconnects == 0 || int(st.Reconnects)+1 != connections() || st.Buffers > 1 {
				t.Errorf("%+v, %d connections", st, connections())
			}
		})
	}
}

// TestRemotePatienceBeginsAnew: each batch that is given out makes the patience whole again.
func TestRemotePatienceBeginsAnew(t *testing.T) {
	r := &remoteTrainer{layout: must[*receivedLayout](t)(newReceivedLayout(specOf(t, "a:U8"), 1)), cfg: TrainerConfig{ReconnectFor: time.Hour}, wake: make(chan struct{}, 1)}
	break1 := func() time.Duration {
		ours, theirs := net.Pipe()
		defer theirs.Close()
		r.begin(ours, &wire.AcceptedRemoteTrain{Prefetch: 1})
		if !r.broken(io.EOF) {
			t.Fatal(r.err)
		}
		return r.outage.spent
	}
	r.outage.spent = time.Minute
	if spent := break1(); spent != time.Minute {
		t.Errorf("nothing came, and %v were spent", spent)
	}
	r.arrived = append(r.arrived, arrival{lost: LostBatchesError{N: 1}})
	if _, ok, err := r.take(); !ok || err != nil {
		t.Fatal(err)
	}
	if spent := break1(); spent != time.Minute {
		t.Errorf("a loss came, and %v were spent", spent)
	}
	r.arrived = append(r.arrived, arrival{batch: r.layout.newBuffer()})
	if _, ok, err := r.take(); !ok || err != nil {
		t.Fatal(err)
	}
	if spent := break1(); spent != 0 {
		t.Errorf("a batch came, and %v were spent", spent)
	}
	r.outage.spent, r.cfg.ReconnectFor = time.Minute, time.Nanosecond
	if spent := break1(); spent != 0 {
		t.Errorf("the connection stood for as long as patience is, and %v were spent", spent)
	}
}

// waiting is a connection whose reads wait at a gate, after so many bytes.
type waiting struct {
	net.Conn
	before int
	open   <-chan struct{}
}

func (g *waiting) Read(b []byte) (int, error) {
	if g.before == 0 {
		<-g.open
		return g.Conn.Read(b)
	}
	n, err := g.Conn.Read(b[:min(len(b), g.before)])
	g.before -= n
	return n, err
}

// waitingSocket shows its socket, and waitingOver what it is over.
type waitingSocket struct{ waiting }

func (g *waitingSocket) SyscallConn() (syscall.RawConn, error) {
	return g.Conn.(syscall.Conn).SyscallConn()
}

type waitingOver struct{ waiting }

func (g *waitingOver) NetConn() net.Conn { return g.Conn }

// TestRemoteDialer: a batch whose connection had ended when the last of it was read is none, also over connections of the program's own; of what neither shows a socket nor is encrypted
// nobody could say that, so it is refused.
func TestRemoteDialer(t *testing.T) {
	addr, _ := breakingDaemon(t, frame(0, 4))
	s := specOf(t, "a:U8,b:U16")
	reply, err := wire.AppendAccepted(nil, &wire.AcceptedRemoteTrain{Table: "t", Spec: s, Fingerprint: s.Fingerprint(), Trainer: 1, Group: "default", BatchSize: 4, Prefetch: 2})
	if err != nil {
		t.Fatal(err)
	}
	for name, wrap := range map[string]func(g waiting) net.Conn{
		"a socket": func(g waiting) net.Conn { return &waitingSocket{g} },
		"over one": func(g waiting) net.Conn { return &waitingOver{g} },
		"neither":  func(g waiting) net.Conn { return &g },
	} {
		ended := make(chan struct{})
		dial := func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return wrap(waiting{conn, len(reply), ended}), nil
		}
		tr, err := Attach(t.Context(), addr, TrainerConfig{Table: "t", Prefetch: 2, ReconnectFor: -1, Dialer: dial})
		if name == "neither" {
			if !errors.Is(err, errNoSocket) {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		again := time.NewTicker(time.Millisecond)
		for !tr.remote.link.hungUp() {
			<-again.C
		}
		again.Stop()
		close(ended)
		if b, err := tr.Next(t.Context()); !errors.Is(err, ErrDaemonGone) {
			t.Errorf("%s: %v, %v", name, b, err)
		}
		if st, _ := tr.RemoteStats(); st.Dropped != 1 {
			t.Errorf("%s: %+v", name, st)
		}
		if err := tr.Close(); err != nil {
			t.Error(err)
		}
	}
}
