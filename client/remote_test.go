//go:build linux && !race

// The race detector does not see mapped memory (it misses races there and flags correct code), so what attaches runs without it.

package client

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// random fills slots with bytes that follow from number and leaf.
func random(number uint64, leaf int, to []byte) {
	r := rand.NewChaCha8([32]byte{byte(number), byte(number >> 8), byte(leaf)})
	r.Read(to)
}

func sameBatch(t *testing.T, got, want *Batch) {
	t.Helper()
	if got.Number() != want.Number() || got.Count() != want.Count() || !slices.Equal(got.Streams(), want.Streams()) ||
		!slices.Equal(got.Numbers(), want.Numbers()) || !slices.Equal(got.Arrivals(), want.Arrivals()) {
		t.Errorf("batch %d of %d rows: %v %v %v; mapped: %d of %d, %v %v %v", got.Number(), got.Count(), got.Streams(), got.Numbers(), got.Arrivals(),
			want.Number(), want.Count(), want.Streams(), want.Numbers(), want.Arrivals())
	}
	for i := range want.Columns() {
		if !bytes.Equal(got.Column(i), want.Column(i)) {
			t.Errorf("batch %d: column %d differs", want.Number(), i)
		}
	}
}

// TestRemoteIsByteForByte: batches that are sent are those that are mapped, full and short, of leaves below and above what is copied on the way.
func TestRemoteIsByteForByte(t *testing.T) {
	for _, text := range []string{"x:U8", "a:U8[3],b:F32[5000],c:I64", "a:U8[100000],b:U8[7],c:F32[3000]", "a:U8[16],b:U8[5000]"} {
		t.Run(text, func(t *testing.T) {
			d := serveTable(t, text, "mapped")
			local := d.attach(TrainerConfig{Group: "a"})
			d.way = "tcp"
			sent := d.attach(TrainerConfig{Group: "b"})
			d.way = "streamed over unix"
			streamed := d.attach(TrainerConfig{Group: "c"})
			for k := range 12 {
				rows := trainerBatchSize - k%2*(1+k/2%3)
				d.push(rows, random)
				d.ring.Flush()
				want := must[*Batch](t)(local.Next(t.Context()))
				for _, tr := range []*Trainer{sent, streamed} {
					got := must[*Batch](t)(tr.Next(t.Context()))
					sameBatch(t, got, want)
					got.Release()
				}
				want.Release()
			}
		})
	}
}

// TestRemoteOutOfOrder: batches may be released in any order, and one that is held for long holds up no other.
func TestRemoteOutOfOrder(t *testing.T) {
	d := serveTable(t, "x:U8[100]", "tcp")
	tr := d.attach(TrainerConfig{Prefetch: 2})
	d.push(trainerBatchSize, random)
	first := must[*Batch](t)(tr.Next(t.Context()))
	content := slices.Clone(first.Column(0))
	for range 20 {
		d.push(trainerBatchSize, random)
		must[*Batch](t)(tr.Next(t.Context())).Release()
	}
	if !bytes.Equal(first.Column(0), content) || !first.Intact() {
		t.Error("a batch that is held has changed")
	}
	first.Release()
	if st, ok := tr.RemoteStats(); !ok || st.Batches != 21 || st.Buffers != 2 {
		t.Errorf("%+v", st)
	}
}

// TestRemoteAllHeld: with all it may hold, nothing more comes until one is released, and the deadline says why.
func TestRemoteAllHeld(t *testing.T) {
	d := serveTable(t, "x:U8", "tcp")
	tr := d.attach(TrainerConfig{Prefetch: 1})
	d.push(2*trainerBatchSize, zero)
	b := must[*Batch](t)(tr.Next(t.Context()))
	soon, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
	defer cancel()
	if _, err := tr.Next(soon); !errors.Is(err, os.ErrDeadlineExceeded) || !bytes.Contains([]byte(err.Error()), []byte("release some")) {
		t.Errorf("holding all: %v", err)
	}
	b.Release()
	if b = must[*Batch](t)(tr.Next(t.Context())); b.Number() != 1 {
		t.Errorf("batch %d", b.Number())
	}
	b.Release()
}

// TestRemoteMemory: what may come is known before memory is asked for.
func TestRemoteMemory(t *testing.T) {
	d := serveTable(t, "x:U8[1000]", "tcp")
	l, err := newReceivedLayout(d.spec, trainerBatchSize)
	if err != nil {
		t.Fatal(err)
	}
	d.attach(TrainerConfig{Prefetch: 2, MemoryBytes: 2 * l.bytes})
	if _, err := d.tryAttach(TrainerConfig{Prefetch: 2, MemoryBytes: 2*l.bytes - 1}); err == nil || !bytes.Contains([]byte(err.Error()), []byte("smaller Prefetch")) {
		t.Errorf("%v", err)
	}
	for _, batchSize := range []int64{1<<30 + 1, 1 << 62} {
		if _, err := newReceivedLayout(d.spec, batchSize); !errors.Is(err, wire.ErrProtocol) {
			t.Errorf("batches of %d rows: %v", batchSize, err)
		}
	}
	big := must[*spec.Spec](t)(spec.ParseText("x:U8[4000000000]"))
	if _, err := newReceivedLayout(big, 1<<30); !errors.Is(err, wire.ErrProtocol) {
		t.Errorf("a batch of 2^62 bytes: %v", err)
	}
}

// TestRemoteCutAnywhere: the connection is cut after each byte of the first batches; every batch comes whole, at least once, in the end.
func TestRemoteCutAnywhere(t *testing.T) {
	d := serveTable(t, "a:U8[5],b:U16", "tcp")
	for cut := int64(0); cut < 2*(wire.BatchHeaderBytes+trainerBatchSize*(24+7))+8; cut++ {
		cutOnce(t, d, cut)
		if t.Failed() {
			t.Fatalf("cut after %d bytes of batches", cut)
		}
	}
}

// cutOnce cuts the first connection so many bytes after the daemon's reply.
func cutOnce(t *testing.T, d *table, cut int64) {
	t.Helper()
	p := cutting(t, "tcp://"+d.tcp, replyBytes(t, d)+cut, -1)
	tr, err := Attach(t.Context(), p.addr, TrainerConfig{Table: "t", Group: "cut", Prefetch: 2, ReconnectFrom: time.Microsecond, ReconnectTo: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Close()
	first := d.next
	d.push(2*trainerBatchSize, random)
	want := map[uint64]bool{first: true, first + trainerBatchSize: true}
	for len(want) > 0 {
		b := must[*Batch](t)(tr.Next(t.Context()))
		proven(t, b)
		delete(want, b.Numbers()[0])
		b.Release()
	}
	for g := d.fifo.Stats().Groups[0]; g.Unread+g.Leased > 0; g = d.fifo.Stats().Groups[0] { // a batch whose answer was cut off comes again
		soon, cancel := context.WithTimeout(t.Context(), 2*time.Millisecond)
		if b, err := tr.Next(soon); err == nil {
			b.Release()
		}
		cancel()
	}
}

// replyBytes is how long the daemon's reply is.
func replyBytes(t *testing.T, d *table) int64 {
	t.Helper()
	s := d.server.Stats()
	b, err := wire.AppendAccepted(nil, &wire.AcceptedRemoteTrain{
		Table: "t", Spec: d.spec, Fingerprint: d.spec.Fingerprint(), Trainer: s.Attached + 1, Group: "cut", BatchSize: trainerBatchSize, Prefetch: 2,
		Created: d.ring.Layout().Created.UnixNano(),
	})
	if err != nil {
		t.Fatal(err)
	}
	return int64(len(b))
}

// speakingDaemon answers each hello with a table of samples of 3 bytes in batches of 4 and then what it is told to.
func speakingDaemon(t testing.TB, connections ...[]byte) (addr string, s *spec.Spec) {
	t.Helper()
	s, err := spec.ParseText("a:U8,b:U16")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for _, say := range connections {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			if _, err = wire.ReadHello(conn); err == nil {
				err = wire.WriteAccepted(conn, &wire.AcceptedRemoteTrain{Table: "t", Spec: s, Fingerprint: s.Fingerprint(), Trainer: 1, Group: "default", BatchSize: 4, Prefetch: 2})
			}
			if err == nil {
				conn.Write(say)
				all.Go(func() {
					io.Copy(io.Discard, conn)
					conn.Close()
				})
				continue
			}
			conn.Close()
		}
	})
	t.Cleanup(func() { l.Close(); all.Wait() })
	return "tcp://" + l.Addr().String(), s
}

// frame is a batch of the fake daemon's table.
func frame(number uint64, rows int) []byte {
	h := wire.BatchHeader{Count: uint32(rows), Number: number, PayloadBytes: uint64(rows * 27), Columns: 5}
	b := wire.AppendBatchHeader(nil, &h)
	for _, column := range []uint64{7, 100, 1000} {
		for row := range rows {
			b = binary.LittleEndian.AppendUint64(b, column+uint64(row))
		}
	}
	return append(b, bytes.Repeat([]byte{byte(number)}, rows*3)...)
}

// TestRemoteHostileDaemon: whatever is no batch ends the trainer with wire.ErrProtocol, at once: another connection would not fare better.
func TestRemoteHostileDaemon(t *testing.T) {
	good := frame(0, 4)
	spoil := func(at int, with byte) []byte {
		b := slices.Clone(good)
		b[at] = with
		return b
	}
	for name, say := range map[string][]byte{
		"no magic":                []byte("HTTP/1.1 400 Bad Request\r\n\r\n                                     "),
		"too many rows":           spoil(4, 5),
		"no rows":                 spoil(4, 0),
		"other size":              spoil(32, 1),
		"huge size":               spoil(39, 0x7f),
		"other columns":           spoil(40, 4),
		"no zeros":                spoil(63, 1),
		"more than it may":        append(append(slices.Clone(good), frame(1, 1)...), frame(2, 4)...),
		"bytes after the end":     append(wire.AppendNotice(nil, &wire.Notice{Code: wire.CodeEndOfStream}), 'x'),
		"a notice that is no use": {0, 2, 0, 0, 0, '{', '}'},
	} {
		t.Run(name, func(t *testing.T) {
			addr, _ := speakingDaemon(t, say)
			tr := must[*Trainer](t)(Attach(t.Context(), addr, TrainerConfig{Table: "t", Prefetch: 2}))
			defer tr.Close()
			for {
				_, err := tr.Next(t.Context())
				if err == nil {
					continue
				}
				if name == "bytes after the end" && err == io.EOF { // it had everything by then
					return
				}
				if !errors.Is(err, wire.ErrProtocol) {
					t.Errorf("%v", err)
				}
				return
			}
		})
	}
}

// TestRemotePatience: a daemon that is gone is an error of the context first, and of the trainer when patience is out.
func TestRemotePatience(t *testing.T) {
	d := serveTable(t, "x:U8", "tcp")
	p := cutting(t, "tcp://"+d.tcp, replyBytes(t, d)+4, 0)
	cfg := TrainerConfig{Table: "t", Group: "cut", Prefetch: 2, ReconnectFor: 300 * time.Millisecond, ReconnectFrom: time.Millisecond, ReconnectTo: 5 * time.Millisecond}
	tr := must[*Trainer](t)(Attach(t.Context(), p.addr, cfg))
	defer tr.Close()
	d.push(trainerBatchSize, zero)
	soon, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := tr.Next(soon)
	if down := (*ReconnectingError)(nil); !errors.As(err, &down) || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("while there is no connection: %v", err)
	}
	if _, err := tr.Next(t.Context()); !errors.Is(err, ErrDaemonGone) {
		t.Errorf("patience is out: %v", err)
	}
}

// FuzzRemoteBatches feeds a trainer what a daemon might send: it gives out whole batches or ends, and asks for no more memory than that of what it was granted.
func FuzzRemoteBatches(f *testing.F) {
	good := frame(3, 4)
	f.Add(good)
	f.Add(good[:70])
	f.Add(append(frame(1, 1), wire.AppendNotice(nil, &wire.Notice{Code: wire.CodeEndOfStream})...))
	f.Add(append(wire.AppendBatchHeader(nil, &wire.BatchHeader{LostFirst: 1, LostCount: 5}), good...))
	f.Add(bytes.Repeat(wire.AppendBatchHeader(nil, &wire.BatchHeader{LostFirst: 1, LostCount: 1 << 63}), 9))
	s, err := spec.ParseText("a:U8,b:U16")
	if err != nil {
		f.Fatal(err)
	}
	l, err := newReceivedLayout(s, 4)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		r := &remoteTrainer{layout: l, cfg: TrainerConfig{Table: "t", ReconnectFor: -1}, wake: make(chan struct{}, 1)}
		ours, theirs := net.Pipe()
		r.begin(ours, &wire.AcceptedRemoteTrain{Prefetch: 2, Group: "default"})
		go func() {
			go io.Copy(io.Discard, theirs)
			theirs.Write(text)
			theirs.Close()
		}()
		done := make(chan struct{})
		go func() {
			defer close(done)
			r.broken(r.receiveAll())
		}()
		for {
			r.mu.Lock()
			if n := len(r.arrived); n > 2*2+1 {
				t.Errorf("%d arrivals in line", n)
			}
			r.mu.Unlock()
			b, err := r.next(t.Context())
			if lost := (*LostBatchesError)(nil); errors.As(err, &lost) && lost.N > 0 {
				continue
			}
			if err != nil {
				break
			}
			at := bytes.Index(text, b.columns[0])
			if b.count < 1 || b.count > 4 || len(b.columns[1]) != 2*b.count || at < 0 {
				t.Errorf("batch %d of %d rows", b.number, b.count)
			}
			r.release(b)
		}
		<-done
		if st := r.statistics(); st.Buffers > 2 {
			t.Errorf("%d buffers", st.Buffers)
		}
	})
}
