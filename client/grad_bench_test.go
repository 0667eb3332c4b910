//go:build linux

package client

import (
	"context"
	"fmt"
	"testing"

	"github.com/ingestd/ingestd/tensor"
)

// heapSource gives out the same batches again and again.
type heapSource struct {
	batches []gradArrival
	at      int
	m       *tensor.Manifest
}

// keptLease is memory that nobody takes back.
type keptLease struct{}

func (keptLease) Release() {}

func (keptLease) Intact() bool { return true }

func (s *heapSource) next(context.Context) (gradArrival, error) {
	a := s.batches[s.at]
	s.at++
	return a, nil
}

func (s *heapSource) fetch(context.Context, uint64) (*tensor.Manifest, error) { return s.m, nil }

func (s *heapSource) name(_ context.Context, stream uint64) (string, error) {
	return fmt.Sprint(stream), nil
}

func (s *heapSource) most() int { return 1 << 20 }

func (s *heapSource) close() error { return nil }

// BenchmarkGradReader reads and sums a step of 8 producers with 16 MiB of F32 each, in chunks of 1 MiB, while it comes and when all of it is there, with and without
// checking sums of data; beside the loop `out[i] += x[i]` over as many elements. MB/s are bytes of the producers.
func BenchmarkGradReader(b *testing.B) {
	const producers, chunk, elements = 8, 1 << 20, 4 << 20
	m := fakeManifest(b, floatTensor("w", elements, tensor.Encoding{}))
	out := map[string][]float32{"w": make([]float32, elements)}
	for _, crc := range []bool{true, false} {
		src := &heapSource{m: m}
		for at := range elements * 4 / chunk {
			for k := range uint64(producers) {
				h := tensor.Header{Stream: k + 1, Producer: tensor.ProducerID(fmt.Sprint(k + 1)), Manifest: m.ID(), Offset: uint64(at * chunk), Length: chunk}
				a := gradArrival{keptLease{}, make([]byte, tensor.HeaderBytes), make([]byte, chunk), []uint64{k + 1}, []uint64{uint64(at)}, 0}
				if h.DataCRC = tensor.CRC(a.data); !crc {
					h.DataCRC, h.Flags = 0, tensor.FlagNoCRC
				}
				if at == 0 {
					h.Flags |= tensor.FlagBegin
				}
				h.Put(a.headers)
				src.batches = append(src.batches, a)
			}
		}
		for _, into := range []map[string][]float32{out, nil} {
			b.Run(fmt.Sprintf("crc %v, while it comes %v", crc, into != nil), func(b *testing.B) {
				cfg, _ := GradConfig{Table: "t"}.withDefaults()
				b.SetBytes(producers * elements * 4)
				for b.Loop() {
					src.at = 0
					r := newGradReader(cfg, src, chunk)
					s, err := r.Step(b.Context(), 0, StepOptions{Quorum: producers, Into: into})
					if err != nil {
						b.Fatal(err)
					}
					if err := s.Sum(out); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
	b.Run("loop", func(b *testing.B) {
		sum, x := out["w"], make([]float32, elements)
		b.SetBytes(producers * elements * 4)
		for b.Loop() {
			for range producers {
				for i := range sum {
					sum[i] += x[i]
				}
			}
		}
	})
}
