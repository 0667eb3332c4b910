//go:build linux

package client

import (
	"fmt"
	"reflect"
	"slices"
	"unsafe"
)

// SlotView returns a leaf of reserved slots as a slice of Go numbers, row after row: N times the leaf's elements. It is the ring's own memory, as
// Slots.Column is. T must be the leaf's dtype.
func SlotView[T Element](s *Slots, leaf int) ([]T, error) {
	spec := s.filler.spec
	if n := spec.NumLeaves(); leaf < 0 || leaf >= n {
		return nil, fmt.Errorf("client: there is no leaf %d: samples have %d", leaf, n)
	}
	l := spec.Leaf(leaf)
	if t := reflect.TypeFor[T](); !slices.Contains(elements[t.Kind()], l.DType) {
		return nil, fmt.Errorf("client: leaf %q is %v and cannot be viewed as %v", l.Name, l.DType, t)
	}
	column := s.Column(leaf)
	size := int(unsafe.Sizeof(*new(T)))
	first := unsafe.SliceData(column)
	if uintptr(unsafe.Pointer(first))%uintptr(size) != 0 || len(column)%size != 0 {
		return nil, fmt.Errorf("client: the column of leaf %q (%d bytes at %p) is not one of whole %d-byte elements", l.Name, len(column), first, size)
	}
	// Safety: column is len(column)/size whole elements on a multiple of their size, both checked above. T has no pointers and no bit pattern that is not
	// a value of it. The memory stays mapped until the slots' Commit or Abandon, up to which the caller may use the slice; nobody else writes it meanwhile.
	return unsafe.Slice((*T)(unsafe.Pointer(first)), len(column)/size), nil
}

// SlotViewNamed is SlotView by the leaf's name.
func SlotViewNamed[T Element](s *Slots, name string) ([]T, error) {
	leaf, err := s.leaf(name)
	if err != nil {
		return nil, err
	}
	return SlotView[T](s, leaf)
}
