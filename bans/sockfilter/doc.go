// Package sockfilter lets the kernel drop what banned addresses send to listening sockets, so that the daemon is not woken for it. A connection that is accepted and closed
// takes 43 µs of processor time, one whose SYN is dropped 15, nearly all of which is the client's (BenchmarkConnect).
//
// A Filter puts a classic BPF program (socket(7), SO_ATTACH_FILTER, for which no privilege is needed) on each socket that is guarded, made from the newest bans of a
// bans.Table, and renews it when these change and when one ends. On listeners of TCP the program drops SYNs, on sockets of QUIC the datagrams that begin connections (RFC 8999:
// those with a long header); what belongs to connections that are there passes. While nobody is banned there is no program.
//
// It takes work away from package bans and decides nothing: what the kernel lets pass, because there were more bans than a program has room for, or because it would take no
// program, is turned away by bans.Door as ever. A program is behind the table by no more than the time between two of them, 100 ms. A handshake whose last packet comes in the
// very moment in which one replaces another waits a second, until the kernel sends its own part again: it cannot give the new socket a program that is going.
//
// The kernel counts what it drops for each socket (SO_MEMINFO), together with what found the socket's queue full or belonged to no connection any more; by address it does not.
//
// Ownership: sockets belong to their servers; a closed one is forgotten when the next program is attached.
//
// Goroutines: Run is one; Guard and GuardQUIC come before it; Stats may be called from any. A connection costs one system call, and only where its listener has had a program:
// accepted sockets inherit it, and would ask it about each packet.
//
// Errors: a program that the kernel does not take is counted, logged once, and made smaller where memory was short (net.core.optmem_max).
//
// Cost: 1.4 instructions for a banned address of IPv4, or for each /64 of one /32 of IPv6, else 5.3 for a /64, of at most 4096; a packet passes a search in halves. A full
// program takes 2 ms to make and the kernel 1 ms for each socket (BenchmarkProgram); no more than a twentieth of a processor goes into it.
//
// Proof: program_test.go runs programs in a machine of their own against a plain search; filter_test.go the renewal in a synctest bubble; kernel_test.go real sockets, with
// real addresses of loopback.
package sockfilter
