// Package bans remembers from which addresses handshakes failed, and how many are under way from where: who fails is slowed, who fails often is banned for a while.
//
// After each failure of an address its next handshake waits, for 0.5, 1, 2 and 4 s; at the fifth the address is banned, until 5 minutes after its last failure. A
// success forgets all. An address of IPv6 stands for its /64. Addresses of loopback are exempt unless configured.
//
// A transport calls Door.Enter when a connection has come, waits for Visit.Wait before it reads anything, and says what became of the handshake: Refused, Failed (of a peer that
// ended before its handshake was complete, too), Passed or Succeeded. Leave gives the place back when the connection is gone, so that who is refused and stays takes nobody else's. Sockets
// are the transport's; showing and clearing the table is the daemon's.
//
// The table is bounded: whoever has more than 65,536 addresses can have its oldest failures forgotten, and those of others. Whoever has so many needs no second try from one of
// them either.
//
// Ownership: values go in and out by copy.
//
// Goroutines: all methods may be called from any; nothing runs by itself, and what has expired goes when the table is used.
//
// Errors: Clear's, for what is no address. Nothing panics on input.
//
// Cost: Check is one atomic load while nobody has failed, else a lock and a map lookup, about 100 ns (BenchmarkCheckBanned); an entry takes about 250 bytes.
//
// Proof: bans_test.go, halfopen_test.go and door_test.go: every step of the way in synctest bubbles, both sides of every limit, and a model.
package bans
