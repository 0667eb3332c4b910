package tensor

import (
	"fmt"

	"github.com/ingestd/ingestd/spec"
)

// DiffManifests returns the tensors in which got differs from want, in want's order, then those that want has not. The types are those of Tensor.Type, followed by "at index N"
// where the order differs. It is empty for equal manifests only.
func DiffManifests(got, want *Manifest) []spec.Difference {
	gotRank, wantRank := got.ranks(want), want.ranks(got)
	var diff []spec.Difference
	for i := range want.tensors {
		w := &want.tensors[i]
		j, common := got.index[w.Name]
		if !common {
			diff = append(diff, spec.Difference{Leaf: w.Name, Want: w.Type()})
			continue
		}
		d := spec.Difference{Leaf: w.Name, Got: got.tensors[j].Type(), Want: w.Type()}
		if gotRank[j] != wantRank[i] {
			d.Got, d.Want = fmt.Sprintf("%s at index %d", d.Got, j), fmt.Sprintf("%s at index %d", d.Want, i)
		}
		if d.Got != d.Want {
			diff = append(diff, d)
		}
	}
	for i := range got.tensors {
		g := &got.tensors[i]
		if _, common := want.index[g.Name]; !common {
			diff = append(diff, spec.Difference{Leaf: g.Name, Got: g.Type()})
		}
	}
	return diff
}

// ranks numbers the tensors that the other manifest has too, so that one missing tensor does not displace all after it.
func (m *Manifest) ranks(other *Manifest) []int {
	rank, next := make([]int, len(m.tensors)), 0
	for i := range m.tensors {
		if _, common := other.index[m.tensors[i].Name]; common {
			rank[i] = next
			next++
		}
	}
	return rank
}
