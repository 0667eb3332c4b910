// Package inspect looks at segments from outside: a report on what a segment holds, a check of everything that docs/segment-format.md promises, and a
// copy of a live segment that passes that check. `ingestd inspect` and `ingestd check` print what it finds.
//
// A segment comes as bytes that the caller keeps mapped; nothing here writes to them or keeps them. A live segment moves while it is looked at, so Check, which
// demands that everything agrees, is for files; Report is for both. All functions may be called from any goroutine.
//
// Errors: *ring.FormatError when the bytes are no segment; a file that shrinks while it is mapped is an error, not a SIGBUS (Guard). Whatever stands in the
// bytes, nothing here panics or allocates more than a few words per place of the ring.
//
// Cost: one state line per batch; Check reads 24 bytes per sample; Save copies the segment once. Proof: inspect_test.go.
package inspect
