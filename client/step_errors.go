package client

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/ingestd/ingestd/tensor"
)

// StepRefusedError says that the daemon does not use the chunks of a step: it was too old.
type StepRefusedError struct {
	Step   uint64
	Reason string // the daemon's words
}

func (e *StepRefusedError) Error() string {
	return fmt.Sprintf("client: the daemon refused step %d: %s", e.Step, e.Reason)
}

// StepOrderError is a step that is lower than one that was committed.
type StepOrderError struct{ Step, Last uint64 }

func (e *StepOrderError) Error() string {
	return fmt.Sprintf("client: step %d comes after step %d was committed; steps may only grow: dial anew to go back", e.Step, e.Last)
}

// UnknownTensorError is a name that the manifest does not have.
type UnknownTensorError struct {
	Name string
	Near []string // names that it has and that look alike, the most alike first; at most 3
	Of   int      // tensors that it has
}

func (e *UnknownTensorError) Error() string {
	if len(e.Near) == 0 {
		return fmt.Sprintf("client: there is no tensor %q among the manifest's %d", e.Name, e.Of)
	}
	return fmt.Sprintf("client: there is no tensor %q among the manifest's %d; did you mean %q?", e.Name, e.Of, strings.Join(e.Near, `" or "`))
}

func unknownTensor(m *tensor.Manifest, name string) error {
	type candidate struct {
		name  string
		edits int
	}
	var near []candidate
	most := max(2, len(name)/3)
	for i := range m.Len() {
		other := m.Tensor(i).Name
		if edits := distance(name, other, most); edits <= most {
			near = append(near, candidate{other, edits})
		}
	}
	slices.SortStableFunc(near, func(a, b candidate) int { return cmp.Compare(a.edits, b.edits) })
	e := &UnknownTensorError{Name: name, Of: m.Len()}
	for _, c := range near[:min(3, len(near))] {
		e.Near = append(e.Near, c.name)
	}
	return e
}

// distance is the number of bytes to insert, delete or replace to make b of a, or more than most if it is more than that (Levenshtein).
func distance(a, b string, most int) int {
	if max(len(a), len(b))-min(len(a), len(b)) > most {
		return most + 1
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal, least := row[0], i+1
		row[0] = i + 1
		for j := range len(b) {
			edits := diagonal
			if a[i] != b[j] {
				edits = 1 + min(diagonal, row[j], row[j+1])
			}
			diagonal, row[j+1] = row[j+1], edits
			least = min(least, edits)
		}
		if least > most {
			return most + 1
		}
	}
	return row[len(b)]
}
