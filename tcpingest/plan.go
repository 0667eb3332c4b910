package tcpingest

import "github.com/ingestd/ingestd/spec"

// How much and how, by size. Measured by BenchmarkReceive in this package and `ingestd bench tcp`.
const (
	// readBytes is the most one read takes: larger reads leave the L2 cache behind and gain nothing.
	readBytes = 256 << 10
	// heldMin: samples above it are received in place, with their slot held, since a socket buffer may not hold a whole one. Up to it, a part of a
	// sample waits outside the ring.
	heldMin = 64 << 10
	// heldRateMin is the bytes per second at which a sample that holds its slot must come, StallTimeout aside.
	heldRateMin = 256 << 10
	// vectoredMin is the mean size of a leaf from which the kernel scatters (readv) cheaper than a copy from the staging buffer does.
	vectoredMin = 1 << 10
	// runsMax is how many runs, each in another batch, one read may fill.
	runsMax = 8
	// vectorsMax is the kernel's limit on the parts of one readv.
	vectorsMax = 1024
	// yieldBytes: after so many bytes without a wait a connection lets the others have the processor: the drainers, and those who serve trainers.
	yieldBytes = 256 << 10
)

// way is how the bytes of a table's samples are placed.
type way int

const (
	direct   way = iota // one leaf: slots are contiguous, a read goes over many
	vectored            // readv, one part per leaf and sample
	staged              // read many samples, then copy leaf by leaf
)

// plan is what the receive loop needs to know of a spec.
type plan struct {
	way     way
	held    bool    // samples are received in place
	sample  int64   // bytes
	leaves  []int64 // bytes of each
	offsets []int64 // of each in the sample
	atOnce  int64   // most samples in one read
}

func newPlan(s *spec.Spec) *plan {
	p := &plan{sample: s.SampleBytes(), leaves: s.LeafBytes(), offsets: make([]int64, s.NumLeaves())}
	for i := range p.offsets {
		p.offsets[i] = s.Offset(i)
	}
	p.held = p.sample > heldMin
	p.atOnce = max(1, readBytes/p.sample)
	switch {
	case len(p.leaves) == 1:
		p.way = direct
	case p.held || p.sample/int64(len(p.leaves)) >= vectoredMin:
		p.way = vectored
		p.atOnce = max(1, min(p.atOnce, vectorsMax/int64(len(p.leaves))))
	default:
		p.way = staged
	}
	return p
}
