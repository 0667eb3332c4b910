//go:build linux

package weights

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

// netDaemon serves one table, "w", over one listener.
type netDaemon struct {
	store            *Store
	server           *Server
	network, address string
	dial             func(address string) (net.Conn, error)
	ends             chan error // what Serve returned
}

func listenWeights(t testing.TB, network string, cfg ServerConfig, sc StoreConfig) *netDaemon {
	t.Helper()
	ignore := goleak.IgnoreCurrent()
	sc.Table = "w"
	d := &netDaemon{store: must(NewStore(sc))(t), network: network, address: "127.0.0.1:0", ends: make(chan error, 1024)}
	cfg.Stores = map[string]*Store{"w": d.store}
	d.server = must(NewServer(cfg))(t)
	if network == "unix" {
		d.address = filepath.Join(t.TempDir(), "s")
	}
	l, dial := listenAt(t, network, d.address)
	d.address, d.dial = l.Addr().String(), dial
	ctx, stop := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				hello, err := wire.ReadHello(conn)
				if err != nil {
					conn.Close()
					return
				}
				d.ends <- d.server.Serve(ctx, conn, hello)
			})
		}
	})
	t.Cleanup(func() {
		stop()
		l.Close()
		serving.Wait()
		check(t, d.store.Close())
		goleak.VerifyNone(t, ignore)
	})
	return d
}

// rawPublisher is a publisher that says what it is told to.
type rawPublisher struct {
	t testing.TB
	net.Conn
	m        *tensor.Manifest
	accepted wire.AcceptedPublish
}

func (d *netDaemon) publisher(t testing.TB, m *tensor.Manifest) *rawPublisher {
	t.Helper()
	p := &rawPublisher{t: t, Conn: must(d.dial(d.address))(t), m: m}
	t.Cleanup(func() { p.Close() })
	check(t, p.SetDeadline(time.Now().Add(30*time.Second)))
	check(t, wire.WriteHello(p, &wire.Hello{Role: wire.RolePublish, Table: "w", Manifest: m.JSON(), Client: "raw"}))
	check(t, wire.ReadReply(p, &p.accepted))
	return p
}

func (p *rawPublisher) ask(a *Ask) *Answer {
	p.t.Helper()
	b := must(wire.AppendMessage(nil, a, wire.MessageBytesMax))(p.t)
	_, err := p.Write(b)
	check(p.t, err)
	return p.answer()
}

func (p *rawPublisher) answer() *Answer {
	p.t.Helper()
	var got Answer
	check(p.t, wire.ReadMessage(p, wire.MessageBytesMax, &got))
	return &got
}

func (p *rawPublisher) begin() uint64 {
	p.t.Helper()
	a := p.ask(&Ask{Op: OpBegin, DeadlineMS: 10_000})
	if a.Op != OpPlace || a.Generation == 0 {
		p.t.Fatalf("answer %+v", a)
	}
	return a.Generation
}

// header is that of a chunk as it should be: n flat bytes from the start of a tensor's offset on.
func (p *rawPublisher) header(generation uint64, i int, offset int64, data []byte) tensor.Header {
	return tensor.Header{
		Step: generation, Stream: p.accepted.Publisher, Manifest: p.m.ID(),
		Tensor: uint32(i), Offset: uint64(offset), Length: uint32(len(data)), DataCRC: tensor.CRC(data),
	}
}

// chunk is a chunk as it travels.
func chunkText(h tensor.Header, data []byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, uint32(tensor.HeaderBytes+len(data))|wire.ChunkMark)
	b = append(b, make([]byte, tensor.HeaderBytes)...)
	h.Put(b[4:])
	return append(b, data...)
}

// flatContent is the flat bytes of a generation.
func flatContent(m *tensor.Manifest, generation uint64) []byte {
	b := make([]byte, m.DataBytes())
	for i := range m.Len() {
		contentOf(b[m.Offset(i):][:m.EncodedBytes(i)], generation, i)
	}
	return b
}

// send sends flat bytes from at to end of the content of a generation, in chunks of at most so many bytes.
func (p *rawPublisher) send(generation uint64, at, end, most int64) {
	p.t.Helper()
	flat := flatContent(p.m, generation)
	for at < end {
		n := min(most, end-at)
		i := p.m.At(at)
		h := p.header(generation, i, at-p.m.Offset(i), flat[at:at+n])
		if _, err := p.Write(chunkText(h, flat[at:at+n])); err != nil {
			p.t.Fatal(err)
		}
		at += n
	}
}

// notice reads why the daemon ended the connection, after any answers.
func (p *rawPublisher) notice() *wire.Notice {
	p.t.Helper()
	n, err := readNotice(p)
	check(p.t, err)
	return n
}

func readNotice(r io.Reader) (*wire.Notice, error) {
	for {
		length, chunk, err := wire.ReadMessageLength(r)
		if err != nil {
			return nil, err
		}
		if chunk {
			return nil, errors.New("a chunk from the daemon")
		}
		if length > 0 {
			if _, err := io.CopyN(io.Discard, r, int64(length)); err != nil {
				return nil, err
			}
			continue
		}
		var mark [1]byte
		if _, err := io.ReadFull(r, mark[:]); err != nil {
			return nil, err
		}
		if mark[0] != wire.NoticeMark {
			return nil, fmt.Errorf("mark %#x", mark[0])
		}
		return wire.ReadNotice(r)
	}
}

// untouched fails the test unless nothing was published, no publisher has the table, and all places are free.
func (d *netDaemon) untouched(t testing.TB) {
	t.Helper()
	<-d.ends
	st := d.store.Stats()
	if st.Newest != 0 || st.Publisher != nil {
		t.Errorf("newest %d, publisher %v", st.Newest, st.Publisher)
	}
}

// TestStreamOrders: chunks may come in any order and of any size; what is published is what was sent.
func TestStreamOrders(t *testing.T) {
	m := manifestOf(t, 700, 0, 3, 256, 70_000, 1, 300_000)
	for _, network := range []string{"tcp", "unix"} {
		for _, most := range []int64{256, 512, 4096, 65536, 1 << 20} {
			t.Run(fmt.Sprint(network, most), func(t *testing.T) {
				d := listenWeights(t, network, ServerConfig{}, StoreConfig{Heap: true})
				p := d.publisher(t, m)
				g := p.begin()
				n := m.DataBytes()
				cut := n / 3 / 256 * 256
				p.send(g, 2*cut, n, most)
				p.send(g, 0, cut, most)
				p.send(g, cut, 2*cut, most)
				a := p.ask(&Ask{Op: OpCommit, Generation: g})
				if a.Op != OpPublished {
					t.Fatalf("answer %+v", a)
				}
				r := must(d.store.OpenReader(Who{}))(t)
				held, _ := r.Latest(0)
				if i := wrongContent(m, held.Data(), g); i >= 0 {
					t.Errorf("tensor %d is wrong", i)
				}
				for i, sum := range held.Sums() {
					if want := tensor.CRC(held.Data()[m.Offset(i):][:m.EncodedBytes(i)]); sum != want {
						t.Errorf("tensor %d has the sum %08x, want %08x", i, sum, want)
					}
				}
				if held.Digest() != a.Digest {
					t.Errorf("digest %v, answered %v", held.Digest(), a.Digest)
				}
				held.Release()
				check(t, r.Close())
			})
		}
	}
}

// TestStreamEachByteFlipped: a chunk of which any one bit pattern was damaged on its way is never published.
func TestStreamEachByteFlipped(t *testing.T) {
	m := manifestOf(t, 200)
	d := listenWeights(t, "unix", ServerConfig{}, StoreConfig{Heap: true})
	size := len(chunkText(tensor.Header{}, make([]byte, 200)))
	for at := range size {
		p := d.publisher(t, m)
		g := p.begin()
		data := flatContent(m, g)[:200]
		text := chunkText(p.header(g, 0, 0, data), data)
		text[at] ^= byte(1 + at%255)
		_, err := p.Write(text)
		check(t, err)
		b := must(wire.AppendMessage(nil, &Ask{Op: OpCommit, Generation: g}, wire.MessageBytesMax))(t)
		_, _ = p.Write(b) // may find the connection closed
		check(t, p.Conn.(*net.UnixConn).CloseWrite())
		n, err := readNotice(p)
		if err == nil && at >= 4 && n.Code != wire.CodeBadChunk {
			t.Errorf("byte %d: notice %v", at, n)
		}
		if err != nil && at >= 4 {
			t.Errorf("byte %d: no notice: %v", at, err)
		}
		p.Close()
		<-d.ends
	}
	if st := d.store.Stats(); st.Newest != 0 || st.Publisher != nil || st.Published != 0 || st.Failed[FailedEnded] != uint64(size) {
		t.Errorf("stats %+v", st)
	}
}

// TestStreamWrongChunks: each way in which a chunk can be wrong ends the publisher with a reason that says so, and leaves nothing.
func TestStreamWrongChunks(t *testing.T) {
	m := manifestOf(t, 1000, 300, 70_000)
	for _, c := range []struct {
		name string
		make func(p *rawPublisher, g uint64, good tensor.Header, data []byte) []byte
		want string
	}{
		{"other generation", func(_ *rawPublisher, g uint64, h tensor.Header, data []byte) []byte {
			h.Step = g + 1
			return chunkText(h, data)
		}, "is of generation 2"},
		{"other stream", func(_ *rawPublisher, _ uint64, h tensor.Header, data []byte) []byte {
			h.Stream++
			return chunkText(h, data)
		}, "is of stream 2"},
		{"a producer", func(_ *rawPublisher, _ uint64, h tensor.Header, data []byte) []byte {
			h.Producer = 7
			return chunkText(h, data)
		}, "must be 0"},
		{"other manifest", func(_ *rawPublisher, _ uint64, h tensor.Header, data []byte) []byte {
			h.Manifest++
			return chunkText(h, data)
		}, "manifest"},
		{"no such tensor", func(_ *rawPublisher, _ uint64, h tensor.Header, data []byte) []byte {
			h.Tensor = 3
			return chunkText(h, data)
		}, "is of tensor 3"},
		{"outside its tensor", func(_ *rawPublisher, _ uint64, h tensor.Header, data []byte) []byte {
			h.Offset = 1024
			return chunkText(h, data)
		}, `"layers.0.w" at byte 1024: lies outside`},
		{"beyond the last", func(p *rawPublisher, g uint64, _ tensor.Header, _ []byte) []byte {
			data := make([]byte, 70_000-69_888+256)
			return chunkText(p.header(g, 2, 69_888, data), data)
		}, "beyond the last tensor"},
		{"not on a boundary", func(_ *rawPublisher, _ uint64, h tensor.Header, data []byte) []byte {
			h.Offset = 8
			return chunkText(h, data)
		}, "multiple of 256"},
		{"cuts an element's block", func(p *rawPublisher, g uint64, _ tensor.Header, data []byte) []byte {
			return chunkText(p.header(g, 0, 0, data[:100]), data[:100])
		}, "end neither"},
		{"wrong sum", func(_ *rawPublisher, _ uint64, h tensor.Header, data []byte) []byte {
			h.DataCRC ^= 1
			return chunkText(h, data)
		}, `"layers.0.w" at byte 0: the data is damaged`},
		{"not summed", func(_ *rawPublisher, _ uint64, h tensor.Header, data []byte) []byte {
			h.Flags, h.DataCRC = tensor.FlagNoCRC, 0
			return chunkText(h, data)
		}, "BEGIN alone"},
		{"a list", func(_ *rawPublisher, _ uint64, h tensor.Header, _ []byte) []byte {
			h.Flags, h.Length = tensor.FlagEnd, 4
			return chunkText(h, []byte{0, 0, 0, 0})
		}, "BEGIN alone"},
		{"other length", func(_ *rawPublisher, _ uint64, h tensor.Header, data []byte) []byte {
			return chunkText(h, data[:len(data)-256])
		}, "were announced"},
		{"overlap", func(p *rawPublisher, g uint64, h tensor.Header, data []byte) []byte {
			return append(chunkText(h, data), chunkText(p.header(g, 0, 256, data[256:]), data[256:])...)
		}, "overlaps"},
		{"overlap from before", func(p *rawPublisher, g uint64, _ tensor.Header, _ []byte) []byte {
			flat := flatContent(p.m, g)
			return append(chunkText(p.header(g, 0, 512, flat[512:1024]), flat[512:1024]), chunkText(p.header(g, 0, 0, flat[:768]), flat[:768])...)
		}, "overlaps"},
		{"something in a gap", func(p *rawPublisher, g uint64, _ tensor.Header, _ []byte) []byte {
			flat := bytes.Clone(flatContent(p.m, g)[:1024+300])
			flat[1010] = 1
			return chunkText(p.header(g, 0, 0, flat), flat)
		}, "not zero"},
		{"too short", func(*rawPublisher, uint64, tensor.Header, []byte) []byte {
			return binary.LittleEndian.AppendUint32(nil, 63|wire.ChunkMark)
		}, "63 bytes are announced"},
		{"too long", func(*rawPublisher, uint64, tensor.Header, []byte) []byte {
			return binary.LittleEndian.AppendUint32(nil, 65+64<<10|wire.ChunkMark)
		}, "65601 bytes are announced"},
		{"far too long", func(*rawPublisher, uint64, tensor.Header, []byte) []byte {
			return binary.LittleEndian.AppendUint32(nil, 0xFFFFFFFF)
		}, "2147483647 bytes are announced"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := listenWeights(t, "tcp", ServerConfig{ChunkBytes: 64 << 10}, StoreConfig{Heap: true})
			p := d.publisher(t, m)
			g := p.begin()
			data := flatContent(m, g)[:1000]
			_, err := p.Write(c.make(p, g, p.header(g, 0, 0, data), data))
			check(t, err)
			n := p.notice()
			if n.Code != wire.CodeBadChunk || !strings.Contains(n.Reason, c.want) {
				t.Errorf("notice %v, want %s with %q", n, wire.CodeBadChunk, c.want)
			}
			p.Close()
			d.untouched(t)
		})
	}
}

// TestStreamChunkLimits: the longest and the shortest chunk are taken.
func TestStreamChunkLimits(t *testing.T) {
	m := manifestOf(t, 64<<10, 1)
	d := listenWeights(t, "tcp", ServerConfig{ChunkBytes: 64 << 10}, StoreConfig{Heap: true})
	p := d.publisher(t, m)
	g := p.begin()
	begin := tensor.Header{Flags: tensor.FlagBegin, Step: g, Stream: p.accepted.Publisher, Manifest: m.ID()}
	_, err := p.Write(chunkText(begin, nil))
	check(t, err)
	p.send(g, 0, 64<<10, 64<<10)
	p.send(g, 64<<10, 64<<10+1, 1)
	if a := p.ask(&Ask{Op: OpCommit, Generation: g}); a.Op != OpPublished {
		t.Errorf("answer %+v", a)
	}
}

// TestStreamSameAgain: a chunk that comes again as it was is ignored.
func TestStreamSameAgain(t *testing.T) {
	m := manifestOf(t, 3000)
	d := listenWeights(t, "tcp", ServerConfig{}, StoreConfig{Heap: true})
	p := d.publisher(t, m)
	g := p.begin()
	p.send(g, 0, 1024, 512)
	p.send(g, 512, 1024, 512)
	p.send(g, 1024, 3000, 4096)
	p.send(g, 0, 512, 512)
	if a := p.ask(&Ask{Op: OpCommit, Generation: g}); a.Op != OpPublished {
		t.Errorf("answer %+v", a)
	}
}

// TestStreamEndsAtEachStage: a publisher that closes leaves nothing, whatever it had done, and another one can publish.
func TestStreamEndsAtEachStage(t *testing.T) {
	m := manifestOf(t, 100_000, 5000)
	for _, network := range []string{"tcp", "unix"} {
		d := listenWeights(t, network, ServerConfig{}, StoreConfig{Heap: true})
		for stage, run := range []func(p *rawPublisher){
			func(*rawPublisher) {},
			func(p *rawPublisher) { p.begin() },
			func(p *rawPublisher) { p.Write([]byte{1, 0}) },
			func(p *rawPublisher) { p.begin(); p.Write([]byte{0xff, 0, 0, 0x80, 'I'}) },
			func(p *rawPublisher) { g := p.begin(); p.send(g, 0, 65536, 1024) },
			func(p *rawPublisher) {
				g := p.begin()
				data := flatContent(m, g)[:4096]
				text := chunkText(p.header(g, 0, 0, data), data)
				p.Write(text[:2000])
			},
			func(p *rawPublisher) { g := p.begin(); p.send(g, 0, m.DataBytes(), 65536) },
			func(p *rawPublisher) {
				g := p.begin()
				p.send(g, 0, m.DataBytes(), 65536)
				b := must(wire.AppendMessage(nil, &Ask{Op: OpCommit, Generation: g}, wire.MessageBytesMax))(p.t)
				p.Write(b[:len(b)-1])
			},
		} {
			t.Run(fmt.Sprint(network, stage), func(t *testing.T) {
				p := d.publisher(t, m)
				run(p)
				p.Close()
				d.untouched(t)
			})
		}
		p := d.publisher(t, m)
		g := p.begin()
		p.send(g, 0, m.DataBytes(), 65536)
		if a := p.ask(&Ask{Op: OpCommit, Generation: g}); a.Op != OpPublished {
			t.Errorf("answer %+v", a)
		}
	}
}

// TestStreamIncomplete: a commit before all bytes are there fails with the tensor's name, the place is given back, and the next generation can be begun.
func TestStreamIncomplete(t *testing.T) {
	m := manifestOf(t, 1000, 2000, 3000)
	d := listenWeights(t, "tcp", ServerConfig{}, StoreConfig{Heap: true})
	p := d.publisher(t, m)
	for range 5 { // more often than there are places
		g := p.begin()
		p.send(g, 0, m.Offset(1)+1024, 512)
		p.send(g, m.Offset(2), m.DataBytes()-256, 512)
		a := p.ask(&Ask{Op: OpCommit, Generation: g})
		if a.Op != OpFailed || a.Code != FailedIncomplete || !strings.Contains(a.Reason, `2 tensors`) || !strings.Contains(a.Reason, `"layers.1.w"`) {
			t.Fatalf("answer %+v", a)
		}
	}
	g := p.begin()
	p.send(g, 0, 1024, 512)
	if a := p.ask(&Ask{Op: OpAbort}); a.Op != OpAborted {
		t.Errorf("answer %+v", a)
	}
	g = p.begin() // nothing of the last one counts
	p.send(g, 1024, m.DataBytes(), 512)
	if a := p.ask(&Ask{Op: OpCommit, Generation: g}); a.Op != OpFailed {
		t.Errorf("answer %+v", a)
	}
	if st := d.store.Stats(); st.Newest != 0 || st.Failed[FailedIncomplete] != 6 || st.Failed[FailedAborted] != 1 {
		t.Errorf("stats %+v", st)
	}
}

// TestStreamGenerations: numbers only grow; one that does not is refused and the publisher may ask again.
func TestStreamGenerations(t *testing.T) {
	m := manifestOf(t, 100)
	d := listenWeights(t, "tcp", ServerConfig{}, StoreConfig{Heap: true})
	p := d.publisher(t, m)
	for _, c := range []struct {
		want uint64
		ok   bool
	}{{7, true}, {7, false}, {6, false}, {8, true}, {GenerationMax + 1, false}, {GenerationMax, true}, {0, false}} {
		a := p.ask(&Ask{Op: OpBegin, Generation: c.want})
		if ok := a.Op == OpPlace && a.Generation == c.want; ok != c.ok || !ok && a.Code != FailedOldGeneration {
			t.Fatalf("begin %d: %+v", c.want, a)
		}
		if c.ok {
			p.send(c.want, 0, 100, 256)
			if a := p.ask(&Ask{Op: OpCommit, Generation: c.want}); a.Op != OpPublished {
				t.Fatalf("answer %+v", a)
			}
		}
	}
}

// TestStreamOutOfTurn: what may not be said ends the publisher with bad_peer.
func TestStreamOutOfTurn(t *testing.T) {
	m := manifestOf(t, 100)
	message := func(v any) []byte { return must(wire.AppendMessage(nil, v, wire.MessageBytesMax))(t) }
	early := tensor.Header{Step: 1, Stream: 1, Manifest: m.ID(), Length: 100, DataCRC: tensor.CRC(make([]byte, 100))}
	for name, c := range map[string]struct {
		begin bool
		text  []byte
		code  wire.Code
	}{
		"commit":          {false, message(&Ask{Op: OpCommit, Generation: 1}), wire.CodeBadPeer},
		"other commit":    {true, message(&Ask{Op: OpCommit, Generation: 2}), wire.CodeBadPeer},
		"begin again":     {true, message(&Ask{Op: OpBegin}), wire.CodeBadPeer},
		"no such op":      {false, message(&Ask{Op: "publish"}), wire.CodeBadPeer},
		"negative":        {false, message(&Ask{Op: OpBegin, DeadlineMS: -1}), wire.CodeBadPeer},
		"no JSON":         {false, []byte("\x03\x00\x00\x00abc"), wire.CodeBadPeer},
		"too short":       {false, []byte{1, 0, 0, 0, '{'}, wire.CodeBadPeer},
		"too long":        {false, []byte{1, 0, 1, 0}, wire.CodeBadPeer},
		"length 0":        {false, []byte{0, 0, 0, 0}, wire.CodeBadPeer},
		"chunk too early": {false, chunkText(early, make([]byte, 100)), wire.CodeBadChunk},
	} {
		t.Run(name, func(t *testing.T) {
			d := listenWeights(t, "tcp", ServerConfig{}, StoreConfig{Heap: true})
			p := d.publisher(t, m)
			if c.begin {
				p.begin()
			}
			_, err := p.Write(c.text)
			check(t, err)
			if n := p.notice(); n.Code != c.code {
				t.Errorf("notice %v", n)
			}
			p.Close()
			d.untouched(t)
			if n := d.server.Stats().CutOff[c.code]; n != 1 {
				t.Errorf("%d were cut off", n)
			}
		})
	}
}

// TestStreamTimeouts: a publisher that stops inside a generation is stalled, one that says nothing is idle, and both leave nothing.
func TestStreamTimeouts(t *testing.T) {
	m := manifestOf(t, 1000)
	for name, c := range map[string]struct {
		cfg  ServerConfig
		run  func(p *rawPublisher)
		code wire.Code
	}{
		"idle":  {ServerConfig{IdleTimeout: 30 * time.Millisecond}, func(*rawPublisher) {}, wire.CodeIdleTimeout},
		"begun": {ServerConfig{StallTimeout: 30 * time.Millisecond}, func(p *rawPublisher) { p.begin() }, wire.CodeStalled},
		"a chunk": {ServerConfig{StallTimeout: 30 * time.Millisecond}, func(p *rawPublisher) {
			p.send(p.begin(), 0, 512, 512)
			p.Write([]byte{64, 1, 0, 0x80})
		}, wire.CodeStalled},
	} {
		t.Run(name, func(t *testing.T) {
			d := listenWeights(t, "tcp", c.cfg, StoreConfig{Heap: true})
			p := d.publisher(t, m)
			c.run(p)
			if n := p.notice(); n.Code != c.code {
				t.Errorf("notice %v", n)
			}
			p.Close()
			d.untouched(t)
		})
	}
}
