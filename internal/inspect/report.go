package inspect

import (
	"bytes"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/spec"
)

// Report is what a segment says of itself.
type Report struct {
	Table        string         `json:"table"`
	Spec         *spec.Spec     `json:"spec"`
	Fingerprint  string         `json:"fingerprint"`
	Created      time.Time      `json:"created"`
	SampleBytes  int64          `json:"sample_bytes"`
	SegmentBytes int64          `json:"segment_bytes"`
	BatchSize    int            `json:"batch_size"`
	Batches      int            `json:"batches"`
	Reserved     uint64         `json:"reserved"`  // position after the last slot given to a writer
	Published    uint64         `json:"published"` // batches
	Leased       uint64         `json:"leased"`    // batches
	Closed       bool           `json:"closed"`
	States       map[string]int `json:"states"` // places by state
	Places       []Place        `json:"places"` // those that hold a batch
	Sessions     []Session      `json:"sessions"`
	Groups       []string       `json:"groups"` // of trainers
}

// Session is a producer's sequence of samples that the segment knows.
type Session struct {
	Name   string    `json:"name"`
	Stream uint64    `json:"stream"`
	Held   uint64    `json:"held"` // samples of it that are in the ring, or were
	Seen   time.Time `json:"seen"` // when a connection of it last began or ended
}

// Place is one place of the ring that holds a batch.
type Place struct {
	Index     int    `json:"index"`
	Batch     uint64 `json:"batch"`
	State     string `json:"state"`
	Committed int    `json:"committed"` // slots committed or given up
	Void      int    `json:"void"`      // slots given up
	Count     int    `json:"count"`     // rows, when published or leased
}

// New makes a report of a segment.
func New(v *ring.View) (*Report, error) {
	l := v.Layout()
	s, err := specOf(&l)
	if err != nil {
		return nil, err
	}
	r := &Report{
		Table: l.Table, Spec: s, Fingerprint: s.Fingerprint().String(), Created: l.Created,
		SampleBytes: v.SampleBytes(), SegmentBytes: v.SegmentBytes(), BatchSize: v.BatchSize(), Batches: v.Batches(),
		Leased: v.Leased(), Published: v.Published(), Reserved: v.Reserved(), Closed: v.Closed(), // in this order, so that none is above the next
		States: map[string]int{}, Places: []Place{}, Sessions: []Session{}, Groups: []string{},
	}
	for _, s := range v.Sessions() {
		r.Sessions = append(r.Sessions, Session(s))
	}
	for _, g := range v.Groups() {
		r.Groups = append(r.Groups, g.Name)
	}
	for _, state := range []ring.State{ring.Free, ring.Open, ring.Sealing, ring.Published, ring.Leased, ring.Lent} {
		r.States[state.String()] = 0
	}
	for i := range v.Batches() {
		b := v.BatchState(i)
		r.States[b.State.String()]++
		if b.State != ring.Free {
			r.Places = append(r.Places, Place{i, b.Number, b.State.String(), b.Committed, b.Void, b.Count})
		}
	}
	return r, nil
}

// specOf parses the spec in a segment and checks that fingerprint and columns are those that follow from it.
func specOf(l *ring.Layout) (*spec.Spec, error) {
	s, err := spec.ParseJSON(l.Spec)
	if err != nil {
		return nil, &ring.FormatError{Reason: fmt.Sprintf("its spec: %v", err)}
	}
	if got := spec.Fingerprint(l.Fingerprint); got != s.Fingerprint() {
		return nil, &ring.FormatError{Reason: fmt.Sprintf("fingerprint is %v, its spec's is %v", got, s.Fingerprint())}
	}
	sizes := s.LeafBytes()
	if len(sizes) != len(l.Columns) {
		return nil, &ring.FormatError{Reason: fmt.Sprintf("%d columns, its spec has %d leaves", len(l.Columns), len(sizes))}
	}
	for i, n := range sizes {
		if l.Columns[i] != n {
			return nil, &ring.FormatError{Reason: fmt.Sprintf("column %d has %d bytes per slot, leaf %q has %d", i, l.Columns[i], s.Leaf(i).Name, n)}
		}
	}
	return s, nil
}

// Text is the report for a person.
func (r *Report) Text() string {
	var b bytes.Buffer
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-12s %s\n", name, fmt.Sprintf(format, args...))
	}
	line("table", "%s", r.Table)
	line("spec", "%s", r.Spec.Text())
	line("fingerprint", "%s", r.Fingerprint)
	line("created", "%s", r.Created.Format(time.RFC3339))
	line("sample", "%d bytes", r.SampleBytes)
	line("batch", "%d samples, %d bytes", r.BatchSize, r.SampleBytes*int64(r.BatchSize))
	line("capacity", "%d batches, %d samples; segment of %d bytes", r.Batches, r.Batches*r.BatchSize, r.SegmentBytes)
	line("cursors", "reserved %d samples, published %d batches, leased %d batches", r.Reserved, r.Published, r.Leased)
	line("closed", "%v", r.Closed)
	line("places", "%d free, %d open, %d sealing, %d published, %d leased, %d lent", r.States["free"], r.States["open"], r.States["sealing"], r.States["published"],
		r.States["leased"], r.States["lent"])
	if len(r.Groups) > 0 {
		line("groups", "%s", strings.Join(r.Groups, ", "))
	}
	if len(r.Places) > 0 {
		fmt.Fprintf(&b, "\n%8s %12s %-10s %10s %6s %8s\n", "place", "batch", "state", "committed", "void", "rows")
	}
	for _, p := range r.Places {
		fmt.Fprintf(&b, "%8d %12d %-10s %10d %6d %8d\n", p.Index, p.Batch, p.State, p.Committed, p.Void, p.Count)
	}
	if len(r.Sessions) > 0 {
		fmt.Fprintf(&b, "\n%8s %12s  %-25s %s\n", "stream", "held", "seen", "session")
	}
	for _, e := range r.Sessions {
		fmt.Fprintf(&b, "%8d %12d  %-25s %s\n", e.Stream, e.Held, e.Seen.Format(time.RFC3339), e.Name)
	}
	return b.String()
}

// Guard runs f, which reads a mapped file, and turns the fault of a file that was cut short meanwhile into an error.
func Guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		switch fault := recover().(type) {
		case nil:
		case runtime.Error:
			if _, ok := fault.(interface{ Addr() uintptr }); !ok {
				panic(fault)
			}
			err = errors.New("the file was cut short while it was read")
		default:
			panic(fault)
		}
	}()
	return f()
}
