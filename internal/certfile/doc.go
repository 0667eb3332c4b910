// Package certfile keeps a server's certificate, its key and the authorities of its clients, as they stand in files: each handshake gets what is in them then.
//
// The files are looked at (three calls of stat) at each handshake and read when one of them has changed. What cannot be used, such as a certificate that was replaced before its key was, is
// logged once, and what was there before goes on being used. Which versions and protocols TLS speaks is left to the transports. Methods are for any goroutine. Proof: certfile_test.go.
package certfile
