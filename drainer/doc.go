// Package drainer moves samples from the streams' queues into the ring's state: a fixed pool of goroutines, each of which owns
// some of the queues, commits what transports have placed and so publishes batches.
//
// The bytes themselves were placed by the transport, which had them in its cache (measured in BenchmarkWhoScatters: placing from the receiving
// goroutine costs less than handing a buffer over). So what travels through a queue is a descriptor of filled slots, and a drainer touches 24
// bytes per sample. Stream is the sender's side: reserve slots, fill them, push; it belongs to one goroutine, the transport's. Between Reserve and Push
// the slots are the sender's; after Push they are the drainer's.
//
// A sender that finds its drainer at rest commits its own run itself, which saves waking a goroutine per read; the queue carries what is pushed while somebody
// else is at work.
//
// A drainer visits its streams in rotating order and takes from each at most what it found there on arrival, so that a flooding
// producer starves nobody. A closed stream is removed when it is empty; Done tells.
//
// Lender is for producers that write to the ring themselves, through shared memory: it lends them whole places, commits the rows they call complete,
// publishes full places as they are, and settles (copies into the batch that all share) what must not wait for the rest. It keeps the order of its stream:
// nothing is published in place before everything of the stream that was copied earlier.
//
// A stream may have a Checker, which sees each run of filled slots, or of rows called complete, before it is committed: what it turns down ends the producer,
// and is in no batch. It is called once per run, and tables of samples have none.
//
// Backpressure is one chain: ring full → Reserve waits → the transport does not read and does not ack → the producer's window closes.
//
// Errors: os.ErrClosed when the ring or the stream is closed, or the context's; *LeaseError for rows that a producer cannot have filled; *StrandedError.
// Cost: per push, one queue slot and one atomic add in the ring; nothing per sample but its 24 bytes; no allocation. Proof: drainer_test.go (fairness,
// order, removal, no allocation), lender_test.go (order of copied and published rows, every end), on heap memory under the race detector.
package drainer
