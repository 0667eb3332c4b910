// Package weights keeps generations of a model's tensors: whole or not there, in shared memory, each verified by sums.
//
// Store holds a table's segment: places for a few generations, made when the first publisher says its manifest. Publishing writes one generation after the
// other; Reader reads them in the daemon itself, for peers elsewhere. Server answers hellos of role publish and subscribe; Attach and AttachPublisher are its
// other side for processes on the same machine. The format and the protocols are in docs/weights.md. What a manifest and a sum are is left to tensor, memory
// and its descriptors to shm, the handshake to wire.
//
// Ownership: the bytes of a place belong to whoever was given it by Begin, until Commit, Abort or Close; after that to whoever pins it, until it lets go.
// Nobody writes a place that is pinned, and never the newest generation's. A segment that was replaced stays mapped until its last user lets go.
//
// Goroutines: a Store has none. One goroutine at a time uses a Publishing and its Place, and one waits for a Reader's news; all else may be called from any. A
// reader costs the server two: the caller of Serve and one that watches the socket; a publisher one. A reader's attachment has one, a publisher's none.
//
// Connections: the chunks of a publisher that sends are read where readers will find them, and summed while they are in the cache; nothing is staged, and what
// one publisher can make the daemon remember is bounded (tensor.Coverage, piecesMax). A reader over a connection is sent the memory itself, with sendfile, and
// only when it says that it has a generation its pin goes: what lies in the sockets' buffers is that memory. One that takes nothing for StallTimeout is cut off.
//
// Trust: readers map the segment read-only and share one page of pins that can say nothing but which generations that reader holds: junk in it is no pin.
// Publishers in place map the segment writable, so they must be of the daemon's own user or listed (shm.FillConfig). The daemon keeps its own copy of what it
// decides by, so that one that means harm can spoil what readers read, but not the daemon. Readers that verify find out.
//
// Errors: *ActiveError, *PinnedError, *OldGenerationError, *CapacityError, *IncompleteError, *NoGenerationError, *ReplacedError, *TooManyReadersError,
// *FormatError, os.ErrClosed and the context's. What panics: letting go of a pin twice.
//
// Cost: a pin is two atomic stores and two loads, whatever the generation's size. A publication costs the daemon one SHA-256 over four bytes per tensor, and
// a look at the page of each reader.
//
// Proof: store_test.go, model_test.go (random lives of publishers and readers against a plain reference), race_test.go (no byte changes under a pin),
// golden_test.go (the format), server_test.go and permit_test.go (peers that break rules, close or stop reading at each stage), stream_test.go and remote_test.go
// (the same over connections: each byte of a chunk flipped, each stage, slow and stalled readers, sums that collide), FuzzPublisher (lives of publishers that
// send, against a plain model), internal/killtest/weights_test.go (publishers, readers and daemons killed and stopped at each stage).
package weights
