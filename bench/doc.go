// Package bench measures the whole path, socket to lease, as separate processes beside its baselines, and prints what it found as ratios.
//
// `ingestd bench tcp` starts for every case a sender, a daemon and a trainer, and in the same run, interleaved, two baselines: a plain copy of the
// same bytes into memory of the same size, and a bare loop, which is a process that reads the socket straight into mapped memory, answers with
// coalesced acks and does nothing else. One sender program drives daemon and bare loop alike, over the native handshake of package wire. `ingestd bench
// micro` runs the queue and the ring beside their twins.
//
// `ingestd bench secure` does so over TLS and QUIC: the bare loops are of crypto/tls and quic-go.
//
// `ingestd bench link` has TCP, TLS and QUIC push over links that lose, delay and reorder packets, beside the same bare loops over the same links; sender and daemon are in
// network namespaces (internal/lossynet), which needs root.
//
// `ingestd bench shm` does the same for producers that fill places of the ring themselves: rates in place and written, beside a bare queue of descriptors
// between two processes, shmipc-go (bench/shmipc, a module of its own) and plain memory writes; latency beside one bare eventfd; and what faults cost: a daemon
// killed under load, a large ring taken up again, a trainer killed with leases.
//
// `ingestd bench tensors` measures the workload of training: gradients over TCP and in place to a reader that sums them, beside the bare loop; the sum of a step
// that lies in the ring, beside a plain loop and numpy; weights published in place, beside one copy, and streamed, beside a bare sendfile loop; CRC-32C beside
// copy; and the memory of the daemon. A case's figures, ours and the baselines', go into one table, which names for each ratio what it is a ratio to.
//
// `ingestd bench access` measures handshakes with tokens beside those of a daemon without, and a producer alone and beside a banned address that connects all the time, to the daemon and
// to a listener that nobody serves, whose kernel drops the same: what that takes is what connecting takes. The parent connects, and so does not sleep then.
//
// It leaves serving to the real binary, which it runs again with the subcommand serve, and the micro benchmarks of single packages to those packages.
//
// Processes: the parent only starts, asks and stops; while a window is measured it sleeps. Children answer one JSON line on standard output for every
// JSON line on standard input and end when their standard input does, so that none outlives the parent. A child reads the clock, its counters and the CPU
// clocks of all processes in one go, so that a rate and its cost are of the same window.
//
// Latencies come from an open loop: samples have intended send times at a fixed rate, which is a stated fraction of the rate just measured, and the
// time stands in the sample's first eight bytes. A sender that is held up sends late, but its samples keep their intended times, so that waiting
// is not left out (no coordinated omission). Arrival to lease is the arrival column against CLOCK_REALTIME when the batch is leased.
//
// bench shm paces its latencies instead: a sample is stamped when its producer commits it, since what is measured is the wake-ups on its way and not a queue.
// A fault's times are of CLOCK_MONOTONIC, which all processes share: a child notes when it saw something, and the parent when it did something.
//
// Errors: everything that fails names the process and the last lines that it logged. A missed target is no error unless --check asks for that.
//
// Cost: a counter per batch in the trainer, one per read in the bare loop, one per write in the sender. Proof: bench_test.go runs every case at
// smoke size with the real binary.
package bench
