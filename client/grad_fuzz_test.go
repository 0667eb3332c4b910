//go:build linux

package client

import (
	"context"
	"math/rand/v2"
	"testing"

	"github.com/ingestd/ingestd/tensor"
)

// FuzzGradReader gives a reader rows that are right but for what the input changes: bytes of headers and data, streams, numbers, order. It must neither panic nor keep
// a batch, and what it shows as complete must be something that was sent whole.
func FuzzGradReader(f *testing.F) {
	f.Add(uint64(1), []byte{})
	f.Add(uint64(2), []byte{0, 3, 7, 9, 1, 5, 6, 200, 2, 8, 70, 3, 3, 9, 9, 4})
	f.Add(uint64(3), []byte{3, 0, 1, 0, 3, 1, 2, 0, 5, 2, 1, 0, 4, 3, 6, 0})
	f.Fuzz(func(t *testing.T, seed uint64, changes []byte) {
		r := rand.New(rand.NewPCG(seed, 3))
		m := randomManifest(t, r)
		ring := newFakeRing(t, m)
		ring.prefetch = 3
		p, q := ring.producer("p", 1, m), ring.producer("q", 2, m)
		sent := map[string]bool{}
		for step := range uint64(3) {
			for _, who := range []*fakeProducer{p, q} {
				flat := flatBytes(m, randomTensors(t, r, m))
				sent[string(flat)] = true
				ring.rows = append(ring.rows, who.opened())
				ring.rows = append(ring.rows, who.send(r, step, flat)...)
			}
		}
		change(ring.rows, changes)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		reader := ring.reader()
		ring.prefetch = len(ring.rows) // a context that has ended does not end it early
		out := map[string][]float32{}
		for i := range m.Len() {
			if x := m.Tensor(i); x.Name != "indexes" {
				out[x.Name] = make([]float32, x.Elements())
			}
		}
		for step := range uint64(3) {
			s, err := reader.Step(ctx, step, StepOptions{Quorum: 2, Into: out})
			if err != nil {
				continue
			}
			if err := s.Sum(out); err != nil {
				t.Error(err)
			}
			for _, name := range s.Have {
				encoded := make([][]byte, m.Len())
				for i := range encoded {
					encoded[i], _ = s.Tensor(name, m.Tensor(i).Name) // which it may not have, if an end came that was not sent
				}
				if !sent[string(flatBytes(m, encoded))] && !unsummed(changes) {
					t.Errorf("step %d of %q is something that was not sent", step, name)
				}
			}
			s.Release()
		}
	})
}

// change changes rows as an input of four bytes each says.
func change(rows []gradRow, changes []byte) {
	for ; len(changes) >= 4; changes = changes[4:] {
		row := &rows[int(changes[1])%len(rows)]
		switch at, bits := int(changes[2]), changes[3]; changes[0] % 6 {
		case 0:
			row.header[at%tensor.HeaderBytes] ^= bits
		case 1: // and its sum is right again
			h, err := tensor.ParseHeader(row.header[:])
			if err != nil {
				break
			}
			switch at % 8 {
			case 0:
				h.Flags ^= uint16(bits) & 0x7f
			case 1:
				h.Step ^= uint64(bits) & 3
			case 2:
				h.Stream ^= uint64(bits) & 3
			case 3:
				h.Tensor ^= uint32(bits)
			case 4:
				h.Offset ^= uint64(bits) << 8
			case 5:
				h.Length ^= uint32(bits) << 2
			case 6:
				h.Producer ^= uint64(bits)
			case 7:
				h.Manifest ^= uint64(bits)
			}
			h.Put(row.header[:])
		case 2:
			if len(row.data) > 0 {
				row.data[(at<<3|int(bits>>5))%len(row.data)] ^= bits
			}
		case 3:
			row.stream ^= uint64(bits) & 3
		case 4:
			row.number ^= uint64(bits) & 7
		case 5:
			other := &rows[at%len(rows)]
			*row, *other = *other, *row
		}
	}
}

// unsummed says whether the input may have changed what no sum tells of: data of chunks that have none, or steps and places, which make something new of right chunks.
func unsummed(changes []byte) bool {
	for ; len(changes) >= 4; changes = changes[4:] {
		if kind := changes[0] % 6; kind == 1 || kind == 2 {
			return true
		}
	}
	return false
}
