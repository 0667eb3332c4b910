// Package sampler decides which batch goes to which trainer. FIFO is the one policy so far: each published batch goes to exactly one
// trainer, in the order of publication and without a copy; one that comes back because its trainer died goes out again before any
// newer one.
//
// It leaves the batches' memory and states to ring, and the trainers themselves to shm (other processes) and engine (this one).
//
// Ownership: a batch belongs to the caller of Next until it calls Release (read) or Return (not read, give it to somebody else),
// exactly one of them, exactly once; ring panics on a second Release, this package on a second Return.
//
// Goroutines: any number may call Next, TryNext, Release and Return at once. Each that calls Next brings its own park.Waiter. Run is
// the linger loop, run by one.
//
// Errors: io.EOF from Next when the ring is closed and nothing is left to give out, or the context's. A batch that is returned after
// that goes to whoever calls Next afterwards: Next never waits for leases of others to end, since their holder may be waiting too.
//
// Cost: per batch a few atomic words and no lock while nothing was returned; nothing per sample; no allocation in steady state.
//
// Proof: fifo_test.go (order, death, end and linger, in simulated time; many trainers of which some die, on the smallest rings).
package sampler
