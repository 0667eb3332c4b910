package daemon

import (
	"fmt"
	"slices"
	"time"

	"github.com/ingestd/ingestd/engine"
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
	Waits     []Wait          `json:"waits"`   // who waits for whom, the longest first within each kind
	Tables    []TableStatus   `json:"tables"`  // of kinds samples and tensors
	Weights   []WeightsStatus `json:"weights"` // tables of that kind
	Producers ProducerStatus  `json:"producers"`
	Local     LocalStatus     `json:"local_producers"`
	Trainers  []TrainerStatus `json:"trainers"`
	Access    AccessStatus    `json:"access"`
}

// Wait says who waits for whom.
type Wait struct {
	Who string `json:"who"`
	Waits
}

// Waits says what somebody waits for, on whom that depends, and since when it lasts.
type Waits struct {
	For   string    `json:"for"`
	On    string    `json:"on"`
	Since time.Time `json:"since"`
}

// TableStatus is one table.
type TableStatus struct {
	Name         string         `json:"name"`
	Kind         string         `json:"kind"` // samples, tensors
	Spec         string         `json:"spec"`
	Fingerprint  string         `json:"fingerprint"`
	SampleBytes  int64          `json:"sample_bytes"`
	SegmentBytes int64          `json:"segment_bytes"`
	Path         string         `json:"path,omitempty"` // where the segment is kept
	Unread       uint64         `json:"samples_unread"` // published, or in the hands of trainers
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
	Dropped      uint64         `json:"batches_dropped"`
	Lost         uint64         `json:"batches_lost"`
	Pinned       int            `json:"places_pinned"` // kept for producers that may come back after a restart
	Groups       []GroupStatus  `json:"groups"`
	Opened       uint64         `json:"streams_opened"`
	Sessions     int            `json:"sessions"`       // known, with and without a connection
	Taken        uint64         `json:"sessions_taken"` // from one connection by another
	Tensors      *TensorsStatus `json:"tensors,omitempty"`
}

// GroupStatus is one group of trainers.
type GroupStatus struct {
	Name      string `json:"name"`
	OnDeath   string `json:"on_death"`
	OnLag     string `json:"on_lag"`
	Listed    bool   `json:"listed"` // in the configuration, so it never ends
	Trainers  int    `json:"trainers"`
	Unread    int    `json:"batches_unread"`
	Leased    int    `json:"batches_leased"`
	Oldest    uint64 `json:"oldest_batch"` // of both
	Delivered uint64 `json:"batches_delivered"`
	Released  uint64 `json:"batches_released"`
	Returned  uint64 `json:"batches_returned"`
	Dropped   uint64 `json:"batches_dropped"`
	Lost      uint64 `json:"batches_lost"`
	Waits     *Waits `json:"waits,omitempty"`
}

// LocalStatus is everything about producers that write in place.
type LocalStatus struct {
	Attached  uint64         `json:"attached"`
	Detached  uint64         `json:"detached"`
	CutOff    uint64         `json:"cut_off"`
	Taken     uint64         `json:"session_taken"`
	BadPeers  uint64         `json:"bad_peers"`
	Settled   uint64         `json:"samples_settled"`  // copied into a batch that many share
	Published uint64         `json:"places_published"` // became a batch as they were
	Stranded  uint64         `json:"samples_stranded"`
	Notes     uint64         `json:"notes"`
	Producers []FillerStatus `json:"producers"`
}

// FillerStatus is one producer that writes in place.
type FillerStatus struct {
	ID        uint64    `json:"id"`
	Table     string    `json:"table"`
	Session   string    `json:"session,omitempty"`
	Client    string    `json:"client,omitempty"`
	Stream    uint64    `json:"stream"`
	PID       int       `json:"pid"`
	UID       int       `json:"uid"`
	Since     time.Time `json:"since"`
	Prefetch  int       `json:"prefetch"`
	Lent      int       `json:"places_lent"`
	State     string    `json:"state"`
	Sleeping  bool      `json:"sleeping"`
	Samples   uint64    `json:"samples"`
	Settled   uint64    `json:"samples_settled"`
	Published uint64    `json:"places_published"`
	Waits     *Waits    `json:"waits,omitempty"`
}

// ProducerStatus is everything about the connections of producers.
type ProducerStatus struct {
	Accepted     uint64             `json:"accepted"`
	Open         int                `json:"open"`
	Samples      uint64             `json:"samples"`
	Bytes        uint64             `json:"bytes"`
	CutShort     uint64             `json:"cut_short"`
	AcceptErrors uint64             `json:"accept_errors"`
	Ended        map[string]uint64  `json:"ended"`
	Refused      map[string]uint64  `json:"refused"`
	Notes        uint64             `json:"notes"`
	QUIC         *ingest.Carriers   `json:"quic,omitempty"` // its connections, on which streams count as connections; none: no such listener
	Connections  []ConnectionStatus `json:"connections"`
}

// ConnectionStatus is one producer's connection.
type ConnectionStatus struct {
	ingest.Connection
	Transport string `json:"transport"` // tcp (and unix, tls), quic; IDs are of one
	Waits     *Waits `json:"waits,omitempty"`
}

// TrainerStatus is one attached trainer.
type TrainerStatus struct {
	ID         uint64        `json:"id"`
	Table      string        `json:"table"`
	Group      string        `json:"group"`
	Client     string        `json:"client"`
	Peer       string        `json:"peer,omitempty"` // where it comes from, if its batches are sent to it
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
	Lost       uint64        `json:"batches_lost"`
	Sent       uint64        `json:"bytes_sent,omitempty"`
	InPlace    uint64        `json:"bytes_sent_in_place,omitempty"` // of those, straight from the segment
	Waits      *Waits        `json:"waits,omitempty"`
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
		Waits: []Wait{}, Tables: []TableStatus{}, Weights: []WeightsStatus{}, Trainers: []TrainerStatus{},
		Access: d.access.status(),
	}
	if a := d.admin; a != nil {
		s.Access.Admin = &AdminStatus{a.open.Load(), a.refused.Snapshot()}
	}
	full := map[string]string{} // by table: whom its writers wait for
	for i, st := range d.tableStats() {
		s.Tables = append(s.Tables, tableStatus(d.tables[i], &st))
		h, _ := d.tables[i].Holder()
		full[st.Table] = engine.Blame(h, s.Now)
	}
	stores, served := d.weightsStats()
	for i := range stores {
		s.Weights = append(s.Weights, weightsStatus(&stores[i], &served))
	}
	s.Producers = ProducerStatus{Ended: map[string]uint64{}, Refused: map[string]uint64{}, Connections: []ConnectionStatus{}}
	for _, in := range d.transportStats() {
		s.Producers.addTransport(&in)
		for _, c := range in.Connections {
			one := ConnectionStatus{c, in.Transport, connectionWaits(&c, full[c.Table])}
			s.Producers.Connections = append(s.Producers.Connections, one)
			if c.State == "waiting-for-slot" {
				s.Waits = append(s.Waits, Wait{one.Name(), *one.Waits})
			}
		}
	}
	attached := d.trainers.Stats()
	s.Local = localStatus(&attached.Fill)
	for _, f := range attached.Fill.Fillers {
		one := fillerStatus(&f, full[f.Table])
		s.Local.Producers = append(s.Local.Producers, one)
		if one.Waits != nil {
			s.Waits = append(s.Waits, Wait{one.Name(), *one.Waits})
		}
	}
	for i := range s.Tables {
		for _, g := range s.Tables[i].Groups {
			if g.Waits != nil {
				s.Waits = append(s.Waits, Wait{fmt.Sprintf("group %q of table %q", g.Name, s.Tables[i].Name), *g.Waits})
			}
		}
	}
	for _, t := range attached.Trainers {
		one := trainerStatus(&t)
		s.Trainers = append(s.Trainers, one)
		if one.Waits != nil {
			s.Waits = append(s.Waits, Wait{one.Name(), *one.Waits})
		}
		if t.State == shm.StateAtLimit && len(t.Held) > 0 {
			s.Waits = append(s.Waits, Wait{fmt.Sprintf("table %q", t.Table), Waits{
				fmt.Sprintf("batch %d to be given back", t.Held[0].Number), one.Name() + ", which holds all it may", t.Held[0].Since,
			}})
		}
	}
	slices.SortStableFunc(s.Waits, func(a, b Wait) int { return a.Since.Compare(b.Since) })
	return s
}

// connectionWaits says what a connection waits for; nil while it receives.
func connectionWaits(c *ingest.Connection, full string) *Waits {
	switch c.State {
	case "handshake":
		return &Waits{"the handshake", "the producer", c.Since}
	case "waiting-for-data":
		return &Waits{"samples", "the producer", c.Since}
	case "waiting-for-slot":
		return &Waits{fmt.Sprintf("a free slot of table %q (the ring is full)", c.Table), full, c.Since}
	case "closing":
		return &Waits{"the producer to read why it was ended", "the producer", c.Since}
	}
	return nil
}

// Name is how the status calls a connection: producer 3 (127.0.0.1:40110, session "a").
func (c *ConnectionStatus) Name() string {
	name := fmt.Sprintf("producer %d (%s", c.ID, c.Peer)
	if c.Client != "" {
		name += ", " + c.Client
	}
	if c.Session != "" {
		name += fmt.Sprintf(", session %q", c.Session)
	}
	return name + ")"
}

// Name is how the status calls a producer that writes in place: local producer 5 (python, pid 4711, session "a").
func (f *FillerStatus) Name() string {
	name := fmt.Sprintf("local producer %d (", f.ID)
	if f.Client != "" {
		name += f.Client + ", "
	}
	name += fmt.Sprintf("pid %d", f.PID)
	if f.Session != "" {
		name += fmt.Sprintf(", session %q", f.Session)
	}
	return name + ")"
}

// Name is how the status calls a trainer: trainer 7 (python, pid 4711, group "default"), with the address instead of the pid where it has no memory of ours.
func (t *TrainerStatus) Name() string {
	name := fmt.Sprintf("trainer %d (", t.ID)
	if t.Client != "" {
		name += t.Client + ", "
	}
	if t.Peer != "" {
		return fmt.Sprintf("%s%s, group %q)", name, t.Peer, t.Group)
	}
	return fmt.Sprintf("%spid %d, group %q)", name, t.PID, t.Group)
}

func localStatus(f *shm.FillStats) LocalStatus {
	return LocalStatus{f.Attached, f.Detached, f.CutOff, f.Taken, f.BadPeers, f.Settled, f.Published, f.Stranded, f.Notes, []FillerStatus{}}
}

func fillerStatus(f *shm.FillerStats, full string) FillerStatus {
	s := FillerStatus{
		ID: f.ID, Table: f.Table, Session: f.Session, Client: f.Client, Stream: f.Stream, PID: f.PID, UID: f.UID, Since: f.Since, Prefetch: f.Prefetch, Lent: f.Lent,
		State: string(f.State), Sleeping: f.Sleeping, Samples: f.Committed, Settled: f.Settled, Published: f.Published,
	}
	if f.State == shm.FillWaiting && !f.WaitingSince.IsZero() {
		s.Waits = &Waits{fmt.Sprintf("a free place of table %q (the ring is full)", f.Table), full, f.WaitingSince}
	}
	return s
}

func groupStatus(g *sampler.GroupStats) GroupStatus {
	s := GroupStatus{
		Name: g.Name, OnDeath: g.OnDeath.String(), OnLag: g.OnLag.String(), Listed: g.Listed, Trainers: g.Members,
		Unread: g.Unread, Leased: g.Leased, Oldest: g.Oldest,
		Delivered: g.Delivered, Released: g.Released, Returned: g.Returned, Dropped: g.Dropped, Lost: g.Lost,
	}
	if g.Members == 0 && g.Unread > 0 {
		s.Waits = &Waits{"a trainer to read its batches", "nobody, as no trainer is in it", g.Since}
	}
	return s
}

func tableStatus(t *table, st *engine.Stats) TableStatus {
	s := TableStatus{
		Name: t.Name(), Kind: t.plan.Kind, Tensors: tensorsStatus(t, st), Spec: t.Spec().Text(), Fingerprint: t.Spec().Fingerprint().String(), SampleBytes: t.Spec().SampleBytes(), SegmentBytes: t.plan.bytes,
		Path: t.plan.path, Unread: t.unread(),
		BatchSize: t.Ring().BatchSize(), Batches: t.Ring().Batches(), Places: st.Places,
		Fill:   1 - float64(st.Places["free"])/float64(t.Ring().Batches()),
		Pushed: st.Pushed, Committed: st.Committed, Abandoned: st.Abandoned, Published: st.Published, Leased: st.Leased,
		Released: st.Sampler.Released, Returned: st.Sampler.Returned, Dropped: st.Sampler.Dropped, Lost: st.Sampler.Lost, Pinned: st.Sampler.Pinned,
		Groups: []GroupStatus{}, Streams: len(st.Streams) + len(st.Lenders), Opened: st.Opened, Sessions: st.Sessions, Taken: st.Taken,
	}
	for _, g := range st.Sampler.Groups {
		s.Groups = append(s.Groups, groupStatus(&g))
	}
	return s
}

func trainerStatus(t *shm.TrainerStats) TrainerStatus {
	s := TrainerStatus{
		ID: t.ID, Table: t.Table, Group: t.Group, Client: t.Client, Peer: t.Peer, PID: t.PID, UID: t.UID, Since: t.Since, Prefetch: t.Prefetch,
		State: string(t.State), StateSince: t.StateSince,
		Sleeping: t.Sleeping, Held: []LeaseStatus{}, Delivered: t.Delivered, GivenBack: t.GivenBack, Lost: t.Lost, Sent: t.Sent, InPlace: t.SentInPlace,
	}
	for _, l := range t.Held {
		s.Held = append(s.Held, LeaseStatus{l.Number, l.Since})
	}
	if t.State == shm.StateWaiting && t.Sleeping && len(t.Held) == 0 {
		s.Waits = &Waits{fmt.Sprintf("a batch of table %q", t.Table), "the producers", t.StateSince}
	}
	return s
}
