package bench

import (
	"fmt"
	"strings"

	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/spec"
)

const (
	kib = 1 << 10
	mib = 1 << 20
)

// Case is one shape of load: samples of one size, cut into leaves, over a number of connections, into a ring of a given size.
type Case struct {
	Name        string `json:"name"`
	Transport   string `json:"transport"`
	SampleBytes int64  `json:"sample_bytes"`
	Leaves      int    `json:"leaves"`
	Connections int    `json:"connections"`
	BatchSize   int    `json:"batch_size"`
	Batches     int    `json:"batches"`

	// Targets, as ratios; 0 where there is none.
	RateMin float64 `json:"rate_min,omitempty"` // samples/s of the full path to those of the bare loop
	CPUMax  float64 `json:"cpu_max,omitempty"`  // daemon's CPU-seconds per GB to the bare loop's

	optional bool // runs only if it is named, or with --all
}

func makeCase(sampleBytes int64, leaves, connections, batchSize, batches int) Case {
	c := Case{Transport: transportTCP, SampleBytes: sampleBytes, Leaves: leaves, Connections: connections, BatchSize: batchSize, Batches: batches}
	c.Name = fmt.Sprintf("%s/%d", sizeText(sampleBytes), leaves)
	if connections > 1 {
		c.Name += fmt.Sprintf("x%d", connections)
	}
	return c
}

func (c Case) want(rateMin, cpuMax float64) Case {
	c.RateMin, c.CPUMax = rateMin, cpuMax
	return c
}

// over is the same case over another transport than TCP.
func (c Case) over(transport string) Case {
	c.Transport, c.Name = transport, transport+"/"+c.Name
	return c
}

func (c Case) onRequest() Case {
	c.optional = true
	return c
}

// many is the number of connections of the cases that have several.
const many = 64

// fullCases are the cases of the targets. Batches are of 0.25 to 16 MiB, and a ring holds some 32 MiB for small samples, because a pool that stays in
// the last-level cache is how such a ring is run, and more only where one batch must hold more.
func fullCases() []Case {
	return []Case{
		makeCase(kib, 1, 1, 256, 128).want(0.6, 0),
		makeCase(kib, 8, 1, 256, 128).want(0.5, 0),
		makeCase(kib, 40, 1, 256, 128).want(0.35, 0),
		makeCase(16*kib, 1, 1, 64, 32).want(0.8, 0),
		makeCase(256*kib, 1, 1, 8, 32).want(0.85, 1.25),
		makeCase(4*mib, 1, 1, 4, 8).want(0.85, 1.25),
		makeCase(64*mib, 1, 1, 1, 4).want(0.85, 1.25).onRequest(),
		makeCase(kib, 1, many, 256, 128),
		makeCase(16*kib, 1, many, 64, 32),
		makeCase(256*kib, 1, many, 8, 32),
		makeCase(4*mib, 1, many, 4, 32).onRequest(),
	}
}

// smokeCases run the same code in a few seconds: every receive path once, with rings so small that they wrap.
func smokeCases() []Case {
	return []Case{
		makeCase(kib, 1, 1, 64, 16).want(0.6, 0),
		makeCase(kib, 8, 1, 64, 16).want(0.5, 0),
		makeCase(256*kib, 1, 1, 4, 4).want(0.85, 1.25),
		makeCase(kib, 1, 4, 64, 16),
	}
}

// chooseCases returns the cases that are named in filter (a comma-separated list), or all that are not optional when it is empty.
func chooseCases(cases []Case, filter string, all bool) ([]Case, error) {
	var chosen []Case
	if filter == "" {
		for _, c := range cases {
			if all || !c.optional {
				chosen = append(chosen, c)
			}
		}
		return chosen, nil
	}
	for name := range strings.SplitSeq(filter, ",") {
		c, ok := findCase(cases, strings.TrimSpace(name))
		if !ok {
			return nil, fmt.Errorf("no case is called %q: choose from %s", name, caseNames(cases))
		}
		chosen = append(chosen, c)
	}
	return chosen, nil
}

func findCase(cases []Case, name string) (Case, bool) {
	for _, c := range cases {
		if strings.EqualFold(c.Name, name) {
			return c, true
		}
	}
	return Case{}, false
}

func caseNames(cases []Case) string {
	names := make([]string, len(cases))
	for i, c := range cases {
		names[i] = c.Name
	}
	return strings.Join(names, ", ")
}

// single is the name of the same case with one connection.
func (c Case) single() string {
	return fmt.Sprintf("%s/%d", sizeText(c.SampleBytes), c.Leaves)
}

// spec cuts the sample into F32 vectors of equal length; the first ones are an element longer where it does not divide.
func (c Case) spec() (*spec.Spec, error) {
	elements := c.SampleBytes / 4
	leaves := make([]spec.Leaf, c.Leaves)
	for i := range leaves {
		n := elements / int64(c.Leaves)
		if int64(i) < elements%int64(c.Leaves) {
			n++
		}
		leaves[i] = spec.Leaf{Name: fmt.Sprintf("leaf%d", i), DType: spec.F32, Shape: []int64{n}}
	}
	s, err := spec.New(leaves)
	if err != nil {
		return nil, fmt.Errorf("case %s: %w", c.Name, err)
	}
	return s, nil
}

// segmentBytes is the size of the daemon's ring for this case.
func (c Case) segmentBytes() (int64, error) {
	s, err := c.spec()
	if err != nil {
		return 0, err
	}
	return ring.Layout{BatchSize: c.BatchSize, Batches: c.Batches, Columns: s.LeafBytes(), Spec: s.JSON()}.Bytes()
}

// dataBytes is the sample bytes that the ring holds: the size of the baselines' memory.
func (c Case) dataBytes() int64 { return c.SampleBytes * int64(c.BatchSize) * int64(c.Batches) }

func sizeText(n int64) string {
	switch {
	case n >= mib && n%mib == 0:
		return fmt.Sprintf("%dMiB", n/mib)
	case n >= kib && n%kib == 0:
		return fmt.Sprintf("%dKiB", n/kib)
	default:
		return fmt.Sprintf("%dB", n)
	}
}
