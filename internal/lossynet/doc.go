// Package lossynet is a network of two hosts for tests and benchmarks: two network namespaces of the kernel, each with a TUN device, and goroutines that carry packets from
// one to the other, of which they lose, delay and reorder some. So TCP and QUIC meet the same link, with the kernel's own TCP at both ends, and nothing outside the namespaces is touched.
//
// It leaves addresses, sockets and processes to its callers: what Side.Do calls runs on a thread in that side's namespace, and sockets that are made there, and processes started there,
// stay there, whoever uses them later. A process that asks for a signal when its parent ends (Pdeathsig) gets it when the thread ends that started it: that call
// has to last as long. So has the thread (runtime.LockOSThread) from which a program with links starts such processes elsewhere, because Do takes, and ends, any thread that is idle.
//
// It is no model of a fast network: packets are of 1,500 bytes, one system call each way, without offloads, so that it carries some 100 MB/s. Delays are exact to about a
// millisecond, which is as exact as the runtime's timers are. What it did is counted (Stats); packets that are not IPv4, which the kernel sends by itself, are dropped uncounted.
//
// Needs root, or CAP_SYS_ADMIN and CAP_NET_ADMIN, and /dev/net/tun: Start's error says which it lacks (ErrUnavailable). Goroutines and threads: two goroutines per direction, which end with Close,
// and a thread per call of Do; a thread that was in another namespace never serves other goroutines. Memory: what is on its way, 64 MiB each way at most.
// Proof: lossynet_test.go, and conformance_test.go, which runs the suite of the transports over it.
package lossynet
