package ring

import (
	"bytes"
	"encoding/binary"
	"testing"
)

// TestSpans: the spans of a batch are its columns, byte for byte and in order, for full and short batches; columns that touch are one span.
func TestSpans(t *testing.T) {
	for _, c := range []struct {
		columns []int64
		size    int
		rows    int
		spans   int
	}{
		{[]int64{64, 4}, 16, 16, 1}, // all columns are whole lines: the batch is one piece
		{[]int64{64, 4}, 16, 15, 5}, // short: a gap after each
		{[]int64{3, 64}, 8, 8, 2},   // 24 bytes, then a gap
		{[]int64{1}, 1, 1, 4},
	} {
		r := newRing(t, c.size, 2, c.columns...)
		for number := range c.rows {
			put(r, 7, uint64(number))
		}
		r.Flush()
		b, ok := r.TryLease()
		if !ok || b.Count != c.rows {
			t.Fatalf("no batch of %d rows: %+v", c.rows, b)
		}
		var want []byte
		for _, words := range [][]uint64{b.Streams(), b.Numbers(), b.Arrivals()} {
			for _, w := range words {
				want = binary.LittleEndian.AppendUint64(want, w)
			}
		}
		for i := range c.columns {
			want = append(want, b.Column(i)...)
		}
		spans := b.Spans(nil)
		var got []byte
		for _, s := range spans {
			got = append(got, b.Bytes(s)...)
		}
		if !bytes.Equal(got, want) || len(spans) != c.spans {
			t.Errorf("columns %v, %d rows of %d: %d spans, want %d; same bytes: %v", c.columns, c.rows, c.size, len(spans), c.spans, bytes.Equal(got, want))
		}
	}
}
