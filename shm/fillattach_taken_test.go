//go:build linux

package shm

import (
	"testing"

	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/spsc"
)

// TestTakenWhileTheQueueIsFull: rows count as taken when their own descriptor was, also while the queue is full of later ones.
func TestTakenWhileTheQueueIsFull(t *testing.T) {
	const capacity = 4
	mem := ring.AlignedBytes(channelBytes(capacity))
	_, giveback, err := formatChannel(mem, capacity)
	check(t, err)
	a := &FillAttachment{counts: make([]uint64, countsFor(capacity))}
	a.giveback, err = spsc.NewProducer(giveback, capacity)
	check(t, err)
	a.toDaemon, err = newBell()
	check(t, err)
	defer func() { check(t, a.toDaemon.close()) }()
	daemon, err := spsc.NewConsumer(giveback, capacity)
	check(t, err)
	taken := uint64(0)
	for round := range 3 * capacity {
		for {
			room, err := a.HasRoom()
			check(t, err)
			if !room {
				break
			}
			check(t, a.Complete(LentPlace{Lease: 1}, 1))
		}
		if rows, all, err := a.Taken(); err != nil || rows != taken || all {
			t.Fatalf("round %d: %d rows were taken (all: %v, %v), want %d of %d", round, rows, all, err, taken, a.Handed())
		}
		var one [1]spsc.Desc
		n, err := daemon.TryPop(one[:])
		check(t, err)
		taken += uint64(n)
	}
}
