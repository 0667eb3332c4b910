// Package pollfd asks what is the case of a file descriptor now, without waiting.
//
// It leaves to its callers what they ask for and what the answer means. It is here because poll(2) is interrupted by signals even when it does not wait, and the Go
// runtime sends them to goroutines that run long: a caller that takes the error for "nothing is the case" is wrong once in a while.
//
// There are no errors: what cannot be asked (a closed connection) answers with POLLNVAL. Cost: one system call. Proof: pollfd_test.go.
package pollfd
