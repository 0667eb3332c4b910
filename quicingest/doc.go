// Package quicingest receives samples over QUIC: each bidirectional stream that a client opens is one connection of the native protocol (docs/wire-protocol.md), with
// a handshake of its own and its acks on the same stream.
//
// It leaves all that happens on a stream to tcpingest, whose Server it holds and whose limits it thus has, and QUIC itself to quic-go. Its own are: UDP sockets with
// buffers as large as they may be; connections, half-open handshakes, streams of a connection and how many of each there may be; when a connection that nobody uses ends;
// and counting what never got as far as a stream.
//
// TLS is 1.3 with the protocol's name (wire.ALPN). 0-RTT is never taken: its bytes can be replayed by whoever saw them, and samples must not come twice; without session
// tickets no client can even try. A client may change its address or port while samples flow. When more handshakes are half-open than Config.RetryAbove, a client has to
// show first that it is at its address (Retry), which costs it one round trip and the daemon no memory.
//
// Strangers: a connection on which nobody was let in is a handshake of its address, before the door of streams but counted apart (bans.Door.Beside), from when the address
// is verified. It ends when no stream came within the time in which a hello has to, and after twice that whatever is done on it; if it ended without a stream, or its
// handshake failed at what only the owner of the address can have sent, that is a failure of the address. A connection that is known ends IdleTimeout after its last stream.
//
// A reset of a stream by the client discards what was under way: the sample of which a part came, and whole ones that nobody has read yet. Those before are counted, and
// acked where the client still reads. A reset by the daemon comes when its acks are not read.
//
// Memory: of what nobody has read a stream holds the window that it was given, Config.Streams.WindowBytes and, when it is read quickly, up to WindowBytesMax; a
// connection as much as its streams, so that those whose table is full do not stop the others. A stranger's connection of which a stream found no room is closed, since
// quic-go keeps what came on a stream as long as its connection. Datagrams that belong to no connection cost their reading. Goroutines: the accept loop and one that
// counts datagrams per socket, one per connection and one per stream, beside quic-go's.
//
// Shutdown stops accepting, ends the streams as tcpingest does, and gives clients some round trips, LingerTimeout at most, to close their connections, since a
// close by the daemon would drop what they have not received. Connections on which somebody attached (Config.Streams.Attach) last until Close. Server.mu is never held
// while quic-go is asked for something that waits: it calls begin while it does.
//
// Proof: the conformance suite (ingest/ingesttest) with a connection per stream, with one for all, and over links that lose, delay and reorder (internal/lossynet);
// door_test.go, hostile_test.go, silent_test.go, windows_test.go, shutdown_test.go; migration_test.go.
package quicingest
