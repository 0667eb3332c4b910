package ingesttest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ingestd/ingestd/wire"
)

// needs are what a test of the suite needs from the network between client and daemon.
type needs int

const (
	quick    needs = 1 << iota // round trips are so short that there can be hundreds, one after the other
	lossless                   // what is sent arrives, and soon: a reset; notes that are a second apart
	near                       // what no network changes, and needs much sent, or many connections, or a short limit of time
)

// suite is all tests, in the order in which they run.
var suite = []struct {
	name  string
	f     func(*testing.T, Start)
	needs needs
}{
	{"SamplesOfEveryShape", samplesOfEveryShape, near},
	{"CommittedAcks", committedAcks, 0},
	{"Refusals", refusals, 0},
	{"RandomHellos", randomHellos, near},
	{"SlowHandshake", slowHandshake, near},
	{"CutShort", cutShort, 0},
	{"Stalled", stalled, 0},
	{"Dribbled", dribbled, near},
	{"Idle", idle, 0},
	{"AcksNotRead", acksNotRead, near},
	{"Backpressure", backpressure, 0},
	{"ConnectionLimit", connectionLimit, 0},
	{"ShutdownUnderLoad", shutdownUnderLoad, 0},
	{"ShutdownWhenFull", shutdownWhenFull, 0},
	{"SmallWindowIsNeverStuck", smallWindow, quick},
	{"SessionsGoOn", sessionsGoOn, 0},
	{"SessionsSurviveBrokenConnections", brokenConnections, quick},
	{"SessionIsTakenOver", takeover, 0},
	{"TooManySessions", tooManySessions, 0},
	{"TableWithCommittedAcks", committedTable, 0},
	{"Notes", notes, lossless},
	{"GoneWhileWaiting", goneWhileWaiting, lossless},
}

// Run runs the suite.
func Run(t *testing.T, start Start) {
	for _, tc := range suite {
		t.Run(tc.name, func(t *testing.T) { tc.f(t, start) })
	}
}

// RunPush has three clients push so many samples of a spec each.
func RunPush(t *testing.T, start Start, spec string, samples int) {
	samplesOf(t, start, shape{name: spec, spec: spec, samples: samples, batch: 8})
}

// shapes reach every way of receiving, on both sides of each of its limits.
// shape is what a client sends.
type shape struct {
	name, spec string
	samples    int
	piece      int // bytes per write; 0: all at once
	batch      int
}

var shapes = []shape{
	{"8 B", "a:U64", 5000, 0, 32},
	{"8 B in odd pieces", "a:U64", 2000, 13, 32},
	{"1 KiB", "a:U8[1024]", 2000, 0, 16},
	{"1 KiB byte by byte at first", "a:U8[1024]", 3, 7, 2},
	{"9 small leaves", "a:U64,b:U8,c:F32[3],d:F64,e:I16[5],f:I32,g:U8[100],h:BOOL,i:F32", 3000, 0, 8},
	{"9 small leaves in pieces", "a:U64,b:U8,c:F32[3],d:F64,e:I16[5],f:I32,g:U8[100],h:BOOL,i:F32", 500, 37, 8},
	{"64 KiB, not held", "a:U8[65536]", 50, 0, 4},
	{"64 KiB and a byte, held", "a:U8[65537]", 50, 0, 4},
	{"held, in pieces", "a:U8[100000]", 10, 4096, 4},
	{"readv of many", "a:U8[2000],b:U8[3000],c:F32[500]", 300, 0, 8},
	{"readv in pieces", "a:U8[2000],b:U8[3000],c:F32[500]", 100, 777, 8},
	{"large with small leaves", "a:U8[300000],b:U8,c:F32[7],d:U8[50000]", 30, 0, 4},
	{"large with small leaves in pieces", "a:U8[300000],b:U8,c:F32[7],d:U8[50000]", 8, 10001, 4},
	{"1,500 leaves", "a:U64," + strings.TrimSuffix(manyLeaves(1499), ","), 50, 0, 4},
	{"1,500 leaves, held", "a:U64," + strings.TrimSuffix(strings.ReplaceAll(manyLeaves(1499), "[3]", "[50]"), ","), 20, 0, 4},
	{"4 MiB", "a:U8[4194304]", 5, 0, 2},
}

func manyLeaves(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "x%d:U8[3],", i)
	}
	return b.String()
}

func samplesOfEveryShape(t *testing.T, start Start) {
	for _, sh := range shapes {
		t.Run(sh.name, func(t *testing.T) { samplesOf(t, start, sh) })
	}
}

func samplesOf(t *testing.T, start Start, sh shape) {
	const clients = 3
	r := newRig(t, start, sh.spec, sh.batch, 4, Limits{})
	r.train()
	var wg sync.WaitGroup
	for id := range uint64(clients) {
		c := r.join(id, nil)
		wg.Go(func() {
			if err := c.send(sh.samples, sh.piece); err != nil {
				t.Error(err)
			}
			if err := c.CloseWrite(); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			defer c.Close()
			acks, notice, err := c.ending()
			if err != nil || notice != nil || acks != uint64(sh.samples) {
				t.Errorf("got %d acks of %d, notice %v, error %v", acks, sh.samples, notice, err)
			}
		})
	}
	wg.Wait()
	r.finish()
	for id := range uint64(clients) {
		if r.taken[id] != uint64(sh.samples) {
			t.Errorf("client %d: %d of %d samples delivered", id, r.taken[id], sh.samples)
		}
	}
	if st := r.transport.Stats(); st.Samples != uint64(clients*sh.samples) || st.Ended["clean"] != clients || st.CutShort != 0 {
		t.Errorf("counted %+v", st)
	}
}

// committedAcks: with committed acks, what is acked is in the ring at that moment.
func committedAcks(t *testing.T, start Start) {
	r := newRig(t, start, "a:U64", 4, 16, Limits{})
	c := r.join(1, func(h *wire.Hello) { h.Ack = wire.AckCommitted })
	defer c.Close()
	if c.accepted.Ack != wire.AckCommitted {
		t.Fatalf("the daemon agreed to %q acks", c.accepted.Ack)
	}
	for n := 1; n <= 8; n++ {
		if err := c.send(1, 0); err != nil {
			t.Fatal(err)
		}
		c.wantAcks(1)
		if got := r.table.Stats().Committed; got != uint64(n) {
			t.Fatalf("%d acked, %d committed", n, got)
		}
	}
	_ = c.CloseWrite()
	r.train()
	r.finish()
}

func refusals(t *testing.T, start Start) {
	r := newRig(t, start, "image:F32[8,4],label:I32", 4, 4, Limits{})
	r.train()
	specHello := func(text string) func(*wire.Hello) {
		return func(h *wire.Hello) { h.Spec = mustSpec(t, text) }
	}
	frame := func(change func(b []byte) []byte) []byte {
		b, err := wire.AppendHello(nil, r.hello())
		if err != nil {
			t.Fatal(err)
		}
		return change(b)
	}
	for _, tc := range []struct {
		name   string
		bytes  []byte
		change func(*wire.Hello)
		code   wire.Code
		says   string
	}{
		{name: "wrong magic", bytes: []byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"), code: wire.CodeBadMagic},
		{name: "wrong version", bytes: frame(func(b []byte) []byte { b[8], b[10] = 9, 9; return b }), code: wire.CodeBadVersion},
		{name: "1 GiB long", bytes: frame(func(b []byte) []byte { binary.LittleEndian.PutUint32(b[12:], 1<<30); return b }), code: wire.CodeBadHandshake},
		{name: "not JSON", bytes: frame(func(b []byte) []byte { b[16] = 'x'; return b }), code: wire.CodeBadHandshake},
		{name: "stops half-way", bytes: frame(func(b []byte) []byte { return b[:len(b)/2] }), code: wire.CodeBadHandshake},
		{name: "unknown table", change: func(h *wire.Hello) { h.Table = "nope" }, code: wire.CodeUnknownTable, says: tableName},
		{name: "one dtype differs", change: specHello("image:F32[8,4],label:F32"), code: wire.CodeSpecMismatch, says: "label"},
		{name: "one leaf renamed", change: specHello("image:F32[8,4],target:I32"), code: wire.CodeSpecMismatch, says: "target"},
		{name: "transposed shape", change: specHello("image:F32[4,8],label:I32"), code: wire.CodeSpecMismatch, says: "F32[4,8]"},
		{name: "trainer on a producers' way in", change: func(h *wire.Hello) { *h = wire.Hello{Role: wire.RoleTrain, Table: tableName} }, code: wire.CodeWrongRole},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := r.transport.Stats().Refused[string(tc.code)]
			c := r.connect()
			defer c.Close()
			b := tc.bytes
			if tc.change != nil {
				h := r.hello()
				tc.change(h)
				var err error
				if b, err = wire.AppendHello(nil, h); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := c.Write(b); err != nil {
				t.Fatal(err)
			}
			if err := c.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			err := wire.ReadReply(c, &c.accepted)
			refusal, ok := err.(*wire.Refusal)
			if !ok || refusal.Code != tc.code {
				t.Fatalf("got %v, want a refusal with code %s", err, tc.code)
			}
			if refusal.Reason == "" || !strings.Contains(refusal.Error()+fmt.Sprint(refusal.Diff), tc.says) {
				t.Errorf("the reason does not name %q: %v", tc.says, refusal)
			}
			if tc.code == wire.CodeSpecMismatch && (refusal.Spec == nil || len(refusal.Diff) == 0) {
				t.Error("the refusal lacks the table's spec or the diff")
			}
			if _, err := io.Copy(io.Discard, c); err != nil {
				t.Errorf("after the refusal: %v, want a clean close", err)
			}
			if got := r.transport.Stats().Refused[string(tc.code)]; got != before+1 {
				t.Errorf("counted %d, want %d", got, before+1)
			}
		})
	}
	c := r.join(1, nil) // nobody else was harmed
	_ = c.Close()
	r.finish()
}

func slowHandshake(t *testing.T, start Start) {
	r := newRig(t, start, "a:U64", 4, 4, Limits{HandshakeTimeout: 50 * time.Millisecond})
	c := r.connect()
	defer c.Close()
	if _, err := c.Write([]byte("I")); err != nil { // and then nothing: a dribble is no better, the limit is on the whole
		t.Fatal(err)
	}
	err := wire.ReadReply(c, &c.accepted)
	if refusal, ok := err.(*wire.Refusal); !ok || refusal.Code != wire.CodeHandshakeTimeout {
		t.Fatalf("got %v, want %s", err, wire.CodeHandshakeTimeout)
	}
	r.finish()
}

// cutShort: a stream that ends inside a sample loses that sample only, whether its slot was reserved already (large) or not.
func cutShort(t *testing.T, start Start) {
	for _, text := range []string{"a:U8[1024]", "a:U8[600],b:U8[424]", "a:U8[200000]", "a:U8[100000],b:U8[100000]"} {
		t.Run(text, func(t *testing.T) {
			r := newRig(t, start, text, 2, 4, Limits{})
			r.train()
			other := r.join(2, nil)
			c := r.join(1, nil)
			if err := c.send(3, 0); err != nil {
				t.Fatal(err)
			}
			size := int(r.table.Spec().SampleBytes())
			if _, err := c.Write(make([]byte, size/2)); err != nil {
				t.Fatal(err)
			}
			_ = c.CloseWrite()
			acks, notice, err := c.ending()
			if err != nil || acks != 3 || notice == nil || notice.Code != wire.CodeCutShort {
				t.Fatalf("got %d acks, notice %v, error %v; want 3 and %s", acks, notice, err, wire.CodeCutShort)
			}
			_ = c.Close()
			if err := other.send(5, 0); err != nil {
				t.Fatal(err)
			}
			other.wantAcks(5)
			_ = other.Close()
			r.finish()
			if r.taken[1] != 3 || r.taken[2] != 5 {
				t.Errorf("delivered %v, want 3 and 5", r.taken)
			}
			if st := r.transport.Stats(); st.CutShort != 1 {
				t.Errorf("counted %d samples cut short, want 1", st.CutShort)
			}
		})
	}
}

func stalled(t *testing.T, start Start) {
	for _, text := range []string{"a:U8[1024]", "a:U8[200000]"} {
		t.Run(text, func(t *testing.T) {
			r := newRig(t, start, text, 4, 4, Limits{StallTimeout: 50 * time.Millisecond})
			r.train()
			c := r.join(1, nil)
			defer c.Close()
			if _, err := c.Write(make([]byte, 700)); err != nil {
				t.Fatal(err)
			}
			acks, notice, err := c.ending()
			if err != nil || acks != 0 || notice == nil || notice.Code != wire.CodeStalled {
				t.Fatalf("got %d acks, notice %v, error %v; want %s", acks, notice, err, wire.CodeStalled)
			}
			r.finish()
			if st := r.transport.Stats(); st.Ended[string(wire.CodeStalled)] != 1 || st.CutShort != 1 {
				t.Errorf("counted %+v", st)
			}
		})
	}
}

// dribbled: a sample that comes byte by byte never stalls for long, and yet must not hold its slot for ever.
func dribbled(t *testing.T, start Start) {
	r := newRig(t, start, "a:U8[100000]", 4, 4, Limits{StallTimeout: 200 * time.Millisecond})
	r.train()
	c := r.join(1, nil)
	defer c.Close()
	ended := make(chan struct{})
	var dribbling sync.WaitGroup
	dribbling.Go(func() {
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-ended:
				return
			case <-tick.C:
				_, _ = c.Write([]byte{0}) // fails once the daemon has closed
			}
		}
	})
	acks, notice, err := c.ending()
	close(ended)
	dribbling.Wait()
	if err != nil || acks != 0 || notice == nil || notice.Code != wire.CodeStalled {
		t.Fatalf("got %d acks, notice %v, error %v; want %s", acks, notice, err, wire.CodeStalled)
	}
	r.finish()
}

func idle(t *testing.T, start Start) {
	r := newRig(t, start, "a:U64", 4, 4, Limits{IdleTimeout: 50 * time.Millisecond})
	r.train()
	c := r.join(1, nil)
	defer c.Close()
	if err := c.send(1, 0); err != nil {
		t.Fatal(err)
	}
	acks, notice, err := c.ending()
	if err != nil || acks != 1 || notice == nil || notice.Code != wire.CodeIdleTimeout {
		t.Fatalf("got %d acks, notice %v, error %v; want 1 and %s", acks, notice, err, wire.CodeIdleTimeout)
	}
	r.finish()
}

// acksNotRead: a producer that never reads its acks is cut off once the socket holds no more, and only that one.
func acksNotRead(t *testing.T, start Start) {
	r := newRig(t, start, "a:U64", 1024, 4, Limits{AckTimeout: 50 * time.Millisecond})
	r.train()
	c := r.join(1, nil)
	defer c.Close()
	for c.send(1<<15, 0) == nil { // ends when the daemon closes
	}
	other := r.join(2, nil)
	if err := other.send(100, 0); err != nil {
		t.Fatal(err)
	}
	other.wantAcks(100)
	_ = other.Close()
	r.finish()
	if st := r.transport.Stats(); st.Ended[string(wire.CodeAckTimeout)] != 1 {
		t.Errorf("counted %+v, want one %s", st.Ended, wire.CodeAckTimeout)
	}
}

// backpressure: without a trainer, no more samples are acked than the ring has slots; with one, all are.
func backpressure(t *testing.T, start Start) {
	const slots, samples = 2 * 4, 50
	r := newRig(t, start, "a:U8[1000]", 4, 2, Limits{})
	c := r.join(1, nil)
	defer c.Close()
	if err := c.send(samples, 0); err != nil {
		t.Fatal(err)
	}
	c.wantAcks(slots)
	// The daemon now waits for a slot, and says so.
	for r.waitingForSlot() == 0 {
		pause(t)
		if r.table.Stats().Pushed > slots {
			t.Fatal("more samples taken than there are slots")
		}
	}
	r.train()
	c.wantAcks(samples - slots)
	_ = c.CloseWrite()
	r.finish()
	if r.taken[1] != samples {
		t.Errorf("%d of %d samples delivered", r.taken[1], samples)
	}
}

func (r *rig) waitingForSlot() int {
	n := 0
	for _, s := range r.table.Stats().Streams {
		if !s.WaitingSince.IsZero() {
			n++
		}
	}
	return n
}

func connectionLimit(t *testing.T, start Start) {
	r := newRig(t, start, "a:U64", 4, 4, Limits{MaxConnections: 2})
	r.train()
	a := r.join(1, nil)
	h := r.hello()
	h.Table = "nope"
	refused := r.connect() // reads its refusal and stays: that takes nobody's place
	defer refused.Close()
	if err := wire.WriteHello(refused, h); err != nil {
		t.Fatal(err)
	}
	if _, ok := wire.ReadReply(refused, &refused.accepted).(*wire.Refusal); !ok {
		t.Fatal("a table that is not there was not refused")
	}
	b := r.join(2, nil)
	c := r.connect()
	if err := wire.WriteHello(c, r.hello()); err != nil {
		t.Fatal(err)
	}
	err := wire.ReadReply(c, &c.accepted)
	if refusal, ok := err.(*wire.Refusal); !ok || refusal.Code != wire.CodeTooManyConnections {
		t.Fatalf("got %v, want %s", err, wire.CodeTooManyConnections)
	}
	_ = c.Close()
	_ = a.CloseWrite()
	if _, _, err := a.ending(); err != nil {
		t.Fatal(err)
	}
	_, _ = a.Close(), refused.Close()
	for r.transport.Stats().Open > 1 { // until the daemon has seen both closes
		pause(t)
	}
	d := r.join(3, nil)
	_ = d.Close()
	_ = b.Close()
	r.finish()
}

// shutdownUnderLoad: a shutdown in the middle of a flood tells every producer why, and every sample it acked is delivered.
func shutdownUnderLoad(t *testing.T, start Start) {
	for _, text := range []string{"a:U8[512]", "a:U8[400],b:U8[112]", "a:U8[150000]"} {
		t.Run(text, func(t *testing.T) {
			r := newRig(t, start, text, 8, 4, Limits{})
			r.train()
			const clients = 4
			var wg sync.WaitGroup
			var acked [clients]uint64
			for id := range uint64(clients) {
				c := r.join(id, nil)
				wg.Go(func() {
					for c.send(16, 0) == nil { // until the daemon closes
					}
				})
				wg.Go(func() {
					acks, notice, err := c.ending()
					acked[id] = acks
					if err != nil || notice == nil || notice.Code != wire.CodeShuttingDown {
						t.Errorf("client %d: notice %v, error %v, want %s", id, notice, err, wire.CodeShuttingDown)
					}
					_ = c.Close()
				})
			}
			for r.table.Stats().Committed*uint64(r.table.Spec().SampleBytes()) < 4<<20 {
				pause(t)
			}
			r.finish()
			wg.Wait()
			for id, n := range acked {
				if r.taken[uint64(id)] < n {
					t.Errorf("client %d: %d acked, %d delivered", id, n, r.taken[uint64(id)])
				}
			}
		})
	}
}

// shutdownWhenFull: a shutdown that may not wait for room in the ring still tells every producer why; what was acked is delivered.
func shutdownWhenFull(t *testing.T, start Start) {
	const clients, slots, samples = 2, 2 * 4, 50
	r := newRig(t, start, "a:U8[1000]", 4, 2, Limits{})
	var joined [clients]*client
	for id := range joined {
		joined[id] = r.join(uint64(id), nil)
		defer joined[id].Close()
		if err := joined[id].send(samples, 0); err != nil {
			t.Fatal(err)
		}
	}
	for r.waitingForSlot() < clients {
		pause(t)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := r.transport.Shutdown(over); !errors.Is(err, context.Canceled) {
			t.Errorf("Shutdown: %v, want the context's error", err)
		}
	})
	total := uint64(0)
	for id, c := range joined {
		acks, notice, err := c.ending()
		if err != nil || notice == nil || notice.Code != wire.CodeShuttingDown {
			t.Errorf("client %d: notice %v, error %v, want %s", id, notice, err, wire.CodeShuttingDown)
		}
		_ = c.Close()
		total += acks
	}
	wg.Wait()
	r.train()
	r.finish()
	if got := r.taken[0] + r.taken[1]; total != slots || got != slots {
		t.Errorf("%d slots: %d samples acked, %d delivered", slots, total, got)
	}
}

// smallWindow: a producer that keeps to its window never waits for an ack that the daemon holds back.
func smallWindow(t *testing.T, start Start) {
	for _, window := range []int64{1, 2, 7} {
		r := newRig(t, start, "a:U8[100]", 8, 4, Limits{})
		r.train()
		c := r.join(1, func(h *wire.Hello) { h.WindowSamples = window })
		if c.accepted.WindowSamples != window {
			t.Fatalf("asked for a window of %d, got %d", window, c.accepted.WindowSamples)
		}
		for range 200 {
			if err := c.send(int(window), 0); err != nil {
				t.Fatal(err)
			}
			c.wantAcks(int(window))
		}
		_ = c.Close()
		r.finish()
	}
}
