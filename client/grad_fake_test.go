//go:build linux

package client

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
)

// fakeChunkBytes is what the chunks of these tests have: a core does not mind.
const fakeChunkBytes = 1024

// gradRow is one row of a batch.
type gradRow struct {
	header         [tensor.HeaderBytes]byte
	data           []byte
	stream, number uint64
}

// fakeRing is a ring and a daemon for a GradReader: batches come one after the other, as many as are not held at once, and what is given back is overwritten.
type fakeRing struct {
	t         *testing.T
	rows      []gradRow
	perBatch  func() int
	prefetch  int
	holding   int
	manifests map[uint64]*tensor.Manifest
	names     map[uint64]string
	fetched   int
	fetchErr  error
	nameErr   error
	lost      *LostBatchesError
	created   int64
	heralds   uint64
	closed    bool
}

type fakeLease struct {
	ring          *fakeRing
	headers, data []byte
	torn          bool
}

func (l *fakeLease) Release() {
	if l.ring == nil {
		panic("released twice")
	}
	l.ring.holding--
	l.ring = nil
	for _, b := range [][]byte{l.headers, l.data} {
		for i := range b {
			b[i] = 0xCC
		}
	}
}

func (l *fakeLease) Intact() bool { return l.ring != nil && !l.torn }

func (f *fakeRing) next(ctx context.Context) (gradArrival, error) {
	if f.lost != nil {
		defer func() { f.lost = nil }()
		return gradArrival{}, f.lost
	}
	if f.holding >= f.prefetch {
		f.t.Fatalf("the reader asks for a batch while it holds %d of %d", f.holding, f.prefetch)
	}
	if len(f.rows) == 0 {
		if ctx.Err() != nil {
			return gradArrival{}, ctx.Err()
		}
		return gradArrival{}, io.EOF
	}
	n := min(len(f.rows), 1)
	if f.perBatch != nil {
		n = min(len(f.rows), f.perBatch())
	}
	l := &fakeLease{ring: f}
	a := gradArrival{lease: l, created: f.created}
	for _, r := range f.rows[:n] {
		if r.stream == heraldStream { // the daemon numbers what it says as it says it
			r.number = f.heralds
			f.heralds++
		}
		l.headers = append(l.headers, r.header[:]...)
		at := len(l.data)
		l.data = append(l.data, make([]byte, fakeChunkBytes)...)
		copy(l.data[at:], r.data)
		a.streams, a.numbers = append(a.streams, r.stream), append(a.numbers, r.number)
	}
	a.headers, a.data = l.headers, l.data
	f.rows = f.rows[n:]
	f.holding++
	return a, nil
}

func (f *fakeRing) fetch(_ context.Context, id uint64) (*tensor.Manifest, error) {
	f.fetched++
	return f.manifests[id], f.fetchErr
}

func (f *fakeRing) close() error {
	f.closed = true
	return nil
}

func (f *fakeRing) name(_ context.Context, stream uint64) (string, error) {
	return f.names[stream], f.nameErr
}

func (f *fakeRing) most() int { return f.prefetch }

func newFakeRing(t *testing.T, manifests ...*tensor.Manifest) *fakeRing {
	f := &fakeRing{t: t, prefetch: 1 << 20, manifests: map[uint64]*tensor.Manifest{}, names: map[uint64]string{}}
	for _, m := range manifests {
		f.manifests[m.ID()] = m
	}
	return f
}

func (f *fakeRing) reader() *GradReader {
	cfg, err := GradConfig{Table: "t"}.withDefaults()
	if err != nil {
		f.t.Fatal(err)
	}
	r := newGradReader(cfg, f, fakeChunkBytes)
	f.t.Cleanup(func() {
		r.Close()
		if f.holding != 0 {
			f.t.Errorf("%d batches are held after the end", f.holding)
		}
	})
	return r
}

// fakeProducer makes the rows of one producer.
type fakeProducer struct {
	ring     *fakeRing
	name     string
	stream   uint64
	manifest *tensor.Manifest
	next     uint64
}

// herald is the daemon's own stream.
const heraldStream = 999

func (f *fakeRing) producer(name string, stream uint64, m *tensor.Manifest) *fakeProducer {
	f.names[stream] = name
	return &fakeProducer{f, name, stream, m, 0}
}

// row makes a row of a header, whose producer, manifest, length and sum it fills in.
func (p *fakeProducer) row(h tensor.Header, data []byte) gradRow {
	h.Stream, h.Producer, h.Manifest = p.stream, tensor.ProducerID(p.name), p.manifest.ID()
	h.Length = uint32(len(data))
	r := gradRow{data: data, stream: p.stream, number: p.next}
	if h.Flags&(tensor.FlagOpened|tensor.FlagClosed) != 0 {
		r.stream = heraldStream
	} else {
		p.next++
	}
	if h.Flags&tensor.FlagNoCRC == 0 {
		h.DataCRC = tensor.CRC(data)
	}
	h.Put(r.header[:])
	return r
}

func (p *fakeProducer) opened() gradRow { return p.row(tensor.Header{Flags: tensor.FlagOpened}, nil) }

func (p *fakeProducer) closed() gradRow { return p.row(tensor.Header{Flags: tensor.FlagClosed}, nil) }

// flatBytes lays the encoded bytes of tensors out as they lie; those that are nil are left out.
func flatBytes(m *tensor.Manifest, encoded [][]byte) []byte {
	flat := make([]byte, m.DataBytes())
	for i, b := range encoded {
		copy(flat[m.Offset(i):], b)
	}
	return flat
}

// span is a part of the flat range that one chunk has.
type span struct{ from, to int64 }

// spans cuts the tensors that are wanted into runs that a chunk may have, at random.
func spans(r *rand.Rand, m *tensor.Manifest, wanted func(i int) bool) []span {
	var all []span
	var open *span
	for i := range m.Len() {
		from, to := m.Offset(i), m.Offset(i)+m.EncodedBytes(i)
		if from == to {
			continue
		}
		if !wanted(i) {
			open = nil
			continue
		}
		for from < to {
			if open != nil && from-open.from < fakeChunkBytes && r.IntN(4) > 0 { // goes on over the gap
				open.to = min(to, open.from+fakeChunkBytes)
			} else {
				all = append(all, span{from, min(to, from+256*(1+r.Int64N(fakeChunkBytes/256)))})
				open = &all[len(all)-1]
			}
			from = open.to
			if from%256 != 0 && from != to {
				panic("a chunk would cut an element")
			}
		}
	}
	return all
}

// chunkAt makes the header of a chunk of a flat range.
func chunkAt(m *tensor.Manifest, step uint64, s span) tensor.Header {
	i := m.At(s.from)
	return tensor.Header{Step: step, Tensor: uint32(i), Offset: uint64(s.from - m.Offset(i))}
}

// send makes the rows of a whole transaction of all tensors, in any order.
func (p *fakeProducer) send(r *rand.Rand, step uint64, flat []byte) []gradRow {
	return p.sendPart(r, step, flat, nil)
}

// sendPart is send of a subset, nil for all.
func (p *fakeProducer) sendPart(r *rand.Rand, step uint64, flat []byte, subset []uint32) []gradRow {
	in := map[int]bool{}
	for _, i := range subset {
		in[int(i)] = true
	}
	all := spans(r, p.manifest, func(i int) bool { return subset == nil || in[i] })
	r.Shuffle(len(all), func(a, b int) { all[a], all[b] = all[b], all[a] })
	var rows []gradRow
	begin := uint16(tensor.FlagBegin)
	if len(all) == 0 || r.IntN(3) == 0 {
		rows = append(rows, p.row(tensor.Header{Flags: begin, Step: step}, nil))
		begin = 0
	}
	for _, s := range all {
		h := chunkAt(p.manifest, step, s)
		h.Flags |= begin
		begin = 0
		if r.IntN(5) == 0 {
			h.Flags |= tensor.FlagNoCRC
		}
		rows = append(rows, p.row(h, flat[s.from:s.to]))
	}
	if subset != nil {
		rows = append(rows, p.row(tensor.Header{Flags: tensor.FlagEnd, Step: step}, tensor.AppendEnd(nil, subset)))
	}
	return rows
}

func fakeManifest(t testing.TB, tensors ...tensor.Tensor) *tensor.Manifest {
	t.Helper()
	m, err := tensor.NewManifest(tensors, nil)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func floatTensor(name string, n int64, encoding tensor.Encoding) tensor.Tensor {
	return tensor.Tensor{Name: name, DType: spec.F32, Shape: []int64{n}, Encoding: encoding}
}

// randomManifest has tensors of all kinds that can be summed, and one that cannot.
func randomManifest(t testing.TB, r *rand.Rand) *tensor.Manifest {
	tensors := []tensor.Tensor{{Name: "indexes", DType: spec.I32, Shape: []int64{5}}}
	for i := range 1 + r.IntN(8) {
		n := r.Int64N(900)
		if r.IntN(4) == 0 {
			n = r.Int64N(3)
		}
		e := tensor.Encoding{Kind: tensor.EncodingKind(r.IntN(6))}
		if e.Kind == tensor.TopK {
			n = max(n, 1)
			e.K = 1 + r.IntN(int(n))
		}
		x := floatTensor(fmt.Sprintf("t%d", i), n, e)
		if e.Kind == tensor.Raw {
			x.DType = []spec.DType{spec.F32, spec.F32, spec.F16, spec.BF16}[r.IntN(4)]
		}
		tensors = append(tensors, x)
	}
	r.Shuffle(len(tensors), func(a, b int) { tensors[a], tensors[b] = tensors[b], tensors[a] })
	return fakeManifest(t, tensors...)
}

// randomTensors are encoded bytes for each tensor of a manifest, of which some are not numbers.
func randomTensors(t testing.TB, r *rand.Rand, m *tensor.Manifest) [][]byte {
	all := make([][]byte, m.Len())
	for i := range all {
		x := m.Tensor(i)
		all[i] = make([]byte, m.EncodedBytes(i))
		if x.DType != spec.F32 {
			for k := range all[i] {
				all[i][k] = byte(r.Uint32())
			}
			continue
		}
		values := make([]float32, x.Elements())
		for k := range values {
			values[k] = float32(r.NormFloat64())
			if r.IntN(20) == 0 {
				values[k] = []float32{0, float32(inf), -float32(inf), float32(nan), 1e-44, 3e38}[r.IntN(6)]
			}
		}
		if err := tensor.Encode(all[i], &x, values); err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// word reads a little-endian number.
func word(b []byte) uint32 { return binary.LittleEndian.Uint32(b) }
