package killtest

import (
	"fmt"
	"strconv"
	"strings"
)

// Span is N samples of a session in a row, from number First on, in one batch.
type Span struct{ Session, Stream, First, N uint64 }

// Delivery is one batch that a trainer has read.
type Delivery struct {
	Batch uint64
	Spans []Span // in the order of the rows
}

// String is the line that a trainer writes, without its newline.
func (d Delivery) String() string {
	b := strconv.AppendUint([]byte("batch "), d.Batch, 10)
	for _, s := range d.Spans {
		b = fmt.Appendf(b, " %d/%d:%d+%d", s.Session, s.Stream, s.First, s.N)
	}
	return string(b)
}

// ParseDelivery reads what String wrote.
func ParseDelivery(line string) (Delivery, error) {
	fields := strings.Fields(line)
	if len(fields) < 2 || fields[0] != "batch" {
		return Delivery{}, fmt.Errorf("%q is no delivery", line)
	}
	var d Delivery
	var err error
	if d.Batch, err = strconv.ParseUint(fields[1], 10, 64); err != nil {
		return Delivery{}, fmt.Errorf("%q: %w", line, err)
	}
	for _, f := range fields[2:] {
		numbers := strings.FieldsFunc(f, func(r rune) bool { return r == '/' || r == ':' || r == '+' })
		if len(numbers) != 4 {
			return Delivery{}, fmt.Errorf("%q: %q is no span", line, f)
		}
		var v [4]uint64
		for i, n := range numbers {
			if v[i], err = strconv.ParseUint(n, 10, 64); err != nil {
				return Delivery{}, fmt.Errorf("%q: %w", line, err)
			}
		}
		d.Spans = append(d.Spans, Span{v[0], v[1], v[2], v[3]})
	}
	return d, nil
}
