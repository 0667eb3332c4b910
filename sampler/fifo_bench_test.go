package sampler

import (
	"fmt"
	"testing"
	"time"

	"github.com/ingestd/ingestd/ring"
)

// BenchmarkNext is a batch's whole way: reserved, committed, taken by one trainer of each group and released. The baseline is the ring alone,
// from which one reader leases without a lock; what is above it is the price of groups, leases that are known by name and time, and returns.
func BenchmarkNext(b *testing.B) {
	newRing := func(b *testing.B) *ring.Ring {
		layout := ring.Layout{BatchSize: 1, Batches: 8, Columns: []int64{8}, Table: "t", Created: time.Now()}
		size, err := layout.Bytes()
		if err != nil {
			b.Fatal(err)
		}
		r, err := ring.Format(ring.AlignedBytes(size), layout)
		if err != nil {
			b.Fatal(err)
		}
		return r
	}
	publish := func(r *ring.Ring) {
		run, _ := r.TryReserve(1)
		r.Commit(run, 0, 0, 1, ring.Mark{})
	}
	b.Run("ring alone", func(b *testing.B) {
		r := newRing(b)
		for b.Loop() {
			publish(r)
			batch, _ := r.TryLease()
			r.Release(batch)
		}
	})
	for _, groups := range []int{1, 2, 8, ring.GroupsMax} {
		b.Run(fmt.Sprintf("groups=%d", groups), func(b *testing.B) {
			r := newRing(b)
			s := newFIFO(b, r, 0)
			var all []*Member
			for i := range groups {
				all = append(all, join(b, s, fmt.Sprint(i)))
			}
			for b.Loop() {
				publish(r)
				for _, m := range all {
					batch, _, _ := m.TryNext()
					m.Release(batch)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*groups), "ns/delivery")
		})
	}
}
