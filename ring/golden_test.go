package ring

import (
	"bytes"
	"encoding/binary"
	"flag"
	"math"
	"os"
	"path/filepath"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write testdata/golden.seg anew")

// goldenSpec has the fingerprint that package spec gives it; both are fixed here so that this package needs no other.
const goldenSpec = `{"leaves":[{"name":"image","dtype":"F32","shape":[2,2]},{"name":"label","dtype":"I16","shape":[]}]}`

// golden makes the segment that the readers in other languages are tested with: batch 0 is leased, opening 1 open with one slot committed, one place lent with one row
// committed; sessions "worker-1" (stream 1, 3 held) and "worker-2" (stream 3), groups "train" and "eval".
func golden(t *testing.T) *Ring {
	l := Layout{BatchSize: 4, Batches: 3, Sessions: 3, Columns: []int64{16, 2}, Spec: []byte(goldenSpec), Table: "golden", Created: time.Unix(1700000000, 5)}
	copy(l.Fingerprint[:], "this is not a real fingerprint..")
	n, err := l.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	r, err := Format(AlignedBytes(n), l)
	if err != nil {
		t.Fatal(err)
	}
	one, err := r.OpenSession("worker-1", time.Unix(1700000000, 0), 0)
	if err != nil {
		t.Fatal(err)
	}
	two := r.NextStream()
	three, err := r.OpenSession("worker-2", time.Unix(1700000000, 7), 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, group := range []string{"train", "eval"} {
		if _, err := r.AddGroup(group, time.Unix(1700000000, 9)); err != nil {
			t.Fatal(err)
		}
	}
	put := func(stream, first uint64, n int) {
		run, ok := r.TryReserve(n)
		if !ok || int(run.N) != n {
			t.Fatalf("reserved %+v", run)
		}
		for i := range uint64(n) {
			for k := range uint64(4) {
				// Floats k + 10*number, exactly representable.
				bits := math.Float32bits(float32(k + 10*(first+i)))
				binary.LittleEndian.PutUint32(r.RunColumn(run, 0)[i*16+k*4:], bits)
			}
			binary.LittleEndian.PutUint16(r.RunColumn(run, 1)[i*2:], uint16(stream*100+first+i))
		}
		r.Commit(run, stream, first, 1700000001000000000+first, Mark{})
	}
	put(one.Stream(), 0, 2)
	put(two, 0, 2)
	put(one.Stream(), 2, 1)
	one.Mark(3).store()
	p, ok := r.TryLend(three.Stream())
	if !ok {
		t.Fatal("no place to lend")
	}
	r.CommitPlace(p, 0, 1, three.Stream(), 0, 1700000001000000000, three.Mark(1))
	if _, ok := r.TryLease(); !ok {
		t.Fatal("nothing to lease")
	}
	return r
}

func TestGoldenBytes(t *testing.T) {
	path := filepath.Join("testdata", "golden.seg")
	got := golden(t).mem
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		for i := range min(len(got), len(want)) {
			if got[i] != want[i] {
				t.Fatalf("byte %d is %#x, golden %#x: the format changed; readers in other languages break", i, got[i], want[i])
			}
		}
		t.Fatalf("%d bytes, golden %d", len(got), len(want))
	}
}

// TestDamagedHeaders flips each bit of the fixed header and of the column table and spec: none may pass unseen.
func TestDamagedHeaders(t *testing.T) {
	whole := golden(t).mem
	mem := AlignedBytes(int64(len(whole)))
	for off := range int64(headerBytes + 2*columnEntry + len(goldenSpec)) {
		if off >= crcTo && off < headerBytes {
			continue // padding and cursors
		}
		for bit := range 8 {
			copy(mem, whole)
			mem[off] ^= 1 << bit
			if _, err := OpenView(mem); err == nil {
				t.Fatalf("bit %d of byte %d flipped, and nobody noticed", bit, off)
			}
		}
	}
	for _, n := range []int{0, 1, headerBytes - 1, headerBytes, headerBytes + 10, len(whole) - 1} {
		if _, err := OpenView(whole[:n]); err == nil {
			t.Fatalf("cut to %d bytes, and nobody noticed", n)
		}
	}
}
