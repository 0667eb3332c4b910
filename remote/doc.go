// Package remote sends the batches of a table to trainers that do not map it: on other machines, or on this one over a connection. docs/wire-protocol.md, "Remote
// trainers", has the bytes.
//
// Who may have which batch is left to sampler, a trainer's number and its share of the table to shm (Server.Seat), so that trainers over connections and those that map the segment
// are under the same rules; the handshake to wire and to the transports; how bytes get from a segment to a socket to internal/sendfile.
//
// Ownership: Serve owns its connection. A batch is leased from before its header is written until the trainer's answer is there, or its connection is gone: socket buffers refer
// to the pages of the segment, also to those that the peer's kernel has received, where that is this machine's. So a connection that ends with batches unanswered is reset before
// they are given back, also by the kernel when the process dies, and a trainer takes none whose connection has ended before it had all of it.
//
// Goroutines: Serve runs in the caller's, which sends, and has one more, which reads answers; both have ended when it returns. Everything else may be called from any.
//
// Errors: nil when the trainer left or died, a *wire.Refusal when it was refused, a *wire.Notice when it was cut off: bad_peer for an answer that answers nothing, stalled
// when it took nothing for StallTimeout, shutting_down. A trainer whose machine vanished is one that died, once the kernel has heard nothing of it for StallTimeout. Nothing a peer
// sends panics, or costs more than its share of batches and 4 KiB; of those that are refused so many are told why as shm.Server.Refused says.
//
// Cost: per batch one write for its header and small columns, and a sendfile for each run of columns of 16 KiB and more that touch; a short hold of one lock per batch and
// answer; no allocation. Proof: remote_test.go (bytes, peers of every kind, limits), ends_test.go (who gets what when a trainer ends),
// process_test.go (a daemon that is killed; internal/e2e does it to the real one), client/remote_test.go and remote_ends_test.go (with the client, cut anywhere), internal/killtest.
package remote
