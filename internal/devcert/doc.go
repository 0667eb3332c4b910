// Package devcert makes certificates for development and tests: an authority of one's own, and certificates of daemons and clients that it signs. All keys are ECDSA on
// P-256.
//
// It is no public key infrastructure: nothing is revoked, and the authority's key lies in a file. `ingestd cert` is its command line; who uses certificates, and checks them, is
// for tcpingest, quicingest and client.
//
// Ownership: a Pair belongs to the caller and does not change. Files are made with mode 0600 and never overwritten.
//
// Goroutines: no state; any function may be called from any goroutine.
//
// Errors: *ExistsError where a file is there already, others of os and crypto/x509, with what was being done.
//
// Cost: under a millisecond per certificate.
//
// Proof: devcert_test.go: real TLS handshakes, the right ones and the wrong ones (other authority, other name, expired, no certificate, a server's as a client's), and what
// files are made.
package devcert
