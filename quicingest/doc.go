// Package quicingest receives samples over QUIC: each bidirectional stream that a client opens is one connection of the native protocol (docs/wire-protocol.md), with
// a handshake of its own and its acks on the same stream.
//
// It leaves all that happens on a stream to tcpingest, whose Server it holds and whose limits it thus has, and QUIC itself to quic-go. Its own are: UDP sockets with buffers as large as
// they may be; connections, half-open handshakes, streams of a connection and how many of each there may be; when a connection that nobody uses ends; and
// counting what never got as far as a stream.
//
// TLS is 1.3 with the protocol's name (wire.ALPN). 0-RTT is never taken: its bytes can be replayed by whoever saw them, and samples must not come twice; without session tickets no client
// can even try. A client may change its address or port while samples flow. When more handshakes are half-open than Config.RetryAbove, a client has to show first that it
// is at its address (Retry), which costs it one round trip and the daemon no memory.
//
// A reset of a stream, by either side, discards the sample that was under way, and nothing else: those before it are counted, and acked where that is still possible.
// A connection without a stream is closed after the time in which a hello has to come, or IdleTimeout after its last one.
//
// Memory: of what nobody reads yet a connection may send WindowBytes on each stream, and twice that in all; of what is read, WindowBytesMax and half as much again. Datagrams that belong to
// no connection cost their reading. Goroutines: the accept loop, one per connection and one per stream, beside quic-go's.
//
// Shutdown stops accepting, ends the streams as tcpingest does, and gives clients some round trips, LingerTimeout at most, to close their connections, since a
// close by the daemon would drop what they have not received. Connections on which somebody attached (Config.Streams.Attach) last until Close. Proof: the conformance suite (ingest/ingesttest) with a connection per stream, with one for all, and over links that lose, delay and
// reorder packets (internal/lossynet); hostile_test.go; migration_test.go.
package quicingest
