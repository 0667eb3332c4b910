// Package daemon assembles what the other packages make: tables in shared memory, listeners, drainers, trainers of other processes, and the admin endpoint. It
// reads the configuration, starts everything, and stops it in the one order that loses nothing.
//
// Config is read from YAML and flags, and validated whole before anything is opened. New opens: listeners first, since a port in use should cost no memory,
// then the tables' segments. Run serves until its context ends or a listener fails, then stops:
//
//  1. not ready any more; listeners close, so nobody new comes
//  2. of each producer the whole samples at hand are taken, it gets its acks, then the notice shutting_down; what producers that write in place have called
//     complete is put where trainers find it
//  3. drainers commit what is queued; the batch being filled is published short; end of stream for trainers (engine.Table.Close)
//  4. trainers read what is left
//  5. trainers that still hold on are cut off; connections are gone
//  6. drainers and lingerers stop; segments that are kept are written through and marked as left in order; all are given back; the admin endpoint goes last
//
// Steps 1 to 4 together last at most DrainTimeout, and a moment only where no trainer is attached, since then nothing more will be read. StopNow skips the
// waiting. What was not read by then stays in the table's file, or is an *UnreadError where it has none.
//
// Tables have kinds (kind.go): samples and tensors are rings, weights are stores of generations, without memory until somebody publishes. Readers of tensors
// keep chunks of steps that nobody will complete, so step 4 is over for them when they were given all. Publishers and readers of weights end in step 5.
//
// Segments (segments.go): with Config.SegmentDir each table lies in a locked file. New takes up what is there, however the daemon before ended, and says what
// it found; what cannot be taken up is a *SegmentError that names the difference, and is never changed without Config.DiscardSegments.
//
// Who may come in (access.go): tokens and bans are read and made first, and stand before all transports (transports.go) and, on an address that other machines reach, before
// the admin endpoint (admin_access.go). A listener that other machines reach is an error of the configuration unless somebody is asked who they are.
//
// A Daemon's methods may be called from any goroutine; Run once. Its goroutines: Run's own, one per listener, one that looks at the file of tokens, the drainers, one per table (linger),
// the admin server's; all have ended when Run returns.
//
// Errors: *ConfigError, *ListenError, *SegmentError, *shm.InsufficientError (wrapped) from New; *UnreadError, ErrStoppedAtOnce from Run. Nothing here runs per
// sample. Proof: config_test.go, address_test.go, daemon_test.go (life cycle in process, every way to stop, the admin endpoint), segments_test.go (kept,
// crashed, refused, damaged, foreign); cmd/ingestd runs it as a process.
package daemon
