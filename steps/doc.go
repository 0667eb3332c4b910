// Package steps is what a daemon knows of the producers of one table of kind tensors: their manifests, which step each is at, which steps are too old. It
// checks the header of each chunk before the chunk is committed, and announces producers to the readers of the table.
//
// docs/tensors.md has the rules. A Keeper is one table's; Admit judges a producer's manifest before its stream is opened, Open makes the Producer that checks
// the chunks of the stream (a drainer.Checker), and Producer.Close ends it when all that it was given is in the ring.
//
// The data of chunks is not looked at, but for the lists that end a step: their readers verify it where it lies. A chunk of a step that is too old gets the
// flag REFUSED, and its producer a note before the ack.
//
// The herald writes chunks with the flags OPENED and CLOSED into the ring, under a stream number of its own: who reads a table knows by them who is there. It
// waits for a free slot like any writer, in the goroutine of Run, so that no transport does. What is to be said of a producer is kept once, however long that
// takes: so the queue is no longer than the number of producers, and one that has come back meanwhile was never away.
//
// Manifests of connected producers are known, and KeptManifests besides, those used last. With Config.Path they are in a file, which a later process reads.
//
// Methods may be called from any goroutine; Check and AppendNotes of one Producer by one at a time. Errors: *MismatchError, *IncompleteHelloError,
// *BadChunkError. Cost: per chunk a copy and a sum of 64 bytes, and one uncontended lock; no allocation but for what is refused. Proof: keeper_test.go,
// producer_test.go, herald_test.go, and tcpingest's and shm's tests over connections; fuzz/chunks_test.go.
package steps
