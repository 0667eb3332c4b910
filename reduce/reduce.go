package reduce

import (
	"encoding/binary"
	"fmt"
	"math"
)

// Kind is how the elements of a source are stored. All are little-endian.
type Kind uint8

// The kinds. The 8-bit ones are the formats of the Open Compute Project and have a scale, by which each decoded element is multiplied.
const (
	F32 Kind = iota + 1
	F16
	BF16
	F8E4M3
	F8E5M2
)

var kinds = [...]struct {
	name  string
	bytes int
}{F32: {"F32", 4}, F16: {"F16", 2}, BF16: {"BF16", 2}, F8E4M3: {"F8_E4M3", 1}, F8E5M2: {"F8_E5M2", 1}}

// Bytes is the size of one element.
func (k Kind) Bytes() int { return kinds[k].bytes }

func (k Kind) String() string {
	if int(k) < len(kinds) && k > 0 {
		return kinds[k].name
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// SumMax is the most sources that one call of Sum takes.
const SumMax = 16

// Set stores the elements of src, decoded. scale is used by the 8-bit kinds only.
func Set(dst []float32, src []byte, kind Kind, scale float32) {
	check(dst, src, kind)
	n := setBlocks(dst, src, kind, scale)
	setGo(dst[n:], src[n*kind.Bytes():], kind, scale)
}

// Add adds the elements of src, decoded, to those of dst. scale is used by the 8-bit kinds only.
func Add(dst []float32, src []byte, kind Kind, scale float32) {
	check(dst, src, kind)
	n := addBlocks(dst, src, kind, scale)
	addGo(dst[n:], src[n*kind.Bytes():], kind, scale)
}

// Sum stores ((srcs[0] + srcs[1]) + srcs[2]) + ... of at most SumMax sources of float32 in one pass over memory. With none it stores zeros.
func Sum(dst []float32, srcs ...[]byte) {
	if len(srcs) == 0 {
		clear(dst)
		return
	}
	n := sumBlocks(dst, srcs, false)
	setGo(dst[n:], srcs[0][4*n:], F32, 1)
	for _, src := range srcs[1:] {
		addGo(dst[n:], src[4*n:], F32, 1)
	}
}

// AddAll is Sum that begins with dst: it stores ((dst + srcs[0]) + srcs[1]) + ...
func AddAll(dst []float32, srcs ...[]byte) {
	n := sumBlocks(dst, srcs, true)
	for _, src := range srcs {
		addGo(dst[n:], src[4*n:], F32, 1)
	}
}

// Divide divides each element by by, rounded to nearest even.
func Divide(dst []float32, by float32) {
	n := divideBlocks(dst, by)
	divideGo(dst[n:], by)
}

func check(dst []float32, src []byte, kind Kind) {
	if kind < F32 || kind > F8E5M2 || len(src) != len(dst)*kind.Bytes() {
		panic(fmt.Sprintf("reduce: %d bytes are not %d elements of %v", len(src), len(dst), kind))
	}
}

func checkAll(dst []float32, srcs [][]byte) {
	if len(srcs) > SumMax {
		panic(fmt.Sprintf("reduce: %d sources at once, the most is %d", len(srcs), SumMax))
	}
	for _, src := range srcs {
		check(dst, src, F32)
	}
}

// Unused is the index of an entry of a sparse array that is not used.
const Unused = math.MaxUint32

// SparseBytes is the size of an entry: an index (u32) and a value (F32).
const SparseBytes = 8

// IndexError is an entry whose index is beyond the array.
type IndexError struct {
	Entry    int // which one
	Index    uint32
	Elements int // of the array
}

func (e *IndexError) Error() string {
	return fmt.Sprintf("entry %d has index %d, but there are %d elements", e.Entry, e.Index, e.Elements)
}

// CheckSparse says whether AddSparse would take entries for an array of so many elements. Bytes after the last whole entry are not looked at.
func CheckSparse(entries []byte, elements int) error {
	for i := 0; i+SparseBytes <= len(entries); i += SparseBytes {
		if at := binary.LittleEndian.Uint32(entries[i:]); uint64(at) >= uint64(elements) && at != Unused {
			return &IndexError{i / SparseBytes, at, elements}
		}
	}
	return nil
}

// AddSparse adds the value of each entry to the element of its index, in order. At an error the entries before the wrong one were added.
func AddSparse(dst []float32, entries []byte) error {
	for i := 0; i+SparseBytes <= len(entries); i += SparseBytes {
		at := binary.LittleEndian.Uint32(entries[i:])
		if uint64(at) >= uint64(len(dst)) {
			if at == Unused {
				continue
			}
			return &IndexError{i / SparseBytes, at, len(dst)}
		}
		dst[at] = add(dst[at], math.Float32frombits(binary.LittleEndian.Uint32(entries[i+4:])))
	}
	return nil
}
