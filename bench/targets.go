package bench

// Target is one of the figures that the engine must reach, as a ratio.
type Target struct {
	Case     string  `json:"case"`
	Figure   string  `json:"figure"`
	Measured float64 `json:"measured"`
	Limit    float64 `json:"limit"`
	AtMost   bool    `json:"at_most"` // otherwise: at least
	Pass     bool    `json:"pass"`
}

// Targets that hold for every case.
const (
	manyRateMin     = 0.8 // of several connections together to one
	shareMin        = 0.5 // of the slowest stream to its fair share
	allocsPerBatch  = 0.01
	allocsPerSecond = 200 // so few are the runtime's own, whatever the load, and are taken off
)

func atLeast(name, figure string, measured, limit float64) Target {
	return Target{Case: name, Figure: figure, Measured: measured, Limit: limit, Pass: measured >= limit}
}

func atMost(name, figure string, measured, limit float64) Target {
	return Target{Case: name, Figure: figure, Measured: measured, Limit: limit, AtMost: true, Pass: measured <= limit}
}

// targets compares what was measured with what must be reached. A figure whose baseline was not measured has no line.
func targets(cases []CaseResult) []Target {
	single := map[string]*CaseResult{}
	for i := range cases {
		if cases[i].Connections == 1 {
			single[cases[i].Name] = &cases[i]
		}
	}
	var all []Target
	for i := range cases {
		c := &cases[i]
		if c.Full == nil {
			continue
		}
		full := &c.Full.Median
		if c.Bare != nil && c.RateMin > 0 {
			all = append(all, atLeast(c.Name, "samples/s to the bare loop's", full.SamplesPerSecond/c.Bare.Median.SamplesPerSecond, c.RateMin))
		}
		if c.Bare != nil && c.CPUMax > 0 {
			all = append(all, atMost(c.Name, "daemon's CPU-s/GB to the bare loop's", full.ServerCPU/c.Bare.Median.ServerCPU, c.CPUMax))
		}
		if c.Connections > 1 {
			if one := single[c.single()]; one != nil && one.Full != nil {
				all = append(all, atLeast(c.Name, "samples/s to one connection's", full.SamplesPerSecond/one.Full.Median.SamplesPerSecond, manyRateMin))
			}
			all = append(all, atLeast(c.Name, "slowest stream to its fair share", full.MinShare, shareMin))
		}
		if full.Memory != nil {
			all = append(all, atMost(c.Name, "daemon's memory to its bound", full.Memory.Ratio, 1))
		}
		perBatch := 0.0
		if over := full.MallocsPerSecond - allocsPerSecond; over > 0 {
			perBatch = full.MallocsPerBatch * over / full.MallocsPerSecond
		}
		if c.Transport == transportTCP { // what crypto/tls and quic-go allocate is theirs
			all = append(all, atMost(c.Name, "daemon's allocations per batch, beyond 200/s", perBatch, allocsPerBatch))
		}
	}
	return all
}

// missed returns the targets that were not reached.
func missed(all []Target) []Target {
	var out []Target
	for _, t := range all {
		if !t.Pass {
			out = append(out, t)
		}
	}
	return out
}
