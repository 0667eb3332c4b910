package daemon

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

const testChunk = 64 << 10

// tensorsConfig is a daemon with one table of each kind: grads, a (samples), model (weights).
func tensorsConfig(t testing.TB) Config {
	cfg := testConfig(t)
	cfg.Listen = cfg.Listen[:2]
	cfg.Tables = append(cfg.Tables, Table{Name: "grads", Kind: "tensors", ChunkBytes: testChunk, Batches: 32}, Table{Name: "model", Kind: "weights"})
	return cfg
}

// testManifest has two tensors of three chunks together.
func testManifest(t testing.TB) *tensor.Manifest {
	t.Helper()
	m, err := tensor.NewManifest([]tensor.Tensor{
		{Name: "w", DType: spec.F32, Shape: []int64{2 * testChunk / 4}}, {Name: "b", DType: spec.F32, Shape: []int64{16}},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// worker is a producer of tensors under test control.
type worker struct {
	net.Conn
	t        testing.TB
	name     string
	m        *tensor.Manifest
	accepted wire.AcceptedPush
}

func (r *running) dial(t testing.TB, addr string) net.Conn {
	t.Helper()
	network, at, _ := strings.Cut(addr, "://")
	c, err := net.Dial(network, at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(time.Minute)) // so that a broken daemon fails and does not hang
	return c
}

// greet sends a hello and returns the refusal, nil if it was accepted.
func greet(t testing.TB, c net.Conn, h *wire.Hello, into wire.Accepted) *wire.Refusal {
	t.Helper()
	if err := wire.WriteHello(c, h); err != nil {
		t.Fatal(err)
	}
	err := wire.ReadReply(c, into)
	var refusal *wire.Refusal
	if err != nil && !errors.As(err, &refusal) {
		t.Fatal(err)
	}
	return refusal
}

func pushHello(name string, m *tensor.Manifest) *wire.Hello {
	return &wire.Hello{Role: wire.RolePush, Table: "grads", Session: name, Manifest: m.JSON(), Ack: wire.AckCommitted, Notes: true}
}

// work connects a producer.
func (r *running) work(t testing.TB, addr, name string, m *tensor.Manifest) *worker {
	t.Helper()
	w := &worker{Conn: r.dial(t, addr), t: t, name: name, m: m}
	if refusal := greet(t, w, pushHello(name, m), &w.accepted); refusal != nil {
		t.Fatal(refusal)
	}
	return w
}

// header is that of a chunk of this producer.
func (w *worker) header(step uint64, flags uint16, i uint32, offset uint64, length int) tensor.Header {
	return tensor.Header{
		Flags: flags, Step: step, Stream: w.accepted.Stream, Producer: tensor.ProducerID(w.name), Manifest: w.m.ID(), Tensor: i, Offset: offset, Length: uint32(length),
	}
}

// chunk makes a chunk whose data is full of one byte.
func chunk(h tensor.Header, fill byte) []byte {
	b := make([]byte, tensor.HeaderBytes+testChunk)
	data := b[tensor.HeaderBytes:][:min(int(h.Length), testChunk)]
	for i := range data {
		data[i] = fill
	}
	if h.Flags&tensor.FlagNoCRC == 0 {
		h.DataCRC = tensor.CRC(data)
	}
	h.Put(b)
	return b
}

// step is the chunks of a whole step.
func (w *worker) step(step uint64) [][]byte {
	return [][]byte{
		chunk(w.header(step, tensor.FlagBegin, 0, 0, testChunk), byte(step)), chunk(w.header(step, 0, 0, testChunk, testChunk), byte(step)),
		chunk(w.header(step, 0, 1, 0, 64), byte(step)),
	}
}

func (w *worker) send(chunks ...[]byte) {
	w.t.Helper()
	for _, c := range chunks {
		if _, err := w.Write(c); err != nil {
			w.t.Fatal(err)
		}
	}
}

// heard is what a daemon says among and after acks.
type heard struct {
	acks   int
	notes  []string // "acks before it: code step"
	reason string
	notice wire.Code // "": it closed without one
}

// hear reads so many acks, or to the end if n is 0.
func (w *worker) hear(n int) (h heard) {
	w.t.Helper()
	for one := make([]byte, 1); n == 0 || h.acks < n; {
		if _, err := io.ReadFull(w, one); err == io.EOF {
			return h
		} else if err != nil {
			w.t.Fatal(err)
		}
		switch one[0] {
		case wire.Ack:
			h.acks++
		case wire.NoteMark:
			note, err := wire.ReadNote(w)
			if err != nil {
				w.t.Fatal(err)
			}
			h.notes = append(h.notes, fmt.Sprintf("%d: %s %d", h.acks, note.Code, note.Step))
		case wire.NoticeMark:
			notice, err := wire.ReadNotice(w)
			if err != nil {
				w.t.Fatal(err)
			}
			h.notice, h.reason = notice.Code, notice.Reason
		}
	}
	return h
}

// leave closes the producer's side and reads to the end.
func (w *worker) leave() heard {
	w.t.Helper()
	if err := w.Conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		w.t.Fatal(err)
	}
	return w.hear(0)
}

// reader reads chunks as a trainer does.
type reader struct {
	*shm.Attachment
	t testing.TB
}

func (r *running) reader(t testing.TB) *reader {
	t.Helper()
	a, err := shm.Attach(t.Context(), strings.TrimPrefix(r.addr.Unix, "unix://"), wire.Hello{Table: "grads", Prefetch: 8})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.Close() })
	return &reader{a, t}
}

// next returns the header of the next chunk, and the stream beside it.
func (r *reader) next() (tensor.Header, uint64) {
	r.t.Helper()
	b, err := r.Next(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	defer r.Release(b)
	h, err := tensor.ParseHeader(b.Column(0))
	if err != nil {
		r.t.Fatal(err)
	}
	return h, b.Streams()[0]
}

// story tells the next n chunks: who, what, step.
func (r *reader) story(n int, names ...string) (all []string) {
	r.t.Helper()
	for range n {
		h, stream := r.next()
		who := "?"
		for _, name := range names {
			if tensor.ProducerID(name) == h.Producer {
				who = name
			}
		}
		what := fmt.Sprintf("%d@%d", h.Step, h.Offset)
		switch {
		case h.Flags&tensor.FlagOpened != 0:
			what = "opened"
		case h.Flags&tensor.FlagClosed != 0:
			what = "closed"
		}
		if (what == "opened" || what == "closed") == (stream == h.Stream) {
			r.t.Errorf("chunk %q of stream %d lies beside stream %d", what, h.Stream, stream)
		}
		if h.Flags&tensor.FlagRefused != 0 {
			what += " refused"
		}
		all = append(all, who+" "+what)
	}
	return all
}

func wantStory(t testing.TB, got []string, want ...string) {
	t.Helper()
	if strings.Join(got, "; ") != strings.Join(want, "; ") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "; "), strings.Join(want, "; "))
	}
}

// TestTensorsOverSockets: chunks land in order between what the herald says of their producer, over TCP and unix sockets, and its manifest and name can be asked for.
func TestTensorsOverSockets(t *testing.T) {
	r := start(t, tensorsConfig(t))
	reader := r.reader(t)
	for i, addr := range []string{r.addr.TCP, r.addr.Unix} {
		name := fmt.Sprintf("worker-%d", i)
		m := testManifest(t)
		w := r.work(t, addr, name, m)
		if w.accepted.ChunkBytes != testChunk {
			t.Errorf("chunk_bytes is %d", w.accepted.ChunkBytes)
		}
		w.send(w.step(7)...)
		w.hear(3)
		var known wire.AcceptedManifest
		if refusal := greet(t, r.dial(t, addr), &wire.Hello{Role: wire.RoleManifest, Table: "grads", ManifestID: fmt.Sprintf("%016x", m.ID())}, &known); refusal != nil {
			t.Fatal(refusal)
		}
		if got, err := tensor.ParseManifest(known.Manifest); err != nil || !got.Equal(m) {
			t.Errorf("manifest %s, %v", known.Manifest, err)
		}
		var named wire.AcceptedManifest
		if refusal := greet(t, r.dial(t, addr), &wire.Hello{Role: wire.RoleManifest, Table: "grads", SessionOf: int64(w.accepted.Stream)}, &named); refusal != nil || named.Session != name {
			t.Errorf("stream %d is of %q, %v", w.accepted.Stream, named.Session, refusal)
		}
		if end := w.leave(); end.acks != 0 || end.notice != "" {
			t.Errorf("ended with %+v", end)
		}
		wantStory(t, reader.story(5, name), name+" opened", name+" 7@0", name+" 7@65536", name+" 7@0", name+" closed")
	}
}
