package inspect

import (
	"fmt"

	"github.com/ingestd/ingestd/ring"
)

// Check checks a whole segment that nobody writes to: header, spec, cursors, tables, every state line, and the slots' own words of every batch. It is the check that a
// daemon makes before it takes a segment up again. The error is for bytes that are not a segment; problems are what is wrong with one.
func Check(mem []byte) (*Report, []string, error) {
	v, err := ring.OpenView(mem)
	if err != nil {
		return nil, nil, err
	}
	r, err := New(v)
	if err != nil {
		return nil, nil, err
	}
	problems := v.Survey().Problems
	if extra := int64(len(mem)) - v.SegmentBytes(); extra >= 4096 {
		problems = append(problems, fmt.Sprintf("%d bytes follow the segment", extra))
	}
	return r, problems, nil
}
