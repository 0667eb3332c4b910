package tensor

import (
	"iter"
	"slices"
)

// Added says what a chunk was to the chunks that came before it.
type Added uint8

// What Coverage.Add returns.
const (
	New     Added = iota // its bytes were not there yet
	Same                 // the same chunk again: same place, length and sum
	Overlap              // part of it was there already, from another chunk: it was not added
	TooMany              // the transaction is cut into more chunks than it may be: it was not added
)

// String is for logs.
func (a Added) String() string { return [...]string{"new", "same", "overlap", "too many"}[a] }

// chunksMin is how many chunks any transaction may be cut into. One that is large may be cut into 4 chunks per ChunkBytesMin bytes, if that is more.
const chunksMin = 1 << 20

// Coverage tells which bytes of one transaction have come. A chunk starts on a multiple of Align and cuts no element, and so does each tensor; so every block of Align bytes
// is of one tensor and of one chunk, and counting blocks tells what is complete.
//
// Chunks that come in order cost one comparison, any others a search. Memory: 12 bytes per chunk.
type Coverage struct {
	m       *Manifest
	pages   [][]extent // in order, none empty; all but a few are half full or more
	free    [][]extent
	chunks  int
	most    int
	blocks  int64 // that have come
	ofAll   int64 // of the manifest
	perPage int
}

// extent is one chunk. Its first block fits 32 bits, since DataBytesMax / Align is 2^32.
type extent struct{ block, length, sum uint32 }

func (e extent) end() int64 { return int64(e.block) + blocksOf(int64(e.length)) }

func blocksOf(bytes int64) int64 { return (bytes + Align - 1) / Align }

// NewCoverage is for transactions of m.
func NewCoverage(m *Manifest) *Coverage {
	c := &Coverage{m: m, perPage: 512}
	c.most = int(max(chunksMin, 4*(m.DataBytes()/ChunkBytesMin)))
	for i := range m.Len() {
		c.ofAll += blocksOf(m.EncodedBytes(i))
	}
	return c
}

// Manifest is what NewCoverage was given.
func (c *Coverage) Manifest() *Manifest { return c.m }

// Reset starts over and keeps the memory.
func (c *Coverage) Reset() {
	for _, page := range c.pages {
		c.free = append(c.free, page[:0])
	}
	c.pages = c.pages[:0]
	c.chunks, c.blocks = 0, 0
}

// Add adds a chunk whose header has passed Header.Check and has data: where it lies (Header.Flat), its length and its sum.
func (c *Coverage) Add(flat int64, length, sum uint32) Added {
	if length == 0 {
		return Same
	}
	e := extent{uint32(flat / Align), length, sum}
	p, i := c.search(e.block)
	if before, ok := c.before(p, i); ok && before.end() > int64(e.block) {
		if before == e {
			return Same
		}
		return Overlap
	}
	if p < len(c.pages) && i < len(c.pages[p]) && e.end() > int64(c.pages[p][i].block) {
		return Overlap
	}
	if c.chunks == c.most {
		return TooMany
	}
	c.insert(p, i, e)
	c.chunks++
	c.blocks += blocksOf(int64(length))
	return New
}

// search finds the place of the first chunk that starts after a block: in page p at i. If there is none, that is after the last one.
func (c *Coverage) search(block uint32) (p, i int) {
	last := len(c.pages) - 1
	if last < 0 {
		return 0, 0
	}
	if page := c.pages[last]; page[len(page)-1].block <= block {
		return last, len(page)
	}
	p, _ = slices.BinarySearchFunc(c.pages, block, func(page []extent, block uint32) int {
		if page[len(page)-1].block <= block {
			return -1
		}
		return 1
	})
	i, _ = slices.BinarySearchFunc(c.pages[p], block, func(e extent, block uint32) int {
		if e.block <= block {
			return -1
		}
		return 1
	})
	return p, i
}

// before returns the chunk before a place.
func (c *Coverage) before(p, i int) (extent, bool) {
	switch {
	case i > 0:
		return c.pages[p][i-1], true
	case p > 0:
		page := c.pages[p-1]
		return page[len(page)-1], true
	}
	return extent{}, false
}

func (c *Coverage) insert(p, i int, e extent) {
	if len(c.pages) == 0 {
		c.pages = append(c.pages, append(c.newPage(), e))
		return
	}
	if len(c.pages[p]) == c.perPage {
		p, i = c.split(p, i)
	}
	c.pages[p] = slices.Insert(c.pages[p], i, e)
}

// split makes room in a full page: a new page after it, for what follows if that is the end of all, else for half of it.
func (c *Coverage) split(p, i int) (int, int) {
	full, cut := c.pages[p], c.perPage/2
	if i == c.perPage && p == len(c.pages)-1 {
		cut = c.perPage
	}
	c.pages[p] = full[:cut]
	c.pages = slices.Insert(c.pages, p+1, append(c.newPage(), full[cut:]...))
	if i >= cut && cut < c.perPage || i == c.perPage {
		return p + 1, i - cut
	}
	return p, i
}

func (c *Coverage) newPage() []extent {
	if n := len(c.free); n > 0 {
		page := c.free[n-1]
		c.free = c.free[:n-1]
		return page
	}
	return make([]extent, 0, c.perPage)
}

// Chunks is how many chunks were added.
func (c *Coverage) Chunks() int { return c.chunks }

// Missing bytes of the flat range from to end, in whole blocks; from is a multiple of Align.
func (c *Coverage) missing(from, end int64) int64 {
	at, stop, missing := from/Align, blocksOf(end), int64(0)
	if at >= stop {
		return 0
	}
	p, i := c.search(uint32(at))
	if before, ok := c.before(p, i); ok {
		at = max(at, before.end())
	}
	for at < stop {
		if p < len(c.pages) && i == len(c.pages[p]) {
			p, i = p+1, 0
		}
		if p == len(c.pages) {
			return missing + stop - at
		}
		e := c.pages[p][i]
		missing += max(min(int64(e.block), stop)-at, 0)
		at = e.end()
		i++
	}
	return missing
}

// Has says whether all bytes of a flat range have come. It starts and ends as a chunk may.
func (c *Coverage) Has(flat, bytes int64) bool { return c.missing(flat, flat+bytes) == 0 }

// Touches says whether some bytes of a flat range have come. It starts and ends as a chunk may.
func (c *Coverage) Touches(flat, bytes int64) bool {
	return c.missing(flat, flat+bytes) != blocksOf(flat+bytes)-flat/Align
}

// Complete says whether the transaction is complete: all bytes of the manifest have come, or, where a subset was announced, all bytes of exactly these tensors. nil is no
// subset; an empty one that is not nil means that there are no bytes. A subset is what ParseEnd returns.
func (c *Coverage) Complete(subset []uint32) bool {
	if subset == nil {
		return c.blocks == c.ofAll
	}
	want := int64(0)
	for _, i := range subset {
		want += blocksOf(c.m.EncodedBytes(int(i)))
	}
	if c.blocks != want {
		return false
	}
	for range c.Missing(subset) {
		return false
	}
	return true
}

// Missing goes through the tensors of a subset, or of the manifest if it is nil, of which bytes are missing, and says how many.
func (c *Coverage) Missing(subset []uint32) iter.Seq2[int, int64] {
	return func(yield func(int, int64) bool) {
		n := len(subset)
		if subset == nil {
			n = c.m.Len()
		}
		for k := range n {
			i := k
			if subset != nil {
				i = int(subset[k])
			}
			blocks := c.missing(c.m.offsets[i], c.m.ends[i])
			if blocks == 0 {
				continue
			}
			bytes := blocks * Align
			if over := roundUp(c.m.ends[i]) - c.m.ends[i]; over > 0 && c.missing(roundUp(c.m.ends[i])-Align, c.m.ends[i]) > 0 {
				bytes -= over // the last block is not full
			}
			if !yield(i, bytes) {
				return
			}
		}
	}
}

// Bytes tells how many bytes of the tensors of a subset (nil: of the manifest) have come, and of how many, without what lies between tensors.
func (c *Coverage) Bytes(subset []uint32) (have, of int64) {
	if subset == nil {
		for i := range c.m.Len() {
			of += c.m.EncodedBytes(i)
		}
	}
	for _, i := range subset {
		of += c.m.EncodedBytes(int(i))
	}
	have = of
	for _, missing := range c.Missing(subset) {
		have -= missing
	}
	return have, of
}
