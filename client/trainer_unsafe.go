//go:build linux

package client

import (
	"fmt"
	"reflect"
	"slices"
	"unsafe"
)

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
