// Package proof makes samples that prove themselves: every byte follows from the stream's number, the sample's number and the leaf, so that whoever reads a
// sample can tell, without any record of what was sent, whether it is whole and where it says it is from.
//
// `ingestd push --generate` sends them, `ingestd pull --verify` and the tests of lost, torn and misplaced samples check them. It keeps no bytes and starts no
// goroutine; all functions may be called from anywhere. A column that is not a whole number of rows panics, as that is the caller's own mistake.
//
// Cost: one multiplication chain per 8 bytes (about 2 GB/s), no allocation. Proof: proof_test.go.
package proof
