// Package ring gives the bytes of a segment their meaning: a header, one state line per batch, and columnar batches that writers fill
// and trainers read as plain arrays. docs/segment-format.md has every offset.
//
// It takes plain bytes and asks nobody where they come from: package shm brings mappings, tests bring heap memory, and the same code runs on both.
// What the leaves mean is package spec's business; here a column is a number of bytes per slot, and the spec is opaque text.
//
// A slot goes reserve → fill → commit (or abandon). The run that Reserve returns belongs to the caller until then; nobody else writes
// it, and its bytes are RunColumn. A batch whose slots are all committed is published, in the order in which the batches were opened, and gets the next number. Lease
// gives each published batch to one caller, who may read it until Release and not a moment longer.
//
// A place goes lend → commit rows → publish (or return): one producer fills all of it in place, in another process maybe, and holds up nobody else's batch.
//
// The segment also knows the sessions of producers, with the samples it holds of each, and the groups of trainers, with the batches each has not released. With these and the
// slots' own words, Recover takes up what a daemon left behind, however it died; Survey is its check, and changes nothing.
//
// All methods of Ring may be called from any goroutine of the one process that formatted the segment: reserve, commit, publish, lease and release are
// lock-free, and no method but the waiting ones (Reserve, Lease) ever blocks. View is the read-only half, for other processes.
//
// A batch takes the place that was freed last: the live part of a large ring stays in the cache, and a trainer that holds
// a batch for long takes one place out of use instead of stopping the ring when it comes round.
//
// Errors: os.ErrClosed from Reserve and Lend after Close, io.EOF from Lease when a closed ring is empty, the context's error (a deadline also matches
// os.ErrDeadlineExceeded), *FormatError for bytes that are not a segment; *MismatchError, *UncleanError and *DamagedError from Recover; *SessionsFullError,
// *GroupsFullError. Releasing what was not leased, committing a run twice, or opening a session that is open, panics: these are this process's own bugs. Nothing read from a segment by View can make it panic.
//
// Cost: one compare-and-swap per reserved run, one atomic add per committed run, 24 bytes written per sample, a few atomic words per batch; no
// allocation, no system call. Proof: the model test and the race tests (ring_test.go, lend_test.go), recovery after every operation of random lives
// (recover_test.go), the golden bytes (golden_test.go), the twins (ring_bench_test.go), fuzz/, kill tests (internal/killtest).
package ring
