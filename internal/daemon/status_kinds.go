package daemon

import (
	"fmt"
	"time"

	"github.com/ingestd/ingestd/engine"
	"github.com/ingestd/ingestd/weights"
)

// TensorsStatus is what is known of the producers of a table of kind tensors.
type TensorsStatus struct {
	ChunkBytes int64             `json:"chunk_bytes"`
	MaxLag     uint64            `json:"max_lag"` // 0: off
	Newest     uint64            `json:"newest_step"`
	Manifests  int               `json:"manifests"` // known
	Completed  uint64            `json:"steps_completed"`
	Aborted    uint64            `json:"steps_aborted"`
	Refused    uint64            `json:"steps_refused"` // too old
	CutShort   uint64            `json:"steps_cut_short"`
	Chunks     uint64            `json:"chunks"`
	Late       uint64            `json:"chunks_refused"` // of steps that were
	BadChunks  map[string]uint64 `json:"chunks_bad"`     // by what was wrong
	Announced  uint64            `json:"producers_announced"`
	Unsaid     int               `json:"producers_unannounced"` // announcements that wait for a free slot
	Producers  []StepStatus      `json:"producers"`
}

// StepStatus is one producer of tensors, and the step it is at.
type StepStatus struct {
	Name     string    `json:"name"`
	Stream   uint64    `json:"stream"`
	Manifest string    `json:"manifest"` // id, 16 hex digits
	Since    time.Time `json:"since"`
	Step     uint64    `json:"step"`
	State    string    `json:"step_state"` // none, incomplete, complete, aborted, refused
	Bytes    int64     `json:"step_bytes"` // that have come
	Of       int64     `json:"step_bytes_of"`
}

func tensorsStatus(t *table, st *engine.Stats) *TensorsStatus {
	of := st.Steps
	if of == nil {
		return nil
	}
	s := &TensorsStatus{
		ChunkBytes: int64(t.plan.ChunkBytes), MaxLag: t.plan.MaxLag, Newest: of.Newest, Manifests: of.Manifests, Completed: of.Completed, Aborted: of.Aborted,
		Refused: of.Refused, CutShort: of.CutShort, Chunks: of.Chunks, Late: of.Late, BadChunks: of.BadChunks, Announced: of.Announced, Unsaid: of.Unsaid,
		Producers: []StepStatus{},
	}
	for _, p := range of.Producers {
		s.Producers = append(s.Producers, StepStatus{p.Name, p.Stream, fmt.Sprintf("%016x", p.Manifest), p.Since, p.Step, p.State, p.Bytes, p.Of})
	}
	return s
}

// WeightsStatus is one table of kind weights.
type WeightsStatus struct {
	Name         string             `json:"name"`
	Newest       uint64             `json:"newest"` // generation; 0: nothing was published
	Manifest     string             `json:"manifest,omitempty"`
	Tensors      int                `json:"tensors"`
	DataBytes    int64              `json:"data_bytes"` // of one generation
	SegmentBytes int64              `json:"segment_bytes"`
	Capacity     int64              `json:"capacity"`
	Places       int                `json:"places"`
	Begun        uint64             `json:"generations_begun"`
	Published    uint64             `json:"generations_published"`
	Bytes        uint64             `json:"bytes_published"`
	Failed       map[string]uint64  `json:"generations_failed"` // by reason
	Generations  []GenerationStatus `json:"generations"`        // oldest first
	Publisher    *PublisherStatus   `json:"publisher,omitempty"`
	Readers      []ReaderStatus     `json:"readers"`
}

// GenerationStatus is a generation that readers can have.
type GenerationStatus struct {
	Generation uint64      `json:"generation"`
	Place      int         `json:"place"`
	Published  time.Time   `json:"published"`
	Digest     string      `json:"digest"`
	Publisher  uint64      `json:"publisher"`
	Pins       []PinStatus `json:"pins"`
}

// PinStatus is a reader that holds a generation.
type PinStatus struct {
	Reader uint64    `json:"reader"`
	Who    string    `json:"who"`
	Since  time.Time `json:"since"`
}

// PublisherStatus is who publishes.
type PublisherStatus struct {
	Number  uint64    `json:"number"`
	Who     string    `json:"who"`
	Since   time.Time `json:"since"`
	Writing uint64    `json:"writing"` // the generation it has begun; 0: none
}

// ReaderStatus is a reader of weights.
type ReaderStatus struct {
	Number uint64        `json:"number"`
	Who    string        `json:"who"`
	Since  time.Time     `json:"since"`
	Pins   int           `json:"pins"`
	Remote *RemoteStatus `json:"remote,omitempty"` // nil: it maps the memory
}

// RemoteStatus is what a remote reader is sent.
type RemoteStatus struct {
	Have       uint64 `json:"have"`       // the generation it has shown last; 0: none yet
	Generation uint64 `json:"generation"` // that is being sent; 0: it has the newest
	Sent       int64  `json:"sent"`       // bytes of that
	Total      int64  `json:"total"`
	Shown      uint64 `json:"generations_shown"`
	Skipped    uint64 `json:"generations_skipped"`
	Bytes      uint64 `json:"bytes"`
}

func weightsStatus(st *weights.Stats, served *weights.ServerStats) WeightsStatus {
	s := WeightsStatus{
		Name: st.Table, Newest: st.Newest, Tensors: st.Tensors, DataBytes: st.DataBytes, SegmentBytes: st.SegmentBytes, Capacity: st.Capacity, Places: st.Places,
		Begun: st.Begun, Published: st.Published, Bytes: st.Bytes, Failed: map[string]uint64{}, Generations: []GenerationStatus{}, Readers: []ReaderStatus{},
	}
	if st.Newest > 0 {
		s.Manifest = st.Manifest.String()
	}
	for why, n := range st.Failed {
		s.Failed[string(why)] = n
	}
	for _, g := range st.Generations {
		one := GenerationStatus{g.Generation, g.Place, g.Published, g.Digest.String(), g.Publisher, []PinStatus{}}
		for _, p := range g.Pins {
			one.Pins = append(one.Pins, PinStatus{p.Reader, p.Who.String(), p.Since})
		}
		s.Generations = append(s.Generations, one)
	}
	if p := st.Publisher; p != nil {
		s.Publisher = &PublisherStatus{p.Number, p.Who.String(), p.Since, p.Writing}
	}
	for _, r := range st.Readers {
		one := ReaderStatus{Number: r.Number, Who: r.Who.String(), Since: r.Since, Pins: r.Pins}
		for _, of := range served.Remote {
			if of.Table == st.Table && of.Number == r.Number {
				one.Remote = &RemoteStatus{of.Have, of.Generation, of.Sent, of.Total, of.Generations, of.Skipped, of.Bytes}
			}
		}
		s.Readers = append(s.Readers, one)
	}
	return s
}
