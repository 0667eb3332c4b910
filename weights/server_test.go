//go:build linux && !race

package weights

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

// served is a server behind a unix socket.
type served struct {
	t      *testing.T
	store  *Store
	server *Server
	path   string
	stop   context.CancelFunc
	conns  sync.WaitGroup
	listen net.Listener
}

func serve(t *testing.T, store StoreConfig, cfg ServerConfig) *served {
	t.Helper()
	store.Table = "w"
	s := &served{t: t, store: must(NewStore(store))(t), path: filepath.Join(t.TempDir(), "s")}
	cfg.Stores = map[string]*Store{"w": s.store}
	cfg.Log = slog.New(slog.DiscardHandler)
	s.server = must(NewServer(cfg))(t)
	ctx, stop := context.WithCancel(t.Context())
	s.stop = stop
	s.listen = must(net.Listen("unix", s.path))(t)
	s.conns.Go(func() {
		for {
			conn, err := s.listen.Accept()
			if err != nil {
				return
			}
			s.conns.Go(func() {
				hello, err := wire.ReadHello(conn)
				if err != nil {
					t.Errorf("a hello: %v", err)
					conn.Close()
					return
				}
				_ = s.server.Serve(ctx, conn, hello)
			})
		}
	})
	t.Cleanup(s.close)
	return s
}

// close stops everything, and waits until no goroutine is left.
func (s *served) close() {
	s.stop()
	_ = s.listen.Close()
	s.conns.Wait()
	check(s.t, s.store.Close())
}

// until waits for something that another goroutine is about to do.
func (s *served) until(what string, cond func() bool) {
	s.t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(20 * time.Second); !cond(); {
		if (<-tick.C).After(deadline) {
			s.t.Fatalf("not in time: %s", what)
		}
	}
}

// publisher attaches a publisher in place.
func (s *served) publisher(m *tensor.Manifest) *PublisherAttachment {
	s.t.Helper()
	return must(AttachPublisher(s.t.Context(), s.path, wire.Hello{Table: "w", Client: "p", Manifest: m.JSON()}))(s.t)
}

// ask says something and returns the next answer.
func ask(t *testing.T, p *PublisherAttachment, a Ask) Answer {
	t.Helper()
	say(t, p.Conn(), a)
	return answer(t, p.Conn())
}

func say(t *testing.T, conn net.Conn, a any) {
	t.Helper()
	_ = must(conn.Write(must(wire.AppendMessage(nil, a, wire.MessageBytesMax))(t)))(t)
}

func answer(t *testing.T, conn net.Conn) (a Answer) {
	t.Helper()
	_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	check(t, wire.ReadMessage(conn, wire.MessageBytesMax, &a))
	return a
}

// fill writes a generation in place.
func fill(p *PublisherAttachment, a Answer) {
	m, data, sums := p.Segment().Manifest(), p.Segment().Data(a.Place), p.Segment().SumBytes(a.Place)
	for i := range m.Len() {
		b := data[m.Offset(i):][:m.EncodedBytes(i)]
		contentOf(b, a.Generation, i)
		binary.LittleEndian.PutUint32(sums[4*i:], tensor.CRC(b))
	}
}

// publishOne publishes a generation in place.
func publishOne(t *testing.T, p *PublisherAttachment) Answer {
	t.Helper()
	a := ask(t, p, Ask{Op: OpBegin})
	if a.Op != OpPlace {
		t.Fatalf("answered %+v", a)
	}
	fill(p, a)
	return ask(t, p, Ask{Op: OpCommit, Generation: a.Generation})
}

func (s *served) attach(hello wire.Hello) (*Attachment, error) {
	hello.Table = "w"
	return Attach(s.t.Context(), s.path, hello)
}

func TestServePublishAndSubscribe(t *testing.T) {
	s := serve(t, StoreConfig{}, ServerConfig{})
	m := manifestOf(t, 100_000, 0, 3)
	_, err := s.attach(wire.Hello{})
	if refusal := as[*wire.Refusal](t, err); refusal.Code != wire.CodeNoGeneration {
		t.Errorf("refused with %v", refusal)
	}
	waited := make(chan *Attachment)
	go func() {
		a, err := s.attach(wire.Hello{Wait: true})
		if err != nil {
			t.Error(err)
		}
		waited <- a
	}()
	p := s.publisher(m)
	defer p.Close()
	_, err = AttachPublisher(t.Context(), s.path, wire.Hello{Table: "w", Manifest: m.JSON()})
	if refusal := as[*wire.Refusal](t, err); refusal.Code != wire.CodePublisherActive || !strings.Contains(refusal.Reason, "p (process ") {
		t.Errorf("a second publisher: %v", refusal)
	}
	published := publishOne(t, p)
	if published.Op != OpPublished || published.Generation != 1 || published.Digest != s.store.Stats().Generations[0].Digest {
		t.Errorf("%+v", published)
	}
	a := <-waited
	defer a.Close()
	generation, place, ok := a.Pin(0)
	if !ok || generation != 1 || wrongContent(a.Segment().Manifest(), a.Segment().Data(place), 1) >= 0 || a.Segment().Digest(place) != published.Digest {
		t.Fatalf("pinned generation %d, %v", generation, ok)
	}
	changed := a.Changed()
	publishOne(t, p)
	<-changed
	if generation, _, ok := a.Pin(1); !ok || generation != 2 {
		t.Errorf("after the news: generation %d, %v", generation, ok)
	}
	st := s.store.Stats()
	if pid := os.Getpid(); len(st.Readers) != 1 || st.Readers[0].Who.PID != pid || st.Readers[0].Pins != 2 || st.Publisher.Who.PID != pid {
		t.Errorf("%+v, publisher %+v", st.Readers, st.Publisher)
	}
	if n := s.server.Stats(); n.Readers != 1 || n.Publishers != 1 || n.Refused[wire.CodeNoGeneration] != 1 || n.Refused[wire.CodePublisherActive] != 1 {
		t.Errorf("%+v", n)
	}
	a.Unpin(place)
	check(t, p.Close())
	s.until("the publisher's end", func() bool { return s.store.Stats().Publisher == nil })
}

// TestMessagesOfABegin: waiting is told once, then failed by the deadline; abort ends a wait; an old number is said to be one.
func TestMessagesOfABegin(t *testing.T) {
	s := serve(t, StoreConfig{Generations: 2}, ServerConfig{})
	p := s.publisher(manifestOf(t, 10))
	defer p.Close()
	publishOne(t, p)
	a := must(s.attach(wire.Hello{Client: "holder"}))(t)
	defer a.Close()
	_, place, _ := a.Pin(0)
	publishOne(t, p)

	if got := ask(t, p, Ask{Op: OpBegin, DeadlineMS: 0}); got.Op != OpFailed || got.Code != FailedPinned || len(got.Pins) != 1 {
		t.Errorf("without a wait: %+v", got)
	}
	began := time.Now()
	got := ask(t, p, Ask{Op: OpBegin, DeadlineMS: 120})
	if got.Op != OpWaiting || len(got.Pins) != 1 || got.Pins[0].Client != "holder" || got.Pins[0].Generation != 1 || got.Pins[0].PID != os.Getpid() {
		t.Errorf("first %+v", got)
	}
	if got = answer(t, p.Conn()); got.Op != OpFailed || got.Code != FailedPinned || time.Since(began) < 120*time.Millisecond {
		t.Errorf("then %+v after %v", got, time.Since(began))
	}
	if got := ask(t, p, Ask{Op: OpBegin, DeadlineMS: 1 << 62}); got.Op != OpWaiting { // more than there is
		t.Errorf("%+v", got)
	}
	if got := ask(t, p, Ask{Op: OpAbort}); got.Op != OpAborted {
		t.Errorf("abort of a wait: %+v", got)
	}
	if got := ask(t, p, Ask{Op: OpBegin, DeadlineMS: 60_000}); got.Op != OpWaiting {
		t.Errorf("%+v", got)
	}
	a.Unpin(place)
	if got := answer(t, p.Conn()); got.Op != OpPlace || got.Generation != 3 {
		t.Errorf("after the release: %+v", got)
	}
	if got := ask(t, p, Ask{Op: OpAbort}); got.Op != OpAborted {
		t.Errorf("abort: %+v", got)
	}
	if got := ask(t, p, Ask{Op: OpBegin, Generation: 2}); got.Op != OpFailed || got.Code != FailedOldGeneration || !strings.Contains(got.Reason, "not above") {
		t.Errorf("an old generation: %+v", got)
	}
	longest := append(binary.LittleEndian.AppendUint32(nil, wire.MessageBytesMax), `{"op":"abort"`+strings.Repeat(" ", wire.MessageBytesMax-14)+"}"...)
	_ = must(p.Conn().Write(longest))(t)
	if got := answer(t, p.Conn()); got.Op != OpAborted {
		t.Errorf("the longest message: %+v", got)
	}
	if got := ask(t, p, Ask{Op: OpBegin, Generation: 20}); got.Op != OpPlace || got.Generation != 20 {
		t.Errorf("a number of its own: %+v", got)
	}
}

// TestReplacedIsTold: readers of the old segment are told at the new one's first commit, and what they hold stays.
func TestReplacedIsTold(t *testing.T) {
	s := serve(t, StoreConfig{}, ServerConfig{})
	p := s.publisher(manifestOf(t, 10))
	publishOne(t, p)
	a := must(s.attach(wire.Hello{}))(t)
	defer a.Close()
	_, place, _ := a.Pin(0)
	check(t, p.Close())
	s.until("the publisher's end", func() bool { return s.store.Stats().Publisher == nil })
	p = s.publisher(manifestOf(t, 11))
	defer p.Close()
	changed := a.Changed()
	if begun := ask(t, p, Ask{Op: OpBegin}); begun.Generation != 2 || a.Err() != nil {
		t.Errorf("%+v; a reader of the other segment: %v", begun, a.Err())
	}
	ask(t, p, Ask{Op: OpAbort})
	publishOne(t, p)
	<-changed
	if notice := as[*wire.Notice](t, a.Err()); notice.Code != wire.CodeReplaced {
		t.Errorf("%v", notice)
	}
	if wrongContent(a.Segment().Manifest(), a.Segment().Data(place), 1) >= 0 {
		t.Error("what was held changed")
	}
	a.Unpin(place)
	b := must(s.attach(wire.Hello{}))(t)
	defer b.Close()
	if b.Accepted().Newest != 2 || b.Segment().Manifest().EncodedBytes(0) != 11 {
		t.Errorf("%+v", b.Accepted())
	}
}

// TestBadPublishers: each breaks a rule, is told so and ended alone; what it began is not there, and the next one may have the table.
func TestBadPublishers(t *testing.T) {
	s := serve(t, StoreConfig{Generations: 2}, ServerConfig{WriteTimeout: time.Second})
	m := manifestOf(t, 10)
	p := s.publisher(m)
	publishOne(t, p)
	check(t, p.Close())
	length := func(n uint32) []byte { return binary.LittleEndian.AppendUint32(nil, n) }
	cases := map[string]struct {
		before []Ask
		junk   []byte
		says   string
	}{
		"commit without begin":     {junk: message(t, Ask{Op: OpCommit, Generation: 2}), says: "not under way"},
		"commit of another":        {[]Ask{{Op: OpBegin}}, message(t, Ask{Op: OpCommit, Generation: 3}), "not under way"},
		"begin twice":              {[]Ask{{Op: OpBegin}}, message(t, Ask{Op: OpBegin}), "is under way"},
		"negative deadline":        {junk: message(t, Ask{Op: OpBegin, DeadlineMS: -1}), says: "-1 ms"},
		"unknown operation":        {junk: message(t, Ask{Op: "boom"}), says: `"boom"`},
		"no object":                {junk: append(length(4), "true"...), says: "message"},
		"no JSON":                  {junk: append(length(4), "{{{{"...), says: "message"},
		"length 0":                 {junk: length(0), says: "0 bytes"},
		"length 1":                 {junk: append(length(1), 'x'), says: "1 bytes"},
		"length beyond the limit":  {junk: length(wire.MessageBytesMax + 1), says: "65537 bytes"},
		"a chunk":                  {[]Ask{{Op: OpBegin}}, length(wire.ChunkMark | 100), "sends none"},
		"text":                     {junk: []byte("GET / HTTP/1.1\r\n\r\n"), says: "bytes"},
		"junk after a whole begin": {[]Ask{{Op: OpBegin}, {Op: OpAbort}}, []byte{0xff, 0xff, 0xff, 0x7f, 1}, "bytes"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			s.until("the end of the one before", func() bool { return s.store.Stats().Publisher == nil })
			p := s.publisher(m)
			defer p.Close()
			for _, a := range c.before {
				ask(t, p, a)
			}
			_ = must(p.Conn().Write(c.junk))(t)
			length, _, err := wire.ReadMessageLength(p.Conn())
			if err != nil || length != 0 {
				t.Fatalf("length %d, %v; want 0 and a notice", length, err)
			}
			var mark [1]byte
			_ = must(io.ReadFull(p.Conn(), mark[:]))(t)
			notice := must(wire.ReadNotice(p.Conn()))(t)
			if notice.Code != wire.CodeBadPeer && notice.Code != wire.CodeBadChunk || !strings.Contains(notice.Reason, c.says) {
				t.Errorf("%v, want %q", notice, c.says)
			}
		})
	}
	s.until("the end of the last", func() bool { return s.store.Stats().Publisher == nil })
	s.until("all are counted", func() bool {
		n := s.server.Stats().CutOff
		return n[wire.CodeBadPeer] == uint64(len(cases)-1) && n[wire.CodeBadChunk] == 1
	})
	p = s.publisher(m)
	defer p.Close()
	if got := publishOne(t, p); got.Generation != 2 {
		t.Errorf("after all of them: %+v", got)
	}
}

func message(t *testing.T, a Ask) []byte {
	t.Helper()
	return must(wire.AppendMessage(nil, a, wire.MessageBytesMax))(t)
}

// TestPublisherClosesAtEachStage: nothing of what was not published is there, whatever it had written.
func TestPublisherClosesAtEachStage(t *testing.T) {
	s := serve(t, StoreConfig{Generations: 2}, ServerConfig{})
	m := manifestOf(t, 10)
	first := s.publisher(m)
	publishOne(t, first)
	check(t, first.Close())
	s.until("the publisher's end", func() bool { return s.store.Stats().Publisher == nil })
	for name, stage := range map[string]func(p *PublisherAttachment){
		"attached":     func(*PublisherAttachment) {},
		"half a word":  func(p *PublisherAttachment) { _ = must(p.Conn().Write([]byte{3, 0}))(t) },
		"half a begin": func(p *PublisherAttachment) { _ = must(p.Conn().Write(message(t, Ask{Op: OpBegin})[:9]))(t) },
		"begun":        func(p *PublisherAttachment) { ask(t, p, Ask{Op: OpBegin}) },
		"written":      func(p *PublisherAttachment) { fill(p, ask(t, p, Ask{Op: OpBegin})) },
		"half a commit": func(p *PublisherAttachment) {
			fill(p, ask(t, p, Ask{Op: OpBegin}))
			_ = must(p.Conn().Write(message(t, Ask{Op: OpCommit, Generation: 2})[:9]))(t)
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := s.publisher(m)
			stage(p)
			check(t, p.Close())
			s.until("the publisher's end", func() bool { return s.store.Stats().Publisher == nil })
			if st := s.store.Stats(); st.Newest != 1 || len(st.Generations) != 1 || s.store.current.view.Generation(1-st.Generations[0].Place) != 0 {
				t.Errorf("left behind: %+v", st)
			}
		})
	}
	if n := len(s.server.Stats().CutOff); n != 0 {
		t.Errorf("peers that only closed were cut off: %v", s.server.Stats().CutOff)
	}
}

// TestBadReaders: a reader that speaks is cut off; one that writes junk to its page harms nobody; one that does not read its news is not cut off, and keeps
// its pins.
func TestBadReaders(t *testing.T) {
	s := serve(t, StoreConfig{Generations: 3}, ServerConfig{WriteTimeout: time.Second})
	m := manifestOf(t, 10)
	p := s.publisher(m)
	defer p.Close()
	publishOne(t, p)

	speaker := must(s.attach(wire.Hello{}))(t)
	defer speaker.Close()
	changed := speaker.Changed()
	_ = must(speaker.conn.Write([]byte("hello")))(t)
	<-changed
	if notice := as[*wire.Notice](t, speaker.Err()); notice.Code != wire.CodeBadPeer {
		t.Errorf("%v", notice)
	}

	scribbler := must(s.attach(wire.Hello{}))(t)
	defer scribbler.Close()
	for i := range scribbler.page.Bytes() {
		scribbler.page.Bytes()[i] = byte(i*7 + 1)
	}

	var accepted wire.AcceptedSubscribe // a reader that reads nothing after the reply
	conn := must(net.Dial("unix", s.path))(t)
	defer conn.Close()
	check(t, wire.WriteHello(conn, &wire.Hello{Role: wire.RoleSubscribe, Table: "w"}))
	check(t, wire.ReadReply(conn, &accepted)) // without its descriptors
	for range 2000 {
		publishOne(t, p)
	}
	if st := s.store.Stats(); st.Newest != 2001 || len(st.Readers) != 2 {
		t.Errorf("newest %d, %d readers", st.Newest, len(st.Readers))
	}
	var n int
	_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	for b := make([]byte, 4096); n < 1; {
		k, err := conn.Read(b)
		check(t, err)
		n += k
	}
	publishOne(t, p)
	check(t, speaker.Close())
	s.until("the one that spoke is counted", func() bool { return s.server.Stats().CutOff[wire.CodeBadPeer] == 1 })
	if got := s.server.Stats().CutOff; len(got) != 1 {
		t.Errorf("cut off: %v", got)
	}
}

func TestServeRefusals(t *testing.T) {
	s := serve(t, StoreConfig{ReadersMax: 1, Capacity: 1 << 20}, ServerConfig{})
	m := manifestOf(t, 10)
	publisher := func(change func(h *wire.Hello)) error {
		h := wire.Hello{Table: "w", Manifest: m.JSON()}
		change(&h)
		return must1(AttachPublisher(t.Context(), s.path, h))
	}
	refused := func(err error, code wire.Code, says string) {
		t.Helper()
		if r := as[*wire.Refusal](t, err); r.Code != code || !strings.Contains(r.Reason, says) {
			t.Errorf("%v; want %s, %q", r, code, says)
		}
	}
	refused(publisher(func(h *wire.Hello) { h.Table = "x" }), wire.CodeUnknownTable, "this daemon has w")
	refused(publisher(func(h *wire.Hello) { h.Manifest = []byte(`{"tensors":[]}`) }), wire.CodeBadOption, "the manifest:")
	refused(publisher(func(h *wire.Hello) { h.Manifest = manifestOf(t, 1<<20).JSON() }), wire.CodeBadOption, "the table's capacity is 1048576")
	p := s.publisher(m)
	defer p.Close()
	publishOne(t, p)
	a := must(s.attach(wire.Hello{}))(t)
	defer a.Close()
	_, err := s.attach(wire.Hello{})
	refused(err, wire.CodeTooManyConnections, "1 readers are attached")
	_, err = s.attach(wire.Hello{Delta: true})
	refused(err, wire.CodeBadOption, "set stream")

	s.stop() // what is attached is told, what comes is refused
	changed := a.Changed()
	if a.Err() == nil {
		<-changed
	}
	if notice := as[*wire.Notice](t, a.Err()); notice.Code != wire.CodeShuttingDown {
		t.Errorf("%v", notice)
	}
	_, err = s.attach(wire.Hello{})
	refused(err, wire.CodeShuttingDown, "stopping")
}

// TestFreedWithTheReader: a reader that ends lets go of all its pins, and its memory goes when nothing is held.
func TestFreedWithTheReader(t *testing.T) {
	s := serve(t, StoreConfig{Generations: 2}, ServerConfig{})
	p := s.publisher(manifestOf(t, 10))
	defer p.Close()
	publishOne(t, p)
	a := must(s.attach(wire.Hello{}))(t)
	_, place, _ := a.Pin(0)
	publishOne(t, p)
	if got := ask(t, p, Ask{Op: OpBegin}); got.Op != OpFailed {
		t.Errorf("%+v", got)
	}
	check(t, a.Close()) // holds on: something is pinned
	if _, _, ok := a.Pin(0); ok {
		t.Error("a closed attachment pins")
	}
	if wrongContent(a.Segment().Manifest(), a.Segment().Data(place), 1) >= 0 {
		t.Error("what is pinned changed when the attachment was closed")
	}
	if !errors.Is(a.Err(), os.ErrClosed) {
		t.Errorf("%v", a.Err())
	}
	if got := ask(t, p, Ask{Op: OpBegin}); got.Op != OpFailed {
		t.Errorf("closed, and not released: %+v", got)
	}
	a.Unpin(place)
	if got := ask(t, p, Ask{Op: OpBegin, DeadlineMS: 20_000}); got.Op != OpPlace && answer(t, p.Conn()).Op != OpPlace {
		t.Errorf("released: %+v", got)
	}
	if len(a.mapping.Bytes()) > 0 || len(a.page.Bytes()) > 0 {
		t.Error("the memory is still mapped")
	}
}

// TestManyTensors: 10,000 tensors of a few bytes.
func TestManyTensors(t *testing.T) {
	s := serve(t, StoreConfig{}, ServerConfig{})
	sizes := make([]int64, 10_000)
	for i := range sizes {
		sizes[i] = int64(i % 9)
	}
	p := s.publisher(manifestOf(t, sizes...))
	defer p.Close()
	publishOne(t, p)
	a := must(s.attach(wire.Hello{}))(t)
	defer a.Close()
	generation, place, _ := a.Pin(0)
	defer a.Unpin(place)
	if i := wrongContent(a.Segment().Manifest(), a.Segment().Data(place), generation); i >= 0 {
		t.Errorf("tensor %d", i)
	}
	if text := fmt.Sprint(a.Segment().Digest(place)); text != fmt.Sprint(Digest(a.Segment().Manifest(), decodeSums(a.Segment().SumBytes(place)))) {
		t.Error("the digest is not that of the sums")
	}
}
