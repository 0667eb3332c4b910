// Package shm is where bytes are shared between processes: memory that the daemon makes and seals, and the attachment to it, over a unix
// socket, of trainers and of producers that fill it in place. It is for Linux.
//
// Memory is a memfd (or a named file), populated at start and sealed before its descriptor leaves the process. Server answers hellos of
// role train, fill and observe; Attach, AttachFill and Observe are their other side. What is exchanged is written in docs/wire-protocol.md ("Attach") and
// docs/segment-format.md ("Channel"). What the bytes of a segment mean is left to ring, which batch goes to whom to the Source (package
// sampler), the handshake's form to wire.
//
// Seat is for who serves trainers that do not map the memory (package remote): their numbers, their share of a table's batches and their groups are the Server's, so that
// the same limits hold for all.
//
// Ownership: a Memory belongs to who made it and must outlive every Serve of its table. Serve owns its connection. A batch that Next of
// an Attachment gave out may be read until its Release; the mapping stays until both Close was called and the last batch was released.
// Whatever becomes of a trainer, each batch it was lent goes back to the Source exactly once: Release if it gave it back, Return if not.
// A place that was lent to a producer is its own to write until its last row is called complete; what it did not complete comes back when
// its socket ends. The memory of a FillAttachment stays mapped from Close to Unmap, so that rows which the daemon did not take can be copied.
//
// Goroutines: a trainer costs the daemon three: the caller of Serve, which watches the socket, one that delivers and one that takes
// back; a filler three as well: one commits and lends, one waits for free places, one watches the socket (and a timer for rows that must
// not wait, and for notes). All end before Serve returns. An Attachment has one, which watches the socket until Close. Waiting is on eventfds through the
// runtime's poller, so no wait takes a thread. One goroutine at a time may be in Attachment.Next, any may Release and Close.
//
// Chunks of tensors that are written in place are checked when they are called complete, before they are published; their producer is told of steps that are
// too old on its socket, before it is told that the chunk was taken. The daemon does not look again: a producer that writes to a place afterwards is one that
// means harm.
//
// Trust: the daemon believes nothing that a peer can write. Each descriptor is compared with what was lent to that peer, cursors are checked by spsc, a socket
// that says anything is cut off; all of it ends that peer alone, with the notice bad_peer. Trainers map the segment read-only and the kernel holds them to it.
// Producers that fill map it writable, so they must be of the daemon's own user or listed (FillConfig): one that means harm can spoil every sample and the
// segment's own words, but not the daemon's process. A client checks seals, sizes and headers, since they may come from another version.
//
// Errors: *InsufficientError (nothing was allocated), *wire.Refusal and *wire.Notice (what the daemon said), *PeerGoneError (it died),
// *FormatError (it shared what makes no sense), io.EOF, os.ErrClosed and the context's. What panics: releasing a batch that is not held,
// and a second goroutine in Next.
//
// Cost per batch: two descriptors of 16 bytes, an eventfd write (0.25 µs) each way if the other side sleeps, no allocation; nothing per
// sample. An attachment is 4 descriptors and 4 KiB. Populating memory takes 0.35 s per GiB with 4 KiB pages, 0.11 s with huge ones.
//
// Proof: memory_test.go (seals, sizes, limits), channel_test.go (header, eventfds), attach_test.go (every end of an attachment),
// process_test.go (trainer processes killed, stopped, writing where they must not; junk in every word of a channel), memory_kept_test.go
// (files taken up again; full file systems), fill_test.go and fill_process_test.go (the same for producers that fill).
package shm
