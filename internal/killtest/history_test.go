package killtest

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/ingestd/ingestd/spec"
)

// event is a step of a history.
type event struct {
	group       string // of a delivery; empty: Sent
	delivery    Delivery
	session     uint64
	sent, acked uint64
}

func sent(session, n, acked uint64) event { return event{session: session, sent: n, acked: acked} }

func delivered(group string, batch uint64, spans ...Span) event {
	return event{group: group, delivery: Delivery{batch, spans}}
}

func play(events []event) *History {
	h := NewHistory("a", "b")
	h.KeepsStreams = true
	for _, e := range events {
		if e.group == "" {
			h.Sent(e.session, e.sent, e.acked)
		} else {
			h.Deliver(e.group, e.delivery)
		}
	}
	return h
}

// truth is a history in which nothing is wrong: two sessions, two groups, batches out of order beside each other, a second delivery, samples beyond the acks.
var truth = []event{
	sent(1, 10, 8), sent(2, 6, 6),
	delivered("a", 0, Span{1, 11, 0, 4}, Span{2, 12, 0, 2}),
	delivered("b", 1, Span{1, 11, 4, 2}, Span{2, 12, 2, 4}),
	delivered("a", 2, Span{1, 11, 6, 3}),
	delivered("b", 0, Span{1, 11, 0, 4}, Span{2, 12, 0, 2}),
	delivered("a", 1, Span{1, 11, 4, 2}, Span{2, 12, 2, 4}),
	delivered("b", 2, Span{1, 11, 6, 3}),
	delivered("a", 0, Span{1, 11, 0, 4}, Span{2, 12, 0, 2}),
}

// TestHistoryFindsFaults: nothing is wrong with a true history, and each planted fault is found and named.
func TestHistoryFindsFaults(t *testing.T) {
	if found := play(truth).Finish(); len(found) > 0 {
		t.Fatalf("a true history is faulted: %q", found)
	}
	if got, want := play(truth).Totals(), (Totals{2, 14, 15, 3, 1, 0}); got != want {
		t.Errorf("totals %+v, want %+v", got, want)
	}
	if got := play(slices.Delete(slices.Clone(truth), 6, 8)).Totals().Lost; got != (4+2)+4 {
		t.Errorf("%d samples are lost, want 4 and 2 of session 1, 4 of session 2", got)
	}
	with := func(i int, e event) []event { l := slices.Clone(truth); l[i] = e; return l }
	for name, tc := range map[string]struct {
		events []event
		want   string
	}{
		"an acked sample is not delivered":        {slices.Delete(slices.Clone(truth), 7, 8), `session 1: 8 samples acked, group "b" has only the first 6`},
		"a batch passes a group by":               {slices.Delete(slices.Clone(truth), 6, 7), `group "a" has only the first 2 without a gap`},
		"acked, and never in a batch":             {append(slices.Clone(truth), sent(3, 1, 1)), "session 3: 1 samples acked"},
		"one more was acked":                      {append(slices.Clone(truth), sent(1, 10, 10)), `session 1: 10 samples acked, group "a" has only the first 9`},
		"a sample twice, in another batch":        {append(slices.Clone(truth), delivered("a", 3, Span{1, 11, 8, 2})), "1 of the samples 8 to 9 are in the ring twice, the second time in batch 3"},
		"a sample twice, in one batch":            {with(4, delivered("a", 1, Span{1, 11, 4, 2}, Span{1, 11, 5, 1}, Span{2, 12, 2, 4})), "other content"},
		"twice at the first sight of the batch":   {append(slices.Clone(truth), delivered("a", 3, Span{2, 12, 6, 1}, Span{2, 12, 6, 1})), "1 of the samples 6 to 6 are in the ring twice"},
		"a second delivery with other content":    {with(5, delivered("b", 0, Span{1, 11, 0, 4}, Span{2, 12, 0, 1})), `batch 0 came to group "b" with other content`},
		"rows in another order":                   {with(5, delivered("b", 0, Span{2, 12, 0, 2}, Span{1, 11, 0, 4})), "other content"},
		"a sample that was never sent":            {append(slices.Clone(truth), delivered("a", 3, Span{2, 12, 6, 1})), "sample 6 was delivered, and only 6 were sent"},
		"a session out of order":                  {append(slices.Clone(truth), sent(4, 4, 0), delivered("a", 3, Span{4, 14, 2, 2}), delivered("a", 4, Span{4, 14, 0, 2})), "samples 0 to 1 in batch 4 come after sample 3 in batch 3"},
		"a gap in the ring":                       {append(slices.Clone(truth), sent(4, 9, 0), delivered("a", 3, Span{4, 14, 0, 2}), delivered("a", 4, Span{4, 14, 3, 2})), "session 4: the ring has a gap"},
		"a session that changes its stream":       {append(slices.Clone(truth), delivered("a", 3, Span{1, 13, 9, 1})), "session 1 has stream 13, and had stream 11"},
		"a stream that two sessions have":         {append(slices.Clone(truth), sent(4, 1, 0), delivered("a", 3, Span{4, 11, 0, 1})), "stream 11 is session 1's"},
		"more acks than samples":                  {append(slices.Clone(truth), sent(2, 6, 7)), "7 samples acked, and only 6 sent"},
		"a group that nobody has set up":          {append(slices.Clone(truth), delivered("c", 3)), `group "c", which this history does not know`},
		"a session of which the start is missing": {append(slices.Clone(truth), sent(4, 9, 5), delivered("a", 3, Span{4, 14, 1, 4}), delivered("b", 3, Span{4, 14, 1, 4})), `session 4: 5 samples acked, group "a" has only the first 0`},
	} {
		if found := strings.Join(play(tc.events).Finish(), "\n"); !strings.Contains(found, tc.want) {
			t.Errorf("%s: want %q, found %q", name, tc.want, found)
		}
	}
}

// TestOrderIsFoundAfterSettling: order is checked also of what a long run no longer keeps.
func TestOrderIsFoundAfterSettling(t *testing.T) {
	h := NewHistory("a")
	const batches = 5 * orderKept
	h.Sent(1, batches, batches)
	for b := range uint64(batches) {
		n := b
		if b == orderKept+3 {
			n = b - 1
		} else if b == orderKept+2 {
			n = b + 1
		}
		h.Deliver("a", Delivery{b, []Span{{1, 1, n, 1}}})
	}
	if found := h.Finish(); len(found) != 1 || !strings.Contains(found[0], "come after sample") {
		t.Errorf("found %q", found)
	}
}

// TestNumberSet compares with a plain set.
func TestNumberSet(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 0))
	for range 300 {
		var s numberSet
		var plain [64]bool
		for range 20 {
			first := rnd.Uint64N(60)
			n := rnd.Uint64N(min(8, 64-first) + 1)
			want := uint64(0)
			for i := first; i < first+n; i++ {
				if plain[i] {
					want++
				}
				plain[i] = true
			}
			if got := s.add(first, n); got != want {
				t.Fatalf("add(%d, %d): %d were there, want %d; %v", first, n, got, want, s)
			}
			var have [64]bool
			for i, e := range s {
				if e.first >= e.end || i > 0 && s[i-1].end >= e.first {
					t.Fatalf("stretches touch: %v", s)
				}
				for k := e.first; k < e.end; k++ {
					have[k] = true
				}
			}
			if have != plain {
				t.Fatalf("%v is not %v", s, plain)
			}
		}
	}
}

// TestRowsAreRead: whole rows are read back as spans, and any damaged byte is found.
func TestRowsAreRead(t *testing.T) {
	s, err := spec.ParseText(SpecText("a:U8[5],b:F32[3]"))
	if err != nil {
		t.Fatal(err)
	}
	ids := []Span{{7, 1, 3, 1}, {7, 1, 4, 1}, {9, 2, 0, 1}, {7, 1, 5, 1}}
	rows := Rows{Columns: make([][]byte, s.NumLeaves())}
	for _, id := range ids {
		sample := make([]byte, s.SampleBytes())
		Fill(sample, s, id.Session, id.First)
		for leaf := range rows.Columns {
			one := make([]byte, s.Leaf(leaf).Bytes())
			FillLeaf(one, s, leaf, id.Session, id.First)
			if at := s.Offset(leaf); string(one) != string(sample[at:at+int64(len(one))]) {
				t.Fatalf("leaf %d alone differs from that of the sample", leaf)
			}
			rows.Columns[leaf] = append(rows.Columns[leaf], one...)
		}
		rows.Streams, rows.Numbers = append(rows.Streams, id.Stream), append(rows.Numbers, id.First)
	}
	spans, err := rows.Read(s)
	if want := []Span{{7, 1, 3, 2}, {9, 2, 0, 1}, {7, 1, 5, 1}}; err != nil || !slices.Equal(spans, want) {
		t.Errorf("%v, %v; want %v", spans, err, want)
	}
	for leaf, column := range rows.Columns {
		for i := range column {
			column[i] ^= 1
			if spans, err := rows.Read(s); err == nil {
				t.Errorf("byte %d of leaf %d is damaged, and read as %v", i, leaf, spans)
			}
			column[i] ^= 1
		}
	}
	rows.Numbers[1]++
	if _, err := rows.Read(s); err == nil || !strings.Contains(err.Error(), "lies beside number 5") {
		t.Errorf("a number beside another sample: %v", err)
	}
}

// TestDeliveryLine: what is written is read back; what was cut short is not taken for something else.
func TestDeliveryLine(t *testing.T) {
	d := Delivery{7, []Span{{1, 2, 3, 4}, {5, 6, 7, 8}}}
	back, err := ParseDelivery(d.String())
	if err != nil || back.Batch != 7 || !slices.Equal(back.Spans, d.Spans) {
		t.Errorf("%v, %v", back, err)
	}
	for _, line := range []string{"", "batch", "batch x", "batch 7 1/2:3", "batch 7 1/2:3+x", "lost 7 1"} {
		if _, err := ParseDelivery(line); err == nil {
			t.Errorf("%q was taken", line)
		}
	}
}
