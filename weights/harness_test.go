package weights

import (
	"encoding/binary"
	"errors"
	"fmt"
	"testing"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		check(t, err)
		return v
	}
}

// manifestOf makes a manifest of U8 vectors.
func manifestOf(t testing.TB, sizes ...int64) *tensor.Manifest {
	t.Helper()
	tensors := make([]tensor.Tensor, len(sizes))
	for i, n := range sizes {
		tensors[i] = tensor.Tensor{Name: fmt.Sprintf("layers.%d.w", i), DType: spec.U8, Shape: []int64{n}}
	}
	return must(tensor.NewManifest(tensors, nil))(t)
}

// as returns the error as one of type T, or fails.
func as[T error](t testing.TB, err error) T {
	t.Helper()
	var want T
	if !errors.As(err, &want) {
		t.Fatalf("got %v, want a %T", err, want)
	}
	return want
}

// contentOf fills b with what a tensor of a generation has at these offsets: every 8 bytes say where they belong.
func contentOf(b []byte, generation uint64, tensor int) {
	seed := generation*0x9e3779b97f4a7c15 ^ uint64(tensor)<<40
	var w [8]byte
	for at := 0; at < len(b); at += 8 {
		x := (seed + uint64(at)) * 0xbf58476d1ce4e5b9
		binary.LittleEndian.PutUint64(w[:], x^x>>31)
		copy(b[at:], w[:])
	}
}

// wrongContent returns the first tensor of a generation that is not what contentOf writes, or -1.
func wrongContent(m *tensor.Manifest, data []byte, generation uint64) int {
	var want []byte
	for i := range m.Len() {
		got := data[m.Offset(i):][:m.EncodedBytes(i)]
		want = append(want[:0], make([]byte, len(got))...)
		contentOf(want, generation, i)
		if string(got) != string(want) {
			return i
		}
	}
	return -1
}

// write puts a generation's content into a place.
func write(pl *Place) {
	m := pl.view.manifest
	for i := range m.Len() {
		b := pl.Data()[m.Offset(i):][:m.EncodedBytes(i)]
		contentOf(b, pl.Generation(), i)
		pl.SetSum(i, tensor.CRC(b))
	}
}

// publish publishes one generation.
func publish(t testing.TB, p *Publishing) uint64 {
	t.Helper()
	pl := must(p.TryBegin(0))(t)
	write(pl)
	must(pl.Commit())(t)
	return pl.Generation()
}

func heapStore(t testing.TB, generations int) *Store {
	t.Helper()
	return must(NewStore(StoreConfig{Table: "w", Generations: generations, Heap: true}))(t)
}
