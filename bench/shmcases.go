package bench

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// What a case of bench shm measures.
const (
	kindPlace    = "place"    // rate, samples filled in place once and not rewritten
	kindWrite    = "write"    // rate, the producer writes each sample
	kindLatency  = "latency"  // one sample per batch, paced
	kindRestart  = "restart"  // the daemon killed and started again under load
	kindRecovery = "recovery" // a large ring taken up again
	kindDeath    = "death"    // a trainer that holds leases killed
)

// ShmCase is one shape of load of bench shm.
type ShmCase struct {
	Case
	Kind string `json:"kind"`
}

// The rings of the cases in place, which are compared with each other, have the same number of samples in the same number of batches; at 16 MiB they are 16 GiB.
const (
	placeBatch   = 64
	placeBatches = 16
)

func shmCase(kind string, sampleBytes int64, batchSize, batches int) ShmCase {
	c := ShmCase{Kind: kind, Case: makeCase(sampleBytes, 1, 1, batchSize, batches)}
	switch c.Name = sizeText(sampleBytes); kind {
	case kindPlace:
	case kindWrite:
		c.Name += "/written"
	default:
		c.Name = kind
	}
	return c
}

// shmCases are the cases of the targets.
func shmCases() []ShmCase {
	var out []ShmCase
	for _, size := range []int64{64 * kib, mib, 16 * mib} {
		out = append(out, shmCase(kindPlace, size, placeBatch, placeBatches))
	}
	return append(out,
		shmCase(kindWrite, 64*kib, placeBatch, placeBatches),
		shmCase(kindWrite, mib, 16, 16),
		shmCase(kindWrite, 16*mib, 4, 16),
		shmCase(kindWrite, 64, 256, 64),
		shmCase(kindLatency, 64, 1, 64),
		shmCase(kindRestart, 4*kib, 64, 256),
		shmCase(kindRecovery, 16*kib, 64, 4096),
		shmCase(kindDeath, 64*kib, 16, 32),
	)
}

// smokeShmCases run the same code in a few seconds, with rings so small that they wrap.
func smokeShmCases() []ShmCase {
	var out []ShmCase
	for _, kind := range []string{kindPlace, kindWrite} {
		for _, size := range []int64{64 * kib, 256 * kib} {
			out = append(out, shmCase(kind, size, 8, 8))
		}
	}
	return append(out,
		shmCase(kindWrite, 64, 64, 16),
		shmCase(kindLatency, 64, 1, 16),
		shmCase(kindRestart, 4*kib, 16, 32),
		shmCase(kindRecovery, 16*kib, 16, 64),
		shmCase(kindDeath, 4*kib, 4, 16),
	)
}

// chooseShmCases returns the cases that are named in filter (a comma-separated list), or all when it is empty.
func chooseShmCases(cases []ShmCase, filter string) ([]ShmCase, error) {
	if filter == "" {
		return cases, nil
	}
	var chosen []ShmCase
	for name := range strings.SplitSeq(filter, ",") {
		i := slices.IndexFunc(cases, func(c ShmCase) bool { return strings.EqualFold(c.Name, strings.TrimSpace(name)) })
		if i < 0 {
			return nil, fmt.Errorf("no case is called %q: choose from %s", name, shmCaseNames(cases))
		}
		chosen = append(chosen, cases[i])
	}
	return chosen, nil
}

func shmCaseNames(cases []ShmCase) string {
	names := make([]string, len(cases))
	for i, c := range cases {
		names[i] = c.Name
	}
	return strings.Join(names, ", ")
}

// pollFor is how long the daemon of the polling contender looks at its queues before it sleeps: longer than the pace of the latency cases.
const pollFor = 10 * time.Millisecond

// pace is the samples per second of the latency case.
const pace = 1000
