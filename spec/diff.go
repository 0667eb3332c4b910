package spec

import (
	"fmt"
	"slices"
	"strings"
)

// Difference is one leaf in which two specs differ. Got and Want are types such as F32[8,8], empty where
// the leaf is missing, and followed by "at index N" where its place among the leaves differs.
type Difference struct {
	Leaf string `json:"leaf"`
	Got  string `json:"got"`
	Want string `json:"want"`
}

// String says it in words.
func (d Difference) String() string {
	switch {
	case d.Got == "":
		return fmt.Sprintf("leaf %q is missing, want %s", d.Leaf, d.Want)
	case d.Want == "":
		return fmt.Sprintf("leaf %q is not wanted, got %s", d.Leaf, d.Got)
	}
	hint := ""
	if transposed(d.Got, d.Want) {
		hint = " (transposed?)"
	}
	return fmt.Sprintf("leaf %q: got %s, want %s%s", d.Leaf, d.Got, d.Want, hint)
}

// transposed says whether two types have the same dtype and the same dimensions in another order.
func transposed(a, b string) bool {
	dtypeA, shapeA, okA := strings.Cut(strings.TrimSuffix(a, "]"), "[")
	dtypeB, shapeB, okB := strings.Cut(strings.TrimSuffix(b, "]"), "[")
	if !okA || !okB || dtypeA != dtypeB || shapeA == shapeB {
		return false
	}
	dimsA, dimsB := strings.Split(shapeA, ","), strings.Split(shapeB, ",")
	slices.Sort(dimsA)
	slices.Sort(dimsB)
	return slices.Equal(dimsA, dimsB)
}

// Diff returns the leaves in which got differs from want, in want's order, then those that want has not.
// It is empty for equal specs only.
func Diff(got, want *Spec) []Difference {
	gotAt, wantAt := got.places(), want.places()
	gotRank, wantRank := got.ranks(wantAt), want.ranks(gotAt)
	var diff []Difference
	for i, w := range want.leaves {
		j, common := gotAt[w.Name]
		if !common {
			diff = append(diff, Difference{Leaf: w.Name, Want: w.Type()})
			continue
		}
		d := Difference{Leaf: w.Name, Got: got.leaves[j].Type(), Want: w.Type()}
		if gotRank[w.Name] != wantRank[w.Name] {
			d.Got, d.Want = fmt.Sprintf("%s at index %d", d.Got, j), fmt.Sprintf("%s at index %d", d.Want, i)
		}
		if d.Got != d.Want {
			diff = append(diff, d)
		}
	}
	for _, g := range got.leaves {
		if _, common := wantAt[g.Name]; !common {
			diff = append(diff, Difference{Leaf: g.Name, Got: g.Type()})
		}
	}
	return diff
}

func (s *Spec) places() map[string]int {
	at := make(map[string]int, len(s.leaves))
	for i, l := range s.leaves {
		at[l.Name] = i
	}
	return at
}

// ranks numbers the leaves that the other spec has too, so that one missing leaf does not displace all after it.
func (s *Spec) ranks(other map[string]int) map[string]int {
	rank := make(map[string]int, len(s.leaves))
	for _, l := range s.leaves {
		if _, common := other[l.Name]; common {
			rank[l.Name] = len(rank)
		}
	}
	return rank
}

// FormatDiff writes differences for a person, on one line, the first eight in full. A missing leaf and
// an unwanted one of the same type are shown as a change of name.
func FormatDiff(diff []Difference) string {
	const most = 8
	var parts []string
	paired := make([]bool, len(diff))
	for i, d := range diff {
		if paired[i] {
			continue
		}
		part := d.String()
		if j := renamed(diff, paired, i); j >= 0 {
			paired[j] = true
			missing, extra := d, diff[j]
			if d.Got != "" {
				missing, extra = extra, d
			}
			part = fmt.Sprintf("leaf %q is missing, got %q of its type %s (renamed?)", missing.Leaf, extra.Leaf, extra.Got)
		}
		parts = append(parts, part)
	}
	if len(parts) > most {
		parts = append(parts[:most], fmt.Sprintf("and %d more", len(parts)-most))
	}
	return strings.Join(parts, "; ")
}

// renamed finds the counterpart after i of a leaf that is in one spec only.
func renamed(diff []Difference, paired []bool, i int) int {
	d := diff[i]
	if d.Got != "" && d.Want != "" {
		return -1
	}
	for j := i + 1; j < len(diff); j++ {
		if !paired[j] && diff[j].Got == d.Want && diff[j].Want == d.Got {
			return j
		}
	}
	return -1
}

// MismatchError says in which leaves a spec differs from the one that was wanted.
type MismatchError struct{ Differences []Difference }

func (e *MismatchError) Error() string {
	noun := "leaves"
	if len(e.Differences) == 1 {
		noun = "leaf"
	}
	return fmt.Sprintf("spec differs in %d %s: %s", len(e.Differences), noun, FormatDiff(e.Differences))
}

// Check returns nil if the specs are equal, else a *MismatchError.
func Check(got, want *Spec) error {
	if got.Equal(want) {
		return nil
	}
	return &MismatchError{Diff(got, want)}
}
