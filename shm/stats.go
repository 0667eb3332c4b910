//go:build linux

package shm

import (
	"time"

	"github.com/ingestd/ingestd/sampler"
	"github.com/ingestd/ingestd/wire"
)

// Stats counts attachments and batches since the server was made.
type Stats struct {
	Attached uint64               // trainers that were accepted
	Observed uint64               // observers that were served
	Refused  map[wire.Code]uint64 // peers that were not
	Detached uint64               // trainers that ended holding nothing that they had begun to read
	Died     uint64               // trainers whose socket ended while they held batches
	CutOff   uint64               // trainers that the daemon cut off at its end
	Stalled  uint64               // trainers over connections that took nothing for too long
	Failed   uint64               // trainers that the daemon's own trouble ended
	BadPeers uint64               // trainers cut off because they broke the rules of their channel

	Delivered uint64 // batches given to trainers
	GivenBack uint64 // batches that trainers gave back
	Returned  uint64 // batches taken from trainers that ended, which their groups offer again or drop
	Lost      uint64 // batches that trainers were told their groups lost; each trainer of a group is told
	Sent      uint64 // bytes of batches sent to trainers over connections

	SentInPlace uint64 // of those, sent straight from the segment, without a copy

	Trainers []TrainerStats // those attached now, by number

	Fill FillStats // producers that fill in place
}

// TrainerStats is one attached trainer.
type TrainerStats struct {
	ID       uint64
	Table    string
	Group    string
	Client   string
	Peer     string // where one over a connection comes from; empty: it maps the segment
	PID, UID int    // 0 where the kernel does not say
	Since    time.Time
	Prefetch int // most batches it may hold

	Held       []LeaseStats // batches it was given and has not given back, longest held first
	State      TrainerState
	StateSince time.Time
	Sleeping   bool // it has read everything it was given and sleeps until we wake it

	Delivered, GivenBack, Lost uint64
	Sent                       uint64 // bytes of batches, over a connection
	SentInPlace                uint64 // of those, straight from the segment
}

// LeaseStats is a batch in a trainer's hands.
type LeaseStats = sampler.Lease

// TrainerState says who waits for whom.
type TrainerState string

// The states of an attached trainer.
const (
	// StateWaiting: it may be given a batch, and the table has none; it waits for producers.
	StateWaiting TrainerState = "waiting for a batch"
	// StateAtLimit: it holds all it may; the daemon waits for it.
	StateAtLimit TrainerState = "holds all it may"
	// StateEnded: it was given the last batch and told so.
	StateEnded TrainerState = "told of the end"
)
