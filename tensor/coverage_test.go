package tensor

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// reference is a Coverage that keeps every block by itself.
type reference struct {
	m      *Manifest
	blocks []bool
	chunks map[[3]int64]bool
}

func newReference(m *Manifest) *reference {
	return &reference{m, make([]bool, m.DataBytes()/Align), map[[3]int64]bool{}}
}

func (r *reference) add(flat int64, length, sum uint32) Added {
	key := [3]int64{flat, int64(length), int64(sum)}
	if r.chunks[key] {
		return Same
	}
	blocks := r.blocks[flat/Align : blocksOf(flat+int64(length))]
	if slices.Contains(blocks, true) {
		return Overlap
	}
	for i := range blocks {
		blocks[i] = true
	}
	r.chunks[key] = true
	return New
}

// missing counts byte by byte.
func (r *reference) missing(i int) (n int64) {
	for at := r.m.Offset(i); at < r.m.Offset(i)+r.m.EncodedBytes(i); at++ {
		if !r.blocks[at/Align] {
			n++
		}
	}
	return n
}

func (r *reference) complete(subset []uint32) bool {
	for i := range r.m.Len() {
		n := r.missing(i)
		if subset == nil || slices.Contains(subset, uint32(i)) {
			if n != 0 {
				return false
			}
		} else if n != r.m.EncodedBytes(i) {
			return false
		}
	}
	return true
}

func compare(t *testing.T, c *Coverage, r *reference, subset []uint32) {
	t.Helper()
	have, of := int64(0), int64(0)
	missing := map[int]int64{}
	for i := range r.m.Len() {
		if subset != nil && !slices.Contains(subset, uint32(i)) {
			continue
		}
		n := r.missing(i)
		if n > 0 {
			missing[i] = n
		}
		have, of = have+r.m.EncodedBytes(i)-n, of+r.m.EncodedBytes(i)
		if size := r.m.EncodedBytes(i); size > 0 && (c.Has(r.m.Offset(i), size) != (n == 0) || c.Touches(r.m.Offset(i), size) != (n < size)) {
			t.Fatalf("tensor %d lacks %d of %d bytes: has %v, touches %v", i, n, size, c.Has(r.m.Offset(i), size), c.Touches(r.m.Offset(i), size))
		}
	}
	for i, n := range c.Missing(subset) {
		if missing[i] != n {
			t.Fatalf("tensor %d lacks %d bytes, not %d", i, missing[i], n)
		}
		delete(missing, i)
	}
	if gotHave, gotOf := c.Bytes(subset); gotHave != have || gotOf != of || len(missing) > 0 || c.Complete(subset) != r.complete(subset) {
		t.Fatalf("subset %v: have %d of %d, want %d of %d; not named: %v; complete %v", subset, gotHave, gotOf, have, of, missing, c.Complete(subset))
	}
}

// FuzzCoverage reads chunks from the input: where they start and end, in blocks, and a bit of their sum.
func FuzzCoverage(f *testing.F) {
	f.Add([]byte{0, 2, 0, 3, 1, 0, 0, 2, 0, 1, 1, 0})
	f.Add([]byte{9, 1, 0, 8, 1, 0, 7, 1, 0, 6, 1, 0, 5, 1, 0, 4, 1, 0, 3, 1, 0, 2, 1, 0, 1, 1, 0, 0, 1, 0, 8, 1, 1})
	f.Add([]byte{0, 20, 0})
	f.Fuzz(func(t *testing.T, script []byte) {
		m := made(t, u8("a", 300), u8("none", 0), u8("b", 1024), u8("c", 3000), u8("d", 1), u8("e", 256))
		c, r := NewCoverage(m), newReference(m)
		c.perPage = 4
		for round := range 2 {
			for script := script; len(script) >= 3; script = script[3:] {
				flat := int64(script[0]) * Align
				length := int64(script[1]) * Align
				h := Header{Manifest: m.ID(), Length: uint32(length)}
				at := m.At(flat)
				if at == m.Len() {
					continue
				}
				h.Tensor, h.Offset = uint32(at), uint64(flat-m.Offset(at))
				if script[2]&2 != 0 && length > 0 {
					// End with the tensor in which the last block is.
					if last := m.At(min(flat+length, m.DataBytes()) - Align); last < m.Len() {
						h.Length = uint32(m.ends[last] - flat)
					}
				}
				if !h.HasData() || h.Check(m, ChunkBytesMin) != nil {
					continue
				}
				if got, want := c.Add(flat, h.Length, uint32(script[2]&1)), r.add(flat, h.Length, uint32(script[2]&1)); got != want {
					t.Fatalf("chunk at %d of %d bytes: %v, want %v", flat, h.Length, got, want)
				}
			}
			for _, subset := range [][]uint32{nil, {}, {0}, {1}, {0, 1, 2, 3, 4, 5}, {2, 4}, {3, 5}} {
				compare(t, c, r, subset)
			}
			if round == 0 {
				c.Reset()
				r = newReference(m)
				compare(t, c, r, nil)
			}
		}
	})
}

// TestCoverageInAnyOrder adds many chunks in several orders, through pages of the real size.
func TestCoverageInAnyOrder(t *testing.T) {
	const chunks = 5000
	m := made(t, u8("a", 1000*Align), u8("b", (chunks-1000)*Align))
	order := rand.New(rand.NewPCG(1, 2)).Perm(chunks)
	descending := make([]int, chunks)
	for i := range descending {
		descending[i] = chunks - 1 - i
	}
	ascending := slices.Clone(descending)
	slices.Sort(ascending)
	for name, order := range map[string][]int{"random": order, "descending": descending, "ascending": ascending} {
		c := NewCoverage(m)
		for k, i := range order {
			if c.Complete(nil) {
				t.Fatalf("%s: complete with %d of %d chunks", name, k, chunks)
			}
			if got := c.Add(int64(i)*Align, Align, uint32(i)); got != New {
				t.Fatalf("%s: chunk %d is %v", name, i, got)
			}
			if got := c.Add(int64(i)*Align, Align, uint32(i)); got != Same {
				t.Fatalf("%s: chunk %d again is %v", name, i, got)
			}
			if got := c.Add(int64(i)*Align, Align, uint32(i+1)); got != Overlap {
				t.Fatalf("%s: chunk %d with another sum is %v", name, i, got)
			}
		}
		if !c.Complete(nil) || c.Chunks() != chunks || !c.Has(0, m.DataBytes()) {
			t.Errorf("%s: not complete", name)
		}
		for _, page := range c.pages {
			if len(page) == 0 || len(page) > c.perPage || name == "ascending" && len(page) < c.perPage && &page[0] != &c.pages[len(c.pages)-1][0] {
				t.Errorf("%s: a page of %d", name, len(page))
			}
		}
	}
}

func TestCoverageOfNothing(t *testing.T) {
	c := NewCoverage(made(t, u8("a", 0), u8("b", 0)))
	if !c.Complete(nil) || !c.Complete([]uint32{}) || !c.Complete([]uint32{1}) || c.Add(0, 0, 0) != Same {
		t.Error("a transaction without bytes is not complete from the start")
	}
	c = NewCoverage(made(t, u8("a", 1)))
	if c.Complete(nil) || !c.Complete([]uint32{}) {
		t.Error("empty subset")
	}
	if c.Add(0, 1, 0) != New || !c.Complete(nil) || c.Complete([]uint32{}) {
		t.Error("bytes that were not announced do not count")
	}
}

// TestCoverageOfTheLargest: the last block of 2^40 bytes.
func TestCoverageOfTheLargest(t *testing.T) {
	m := made(t, u8("a", DataBytesMax))
	c := NewCoverage(m)
	if c.Add(DataBytesMax-Align, Align, 1) != New || c.Add(DataBytesMax-2*Align, 2*Align, 1) != Overlap || c.Add(DataBytesMax-Align, Align, 1) != Same || c.Add(0, Align, 2) != New {
		t.Error("the last block is not told from others")
	}
	if have, of := c.Bytes(nil); have != 2*Align || of != DataBytesMax || c.Complete(nil) {
		t.Errorf("have %d of %d", have, of)
	}
	if c.most != 4*DataBytesMax/ChunkBytesMin {
		t.Errorf("at most %d chunks", c.most)
	}
}

func TestCoverageIsBounded(t *testing.T) {
	c := NewCoverage(made(t, u8("a", 100*Align)))
	if c.most != chunksMin {
		t.Errorf("at most %d chunks", c.most)
	}
	c.most = 3
	for i := range int64(3) {
		if got := c.Add(2*i*Align, Align, 0); got != New {
			t.Errorf("chunk %d is %v", i, got)
		}
	}
	if got := c.Add(Align, Align, 0); got != TooMany {
		t.Errorf("a chunk too many is %v", got)
	}
	if c.Add(0, Align, 0) != Same || c.Has(Align, Align) {
		t.Error("a chunk too many was added")
	}
}

func TestCoverageAllocatesNothingAgain(t *testing.T) {
	m := made(t, u8("a", 3000*Align))
	c := NewCoverage(m)
	life := func() {
		c.Reset()
		for i := range int64(3000) {
			c.Add(i*Align, Align, uint32(i))
		}
		if !c.Complete(nil) {
			t.Fatal("not complete")
		}
	}
	life()
	if n := testing.AllocsPerRun(5, life); n != 0 {
		t.Errorf("%v allocations per transaction", n)
	}
}

func TestEnd(t *testing.T) {
	m := tiny(t)
	for _, subset := range [][]uint32{{}, {0}, {1, 4}, {0, 1, 2, 3, 4}} {
		if got, err := ParseEnd(m, AppendEnd(nil, subset)); err != nil || got == nil || !slices.Equal(got, subset) {
			t.Errorf("%v: %v, %v", subset, got, err)
		}
	}
	for want, data := range map[string][]byte{
		"lists tensor 5; the manifest has 5": AppendEnd(nil, []uint32{0, 5}),
		"tensor 1 after 1":                   AppendEnd(nil, []uint32{0, 1, 1}),
		"tensor 1 after 2":                   AppendEnd(nil, []uint32{2, 1}),
		"in 3 bytes":                         make([]byte, 3),
		"in 24 bytes":                        make([]byte, 24),
	} {
		var typed *ChunkError
		if _, err := ParseEnd(m, data); !errors.As(err, &typed) || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	if fmt.Sprint(New, Same, Overlap, TooMany) != "new same overlap too many" {
		t.Error("names")
	}
}

func BenchmarkCoverage(b *testing.B) {
	const chunks = 1000
	m := made(b, u8("a", chunks*ChunkBytesDefault))
	c := NewCoverage(m)
	for b.Loop() {
		c.Reset()
		for i := range int64(chunks) {
			c.Add(i*ChunkBytesDefault, ChunkBytesDefault, 0)
			if c.Complete(nil) != (i == chunks-1) {
				b.Fatal("complete at the wrong time")
			}
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*chunks), "ns/chunk")
}
