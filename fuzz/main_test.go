package fuzz

import (
	"flag"
	"os"
	"runtime/metrics"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	flag.Parse()
	if searching := flag.Lookup("test.fuzz"); searching != nil && searching.Value.String() != "" {
		os.Exit(m.Run()) // the fuzzer has goroutines of its own
	}
	goleak.VerifyTestMain(m)
}

// checkAllocated runs f, which reads a message of which arrived bytes came. What that takes from the heap follows from what came, never from what is
// announced. A field of a few bytes becomes tokens, strings and an entry of a list; 100 bytes for one is what specs of many short leaves come to.
//
// The runtime counts small things late, together with those of earlier runs, so f is run again if it seems to take too much.
func checkAllocated(t *testing.T, arrived int, f func()) {
	t.Helper()
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	most, took := uint64(128<<10+100*arrived), uint64(0)
	for range 5 {
		metrics.Read(sample)
		before := sample[0].Value.Uint64()
		f()
		metrics.Read(sample)
		if took = sample[0].Value.Uint64() - before; took <= most {
			return
		}
	}
	t.Fatalf("reading %d bytes took %d from the heap, at most %d were expected", arrived, took, most)
}
