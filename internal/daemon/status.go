package daemon

import (
	"fmt"
	"time"

	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/sampler"
	"github.com/ingestd/ingestd/shm"
)

// Status is the answer to GET /status; docs/operations.md describes it.
type Status struct {
	Version   string          `json:"version"`
	State     string          `json:"state"` // starting, serving, draining
	Started   time.Time       `json:"started"`
	Now       time.Time       `json:"now"`
	Addresses Addresses       `json:"addresses"`
	Waits     []Wait          `json:"waits"` // who waits for whom, the longest first within each kind
	Tables    []TableStatus   `json:"tables"`
	Producers ProducerStatus  `json:"producers"`
	Trainers  []TrainerStatus `json:"trainers"`
}

// Wait says who waits for whom.
type Wait struct {
	Who   string    `json:"who"`
	For   string    `json:"for"`
	Since time.Time `json:"since"`
}

// TableStatus is one table.
type TableStatus struct {
	Name         string         `json:"name"`
	Spec         string         `json:"spec"`
	Fingerprint  string         `json:"fingerprint"`
	SampleBytes  int64          `json:"sample_bytes"`
	SegmentBytes int64          `json:"segment_bytes"`
	BatchSize    int            `json:"batch_size"`
	Batches      int            `json:"batches"`
	Places       map[string]int `json:"places"` // by state of the batch in them
	Fill         float64        `json:"fill"`   // places that hold samples, of all
	Pushed       uint64         `json:"samples_pushed"`
	Committed    uint64         `json:"samples_committed"`
	Abandoned    uint64         `json:"slots_abandoned"`
	Published    uint64         `json:"batches_published"`
	Leased       uint64         `json:"batches_leased"`
	Released     uint64         `json:"batches_released"`
	Returned     uint64         `json:"batches_returned"`
	Streams      int            `json:"streams"`
	Opened       uint64         `json:"streams_opened"`
}

// ProducerStatus is everything about the connections of producers.
type ProducerStatus struct {
	Accepted     uint64              `json:"accepted"`
	Open         int                 `json:"open"`
	Samples      uint64              `json:"samples"`
	Bytes        uint64              `json:"bytes"`
	CutShort     uint64              `json:"cut_short"`
	AcceptErrors uint64              `json:"accept_errors"`
	Ended        map[string]uint64   `json:"ended"`
	Refused      map[string]uint64   `json:"refused"`
	Connections  []ingest.Connection `json:"connections"`
}

// TrainerStatus is one attached trainer.
type TrainerStatus struct {
	ID         uint64        `json:"id"`
	Table      string        `json:"table"`
	Client     string        `json:"client"`
	PID        int           `json:"pid"`
	UID        int           `json:"uid"`
	Since      time.Time     `json:"since"`
	Prefetch   int           `json:"prefetch"`
	State      string        `json:"state"`
	StateSince time.Time     `json:"state_since"`
	Sleeping   bool          `json:"sleeping"`
	Held       []LeaseStatus `json:"held"`
	Delivered  uint64        `json:"batches_delivered"`
	GivenBack  uint64        `json:"batches_given_back"`
}

// LeaseStatus is a batch in a trainer's hands.
type LeaseStatus struct {
	Batch uint64    `json:"batch"`
	Since time.Time `json:"since"`
}

// Status returns a snapshot; its parts may belong to slightly different moments. It must not be called after Run has returned.
func (d *Daemon) Status() Status {
	s := Status{
		Version: d.version, State: stateNames[d.state.Load()], Started: d.started, Now: time.Now(), Addresses: d.Addresses(),
		Waits: []Wait{}, Trainers: []TrainerStatus{},
	}
	for i, st := range d.tableStats() {
		s.Tables = append(s.Tables, tableStatus(d.tables[i], st.Places, st.Sampler))
		t := &s.Tables[i]
		t.Pushed, t.Committed, t.Abandoned = st.Pushed, st.Committed, st.Abandoned
		t.Published, t.Leased, t.Streams, t.Opened = st.Published, st.Leased, len(st.Streams), st.Opened
		for _, stream := range st.Streams {
			if !stream.WaitingSince.IsZero() {
				s.Waits = append(s.Waits, Wait{fmt.Sprintf("stream %d of table %q", stream.Stream, t.Name), "a free slot: the ring is full, trainers must give batches back", stream.WaitingSince})
			}
		}
	}
	in := d.ingest.Stats()
	s.Producers = ProducerStatus{in.Accepted, in.Open, in.Samples, in.Bytes, in.CutShort, in.AcceptErrors, in.Ended, in.Refused, in.Connections}
	if s.Producers.Connections == nil {
		s.Producers.Connections = []ingest.Connection{}
	}
	for _, t := range d.trainers.Stats().Trainers {
		s.Trainers = append(s.Trainers, trainerStatus(&t))
		s.Waits = append(s.Waits, trainerWaits(&t)...)
	}
	return s
}

func tableStatus(t *table, places map[string]int, st sampler.Stats) TableStatus {
	return TableStatus{
		Name: t.Name(), Spec: t.Spec().Text(), Fingerprint: t.Spec().Fingerprint().String(), SampleBytes: t.Spec().SampleBytes(), SegmentBytes: t.plan.bytes,
		BatchSize: t.Ring().BatchSize(), Batches: t.Ring().Batches(), Places: places,
		Fill:     1 - float64(places["free"])/float64(t.Ring().Batches()),
		Released: st.Released, Returned: st.Returned,
	}
}

func trainerStatus(t *shm.TrainerStats) TrainerStatus {
	s := TrainerStatus{
		ID: t.ID, Table: t.Table, Client: t.Client, PID: t.PID, UID: t.UID, Since: t.Since, Prefetch: t.Prefetch, State: string(t.State), StateSince: t.StateSince,
		Sleeping: t.Sleeping, Held: []LeaseStatus{}, Delivered: t.Delivered, GivenBack: t.GivenBack,
	}
	for _, l := range t.Held {
		s.Held = append(s.Held, LeaseStatus{l.Number, l.Since})
	}
	return s
}

// trainerWaits says what a trainer waits for, and what is waited for of it.
func trainerWaits(t *shm.TrainerStats) (waits []Wait) {
	who := fmt.Sprintf("trainer %d of table %q (%s, pid %d)", t.ID, t.Table, t.Client, t.PID)
	switch {
	case t.State == shm.StateWaiting && t.Sleeping && len(t.Held) == 0:
		waits = append(waits, Wait{who, "a batch: producers must push", t.StateSince})
	case t.State == shm.StateAtLimit && len(t.Held) > 0:
		waits = append(waits, Wait{fmt.Sprintf("table %q", t.Table), fmt.Sprintf("%s, which holds all it may, to give back batch %d", who, t.Held[0].Number), t.Held[0].Since})
	}
	return waits
}
