// Package ingest holds what every transport shares: what it needs of a table, how a push handshake is judged, how its ends are counted, and
// the interface by which the daemon knows it.
//
// A transport reads a hello (package wire), calls Tables.OpenPush, answers, and then moves bytes: it reserves slots on the drainer.Stream it was given,
// fills them in place, pushes them, acks. When the stream ends, for whatever reason, it counts the reason and closes the stream. A new
// transport is a new package that does this; ingesttest is the suite that it must pass.
//
// Tables have a kind (kind.go), which says which roles they have: CheckKind refuses the others, before a connection is handed to whoever serves its role.
// Manifest answers the role of that name.
//
// A session's streams are numbered through: OpenPush waits for the connection that had it, and answers how many samples are held. Errors of a table become
// refusals in RefuseStream, and a full ring a note in RingFull.
//
// Counters are atomic; Snapshot may be called from anywhere. Nothing here runs per sample.
package ingest
