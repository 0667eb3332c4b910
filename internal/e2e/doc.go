// Package e2e tests the real binary, as processes, with everything that peers and machines do wrong: each case must end with an error that says what to do,
// be counted, and harm nobody else.
//
// What a transport or the attach server does with one peer is tested in process, by ingest/ingesttest and by shm; here it is the whole daemon, its
// commands and its operating system. It is tests only; nobody imports it.
//
// Beside nearly every case run an honest `ingestd push --generate` and an honest `ingestd pull --verify --gapless`, on the same table where a case does
// not take batches away itself. A case ends as a daemon does: SIGTERM under load. Then the daemon must have ended with 0, which it does only if everything was
// read, and of the samples, which prove themselves by stream and number, none that was acked may be missing, wrong, torn, twice or out of order.
//
// Nothing sleeps: tests wait for what /status, /metrics, a socket or a process says, for as long as `go test -timeout` lets them. Processes die with the
// test. When a test fails, it prints what each of its processes wrote.
//
//	harness_test.go     the binary, processes, daemons, what they say and what they hold
//	peers_test.go       the honest pair, a rude producer, a trainer that keeps account
//	producers_test.go   handshakes, specs, acks that are not read, half samples, killed producers
//	trainers_test.go    missing table, wrong spec, killed, stopped, junk descriptors
//	start_test.go       what serve refuses to start with
//	compressed_test.go  producers that compress, bombs
//	flights_test.go     what authentication costs in round trips
//	limits_test.go      memory, descriptors, 10,000 connects
//	stop_test.go        SIGTERM under load, and a daemon that is killed
package e2e
