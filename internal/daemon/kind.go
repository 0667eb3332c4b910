package daemon

import (
	"log/slog"
	"slices"

	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/steps"
	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/weights"
)

// DefaultWeightsCapacity is the most bytes of a segment of weights, where a table does not say.
const DefaultWeightsCapacity = Size(4 << 30)

// kind returns what the table holds.
func (t *Table) kind() ingest.Kind { return ingest.Kind(t.Kind) }

// setting is a field of a table, by its name in the file.
type setting struct {
	name string
	set  bool
	of   []ingest.Kind // the kinds that have it
}

// settings are the fields that not every kind has.
func (t *Table) settings() []setting {
	rings := []ingest.Kind{ingest.KindSamples, ingest.KindTensors}
	return []setting{
		{"spec", t.Spec != "", []ingest.Kind{ingest.KindSamples}},
		{"chunk_bytes", t.ChunkBytes != 0, []ingest.Kind{ingest.KindTensors}},
		{"max_lag", t.MaxLag != 0, []ingest.Kind{ingest.KindTensors}},
		{"generations", t.Generations != 0, []ingest.Kind{ingest.KindWeights}},
		{"batch_size", t.BatchSize != 0, rings},
		{"batches", t.Batches != 0, rings},
		{"linger", t.Linger != 0, rings},
		{"segment_dir", t.SegmentDir != nil && *t.SegmentDir != "", rings},
		{"ack", t.Ack != "", rings},
		{"sessions", t.Sessions != 0, rings},
		{"session_ttl", t.SessionTTL != 0, rings},
		{"groups", len(t.Groups) > 0, rings},
		{"other_groups", t.OtherGroups != Policy{}, rings},
		{"group_keep", t.GroupKeep != 0, rings},
	}
}

// whyNot says what to do about a setting that a kind does not have, unless it says enough for which kinds that is.
func whyNot(s *setting, kind ingest.Kind) string {
	switch {
	case s.name == "spec":
		return "whoever sends tensors says in a manifest which they are"
	case s.name == "batches" && kind == ingest.KindWeights:
		return "say how many generations it holds with generations, and how large all may be with capacity"
	case s.name == "segment_dir" && kind == ingest.KindWeights:
		return "weights lie in memory, and are published again to the next daemon"
	}
	return "that is for tables of kind " + string(s.of[0])
}

// checkKind fills in the kind and refuses the settings of others.
func (t *Table) checkKind(where string) error {
	if t.Kind == "" {
		t.Kind = string(ingest.KindSamples)
	}
	kind := t.kind()
	if kind != ingest.KindSamples && kind != ingest.KindTensors && kind != ingest.KindWeights {
		return configErrorf(where+": kind", "%q is none of %s, %s and %s", t.Kind, ingest.KindSamples, ingest.KindTensors, ingest.KindWeights)
	}
	for _, s := range t.settings() {
		if s.set && !slices.Contains(s.of, kind) {
			return configErrorf(where+": "+s.name, "a table of kind %s has none; take it out: %s", kind, whyNot(&s, kind))
		}
	}
	switch kind {
	case ingest.KindTensors:
		return t.checkTensors(where)
	case ingest.KindWeights:
		return t.checkWeights(where)
	}
	return nil
}

func (t *Table) checkTensors(where string) error {
	if t.ChunkBytes == 0 {
		t.ChunkBytes = tensor.ChunkBytesDefault
	}
	if c := t.ChunkBytes; c < tensor.ChunkBytesMin || c > tensor.ChunkBytesMax || c%tensor.ChunkBytesUnit != 0 {
		return configErrorf(where+": chunk_bytes", "is %v, must be %v to %v and a multiple of %d bytes",
			c, Size(tensor.ChunkBytesMin), Size(tensor.ChunkBytesMax), tensor.ChunkBytesUnit)
	}
	if t.BatchSize == 0 {
		t.BatchSize = 1 // a chunk is readable as soon as it is there
	}
	if t.BatchSize > 1 && t.Linger == 0 {
		return configErrorf(where+": batch_size",
			"is %d, so the last chunks of a step would wait for others to fill their batch: leave it out (1), or give a linger", t.BatchSize)
	}
	return nil
}

func (t *Table) checkWeights(where string) error {
	if t.Generations == 0 {
		t.Generations = weights.PlacesDefault
	}
	if t.Generations < weights.PlacesMin || t.Generations > weights.PlacesMax {
		return configErrorf(where+": generations", "is %d, must be %d to %d", t.Generations, weights.PlacesMin, weights.PlacesMax)
	}
	if t.Capacity == 0 {
		t.Capacity = DefaultWeightsCapacity
	}
	if t.Capacity < 1<<16 || t.Capacity > 1<<46 {
		return configErrorf(where+": capacity", "is %v, must be %v to %v", t.Capacity, Size(1<<16), Size(1<<46))
	}
	return nil
}

// steps is the table as package steps knows it; nil for another kind.
func (p *tablePlan) steps(log *slog.Logger) *steps.Config {
	if p.kind() != ingest.KindTensors {
		return nil
	}
	cfg := &steps.Config{ChunkBytes: int(p.ChunkBytes), MaxLag: p.MaxLag, Log: log.With("table", p.Name)}
	if p.path != "" {
		cfg.Path = manifestsPath(p.path)
	}
	return cfg
}
