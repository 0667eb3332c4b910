package client

import (
	"fmt"
	"reflect"
	"slices"
	"unsafe"

	"github.com/ingestd/ingestd/tensor"
)

// WeightsView returns a tensor of a generation as a slice of Go numbers, row-major. It is shared memory and read-only, as Weights.At is. T must be the
// tensor's dtype, and the tensor have no encoding.
func WeightsView[T Element](w *Weights, name string) ([]T, error) {
	i, err := w.index(name)
	if err != nil {
		return nil, err
	}
	t := w.held.manifest.Tensor(i)
	if goType := reflect.TypeFor[T](); t.Encoding != (tensor.Encoding{}) || !slices.Contains(elements[goType.Kind()], t.DType) {
		return nil, fmt.Errorf("client: tensor %q is %s and cannot be viewed as %v", name, t.Type(), goType)
	}
	b, size := w.At(i), int(unsafe.Sizeof(*new(T)))
	if len(b) == 0 {
		return nil, nil
	}
	first := unsafe.SliceData(b)
	if uintptr(unsafe.Pointer(first))%uintptr(size) != 0 || len(b)%size != 0 {
		return nil, fmt.Errorf("client: tensor %q (%d bytes at %p) is not one of whole %d-byte elements", name, len(b), first, size)
	}
	// Safety: b is len(b)/size whole elements on a multiple of their size, both checked above. T has no pointers and no bit pattern that is not a value of it.
	// The memory stays mapped until the generation's Release, up to which the caller may use the slice; nobody writes it meanwhile.
	return unsafe.Slice((*T)(unsafe.Pointer(first)), len(b)/size), nil
}
