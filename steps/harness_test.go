package steps

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

const chunkBytes = tensor.ChunkBytesMin

// newRing is a ring of so many chunks on the heap.
func newRing(t testing.TB, batches int) *ring.Ring {
	t.Helper()
	r, _ := newRingIn(t, batches, 1)
	return r
}

// newRingIn also returns its memory.
func newRingIn(t testing.TB, batches, batchSize int) (*ring.Ring, []byte) {
	t.Helper()
	s, err := Spec(chunkBytes)
	if err != nil {
		t.Fatal(err)
	}
	l := ring.Layout{BatchSize: batchSize, Batches: batches, Columns: s.LeafBytes(), Spec: s.JSON(), Fingerprint: s.Fingerprint(), Table: "grads", Created: time.Unix(1, 0)}
	size, err := l.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	mem := ring.AlignedBytes(size)
	r, err := ring.Format(mem, l)
	if err != nil {
		t.Fatal(err)
	}
	return r, mem
}

func newKeeper(t testing.TB, cfg Config) *Keeper {
	t.Helper()
	cfg.ChunkBytes = chunkBytes
	return New(newRing(t, 64), cfg, nil)
}

// manifest has the tensors w, of two chunks, and b, of 64 bytes.
func manifest(t testing.TB, metadata ...string) *tensor.Manifest {
	t.Helper()
	with := map[string]string{}
	for _, m := range metadata {
		with[m] = m
	}
	m, err := tensor.NewManifest([]tensor.Tensor{
		{Name: "w", DType: spec.F32, Shape: []int64{2 * chunkBytes / 4}}, {Name: "b", DType: spec.F32, Shape: []int64{16}},
	}, with)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// other has one tensor of that many elements.
func other(t testing.TB, elements int64) *tensor.Manifest {
	t.Helper()
	m, err := tensor.NewManifest([]tensor.Tensor{{Name: "w", DType: spec.F32, Shape: []int64{elements}}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func open(t testing.TB, k *Keeper, name string, stream uint64, m *tensor.Manifest) *Producer {
	t.Helper()
	if err := k.Admit(name, m); err != nil {
		t.Fatal(err)
	}
	p, err := k.Open(name, stream, m)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// header is that of a chunk of p.
func (p *Producer) chunk(step uint64, flags uint16, i uint32, offset uint64, length int) tensor.Header {
	return tensor.Header{
		Flags: flags, Step: step, Stream: p.stream, Producer: p.id, Manifest: p.manifest.ID(), Tensor: i, Offset: offset, Length: uint32(length),
	}
}

// whole is the chunks of a step.
func (p *Producer) whole(step uint64) []tensor.Header {
	return []tensor.Header{
		p.chunk(step, tensor.FlagBegin, 0, 0, chunkBytes), p.chunk(step, 0, 0, chunkBytes, chunkBytes), p.chunk(step, 0, 1, 0, 64),
	}
}

// run has the columns of some chunks, as a transport has them.
type run struct{ headers, data []byte }

func columnsOf(chunks ...tensor.Header) run {
	r := run{make([]byte, len(chunks)*tensor.HeaderBytes), make([]byte, len(chunks)*chunkBytes)}
	for i, h := range chunks {
		if h.Flags&tensor.FlagNoCRC == 0 && h.DataCRC == 0 && h.Length <= chunkBytes {
			h.DataCRC = tensor.CRC(r.data[i*chunkBytes:][:h.Length])
		}
		h.Put(r.headers[i*tensor.HeaderBytes:])
	}
	return r
}

func (r run) columns() [][]byte { return [][]byte{r.headers, r.data} }

// refused tells which of the chunks are marked.
func (r run) refused() string {
	var b strings.Builder
	for at := 0; at < len(r.headers); at += tensor.HeaderBytes {
		h, err := tensor.ParseHeader(r.headers[at:])
		switch {
		case err != nil:
			b.WriteString("?")
		case h.Flags&tensor.FlagRefused != 0:
			b.WriteString("x")
		default:
			b.WriteString(".")
		}
	}
	return b.String()
}

// take has chunks checked, all of which must be good, and returns which were refused.
func (p *Producer) takes(t testing.TB, chunks ...tensor.Header) string {
	t.Helper()
	r := columnsOf(chunks...)
	if good, err := p.Check(r.columns()); err != nil || good != len(chunks) {
		t.Fatalf("%d of %d chunks are good: %v", good, len(chunks), err)
	}
	return r.refused()
}

// told returns the notes for the producer.
func (p *Producer) told(t testing.TB) (all []*wire.Note) {
	t.Helper()
	for from := bytes.NewReader(p.AppendNotes(nil)); from.Len() > 0; {
		if mark, _ := from.ReadByte(); mark != wire.NoteMark {
			t.Fatalf("byte %#x where a note begins", mark)
		}
		n, err := wire.ReadNote(from)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, n)
	}
	return all
}

func wantBad(t testing.TB, err error, kind, words string) {
	t.Helper()
	var bad *BadChunkError
	if !errors.As(err, &bad) || bad.Kind != kind || !strings.Contains(err.Error(), words) {
		t.Errorf("got %v (%T), want kind %s with %q", err, err, kind, words)
	}
}
