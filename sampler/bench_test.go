package sampler

import (
	"testing"
	"time"

	"github.com/ingestd/ingestd/ring"
)

func bring(t testing.TB, n int) *ring.Ring {
	layout := ring.Layout{BatchSize: 1, Batches: n, Columns: []int64{8}, Table: "t", Created: time.Now()}
	size, _ := layout.Bytes()
	r, err := ring.Format(ring.AlignedBytes(size), layout)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func BenchmarkX(b *testing.B) {
	b.Run("old", func(b *testing.B) {
		r := bring(b, 8)
		s, _ := newOld(r, oldConfig{})
		for b.Loop() {
			run, _ := r.TryReserve(1)
			r.Commit(run, 0, 0, 1)
			x, _ := s.TryNext()
			s.Release(x)
		}
	})
	b.Run("new", func(b *testing.B) {
		r := bring(b, 8)
		s, _ := New(r, Config{}, nil)
		m, _ := s.Join("a", Who{})
		for b.Loop() {
			run, _ := r.TryReserve(1)
			r.Commit(run, 0, 0, 1)
			x, _, _ := m.TryNext()
			m.Release(x)
		}
	})
	b.Run("now", func(b *testing.B) {
		for b.Loop() {
			time.Now()
		}
	})
}
