package ingesttest

import (
	"context"
	"sync"
	"testing"

	"github.com/ingestd/ingestd/ingest"
)

// Network is what lies between client and daemon in RunOver.
type Network struct {
	Slow  bool // a round trip takes so long that there cannot be hundreds of them
	Lossy bool // what is sent once may not arrive
}

// patience is how many times as long all limits of time are over a network: what is lost is sent again only after a while.
const patience = 100

// together is how many tests run at once. They mostly wait for packets.
const together = 4

// overNetwork is what each client sends at most over a network.
const overNetwork = 512 << 10

// RunOver runs what a network can change of the suite over one, with less to send.
func RunOver(t *testing.T, start Start, n Network) {
	over := func(t *testing.T, tables ingest.Tables, limits Limits) (ingest.Transport, func(context.Context) (Conn, error)) {
		limits.HandshakeTimeout *= patience
		limits.IdleTimeout *= patience
		limits.StallTimeout *= patience
		limits.AckTimeout *= patience
		return start(t, tables, limits)
	}
	var running sync.WaitGroup
	seats := make(chan struct{}, together)
	run := func(name string, f func(*testing.T, Start)) {
		seats <- struct{}{}
		running.Go(func() {
			t.Run(name, func(t *testing.T) { f(t, over) })
			<-seats
		})
	}
	for _, tc := range suite {
		if tc.needs&near == 0 && (tc.needs&quick == 0 || !n.Slow) && (tc.needs&lossless == 0 || !n.Lossy) {
			run(tc.name, tc.f)
		}
	}
	for _, sh := range shapes {
		if size := int(mustSpec(t, sh.spec).SampleBytes()); size <= overNetwork/4 {
			sh.samples = min(sh.samples, overNetwork/size)
			run("Samples of "+sh.name, func(t *testing.T, start Start) { samplesOf(t, start, sh) })
		}
	}
	running.Wait()
}
