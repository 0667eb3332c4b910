package ring

// Span is a part of a segment.
type Span struct{ Offset, Bytes int64 }

// Spans appends where the columns of a batch lie, in the order of their names here: streams, numbers, arrivals, then each leaf's. Those that touch are one.
func (b Batch) Spans(dst []Span) []Span {
	g, rows := &b.view.geo, int64(b.Count)
	base := b.view.base(b.Index)
	for _, at := range [...]int64{g.streams, g.numbers, g.arrivals} {
		dst = appendSpan(dst, base+at, 8*rows)
	}
	for i, at := range g.columns {
		dst = appendSpan(dst, base+at, rows*b.view.layout.Columns[i])
	}
	return dst
}

func appendSpan(dst []Span, offset, bytes int64) []Span {
	if k := len(dst) - 1; k >= 0 && dst[k].Offset+dst[k].Bytes == offset {
		dst[k].Bytes += bytes
		return dst
	}
	return append(dst, Span{offset, bytes})
}

// Bytes returns a part of the segment that holds the batch. It is the ring's own memory.
func (b Batch) Bytes(s Span) []byte {
	return b.view.mem[s.Offset : s.Offset+s.Bytes : s.Offset+s.Bytes]
}
