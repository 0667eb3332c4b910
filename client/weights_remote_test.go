//go:build linux

package client

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/weights"
	"github.com/ingestd/ingestd/wire"
)

// shapes are manifests whose tensors lie differently to chunks, blocks and each other.
func shapes(t testing.TB) map[string]*tensor.Manifest {
	small := make([]int64, 3000)
	for i := range small {
		small[i] = int64(i % 37)
	}
	return map[string]*tensor.Manifest{
		"one":    vectors(t, 100),
		"empty":  vectors(t, 0, 0),
		"mixed":  vectors(t, 0, 1, 256, 257, 0, 1<<20, 3<<20+5, 0, 64<<10, 7, 0),
		"small":  vectors(t, small...),
		"large":  vectors(t, 17<<20+3),
		"blocks": vectors(t, receiveBytes, receiveBytes-1, receiveBytes+1, 2*receiveBytes),
	}
}

// TestWeightsOverConnections: what is published over a connection, and read over another, is the same, generation after generation, whole and as what differs.
func TestWeightsOverConnections(t *testing.T) {
	for name, m := range shapes(t) {
		for _, network := range []string{"tcp", "unix", "tls", "quic"} {
			for _, heap := range []bool{false, true} {
				if heap && (network == "tls" || network == "quic") { // which memory it comes from is the same to them
					continue
				}
				t.Run(name+"/"+network+map[bool]string{true: "/heap"}[heap], func(t *testing.T) {
					d := serveWeights(t, network, weights.ServerConfig{}, weights.StoreConfig{Heap: heap})
					p := publisherOf(t, d, m)
					first := publishAll(t, p, all(1))
					s := subscribed(t, d.addr, SubscribeConfig{TLS: d.tls})
					w := newer(t, s, 0)
					wantWeights(t, w, all(1))
					if w.Digest() != first.Digest || w.Generation() != first.Generation || !w.Manifest().Equal(m) {
						t.Errorf("generation %d with digest %v, want %d with %v", w.Generation(), w.Digest(), first.Generation, first.Digest)
					}
					for g := uint64(2); g < 6; g++ {
						v := func(i int) uint64 {
							if i%5 == int(g) {
								return g
							}
							return 1
						}
						publishAll(t, p, v)
						next := newer(t, s, g-1)
						wantWeights(t, next, v)
						wantWeights(t, w, all(1)) // held all the time
						next.Release()
					}
					w.Release()
					if st := remoteStats(t, s); st.Generations != 5 || st.BadSums != 0 || st.Reconnects != 0 {
						t.Errorf("stats %+v", st)
					}
				})
			}
		}
	}
}

// TestRemoteResumes: a transfer that breaks after any number of bytes goes on where it was, and what is shown is right.
func TestRemoteResumes(t *testing.T) {
	m := vectors(t, 100, 1<<20, 0, 3000, 700_000)
	d := serveWeights(t, "tcp", weights.ServerConfig{}, weights.StoreConfig{})
	p := publisherOf(t, d, m)
	publishAll(t, p, all(1))
	whole := m.DataBytes()
	for _, limits := range [][]int64{
		{0, -1}, {10, -1}, {500, -1}, {700, -1}, {1000, -1}, {2000, -1}, {70_000, -1}, {whole, -1}, {whole + 400, -1},
		{100_000, 100_000, 100_000, 100_000, -1}, {5000, 0, 0, 300, 5000, 100_000, -1},
	} {
		proxy := cutting(t, d.addr, limits...)
		s, err := Subscribe(patient(t), proxy.addr, SubscribeConfig{Table: "w", ReconnectFrom: time.Millisecond, ReconnectTo: 2 * time.Millisecond})
		if err != nil { // it broke before the reply: the caller tries again
			if s, err = Subscribe(patient(t), proxy.addr, SubscribeConfig{Table: "w", ReconnectFrom: time.Millisecond, ReconnectTo: 2 * time.Millisecond}); err != nil {
				t.Fatal(err)
			}
		}
		w := newer(t, s, 0)
		wantWeights(t, w, all(1))
		w.Release()
		st := remoteStats(t, s)
		if st.BadSums != 0 || int64(st.Bytes) != whole {
			t.Errorf("limits %v: %d bytes were received, and there are %d: %+v", limits, st.Bytes, whole, st)
		}
		if proxy.connections() < len(limits) && limits[0] < whole {
			t.Errorf("limits %v: %d connections", limits, proxy.connections())
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestRemoteBreaksBetween: a reader that lost its connection keeps what it has, gets the newest when it is back, as what differs, and numbers that were
// skipped are counted.
func TestRemoteBreaksBetween(t *testing.T) {
	m := vectors(t, 100_000, 200_000)
	d := serveWeights(t, "tcp", weights.ServerConfig{}, weights.StoreConfig{Generations: 8})
	p := publisherOf(t, d, m)
	publishAll(t, p, all(1))
	proxy := cutting(t, d.addr, m.DataBytes()+3000, -1) // the second generation breaks the connection
	s, err := Subscribe(patient(t), proxy.addr, SubscribeConfig{Table: "w", ReconnectFrom: time.Millisecond, ReconnectTo: 2 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	w := newer(t, s, 0)
	first := func(i int) uint64 { return uint64(2 - i) }
	publishAll(t, p, first)
	next := newer(t, s, 1)
	wantWeights(t, next, first)
	wantWeights(t, w, all(1))
	if st := remoteStats(t, s); st.Deltas != 1 || st.Reconnects != 1 || st.CopiedBytes != uint64(m.DataBytes())-100_000 || st.Bytes >= 2*uint64(m.DataBytes()) {
		t.Errorf("stats %+v", st)
	}
	next.Release()
	w.Release()
}

// TestRemoteDeltaBytes: what is received is what differs, unless the subscription wants all.
func TestRemoteDeltaBytes(t *testing.T) {
	m := vectors(t, 1<<20, 2<<20, 4<<20)
	for _, noDelta := range []bool{false, true} {
		d := serveWeights(t, "tcp", weights.ServerConfig{}, weights.StoreConfig{})
		p := publisherOf(t, d, m)
		publishAll(t, p, all(1))
		s := subscribed(t, d.addr, SubscribeConfig{NoDelta: noDelta})
		newer(t, s, 0).Release()
		before := remoteStats(t, s).Bytes
		v := func(i int) uint64 { return 1 + uint64(i%2) }
		publishAll(t, p, v)
		w := newer(t, s, 1)
		wantWeights(t, w, v)
		w.Release()
		want := uint64(2 << 20)
		if noDelta {
			want = 7 << 20
		}
		if got := remoteStats(t, s).Bytes - before; got != want {
			t.Errorf("NoDelta %v: %d bytes were received, want %d", noDelta, got, want)
		}
	}
}

// TestRemoteHeld: what callers hold is never written over; when they hold all there is memory for, the daemon is not kept waiting, and the newest comes once
// they let go.
func TestRemoteHeld(t *testing.T) {
	m := vectors(t, 300_000)
	d := serveWeights(t, "tcp", weights.ServerConfig{}, weights.StoreConfig{})
	p := publisherOf(t, d, m)
	s := (*Subscription)(nil)
	var held []*Weights
	for g := uint64(1); g <= 3; g++ {
		publishAll(t, p, all(g))
		if s == nil {
			s = subscribed(t, d.addr, SubscribeConfig{Generations: 3, ReconnectFrom: time.Millisecond, ReconnectTo: 2 * time.Millisecond})
		}
		held = append(held, newer(t, s, g-1))
	}
	for g := uint64(4); g <= 9; g++ {
		publishAll(t, p, all(g)) // no publisher waits
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if w, err := s.Wait(ctx, 3); !errors.Is(err, os.ErrDeadlineExceeded) || !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v, %v", w, err)
	}
	for i, w := range held {
		wantWeights(t, w, all(uint64(i+1)))
	}
	held[1].Release()
	w := newer(t, s, 3)
	wantWeights(t, w, all(9))
	wantWeights(t, held[0], all(1))
	wantWeights(t, held[2], all(3))
	for _, w := range append(held, w) {
		w.Release()
	}
	if st := remoteStats(t, s); st.Buffers > 3 || st.Skipped != 5 {
		t.Errorf("stats %+v", st)
	}
	last := publishAll(t, p, all(10))
	w = newer(t, s, 9)
	if w.Digest() != last.Digest {
		t.Error("another digest")
	}
	w.Release()
	if st := remoteStats(t, s); st.Buffers > 2 {
		t.Errorf("nobody holds anything, and there are %d buffers", st.Buffers)
	}
}

// TestRemoteDamaged: bytes that do not have their sums are not shown; the error of a wait that ends meanwhile names the tensor, and the next generation is
// shown.
func TestRemoteDamaged(t *testing.T) {
	m := vectors(t, 1000, 300_000)
	d := serveWeights(t, "tcp", weights.ServerConfig{}, weights.StoreConfig{})
	p, err := d.store.OpenPublisher(m, weights.Who{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	publish := func(version uint64, wrong int) {
		t.Helper()
		pl, err := p.Begin(t.Context(), 0)
		if err != nil {
			t.Fatal(err)
		}
		for i := range m.Len() {
			b := tensorContent(version, i, m.EncodedBytes(i))
			copy(pl.Data()[m.Offset(i):], b)
			sum := tensor.CRC(b)
			if i == wrong {
				sum++
			}
			pl.SetSum(i, sum)
		}
		if _, err := pl.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	publish(1, 1)
	s := subscribed(t, d.addr, SubscribeConfig{})
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for remoteStats(t, s).BadSums < 2 {
		<-tick.C
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := s.Wait(ctx, 0); !errors.Is(err, os.ErrDeadlineExceeded) || !strings.Contains(err.Error(), "layers.1.w") {
		t.Fatalf("got %v", err)
	}
	if _, err := s.Latest(); err == nil {
		t.Error("something damaged is shown")
	}
	if st := remoteStats(t, s); st.BadSums != 2 || st.Generations != 0 {
		t.Errorf("stats %+v", st)
	}
	publish(2, -1)
	w := newer(t, s, 0)
	wantWeights(t, w, all(2))
	w.Release()
}

// TestRemoteReplaced: another manifest ends the subscription with an error that says so; what is held stays.
func TestRemoteReplaced(t *testing.T) {
	m := vectors(t, 1000)
	d := serveWeights(t, "tcp", weights.ServerConfig{}, weights.StoreConfig{})
	p := publisherOf(t, d, m)
	publishAll(t, p, all(1))
	s := subscribed(t, d.addr, SubscribeConfig{})
	w := newer(t, s, 0)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	var other *Publisher
	for other == nil { // the daemon learns of the end of the first one
		var err error
		other, err = OpenPublisher(patient(t), d.addr, PublisherConfig{Table: "w", Manifest: vectors(t, 2000), Stream: true})
		if err != nil && !errors.Is(err, ErrPublisherActive) {
			t.Fatal(err)
		}
	}
	defer other.Close()
	publishAll(t, other, all(5))
	if _, err := s.Wait(patient(t), 1); !errors.Is(err, ErrReplaced) {
		t.Errorf("got %v", err)
	}
	wantWeights(t, w, all(1))
	w.Release()
	again := subscribed(t, d.addr, SubscribeConfig{})
	w = newer(t, again, 1)
	wantWeights(t, w, all(5))
	w.Release()
}

// TestRemoteWaits: a subscription waits for the first generation, or is refused; a context that ends is named; closing ends a wait.
func TestRemoteWaits(t *testing.T) {
	m := vectors(t, 1000)
	d := serveWeights(t, "tcp", weights.ServerConfig{}, weights.StoreConfig{})
	var refusal *wire.Refusal
	if _, err := Subscribe(patient(t), d.addr, SubscribeConfig{Table: "w"}); !errors.As(err, &refusal) || refusal.Code != wire.CodeNoGeneration {
		t.Fatalf("got %v", err)
	}
	if _, err := Subscribe(patient(t), d.addr, SubscribeConfig{Table: "x"}); !errors.As(err, &refusal) || refusal.Code != wire.CodeUnknownTable {
		t.Fatalf("got %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := Subscribe(ctx, d.addr, SubscribeConfig{Table: "w", Wait: true}); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("got %v", err)
	}
	p := publisherOf(t, d, m)
	subscribing := make(chan *Subscription)
	go func() {
		s, err := Subscribe(patient(t), d.addr, SubscribeConfig{Table: "w", Wait: true})
		if err != nil {
			t.Error(err)
		}
		subscribing <- s
	}()
	publishAll(t, p, all(1))
	s := <-subscribing
	if s == nil {
		return
	}
	newer(t, s, 0).Release()
	waiting := make(chan error)
	go func() {
		_, err := s.Wait(patient(t), 1)
		waiting <- err
	}()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := <-waiting; !errors.Is(err, os.ErrClosed) {
		t.Errorf("got %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// TestRemoteHostile: what a daemon sends that makes no sense ends the connection, not the process, and takes no memory.
func TestRemoteHostile(t *testing.T) {
	m := vectors(t, 512, 300)
	message := func(v any) []byte {
		b, err := wire.AppendMessage(nil, v, weights.AnnouncementBytesMax)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	n := m.DataBytes()
	sums := make([]byte, 8)
	for name, text := range map[string][]byte{
		"a chunk":          {1, 0, 0, 0x80},
		"too short":        {1, 0, 0, 0, '{'},
		"too long":         {1, 0, 0x40, 0},
		"no JSON":          []byte("\x03\x00\x00\x00abc"),
		"no notice":        {0, 0, 0, 0, 1},
		"no generation":    message(&weights.Announcement{Op: "generation", Ranges: []weights.Range{{0, n}}, Bytes: n}),
		"part of it":       message(&weights.Announcement{Op: "generation", Generation: 1, Ranges: []weights.Range{{0, 512}}, Bytes: 512}),
		"a base not had":   message(&weights.Announcement{Op: "generation", Generation: 2, Base: 1, Ranges: []weights.Range{{0, 512}}, Bytes: 512}),
		"resumed unasked":  message(&weights.Announcement{Op: "generation", Generation: 2, Ranges: []weights.Range{{0, n}}, Bytes: n, From: 5}),
		"another's digest": append(message(&weights.Announcement{Op: "generation", Generation: 1, Ranges: []weights.Range{{0, n}}, Bytes: n}), sums...),
	} {
		t.Run(name, func(t *testing.T) {
			addr := listen(t, "tcp", func(conn net.Conn) {
				if _, err := wire.ReadHello(conn); err != nil {
					t.Error(err)
					return
				}
				if err := wire.WriteAccepted(conn, &wire.AcceptedSubscribe{Table: "w", Reader: 1, Newest: 1, Manifest: m.JSON()}); err != nil {
					t.Error(err)
				}
				conn.Write(text)
				io.Copy(io.Discard, conn)
			})
			s, err := Subscribe(patient(t), addr, SubscribeConfig{Table: "w", ReconnectFor: -1})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.Wait(patient(t), 0); !errors.Is(err, wire.ErrProtocol) {
				t.Errorf("got %v", err)
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	large := vectors(t, 1<<40)
	addr := listen(t, "tcp", func(conn net.Conn) {
		if _, err := wire.ReadHello(conn); err == nil {
			_ = wire.WriteAccepted(conn, &wire.AcceptedSubscribe{Table: "w", Reader: 1, Newest: 1, Manifest: large.JSON()})
		}
	})
	if _, err := Subscribe(patient(t), addr, SubscribeConfig{Table: "w"}); err == nil || !strings.Contains(err.Error(), "CapacityBytes") {
		t.Errorf("got %v", err)
	}
}

// TestWeightsPatienceWithBreaks: a daemon that accepts and ends each connection is given up as one that is gone is.
func TestWeightsPatienceWithBreaks(t *testing.T) {
	m := vectors(t, 300)
	addr, connections := breaking(t, func(conn net.Conn) {
		if _, err := wire.ReadHello(conn); err == nil {
			_ = wire.WriteAccepted(conn, &wire.AcceptedSubscribe{Table: "w", Reader: 1, Newest: 1, Manifest: m.JSON()})
		}
	})
	s, err := Subscribe(patient(t), addr, SubscribeConfig{Table: "w", ReconnectFor: 300 * time.Millisecond, ReconnectFrom: time.Millisecond, ReconnectTo: 10 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Wait(patient(t), 0); !errors.Is(err, ErrDaemonGone) {
		t.Errorf("got %v", err)
	}
	if st, _ := s.RemoteStats(); st.Reconnects == 0 || int(st.Reconnects)+1 != connections() {
		t.Errorf("%d reconnects, %d connections", st.Reconnects, connections())
	}
}

// TestWhatPatienceCounts: time without a connection, since one brought something or stood for long; not time with one.
func TestWhatPatienceCounts(t *testing.T) {
	for name, test := range map[string]struct {
		stood time.Duration
		over  bool
		want  time.Duration
	}{
		"nothing came":       {59 * time.Minute, false, time.Minute},
		"something came":     {0, true, 0},
		"it stood for long":  {61 * time.Minute, false, 0},
		"both of these were": {61 * time.Minute, true, 0},
	} {
		r := &remoteWeights{cfg: SubscribeConfig{ReconnectFor: time.Hour}, changed: make(chan struct{}), stoodFrom: time.Now().Add(-test.stood)}
		r.outage.spent, r.outage.over = time.Minute, test.over
		if !r.broken(io.EOF) || r.outage.spent != test.want || r.outage.over {
			t.Errorf("%s: %v were spent, %v; want %v", name, r.outage.spent, r.err, test.want)
		}
	}
}
