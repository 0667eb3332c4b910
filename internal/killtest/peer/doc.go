// Command peer is a producer or a trainer for the tests of internal/killtest, which build it with the tag `failpoints`, start many and kill them.
//
//	peer produce --addr ADDR --table NAME --session N --ledger FILE
//	peer fill    --addr ADDR --table NAME --session N --ledger FILE
//	peer train   --addr ADDR --table NAME --group NAME
//	peer own     --addr FILE --table NAME --ledger PREFIX
//	peer scribble --addr ADDR --table NAME --role train|fill
//	peer publish   --addr ADDR --table NAME
//	peer subscribe --addr ADDR --table NAME --role hold
//
// A producer sends samples of its session, or fills them in place, until SIGTERM, then ends its stream in order. A trainer reads until SIGTERM, checks every byte, and writes one line per
// batch to standard output before it gives the batch back. An owner is all of these in one process, on a ring in a file, so that a kill falls inside package
// ring. Producers and trainers come back when the daemon was restarted. A scribbler breaks every rule of its channel. A publisher publishes
// generations of weights whose content proves itself, a subscriber reads them and checks every byte; both write one line per generation. Exit codes: 0 ended in order; 1 something
// failed; 2 wrong usage; 3 the daemon broke a promise, such as a torn sample. Standard error says what.
package main
