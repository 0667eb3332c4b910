//go:build linux

package client

import (
	"fmt"
	"reflect"
	"slices"
	"unsafe"

	"github.com/ingestd/ingestd/spec"
)

// Element is what View can show a column as. Floats of 16 and 8 bits, which Go does not have, and BOOL show as unsigned bits.
type Element interface {
	uint8 | int8 | uint16 | int16 | uint32 | int32 | float32 | uint64 | int64 | float64
}

var elements = map[reflect.Kind][]spec.DType{
	reflect.Uint8: {spec.U8, spec.BOOL, spec.F8_E4M3, spec.F8_E5M2}, reflect.Int8: {spec.I8},
	reflect.Uint16: {spec.U16, spec.F16, spec.BF16}, reflect.Int16: {spec.I16},
	reflect.Uint32: {spec.U32}, reflect.Int32: {spec.I32}, reflect.Float32: {spec.F32},
	reflect.Uint64: {spec.U64}, reflect.Int64: {spec.I64}, reflect.Float64: {spec.F64},
}

// View returns a leaf of a batch as a slice of Go numbers, row after row: Count times the leaf's elements. It is the ring's own
// memory, as Batch.Column is. T must be the leaf's dtype.
func View[T Element](b *Batch, leaf int) ([]T, error) {
	if n := b.Spec().NumLeaves(); leaf < 0 || leaf >= n {
		return nil, fmt.Errorf("client: there is no leaf %d: samples have %d", leaf, n)
	}
	l := b.Spec().Leaf(leaf)
	if t := reflect.TypeFor[T](); !slices.Contains(elements[t.Kind()], l.DType) {
		return nil, fmt.Errorf("client: leaf %q is %v and cannot be viewed as %v", l.Name, l.DType, t)
	}
	column := b.Column(leaf)
	size := int(unsafe.Sizeof(*new(T)))
	first := unsafe.SliceData(column)
	if uintptr(unsafe.Pointer(first))%uintptr(size) != 0 || len(column)%size != 0 {
		return nil, fmt.Errorf("client: the column of leaf %q (%d bytes at %p) is not one of whole %d-byte elements", l.Name, len(column), first, size)
	}
	// Safety: column is len(column)/size whole elements on a multiple of their size, both checked above. T has no pointers and no
	// bit pattern that is not a value of it. The memory stays mapped until the batch's Release, up to which the caller may use the
	// slice; nobody writes it meanwhile.
	return unsafe.Slice((*T)(unsafe.Pointer(first)), len(column)/size), nil
}

// ViewNamed is View by the leaf's name.
func ViewNamed[T Element](b *Batch, name string) ([]T, error) {
	leaf, err := b.leaf(name)
	if err != nil {
		return nil, err
	}
	return View[T](b, leaf)
}
