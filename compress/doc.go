// Package compress turns samples into compressed streams and back: S2, zstd, each with or without a byte shuffle before. What the bytes are is in
// docs/wire-protocol.md, "Compression".
//
// It knows no sockets: who wants deadlines sets them on what the Reader reads from and the Writer writes to. An error of those, a deadline that passed included, ends the
// stream: neither side can go on in the middle of a block. What is wrong with the compressed bytes themselves is a *CorruptError.
//
// A Reader and a Writer belong to one goroutine and start none. Both copy: what they were given is the caller's again when the call returns. A Reader allocates buffers as large as
// the blocks and the window of what comes ask for, never beyond BlockBytesMax and Window, of which a decoder may need twice; how much comes out of how little costs processor
// time, but no memory.
// Nothing is allocated per sample once both run.
//
// Proof: round trips of every kind and dtype in pieces of all sizes, the examples of the docs, cuts at every byte, bombs and bounds of memory in the tests here; FuzzReader; whole streams
// in tcpingest and client.
package compress
