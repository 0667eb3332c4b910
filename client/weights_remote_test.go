//go:build linux

package client

import (
	"testing"

	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/weights"
)

// shapes are manifests whose tensors lie differently to chunks, blocks and each other.
func shapes(t testing.TB) map[string]*tensor.Manifest {
	small := make([]int64, 3000)
	for i := range small {
		small[i] = int64(i % 37)
	}
	return map[string]*tensor.Manifest{
		"one":    vectors(t, 100),
		"empty":  vectors(t, 0, 0),
		"mixed":  vectors(t, 0, 1, 256, 257, 0, 1<<20, 3<<20+5, 0, 64<<10, 7, 0),
		"small":  vectors(t, small...),
		"large":  vectors(t, 17<<20+3),
		"blocks": vectors(t, receiveBytes, receiveBytes-1, receiveBytes+1, 2*receiveBytes),
	}
}

// TestWeightsOverConnections: what is published over a connection, and read over another, is the same, generation after generation, whole and as what differs.
func TestWeightsOverConnections(t *testing.T) {
	for name, m := range shapes(t) {
		for _, network := range []string{"tcp", "unix"} {
			for _, heap := range []bool{false, true} {
				t.Run(name+"/"+network+map[bool]string{true: "/heap"}[heap], func(t *testing.T) {
					d := serveWeights(t, network, weights.ServerConfig{}, weights.StoreConfig{Heap: heap})
					p := publisherOf(t, d, m)
					first := publishAll(t, p, all(1))
					s := subscribed(t, d.addr, SubscribeConfig{})
					w := newer(t, s, 0)
					wantWeights(t, w, all(1))
					if w.Digest() != first.Digest || w.Generation() != first.Generation || !w.Manifest().Equal(m) {
						t.Errorf("generation %d with digest %v, want %d with %v", w.Generation(), w.Digest(), first.Generation, first.Digest)
					}
					for g := uint64(2); g < 6; g++ {
						v := func(i int) uint64 {
							if i%5 == int(g) {
								return g
							}
							return 1
						}
						publishAll(t, p, v)
						next := newer(t, s, g-1)
						wantWeights(t, next, v)
						wantWeights(t, w, all(1)) // held all the time
						next.Release()
					}
					w.Release()
					if st := remoteStats(t, s); st.Generations != 5 || st.BadSums != 0 || st.Reconnects != 0 {
						t.Errorf("stats %+v", st)
					}
				})
			}
		}
	}
}
