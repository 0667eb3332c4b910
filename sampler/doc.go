// Package sampler decides which batch goes to which trainer. FIFO is the one policy so far: every group of trainers gets each published batch once, in the order of
// publication and without a copy; the trainers of a group share them. A batch that comes back because its trainer died goes out again in its group before any newer one.
//
// Batches are taken from the ring when some group has nothing left to give out, and put in the queue of every group; a place is free again when the last group that needs it is
// done with it. Which those are is noted in the segment (ring.SetPending), so that a process that takes the segment up again knows it.
//
// It leaves the batches' memory and states to ring, and the trainers themselves to shm (other processes) and engine (this one).
//
// Ownership: a batch belongs to the member whose Next returned it until that member calls Release (read), Return (not read to its end: the group's policy says what becomes of it) or
// Offer (not begun), exactly one of them, exactly once; giving back what one does not hold panics. Leave returns what is left. FIFO owns what it has leased from the
// ring, and what ring.Recover found.
//
// Goroutines: any number may call all methods at once, but for Next, of which a seat (park.Waiter) can be in one at a time. Run is what the clock says, run by one.
// ring.Full, which New sets, calls from a writer's goroutine.
//
// Errors: from Next io.EOF when the ring is closed and nothing is left to give out in this group, *LostError when the group lost batches (and then it goes on), os.ErrClosed
// after Leave, or the context's. A batch that is returned after the end goes to whoever of the group calls Next afterwards: Next never waits for leases of others to
// end, since their holder may be waiting too. From Join a *ring.GroupsFullError.
//
// Cost: per batch and group two short holds of one lock and one look at the clock; nothing per sample; no allocation in steady state. A group takes 48 bytes for each
// place of the ring.
//
// Proof: model_test.go (random lives of groups and members against the plain rules, on rings of 2 and 4 batches; members of several groups at once, under the race
// detector), fifo_test.go and group_test.go (order, death, loss, end, linger, keep and recovery, in simulated time), fifo_bench_test.go (beside the ring alone).
package sampler
