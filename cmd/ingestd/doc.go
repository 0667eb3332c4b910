// Command ingestd is the daemon and its tools in one binary: serve, push, pull, inspect, check, bench, version.
//
// It holds flags, their help, and what is printed; the daemon itself is internal/daemon, the producer and the trainer are package client, files of samples
// internal/tensorfile, segments internal/inspect. Every command returns an error and nothing else exits: exit.go turns errors into the documented exit
// codes. Results go to standard output, progress, logs and errors to standard error.
//
// Proof: cli_test.go and serve_test.go run the real binary (the test binary, re-executed): exit codes, every command, SIGTERM under load.
package main
