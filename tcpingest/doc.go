// Package tcpingest receives samples over streams of bytes: TCP and unix sockets, TLS over them, and what other transports hand to ServeStream; the native protocol of
// docs/wire-protocol.md, and echo's.
//
// It leaves to package wire what a handshake may contain, to ingest how it is judged, and to drainer what happens to filled slots. One goroutine serves one
// connection; its bytes go from the socket to where a trainer will read them, by one of three ways that the spec decides (plan.go): read straight over the
// contiguous slots of a one-leaf column, scattered by readv into larger columns, or read many at once into a staging buffer and scattered from there while
// it is hot. Slots are reserved only for samples whose bytes are in the socket buffer already, so a slow sender holds nothing up; a sample larger
// than heldMin cannot wait there, so it is received in place, and its slot is given back if it stalls.
//
// A connection's bytes come from a source, of which there are two. A socket (socket.go) says how much it holds. Of TLS and of other transports' streams
// nobody says it, so that up to 64 KiB are read ahead of them (ahead.go); the rest of a large sample is read straight into its columns. Acks and notes are writes of the
// stream's own. TLS is 1.3 only (tls.go): a handshake that fails is counted by what was wrong (RefusedTLS), and nothing but TLS's own alert is said. A write of TLS that a
// deadline cut short cannot be followed by another, so that such a peer is closed without a reason.
//
// Of tables of tensors the samples are chunks, whose headers the stream's checker sees when they are pushed: at the first bad one the connection ends with
// bad_chunk, and what the checker has to say is written before the acks. Role manifest is answered here; other roles are handed to Config.Attach: publish and
// subscribe from TCP as well.
//
// A session has one connection. When another asks for it, the one that has it takes nothing more, whatever it waits for just then, closes its stream at once
// and acks afterwards, so that a peer that is half dead holds nobody up. While a stream waits for a slot, a timer looks after its peer (watch.go): a peer that
// wants them gets notes, and one that is gone is let go.
//
// Memory: a connection owns at most one partial sample of at most heldMin bytes, where it is no socket as much again that is read ahead, and its goroutine; staging buffers come from a pool of a fixed number
// that are held only while they are being scattered, never across a wait. So memory does not depend on the size of samples.
//
// Errors of a peer end that peer only, are counted by reason, and are told to it (a closing notice, then a close that lingers until the peer has read it).
// Serve returns when its listener closes. Cost: three system calls per read of up to 256 KiB (how much is there, read, ack), nothing per sample but the bytes
// and the ack. Proof: the conformance suite (ingest/ingesttest), tcpingest_test.go, tls_test.go, and bench/.
package tcpingest
