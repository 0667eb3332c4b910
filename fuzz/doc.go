// Package fuzz holds the fuzz targets that reach over more than one package: bytes from strangers, memory that a hostile peer shares, and lists of
// operations that are played against a plain reference. It is tests only; nobody imports it.
//
//	FuzzHello, FuzzReply, FuzzNotice   handshake bytes, cut anyhow                          handshake_test.go
//	FuzzSpec, FuzzSpecPair             spec text and JSON, and what tells two specs apart   spec_test.go
//	FuzzSegment, FuzzSegmentDamaged    anything taken for a segment; a sound one with       segment_test.go
//	                                   words overwritten; batches that a peer makes up
//	FuzzRingLife                       reserve, split, commit, abandon, flush, lease and    ringlife_test.go
//	                                   release on a small ring, beside a model of it        model_test.go
//	FuzzSharedQueue                    a shared queue in which words are overwritten        sharedqueue_test.go
//	FuzzTrainerChannel                 a real attachment whose trainer scribbles, gives     trainerchannel_test.go
//	                                   back what it never got, talks, and leaves
//	FuzzConnection                     a real connection of tcpingest from its first byte   connection_test.go
//	                                   to its last: cut anyhow, reset, shut down
//	FuzzHandshake                      visitors of a daemon with tokens over TCP, TLS and   doors_test.go
//	                                   QUIC: each field of a hello, proofs, what follows    doors_hello_test.go
//	FuzzDaemon                         what says it is a daemon, over TLS and QUIC, to      doors_daemon_test.go
//	                                   clients with a token
//	FuzzChallenge, FuzzProof,          the exchange alone, and the file of tokens           authentication_test.go
//	FuzzTokens
//
// What must hold is said beside each target. Seeds are in the code. `go test ./fuzz` plays them, with whatever was found and kept under testdata; `make fuzz`
// searches, or one target alone:
//
//	go test -run '^$' -fuzz '^FuzzRingLife$' -fuzztime 1m -fuzzminimizetime 1s ./fuzz
//
// Targets own all memory they use. Those on heap memory have one goroutine, or goroutines that the race detector can follow; FuzzTrainerChannel maps memory
// twice, which it cannot, and is left out under it.
package fuzz
