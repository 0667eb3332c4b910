package killtest

import (
	"encoding/binary"
	"fmt"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
)

// WeightsManifest is of the weights that peers publish: more than one block of copying, an empty tensor, and small ones.
func WeightsManifest() (*tensor.Manifest, error) {
	tensors := []tensor.Tensor{{Name: "large", DType: spec.U8, Shape: []int64{700_001}}, {Name: "empty", DType: spec.F32, Shape: []int64{0, 4}}}
	for i := range 20 {
		tensors = append(tensors, tensor.Tensor{Name: fmt.Sprintf("layers.%d.b", i), DType: spec.F64, Shape: []int64{int64(i)}})
	}
	return tensor.NewManifest(tensors, nil)
}

// WeightsContent fills b with what a tensor of a generation has.
func WeightsContent(b []byte, generation uint64, tensor int) {
	seed := generation*0x9e3779b97f4a7c15 ^ uint64(tensor)<<40
	var w [8]byte
	for at := 0; at < len(b); at += 8 {
		x := (seed + uint64(at)) * 0xbf58476d1ce4e5b9
		binary.LittleEndian.PutUint64(w[:], x^x>>31)
		copy(b[at:], w[:])
	}
}
