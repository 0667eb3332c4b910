// Package quicconn makes a stream of QUIC look like the other connections that the native protocol runs over: it is a net.Conn that can close its writing side alone.
//
// Daemon (package quicingest) and clients (package client) use the same; whose QUIC connection it is, and when that ends, is theirs. Reads and writes may run at the same time,
// two reads or two writes may not; Close, deadlines and HungUp are for any goroutine. Deadlines are errors with os.ErrDeadlineExceeded, as of sockets. A peer that closed its whole
// connection in order has ended the stream in order, too. Close delivers what was written, as of sockets, unless a write did not take all. It copies nothing and has no
// goroutine. Proof: conn_test.go and the tests of quicingest.
package quicconn
