package proof

import (
	"bytes"
	"testing"

	"github.com/ingestd/ingestd/spec"
)

func mustSpec(t *testing.T, text string) *spec.Spec {
	t.Helper()
	s, err := spec.ParseText(text)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestEveryDamagedByteIsFound(t *testing.T) {
	for _, text := range []string{"a:U8", "a:U8[7]", "a:F32[4]", "a:BOOL[13]"} {
		leaf := mustSpec(t, text).Leaf(0)
		const rows = 3
		column := make([]byte, rows*leaf.Bytes())
		streams, numbers := []uint64{7, 7, 9}, []uint64{0, 1, 0}
		for i := range rows {
			Leaf(column[int64(i)*leaf.Bytes():int64(i+1)*leaf.Bytes()], leaf.DType, streams[i], numbers[i], 0)
		}
		if row, at := CheckColumn(column, leaf, 0, streams, numbers); row != -1 {
			t.Fatalf("%s: whole column is said to be wrong at row %d byte %d", text, row, at)
		}
		for i := range column {
			column[i] ^= 1
			wantRow, wantAt := i/int(leaf.Bytes()), i%int(leaf.Bytes())
			if row, at := CheckColumn(column, leaf, 0, streams, numbers); row != wantRow || at != wantAt {
				t.Fatalf("%s: byte %d damaged, found row %d byte %d", text, i, row, at)
			}
			column[i] ^= 1
		}
	}
}

func TestContentDependsOnStreamNumberAndLeaf(t *testing.T) {
	seen := map[string]string{}
	for stream := range uint64(8) {
		for number := range uint64(8) {
			for leaf := range 4 {
				b := make([]byte, 16)
				Leaf(b, spec.U8, stream, number, leaf)
				seen[string(b)] = ""
			}
		}
	}
	if len(seen) != 8*8*4 {
		t.Fatalf("%d different contents of %d", len(seen), 8*8*4)
	}
}

func TestSampleIsItsLeaves(t *testing.T) {
	s := mustSpec(t, "a:F32[3],b:BOOL[5],c:I64")
	whole := make([]byte, s.SampleBytes())
	Sample(whole, s, 3, 4)
	var parts []byte
	for i := range s.NumLeaves() {
		leaf := s.Leaf(i)
		b := make([]byte, leaf.Bytes())
		Leaf(b, leaf.DType, 3, 4, i)
		if leaf.DType == spec.BOOL && len(bytes.Trim(b, "\x00\x01")) > 0 {
			t.Errorf("BOOL leaf holds % x", b)
		}
		parts = append(parts, b...)
	}
	if !bytes.Equal(whole, parts) {
		t.Fatal("a sample is not its leaves one after another")
	}
	if n := testing.AllocsPerRun(100, func() { Sample(whole, s, 3, 4) }); n != 0 {
		t.Fatalf("%v allocations per sample", n)
	}
}
