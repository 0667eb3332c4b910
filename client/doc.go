// Package client is the Go library for the two ends of ingestd: Producer pushes samples to a daemon, Trainer (Linux)
// maps a table's ring and reads whole batches from it.
//
// What a sample is, is left to spec; the bytes of the handshake to wire; mapping and descriptor passing to shm.
//
// Ownership: the slices given to Push and PushMany are the caller's again when the call returns, whatever it returns. A
// sample is taken when Push returns nil: then the Producer has written it or holds a copy. After an error it was not taken and
// may be pushed again. Taken is not acked: what Sent counts and Acked does not is lost when the connection ends.
//
// Goroutines: Push, PushMany, Flush and Close of one Producer are for one goroutine at a time. Abort, Sent, Acked,
// Held, Accepted and Stats may be called from any. Dial starts two goroutines, one that reads acks and one that writes
// what is left over when nobody pushes; Close and Abort end both.
//
// Errors, to be told apart with errors.Is and errors.As:
//
//   - *wire.Refusal: the daemon refused the connection, and says why
//   - *wire.Notice: the daemon ended the stream, and says why
//   - ErrDaemonGone: the connection ended and nobody said why
//   - os.ErrClosed: Close or Abort was called
//   - context.Canceled, context.DeadlineExceeded: the call's context ended first; for a deadline os.ErrDeadlineExceeded too
//   - wire.ErrProtocol: the other side is not an ingestd daemon
//
// Nothing panics on what a daemon sends.
//
// Cost: small samples are copied once into a send buffer and go many to one system call; large ones are written from the
// caller's memory with no copy. In steady state a Push allocates nothing. Memory per Producer: two send buffers of at
// most Config.BufferBytes, and the rest of one sample when a context ends in the middle of writing it.
//
// Proof: producer_test.go (delivery, both windows, coalescing, interruption half-way, over TCP and unix sockets),
// producer_alloc_test.go (no allocation), producer_errors_test.go (each error, and no other), and the conformance suite of the
// transports. BenchmarkPush sets the rates beside bare writes.
package client
