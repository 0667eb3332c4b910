package bench

// Targets of bench shm.
const (
	placeRateMin    = 2e6  // samples/s in place, at any size
	placeSpreadMin  = 0.8  // the slowest size to the fastest
	placeShmipcMin  = 1.0  // to shmipc-go
	writeRateMin    = 0.9  // to plain memory writes
	smallRateMin    = 5e6  // samples/s of 64 B
	smallBytesMax   = 1024 // a written case of samples so small has the rate above as its target, not that of memory
	blockLatencyMax = 2.5  // p50 to that of a bare wake-up
	pollLatencyMax  = 1.5
	restartCostMax  = 100.0  // ms
	recoveryMax     = 1000.0 // ms
	deathAfterMax   = 5.0    // ms
)

// shmTargets compares what was measured with what must be reached. A figure whose baseline was not measured has no line.
func shmTargets(cases []ShmResult) []Target {
	var all []Target
	slowest, fastest, sizes := 0.0, 0.0, 0
	for i := range cases {
		c := &cases[i]
		rate := func(name string) (float64, bool) {
			r := c.Rates[name]
			if r == nil {
				return 0, false
			}
			return r.Median.SamplesPerSecond, true
		}
		full, ok := rate(contenderFull)
		switch {
		case c.Kind == kindPlace && ok:
			all = append(all, atLeast(c.Name, "million samples/s", full/1e6, placeRateMin/1e6))
			if shmipc, ok := rate(contenderShmipc); ok {
				all = append(all, atLeast(c.Name, "samples/s to shmipc-go's", full/shmipc, placeShmipcMin))
			}
			if sizes == 0 || full < slowest {
				slowest = full
			}
			fastest = max(fastest, full)
			sizes++
		case c.Kind == kindWrite && ok && c.SampleBytes <= smallBytesMax:
			all = append(all, atLeast(c.Name, "million samples/s", full/1e6, smallRateMin/1e6))
		case c.Kind == kindWrite && ok:
			if memory, ok := rate(contenderMemory); ok {
				all = append(all, atLeast(c.Name, "rate to that of memory writes", full/memory, writeRateMin))
			}
		default:
			all = append(all, c.timeTargets()...)
		}
	}
	if sizes > 1 {
		all = append(all, atLeast("in place", "slowest size to fastest", slowest/fastest, placeSpreadMin))
	}
	return all
}

// timeTargets are those of the cases that measure times.
func (r *ShmResult) timeTargets() []Target {
	var all []Target
	limit := func(figure, text string, most float64) {
		if t := r.Times[figure]; t != nil {
			all = append(all, atMost(r.Name, text, t.Median, most))
		}
	}
	switch r.Kind {
	case kindLatency:
		wake := r.Times[contenderWake]
		for _, one := range []struct {
			name, text string
			most       float64
		}{
			{contenderFull, "p50 to a bare wake-up's, blocking", blockLatencyMax},
			{contenderPoll, "p50 to a bare wake-up's, daemon polls", pollLatencyMax},
		} {
			if t := r.Times[one.name]; t != nil && wake != nil {
				all = append(all, atMost(r.Name, one.text, t.Median/wake.Median, one.most))
			}
		}
	case kindRestart:
		limit(figureCost, "ms without acks beyond the restart's", restartCostMax)
	case kindRecovery:
		limit(figureReady, "ms from start to ready", recoveryMax)
	case kindDeath:
		limit(figureAfter, "ms from end of file to the last lease back", deathAfterMax)
	}
	return all
}
