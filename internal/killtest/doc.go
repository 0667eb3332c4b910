// Package killtest kills. Its tests run the real daemon, producers and trainers as processes, end and stop them at random moments and at every point of
// internal/failpoint, damage segments, and judge by what was acked and what was read whether anything was lost, came twice or was torn.
//
// The processes are `ingestd serve` and the command in peer, both built with the tag `failpoints`. A peer tells what it knows in a way that its own death cannot
// take back: a producer writes the number of samples sent and acked into a Ledger, a file; a trainer writes a Delivery, one line to its standard output,
// before it gives a batch back. Samples name their session and number and their bytes follow from these (Content), so a History, which is the oracle, needs
// nothing else:
//
//   - with committed acks, every acked sample is delivered to every group at least once;
//   - no sample is in the ring twice: a second delivery has the batch number and the content of the first;
//   - the samples of a session come in order, and nothing comes that was not sent;
//   - none is torn: trainers check every byte.
//
// At the end of a run, the harness also asks the daemon that places, leases and connections came back and that its memory did not grow, and `ingestd check`
// whether the segments are whole. TestHistoryFindsFaults plants each fault into a true history, and each must be found.
//
// The machine's clock is not set: it belongs to everybody. What is told by the wall clock is tested with the time passed in: TestClockJumps, and TestRowAgeIgnoresTheWallClock in shm;
// everything else goes by the monotonic clock.
//
// `make test` runs a hundred kills of each kind; `make soak` goes on for SOAK (30m) and replays with SEED. A seed gives the same choices of victims, points and
// delays; processes on a real machine still meet in their own order.
//
// Nothing here is used by the daemon. Only the tests start goroutines.
package killtest
