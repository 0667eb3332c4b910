// Package wire is the handshake of the native protocol (docs/wire-protocol.md), over any byte stream, and
// every limit on what a peer may send in it.
//
// It encodes and decodes the hello, the replies and the closing notice, and compares the spec of a hello
// with a table's. Sockets, deadlines, the samples and the acks are left to tcpingest, shm and client.
//
// Ownership: the Append functions append to the caller's slice; what the Read functions return is the
// caller's. No reader takes a byte beyond its message, since samples and acks follow at once.
//
// Goroutines: no state; any function may be called from any goroutine.
//
// Authentication: it holds the messages and the arithmetic that both sides share, and the client's side of the exchange (Greet). Which tokens there are, and what they
// may, is for package auth. A Secret shows itself to nobody who does not call Reveal.
//
// Errors: ReadHello returns a *Refusal, ready to be written back, for whatever the peer did wrong. ReadReply
// returns the *Refusal that the daemon sent. *Notice is an error too: why a daemon ended the stream. Bytes
// that are not this protocol wrap ErrProtocol. Nothing panics on input.
//
// Cost: once per connection. A body is read into memory that grows with what has arrived, to at most
// BodyBytesMax, however long its header says it is.
//
// Proof: hello_test.go and reply_test.go (both sides of every limit, every cut, one byte at a time),
// auth_test.go (every cut, every limit, nothing that prints shows a secret), doc_test.go (the hex in docs/wire-protocol.md is what this code writes and reads), and the handshake target in fuzz.
package wire
