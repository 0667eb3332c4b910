//go:build linux

package shm

import "time"

// FillStats counts producers that fill places in place, and what they filled, since the server was made.
type FillStats struct {
	Attached uint64 // producers that were accepted
	Detached uint64 // producers whose socket ended
	CutOff   uint64 // producers that the daemon cut off at its end
	Taken    uint64 // producers whose session another connection took
	BadPeers uint64 // producers cut off because they broke the rules of their channel

	Committed uint64 // samples
	Settled   uint64 // of those, copied into a batch that many share
	Published uint64 // places that became a batch as they were
	Stranded  uint64 // samples that stayed in lent places at the daemon's end
	Notes     uint64 // notes sent to producers that waited

	Fillers []FillerStats // those attached now, by number
}

// FillerStats is one attached producer that fills places in place.
type FillerStats struct {
	ID       uint64
	Table    string
	Client   string
	Session  string
	Stream   uint64
	PID, UID int
	Since    time.Time
	Prefetch int // most places it is lent at once

	Lent         int // places it has
	State        FillerState
	WaitingSince time.Time // in FillWaiting: since when
	Sleeping     bool      // it has seen everything we did and sleeps until we wake it

	Committed, Settled, Published uint64
}

// FillerState says who waits for whom.
type FillerState string

// The states of an attached filler.
const (
	// FillHasRoom: it has rows to fill; the daemon waits for it.
	FillHasRoom FillerState = "has rows to fill"
	// FillWaiting: the ring is full; it waits for a place, or for its rows to be copied, and so for the trainers.
	FillWaiting FillerState = "waiting for a free place"
	// FillEnded: the ring was closed, and it was told so.
	FillEnded FillerState = "told of the end"
)
