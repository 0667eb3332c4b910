package tensor

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// sink is a reader: it checks each chunk as a reader does and puts the bytes where they belong.
type sink struct {
	t       testing.TB
	m       *Manifest
	flat    []byte
	covered *Coverage
	subset  []uint32
	headers []Header
	pieces  int
	aborted bool
}

func newSink(t testing.TB, m *Manifest) *sink {
	return &sink{t: t, m: m, flat: make([]byte, m.DataBytes()), covered: NewCoverage(m)}
}

func (s *sink) emit(header []byte, data [][]byte) error {
	s.t.Helper()
	all := slices.Concat(data...)
	h, err := ParseHeader(header)
	if err == nil {
		err = h.Check(s.m, ChunkBytesMin)
	}
	if err == nil {
		err = h.CheckData(s.m, all)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	if (h.Flags&FlagBegin != 0) != (len(s.headers) == 0) {
		s.t.Fatalf("chunk %d has flags %#x", len(s.headers), h.Flags)
	}
	s.headers = append(s.headers, h)
	s.pieces += len(data)
	switch {
	case h.Flags&FlagEnd != 0:
		if s.subset, err = ParseEnd(s.m, all); err != nil {
			s.t.Fatal(err)
		}
	case h.Flags&FlagAbort != 0:
		s.aborted = true
	case h.HasData():
		if got := s.covered.Add(h.Flat(s.m), h.Length, h.DataCRC); got != New {
			s.t.Fatalf("chunk %d is %v", len(s.headers)-1, got)
		}
		copy(s.flat[h.Flat(s.m):], all)
	}
	return nil
}

// image is what all tensors of a subset look like when they lie where they belong.
func image(m *Manifest, tensors [][]byte, subset []uint32) []byte {
	flat := make([]byte, m.DataBytes())
	for i, b := range tensors {
		if subset == nil || slices.Contains(subset, uint32(i)) {
			copy(flat[m.Offset(i):], b)
		}
	}
	return flat
}

func contents(m *Manifest) [][]byte {
	all := make([][]byte, m.Len())
	for i := range all {
		all[i] = pattern(int(m.EncodedBytes(i)))
		for k := range all[i] {
			all[i][k] += byte(i + 1)
		}
	}
	return all
}

func (s *sink) check(tensors [][]byte) {
	s.t.Helper()
	if !s.covered.Complete(s.subset) {
		s.t.Fatal("the reader has not got all")
	}
	if !bytes.Equal(s.flat, image(s.m, tensors, s.subset)) {
		s.t.Fatal("the reader has other bytes")
	}
}

func TestCutterOrders(t *testing.T) {
	const c = ChunkBytesMin
	m := made(t, u8("a", 100), u8("none", 0), u8("large", 3*c+100), u8("b", 7), u8("c", 5000), u8("larger", 5*c), u8("d", 300), u8("e", c-256), u8("f", 1))
	tensors := contents(m)
	least := int((m.DataBytes() + c - 1) / c)
	ascending := []int{0, 1, 2, 3, 4, 5, 6, 7, 8}
	descending := slices.Clone(ascending)
	slices.Reverse(descending)
	cutter := func(s *sink) *Cutter { return NewCutter(m, c, 5, ProducerID("x"), s.emit) }
	for name, order := range map[string][]int{"ascending": ascending, "descending": descending, "mixed": {5, 6, 3, 2, 8, 7, 0, 4, 1}} {
		s := newSink(t, m)
		cut := cutter(s)
		for round := range 2 { // a transaction after one of the same order
			*s = *newSink(t, m)
			cut.Begin(uint64(round))
			for _, i := range order {
				if err := cut.Put(i, tensors[i]); err != nil {
					t.Fatalf("%s: %v", name, err)
				}
			}
			if err := cut.Finish(); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			s.check(tensors)
			h := s.headers[len(s.headers)-1]
			if h.Step != uint64(round) || h.Stream != 5 || h.Producer != ProducerID("x") {
				t.Errorf("%s: %+v", name, h)
			}
			if most := least; name != "mixed" && len(s.headers) > most {
				t.Errorf("%s, step %d: %d chunks, %d would do", name, round, len(s.headers), most)
			}
		}
	}
}

// TestCutterBorrows: the pieces of a large tensor are its own memory, and what comes out stays as it was until the next Begin.
func TestCutterBorrows(t *testing.T) {
	const c = ChunkBytesMin
	m := made(t, u8("small", 10), u8("large", 4*c), u8("small2", 10))
	tensors := contents(m)
	var chunks [][][]byte
	cut := NewCutter(m, c, 1, 2, func(header []byte, data [][]byte) error {
		chunks = append(chunks, append([][]byte{header}, data...))
		return nil
	})
	cut.Begin(9)
	for i, b := range tensors {
		if err := cut.Put(i, b); err != nil {
			t.Fatal(err)
		}
	}
	if err := cut.Finish(); err != nil {
		t.Fatal(err)
	}
	borrowed := 0
	s := newSink(t, m)
	for _, chunk := range chunks {
		for _, piece := range chunk[1:] {
			for at := 0; at < len(tensors[1]); at += Align {
				if &piece[0] == &tensors[1][at] {
					borrowed += len(piece)
				}
			}
		}
		if err := s.emit(chunk[0], chunk[1:]); err != nil {
			t.Fatal(err)
		}
	}
	s.check(tensors)
	if borrowed <= 4*c-smallBytes {
		t.Errorf("only %d bytes of %d were not copied", borrowed, 4*c)
	}
}

func TestCutterManySmall(t *testing.T) {
	var list []Tensor
	for i := range 10_000 {
		list = append(list, u8(fmt.Sprint("t", i), int64(i%5)))
	}
	m := made(t, list...)
	tensors := contents(m)
	for _, reverse := range []bool{false, true} {
		s := newSink(t, m)
		cut := NewCutter(m, ChunkBytesMin, 1, 2, s.emit)
		cut.Begin(1)
		for k := range tensors {
			i := k
			if reverse {
				i = len(tensors) - 1 - k
			}
			if err := cut.Put(i, tensors[i]); err != nil {
				t.Fatal(err)
			}
		}
		if err := cut.Finish(); err != nil {
			t.Fatal(err)
		}
		s.check(tensors)
		if want := int((m.DataBytes() + ChunkBytesMin - 1) / ChunkBytesMin); len(s.headers) != want || s.pieces > 2*want {
			t.Errorf("reverse %v: %d chunks of %d pieces, want %d", reverse, len(s.headers), s.pieces, want)
		}
	}
}

func TestCutterParts(t *testing.T) {
	const c = ChunkBytesMin
	m := made(t, u8("a", 1000), u8("b", 2*c+1), u8("d", 700))
	tensors := contents(m)
	part := func(i int, from, end int64) func(*Cutter) error {
		return func(cut *Cutter) error { return cut.PutAt(i, from, tensors[i][from:end]) }
	}
	refused := func(want string, put func(*Cutter) error) func(*Cutter) error {
		return func(cut *Cutter) error {
			var typed *PlaceError
			if err := put(cut); !errors.As(err, &typed) || !strings.Contains(err.Error(), want) {
				return fmt.Errorf("got %v, want %q", err, want)
			}
			return nil
		}
	}
	for name, puts := range map[string][]func(*Cutter) error{
		"aligned": {part(0, 256, 1000), part(0, 0, 256), part(1, 0, c), part(1, c, 2*c+1), part(2, 0, 700)},
		"rows":    {part(0, 0, 100), part(0, 100, 350), part(0, 350, 1000), part(1, 0, 77), part(1, 77, 2*c+1), part(2, 0, 1), part(2, 1, 700)},
		"refused": {
			refused("do not lie in the tensor", func(cut *Cutter) error { return cut.PutAt(0, 512, make([]byte, 489)) }),
			refused("do not lie in the tensor", func(cut *Cutter) error { return cut.PutAt(0, -256, make([]byte, 256)) }),
			refused("do not lie in the tensor", func(cut *Cutter) error { return cut.PutAt(0, 1<<62, nil) }),
			refused("has 999 bytes, the manifest says U8[1000]: 1000 bytes", func(cut *Cutter) error { return cut.Put(0, make([]byte, 999)) }),
			refused("must start on a multiple of 256", part(0, 100, 1000)),
			part(0, 256, 600),
			refused("must start on a multiple of 256", part(0, 601, 1000)),
			refused("must be followed by the next one", part(2, 0, 700)),
			refused("must be followed by the next one", part(1, 0, 256)),
			refused("must be followed by the next one", part(0, 0, 256)),
			refused("must be followed by the next one", part(0, 768, 1000)),
			refused("put before", part(0, 512, 768)),
			refused("put before", part(0, 0, 512)),
			part(0, 600, 1000),
			refused("put before", part(0, 768, 1000)),
			part(0, 0, 256),
			refused("put before", part(0, 0, 1000)),
			part(2, 0, 512),
			refused("put before", part(0, 0, 256)),
			part(2, 512, 700),
			part(1, 0, 2*c+1),
			refused("put before", part(1, c, c+256)),
			refused("put before", part(1, 2*c, 2*c+1)),
			part(1, 512, 512),
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSink(t, m)
			cut := NewCutter(m, c, 1, 2, s.emit)
			cut.Begin(1)
			for k, put := range puts {
				if err := put(cut); err != nil {
					t.Fatalf("put %d: %v", k, err)
				}
			}
			if err := cut.Finish(); err != nil {
				t.Fatal(err)
			}
			s.check(tensors)
		})
	}
}

func TestCutterFinish(t *testing.T) {
	m := tiny(t)
	tensors := contents(m)
	s := newSink(t, m)
	cut := NewCutter(m, ChunkBytesMin, 1, 2, s.emit)
	for _, err := range []error{cut.Put(0, tensors[0]), cut.Finish(), cut.FinishSubset(), cut.Abort()} {
		if !errors.Is(err, errNotBegun) {
			t.Errorf("outside of a transaction: %v", err)
		}
	}
	var incomplete *IncompleteError
	cut.Begin(1)
	if err := cut.PutAt(2, 256, tensors[2][256:]); err != nil {
		t.Fatal(err)
	}
	want := `the step is not complete: 4 tensors lack bytes: "a" 300; "b" 256; "c" 266; "d" 1`
	if err := cut.Finish(); !errors.As(err, &incomplete) || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	if err := cut.FinishSubset(); !errors.As(err, &incomplete) || len(incomplete.Missing) != 1 || incomplete.Missing[0] != (MissingTensor{"b", 256}) {
		t.Errorf("got %v", err)
	}
	// It goes on.
	if err := errors.Join(cut.PutAt(2, 0, tensors[2][:256]), cut.Put(1, nil), cut.Put(4, tensors[4]), cut.FinishSubset()); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(s.subset, []uint32{1, 2, 4}) {
		t.Errorf("subset %v", s.subset)
	}
	s.check(tensors)
	if err := cut.Put(0, tensors[0]); !errors.Is(err, errNotBegun) {
		t.Errorf("after the end: %v", err)
	}

	*s = *newSink(t, m)
	cut.Begin(2)
	if err := errors.Join(cut.PutAt(0, 0, tensors[0][:100])); err != nil {
		t.Fatal(err)
	}
	if err := cut.Finish(); !errors.As(err, &incomplete) || incomplete.Missing[0] != (MissingTensor{"a", 200}) {
		t.Errorf("got %v", err)
	}
	if err := cut.Abort(); err != nil || len(s.headers) != 0 {
		t.Errorf("an abort of what was not sent: %v, %d chunks", err, len(s.headers))
	}

	cut.Begin(3)
	if err := errors.Join(cut.Put(0, tensors[0]), cut.Put(2, tensors[2]), cut.Put(0, nil)); err == nil {
		t.Fatal("a tensor without its bytes was taken")
	}
	if err := errors.Join(cut.Put(4, tensors[4]), cut.Abort()); err != nil || !s.aborted || len(s.headers) != 2 {
		t.Errorf("%v, aborted %v, %d chunks", err, s.aborted, len(s.headers))
	}

	// A subset that is everything needs no list; one of nothing is an empty list.
	*s = *newSink(t, m)
	cut.Begin(4)
	for i, b := range tensors {
		if err := cut.Put(i, b); err != nil {
			t.Fatal(err)
		}
	}
	if err := cut.FinishSubset(); err != nil || s.subset != nil || len(s.headers) != 1 {
		t.Errorf("%v, subset %v, %d chunks", err, s.subset, len(s.headers))
	}
	*s = *newSink(t, m)
	cut.Begin(5)
	if err := cut.FinishSubset(); err != nil || s.subset == nil || len(s.subset) != 0 || len(s.headers) != 1 {
		t.Errorf("%v, subset %v, %d chunks", err, s.subset, len(s.headers))
	}
	empty := made(t, u8("a", 0), u8("b", 0))
	s = newSink(t, empty)
	cut = NewCutter(empty, ChunkBytesMin, 1, 2, s.emit)
	cut.Begin(6)
	if err := cut.Finish(); err != nil || len(s.headers) != 1 || s.headers[0].Flags != FlagBegin {
		t.Errorf("%v, %d chunks", err, len(s.headers))
	}
}

func TestCutterSubsetThatFitsNoChunk(t *testing.T) {
	var list []Tensor
	for i := range ChunkBytesMin/4 + 2 {
		list = append(list, u8(fmt.Sprint(i), 0))
	}
	m := made(t, list...)
	for _, n := range []int{ChunkBytesMin / 4, ChunkBytesMin/4 + 1} {
		s := newSink(t, m)
		cut := NewCutter(m, ChunkBytesMin, 1, 2, s.emit)
		cut.Begin(1)
		for i := range n {
			if err := cut.Put(i, nil); err != nil {
				t.Fatal(err)
			}
		}
		err := cut.FinishSubset()
		if fits := n <= ChunkBytesMin/4; (err == nil) != fits || fits != (len(s.subset) == n) {
			t.Errorf("%d tensors: %v, %d announced", n, err, len(s.subset))
		}
	}
}

func TestCutterFailedEmit(t *testing.T) {
	m := made(t, u8("a", 3*ChunkBytesMin))
	boom := errors.New("boom")
	fails := true
	calls := 0
	cut := NewCutter(m, ChunkBytesMin, 1, 2, func([]byte, [][]byte) error {
		if calls++; fails && calls == 2 {
			return boom
		}
		return nil
	})
	a := make([]byte, 3*ChunkBytesMin)
	cut.Begin(1)
	if err := cut.Put(0, a); !errors.Is(err, boom) {
		t.Errorf("got %v", err)
	}
	if err := cut.Finish(); !errors.Is(err, boom) || calls != 2 {
		t.Errorf("got %v after %d calls", err, calls)
	}
	if err := cut.Abort(); err != nil || calls != 2 {
		t.Errorf("abort: %v after %d calls", err, calls)
	}
	fails = false
	cut.Begin(1)
	if err := errors.Join(cut.Put(0, a), cut.Finish()); err != nil || calls != 5 {
		t.Errorf("again: %v after %d calls", err, calls)
	}
}

func TestCutterSkipCRC(t *testing.T) {
	m := tiny(t)
	s := newSink(t, m)
	cut := NewCutter(m, ChunkBytesMin, 1, 2, s.emit)
	cut.SkipCRC()
	cut.Begin(1)
	if err := errors.Join(cut.Put(0, contents(m)[0]), cut.FinishSubset()); err != nil {
		t.Fatal(err)
	}
	for _, h := range s.headers {
		if h.Flags&FlagNoCRC == 0 || h.DataCRC != 0 {
			t.Errorf("%+v", h)
		}
	}
	defer func() {
		if recover() == nil {
			t.Error("a chunk size that is not legal was taken")
		}
	}()
	NewCutter(m, ChunkBytesMin+1, 1, 2, s.emit)
}

// FuzzCutter puts parts of tensors in any order; what is refused must leave no trace, and what is put must arrive.
func FuzzCutter(f *testing.F) {
	f.Add(uint64(1), []byte{0, 0, 9, 1, 0, 9, 2, 0, 99, 3, 0, 9, 4, 0, 9})
	f.Add(uint64(2), []byte{4, 0, 99, 3, 0, 99, 2, 0, 99, 2, 1, 99, 1, 0, 99, 0, 0, 99})
	f.Add(uint64(3), []byte{5, 0, 99, 4, 0, 99, 3, 0, 200, 5, 3, 250})
	f.Fuzz(tryCutter)
}

func tryCutter(t *testing.T, seed uint64, script []byte) {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 1))
	const c = ChunkBytesMin
	m := made(t, u8("a", r.Int64N(600)), u8("b", r.Int64N(3)), u8("c", c*r.Int64N(3)+r.Int64N(1000)), u8("d", r.Int64N(3*c)), u8("e", 256*r.Int64N(3)), u8("f", r.Int64N(c)+1))
	tensors := contents(m)
	s := newSink(t, m)
	cut := NewCutter(m, c, 1, 2, s.emit)
	cut.Begin(1)
	put := make([][]bool, m.Len())
	for i := range put {
		put[i] = make([]bool, len(tensors[i]))
	}
	for ; len(script) >= 3; script = script[3:] {
		i := int(script[0]) % m.Len()
		size := len(tensors[i])
		from := int(script[1]) * Align % (size + 1)
		end := min(from+int(script[2])*200, size)
		if script[2] >= 250 {
			from = int(script[1]) * 200 % (size + 1)
			end = size
		}
		var typed *PlaceError
		err := cut.PutAt(i, int64(from), tensors[i][from:end])
		switch again := slices.Contains(put[i][from:end], true); {
		case err == nil && again:
			t.Fatalf("tensor %d, %d to %d: put twice", i, from, end)
		case err == nil:
			for k := from; k < end; k++ {
				put[i][k] = true
			}
		case !errors.As(err, &typed):
			t.Fatal(err)
		case strings.Contains(err.Error(), "put before") && !again:
			t.Fatalf("tensor %d, %d to %d: %v", i, from, end, err)
		}
	}
	var incomplete *IncompleteError
	if err := cut.Finish(); err == nil {
		s.check(tensors)
		return
	} else if !errors.As(err, &incomplete) {
		t.Fatal(err)
	}
	for i, was := range put {
		missing := int64(0)
		for _, ok := range was {
			if !ok {
				missing++
			}
		}
		for _, named := range incomplete.Missing {
			if named.Name == m.Tensor(i).Name {
				missing -= named.Bytes
			}
		}
		if missing != 0 {
			t.Fatalf("tensor %d: %d bytes more than named in %v", i, missing, incomplete)
		}
	}
	putTheRest(t, cut, tensors, put)
	if err := cut.Finish(); err != nil {
		t.Fatal(err)
	}
	s.check(tensors)
}

// putTheRest puts each run of bytes that was not put, first the one that must come next.
func putTheRest(t *testing.T, cut *Cutter, tensors [][]byte, put [][]bool) {
	t.Helper()
	for range 2 {
		for i, was := range put {
			for from := 0; from < len(was); {
				end := from
				for end < len(was) && was[end] == was[from] {
					end++
				}
				if !was[from] {
					err := cut.PutAt(i, int64(from), tensors[i][from:end])
					if err != nil && !strings.Contains(err.Error(), "must be followed") {
						t.Fatal(err)
					}
					for k := from; k < end; k++ {
						was[k] = err == nil
					}
				}
				from = end
			}
		}
	}
}

func TestCutterRandom(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for seed := range uint64(60) {
		script := make([]byte, 3*(5+r.IntN(40)))
		for i := range script {
			script[i] = byte(r.Uint32())
			if i%3 == 2 && r.IntN(3) == 0 {
				script[i] |= 0xF8
			}
		}
		tryCutter(t, seed, script)
	}
}

func TestCutterAllocatesNothingAgain(t *testing.T) {
	const c = ChunkBytesMin
	list := []Tensor{u8("large", 100*c)}
	for i := range 3000 {
		list = append(list, u8(fmt.Sprint(i), 20))
	}
	m := made(t, list...)
	tensors := contents(m)
	chunks := 0
	cut := NewCutter(m, c, 1, 2, func([]byte, [][]byte) error { chunks++; return nil })
	for name, life := range map[string]func(i int) int{"ascending": func(i int) int { return i }, "descending": func(i int) int { return len(tensors) - 1 - i }} {
		step := func() {
			cut.Begin(1)
			for k := range tensors {
				i := life(k)
				if err := cut.Put(i, tensors[i]); err != nil {
					t.Fatal(err)
				}
			}
			if err := cut.Finish(); err != nil {
				t.Fatal(err)
			}
		}
		step()
		if n := testing.AllocsPerRun(3, step); n != 0 {
			t.Errorf("%s: %v allocations per step", name, n)
		}
	}
	if chunks < 500 {
		t.Errorf("only %d chunks", chunks)
	}
}

func BenchmarkCutter(b *testing.B) {
	const bytes = 64 << 20
	for _, c := range []struct {
		name    string
		tensors int64
	}{{"one tensor", 1}, {"64 tensors", 64}, {"16384 tensors", 16384}} {
		var list []Tensor
		for i := range c.tensors {
			list = append(list, u8(fmt.Sprint(i), bytes/c.tensors-i%2))
		}
		m := made(b, list...)
		tensors := contents(m)
		for _, sums := range []bool{true, false} {
			b.Run(fmt.Sprintf("%s/crc=%v", c.name, sums), func(b *testing.B) {
				cut := NewCutter(m, ChunkBytesDefault, 1, 2, func([]byte, [][]byte) error { return nil })
				if !sums {
					cut.SkipCRC()
				}
				b.SetBytes(bytes)
				for b.Loop() {
					cut.Begin(1)
					for i := range tensors {
						if err := cut.Put(i, tensors[i]); err != nil {
							b.Fatal(err)
						}
					}
					if err := cut.Finish(); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
