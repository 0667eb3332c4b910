package killtest

import (
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
)

// StepsManifest is of the gradients that peers send: several chunks, of which some have many tensors.
func StepsManifest() (*tensor.Manifest, error) {
	tensors := []tensor.Tensor{{Name: "large", DType: spec.F32, Shape: []int64{90_001}}, {Name: "empty", DType: spec.F32, Shape: []int64{0}}}
	for i := range 20 {
		tensors = append(tensors, tensor.Tensor{Name: "b" + string(rune('a'+i)), DType: spec.F32, Shape: []int64{int64(3 * i)}})
	}
	return tensor.NewManifest(tensors, nil)
}

// StepsContent fills values with what a producer sends of a tensor in a step: numbers whose sum depends on the order of additions.
func StepsContent(values []float32, producer string, step uint64, tensor int) {
	seed := step*0x9e3779b97f4a7c15 ^ uint64(tensor)<<40
	for _, b := range []byte(producer) {
		seed = (seed ^ uint64(b)) * 0x100000001b3
	}
	for i := range values {
		x := (seed + uint64(i)) * 0xbf58476d1ce4e5b9
		values[i] = float32(int32(x^x>>31)) / (1 << 20)
	}
}
