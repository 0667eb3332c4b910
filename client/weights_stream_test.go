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

// TestStreamedPublisher: tensors may be put in any order; an abort and a commit of what is not whole leave nothing; numbers are asked for.
func TestStreamedPublisher(t *testing.T) {
	m := vectors(t, 1000, 0, 3<<20, 70, 500_000)
	for _, network := range []string{"tcp", "unix"} {
		d := serveWeights(t, network, weights.ServerConfig{}, weights.StoreConfig{})
		p := publisherOf(t, d, m)
		put := func(g *Generation, v uint64, order ...int) {
			t.Helper()
			for _, i := range order {
				if err := g.PutAt(patient(t), i, tensorContent(v, i, m.EncodedBytes(i))); err != nil {
					t.Fatal(err)
				}
			}
		}
		begin := func(want uint64) *Generation {
			t.Helper()
			g, err := p.Begin(patient(t), want)
			if err != nil {
				t.Fatal(err)
			}
			return g
		}
		g := begin(0)
		put(g, 1, 4, 3, 2, 0)
		if done, err := g.Commit(patient(t)); err != nil || done.Generation != 1 {
			t.Fatalf("%+v, %v", done, err)
		}
		g = begin(0)
		put(g, 2, 0, 2)
		if _, err := g.Commit(patient(t)); !errors.As(err, new(*IncompleteError)) {
			t.Fatalf("got %v", err)
		}
		if err := g.Abort(); err != nil {
			t.Fatal(err)
		}
		g = begin(7)
		put(g, 7, 2, 0, 3, 4)
		if _, err := g.Commit(patient(t)); err != nil {
			t.Fatal(err)
		}
		old := (*OldGenerationError)(nil)
		if _, err := p.Begin(patient(t), 7); !errors.As(err, &old) || old.Newest != 7 {
			t.Fatalf("got %v", err)
		}
		s := subscribed(t, d.addr, SubscribeConfig{})
		w := newer(t, s, 0)
		if w.Generation() != 7 {
			t.Errorf("generation %d", w.Generation())
		}
		wantWeights(t, w, all(7))
		w.Release()
		if n := p.SentBytes(); n < tensorBytesOf(m) || n > m.DataBytes() {
			t.Errorf("%d bytes were sent", n)
		}
		if st := d.store.Stats(); st.Failed[weights.FailedAborted] != 1 || st.Published != 2 || st.Failed[weights.FailedOldGeneration] != 1 {
			t.Errorf("stats %+v", st)
		}
	}
}

func tensorBytesOf(m *tensor.Manifest) (n int64) {
	for i := range m.Len() {
		n += m.EncodedBytes(i)
	}
	return n
}

// TestStreamedPinned: who finds all places held is told by whom when the deadline passes, and goes on when one is let go; one whose context is cancelled can
// go on, too.
func TestStreamedPinned(t *testing.T) {
	m := vectors(t, 1000)
	d := serveWeights(t, "tcp", weights.ServerConfig{}, weights.StoreConfig{Generations: 2})
	p := publisherOf(t, d, m)
	publishAll(t, p, all(1))
	r, err := d.store.OpenReader(weights.Who{Client: "the-holder"})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	held, _ := r.Latest(0)
	publishAll(t, p, all(2))
	pinned := (*PinnedError)(nil)
	for wait := time.Duration(0); pinned == nil; wait = 2*wait + 20*time.Millisecond { // a deadline may pass before the daemon has said a word
		ctx, cancel := context.WithTimeout(t.Context(), wait)
		_, err := p.Begin(ctx, 0)
		cancel()
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("after %v: %v", wait, err)
		}
		errors.As(err, &pinned)
	}
	if len(pinned.Pins) != 1 || pinned.Pins[0].Who.Client != "the-holder" {
		t.Fatalf("got %v", pinned)
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(80*time.Millisecond, cancel)
	if _, err := p.Begin(ctx, 0); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	time.AfterFunc(20*time.Millisecond, held.Release)
	if done := publishAll(t, p, all(3)); done.Generation != 3 {
		t.Errorf("%+v", done)
	}
}

// TestStreamedBreaks: a publisher whose connection breaks in a generation says so, and the next Begin makes another connection.
func TestStreamedBreaks(t *testing.T) {
	m := vectors(t, 8<<20)
	d := serveWeights(t, "tcp", weights.ServerConfig{}, weights.StoreConfig{})
	var last net.Conn
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		last = conn
		return conn, err
	}
	p, err := OpenPublisher(patient(t), d.addr, PublisherConfig{Table: "w", Manifest: m, Dialer: dial})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	publishAll(t, p, all(1))
	data := all(2).data(m)(0)
	for stage := range 3 {
		var g *Generation
		for g == nil { // the daemon may not have seen yet that the last connection is gone
			if g, err = p.Begin(patient(t), 0); err != nil && !errors.Is(err, ErrPublisherActive) {
				t.Fatalf("stage %d: %v", stage, err)
			}
		}
		if stage == 0 {
			last.Close()
		}
		err := g.PutAt(patient(t), 0, data)
		if stage == 1 {
			last.Close()
		}
		if err == nil {
			_, err = g.Commit(patient(t))
		}
		if stage == 2 {
			if err != nil {
				t.Fatal(err)
			}
			break
		}
		if err == nil {
			t.Fatalf("stage %d: published over a connection that was closed", stage)
		}
		_ = g.Abort()
	}
	last.Close() // while nothing is under way: the next Begin finds out
	var done Published
	for done.Generation == 0 {
		if done, err = p.Publish(patient(t), all(3).data(m)); err != nil && !errors.Is(err, ErrPublisherActive) {
			t.Fatal(err)
		}
	}
	if done.Generation != 3 {
		t.Errorf("%+v", done)
	}
	s := subscribed(t, d.addr, SubscribeConfig{})
	w := newer(t, s, 0)
	wantWeights(t, w, all(3))
	w.Release()
}

// TestStreamedContext: a daemon that takes nothing does not hold a publisher beyond its context.
func TestStreamedContext(t *testing.T) {
	m := vectors(t, 32<<20)
	stuck := make(chan struct{})
	addr := listen(t, "tcp", func(conn net.Conn) {
		if _, err := wire.ReadHello(conn); err != nil {
			t.Error(err)
		}
		if err := wire.WriteAccepted(conn, &wire.AcceptedPublish{Table: "w", Publisher: 1, ChunkBytes: 1 << 20}); err != nil {
			t.Error(err)
		}
		var ask weights.Ask
		if err := wire.ReadMessage(conn, wire.MessageBytesMax, &ask); err != nil || ask.Op != weights.OpBegin {
			t.Errorf("%+v, %v", ask, err)
		}
		b, err := wire.AppendMessage(nil, &weights.Answer{Op: weights.OpPlace, Generation: 1}, wire.MessageBytesMax)
		if err != nil {
			t.Error(err)
		}
		conn.Write(b)
		<-stuck
	})
	defer close(stuck)
	p, err := OpenPublisher(patient(t), addr, PublisherConfig{Table: "w", Manifest: m})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	g, err := p.Begin(patient(t), 0)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := g.PutAt(ctx, 0, make([]byte, 32<<20)); !errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, ErrDaemonGone) {
		t.Errorf("got %v", err)
	}
}

// TestStreamedToldWhy: a publisher that the daemon ends learns the reason, in the middle of its tensors and at its commit.
func TestStreamedToldWhy(t *testing.T) {
	m := vectors(t, 4<<20)
	d := serveWeights(t, "tcp", weights.ServerConfig{}, weights.StoreConfig{})
	p := publisherOf(t, d, m)
	g, err := p.Begin(patient(t), 0)
	if err != nil {
		t.Fatal(err)
	}
	p.sink.(*streamed).cutter.Begin(5) // chunks of another generation
	err = g.PutAt(patient(t), 0, make([]byte, 4<<20))
	if err == nil {
		_, err = g.Commit(patient(t))
	}
	notice := (*wire.Notice)(nil)
	if !errors.As(err, &notice) || notice.Code != wire.CodeBadChunk || !strings.Contains(notice.Reason, "is of generation 5") {
		t.Errorf("got %v", err)
	}
}

// TestStreamedHostile: a daemon that answers nonsense is no daemon.
func TestStreamedHostile(t *testing.T) {
	m := vectors(t, 100)
	message := func(v any) []byte {
		b, err := wire.AppendMessage(nil, v, wire.MessageBytesMax)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for name, c := range map[string]struct {
		chunkBytes int64
		answer     []byte
	}{
		"chunks too small": {4096, nil},
		"chunks too large": {1 << 40, nil},
		"published":        {1 << 20, message(&weights.Answer{Op: weights.OpPublished})},
		"nonsense":         {1 << 20, message(&weights.Answer{Op: "x"})},
		"a chunk":          {1 << 20, []byte{1, 0, 0, 0x80}},
		"too long":         {1 << 20, []byte{1, 0, 1, 0}},
		"no JSON":          {1 << 20, []byte("\x03\x00\x00\x00abc")},
		"no notice":        {1 << 20, []byte{0, 0, 0, 0, 7}},
	} {
		t.Run(name, func(t *testing.T) {
			addr := listen(t, "tcp", func(conn net.Conn) {
				if _, err := wire.ReadHello(conn); err != nil {
					t.Error(err)
				}
				if err := wire.WriteAccepted(conn, &wire.AcceptedPublish{Table: "w", Publisher: 1, ChunkBytes: c.chunkBytes}); err != nil {
					t.Error(err)
				}
				conn.Write(c.answer)
				io.Copy(io.Discard, conn)
			})
			p, err := OpenPublisher(patient(t), addr, PublisherConfig{Table: "w", Manifest: m})
			if err == nil {
				_, err = p.Begin(patient(t), 0)
				p.Close()
			}
			if !errors.Is(err, wire.ErrProtocol) {
				t.Errorf("got %v", err)
			}
		})
	}
}
