package fuzz

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math"
	"testing"
	"time"

	"github.com/ingestd/ingestd/ring"
)

// segment makes a small segment in the middle of its life: one batch leased, one published, one being filled.
func segment(tb testing.TB) []byte {
	l := ring.Layout{
		BatchSize: 3, Batches: 4, Columns: []int64{8, 5}, Spec: []byte(`{"leaves":[]}`), Fingerprint: [32]byte{1}, Table: "fuzz", Created: time.Unix(1, 0),
	}
	size, err := l.Bytes()
	if err != nil {
		tb.Fatal(err)
	}
	mem := ring.AlignedBytes(size)
	r, err := ring.Format(mem, l)
	if err != nil {
		tb.Fatal(err)
	}
	for range 3 {
		run, ok := r.TryReserve(3)
		if !ok {
			tb.Fatal("a fresh ring is full")
		}
		if run.Position < 6 {
			r.Commit(run, 1, run.Position, 1, ring.Mark{})
		}
	}
	if _, ok := r.TryLease(); !ok {
		tb.Fatal("nothing to lease")
	}
	return mem
}

// aligned copies data to where a segment may lie.
func aligned(data []byte) []byte {
	mem := ring.AlignedBytes(int64(len(data)))
	copy(mem, data)
	return mem
}

// checkView opens mem, and walks through everything that a view offers if that works, also to what a peer says: nothing may panic or leave the bounds.
func checkView(t *testing.T, mem []byte, peer told) {
	v, err := ring.OpenView(mem)
	if err != nil {
		var format *ring.FormatError
		if !errors.As(err, &format) || format.Reason == "" {
			t.Fatalf("error %v (%T) is no *ring.FormatError with a reason", err, err)
		}
		return
	}
	l := v.Layout()
	if n, err := l.Bytes(); err != nil || n != v.SegmentBytes() || n > int64(len(mem)) {
		t.Fatalf("a view of %d bytes was opened on %d bytes; its layout gives %d, %v", v.SegmentBytes(), len(mem), n, err)
	}
	checkFixed(t, mem, l)
	_, _, _, _ = v.Reserved(), v.Published(), v.Leased(), v.Closed()
	for i := range v.Batches() {
		s := v.BatchState(i)
		_ = s.State.String()
		for _, count := range []int{s.Count, 0, -1, 1, l.BatchSize, l.BatchSize + 1} {
			checkTold(t, v, told{s.Number, uint32(i), count})
		}
	}
	checkTold(t, v, told{0, uint32(v.Batches()), 1})
	checkTold(t, v, peer)
}

// checkFixed: what was accepted is just what Format writes, since readers in other languages go by the stored offsets.
func checkFixed(t *testing.T, mem []byte, l ring.Layout) {
	size, _ := l.Bytes()
	if size > 1<<24 {
		return
	}
	again := ring.AlignedBytes(size)
	if _, err := ring.Format(again, l); err != nil {
		t.Fatalf("a segment was accepted whose layout is none: %v", err)
	}
	specEnd := 512 + 16*len(l.Columns) + len(l.Spec)
	for _, part := range [][2]int{{0, 200}, {512, specEnd}} {
		if got, want := mem[part[0]:part[1]], again[part[0]:part[1]]; string(got) != string(want) {
			t.Fatalf("accepted a header that Format would not write:\n% x\n% x", got, want)
		}
	}
}

// told is what a peer says of a batch.
type told struct {
	number uint64
	index  uint32
	count  int
}

// checkTold asks for a batch. It is refused, or just what the segment says of that place, and can be read as far as it goes.
func checkTold(t *testing.T, v *ring.View, d told) {
	b, err := v.Batch(d.number, d.index, d.count)
	if err != nil {
		var format *ring.FormatError
		if !errors.As(err, &format) || format.Reason == "" {
			t.Fatalf("error %v (%T) is no *ring.FormatError with a reason", err, err)
		}
		return
	}
	l := v.Layout()
	if int(d.index) >= v.Batches() || b.Number != d.number || b.Index != d.index || b.Count != d.count || d.count < 1 || d.count > l.BatchSize {
		t.Fatalf("told of %+v, got %+v", d, b)
	}
	if s := v.BatchState(int(d.index)); s.State != ring.Leased || s.Number != d.number || s.Count != d.count {
		t.Fatalf("told of %+v, got a batch; the segment says %+v", d, s)
	}
	for c := range b.Columns() {
		column := b.Column(c)
		if int64(len(column)) != int64(b.Count)*l.Columns[c] || cap(column) != len(column) {
			t.Fatalf("column %d of %+v has %d bytes, room for %d", c, d, len(column), cap(column))
		}
		for _, x := range column {
			sink += uint64(x)
		}
	}
	for _, words := range [][]uint64{b.Streams(), b.Numbers(), b.Arrivals()} {
		if len(words) != b.Count || cap(words) != b.Count {
			t.Fatalf("%+v has %d words in a column, room for %d", d, len(words), cap(words))
		}
		for _, x := range words {
			sink += x
		}
	}
}

var sink uint64

// FuzzSegment takes anything for a segment.
func FuzzSegment(f *testing.F) {
	whole := segment(f)
	f.Add(whole, uint64(0), uint32(0), 3)
	f.Add(whole[:512], uint64(0), uint32(0), 3)
	f.Add(whole[:100], uint64(0), uint32(0), 3)
	f.Add([]byte("INGDSEG1"), uint64(0), uint32(0), 0)
	f.Add([]byte{}, uint64(0), uint32(0), 0)
	f.Fuzz(func(t *testing.T, data []byte, number uint64, index uint32, count int) {
		checkView(t, aligned(data), told{number, index, count})
	})
}

// FuzzSegmentDamaged overwrites words of a sound segment and makes the checksum right again, so that the checks behind it are reached.
func FuzzSegmentDamaged(f *testing.F) {
	for _, d := range []told{{0, 0, 3}, {1 << 61, 0, 3}, {1, 1, 3}, {0, 1 << 31, 3}, {0, 0, -1}, {0, 0, math.MaxInt}} {
		f.Add([]byte{}, d.number, d.index, d.count)
	}
	patch := func(at uint16, v uint64) []byte {
		return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint16(nil, at), v)
	}
	for _, at := range []uint16{16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 512, 520, 256, 320, 576, 584, 592} {
		for _, v := range []uint64{0, 1, 1 << 20, 1 << 63, ^uint64(0)} {
			f.Add(patch(at, v), v, uint32(v), int(v))
		}
	}
	sound := segment(f)
	f.Fuzz(func(t *testing.T, patches []byte, number uint64, index uint32, count int) {
		mem := aligned(sound)
		for ; len(patches) >= 10; patches = patches[10:] {
			at := int(binary.LittleEndian.Uint16(patches)) % (len(mem) - 8)
			copy(mem[at:at+8], patches[2:10])
		}
		fixChecksum(mem)
		checkView(t, mem, told{number, index, count})
	})
}

// fixChecksum is written from docs/segment-format.md.
func fixChecksum(mem []byte) {
	columns, specBytes := binary.LittleEndian.Uint64(mem[40:]), binary.LittleEndian.Uint64(mem[72:])
	end := uint64(len(mem))
	if columns < end/16 && specBytes < end {
		end = min(end, 512+16*columns+specBytes)
	}
	table := crc32.MakeTable(crc32.Castagnoli)
	sum := crc32.Update(crc32.Checksum(mem[16:200], table), table, mem[512:end])
	binary.LittleEndian.PutUint32(mem[12:], sum)
}
