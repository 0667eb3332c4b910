package proof

import (
	"encoding/binary"

	"github.com/ingestd/ingestd/spec"
)

// mix is the finaliser of splitmix64 (Steele, Lea, Flood 2014): every bit of the input moves half of the output's.
func mix(z uint64) uint64 {
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

const gamma = 0x9e3779b97f4a7c15

func seed(stream, number uint64, leaf int) uint64 {
	return mix(mix(mix(stream+gamma)+number+gamma) + uint64(leaf) + gamma)
}

// Leaf fills dst with the bytes of one leaf of one sample. A BOOL leaf holds 0 and 1 only.
func Leaf(dst []byte, dtype spec.DType, stream, number uint64, leaf int) {
	z := seed(stream, number, leaf)
	mask := ^uint64(0)
	if dtype == spec.BOOL {
		mask = 0x0101010101010101
	}
	for len(dst) >= 8 {
		z += gamma
		binary.LittleEndian.PutUint64(dst, mix(z)&mask)
		dst = dst[8:]
	}
	if len(dst) > 0 {
		var last [8]byte
		binary.LittleEndian.PutUint64(last[:], mix(z+gamma)&mask)
		copy(dst, last[:])
	}
}

// Sample fills dst, of s.SampleBytes bytes, with a whole sample: its leaves one after another.
func Sample(dst []byte, s *spec.Spec, stream, number uint64) {
	for i := range s.NumLeaves() {
		leaf := s.Leaf(i)
		at := s.Offset(i)
		Leaf(dst[at:at+leaf.Bytes()], leaf.DType, stream, number, i)
	}
}

// CheckLeaf tells at which byte got differs from what Leaf would have made, or -1.
func CheckLeaf(got []byte, dtype spec.DType, stream, number uint64, leaf int) int {
	z := seed(stream, number, leaf)
	mask := ^uint64(0)
	if dtype == spec.BOOL {
		mask = 0x0101010101010101
	}
	var want [8]byte
	for at := 0; at < len(got); at += 8 {
		z += gamma
		word := mix(z) & mask
		if len(got)-at >= 8 && binary.LittleEndian.Uint64(got[at:]) == word {
			continue
		}
		binary.LittleEndian.PutUint64(want[:], word)
		for k := range min(8, len(got)-at) {
			if got[at+k] != want[k] {
				return at + k
			}
		}
	}
	return -1
}

// CheckColumn checks the rows of one leaf's column against the stream and number that stand beside each; it returns the first row and byte that
// differ, or -1, -1.
func CheckColumn(column []byte, leaf spec.Leaf, index int, streams, numbers []uint64) (row, at int) {
	size := int(leaf.Bytes())
	if len(column) != size*len(streams) || len(streams) != len(numbers) {
		panic("proof: a column, its streams and its numbers have different numbers of rows")
	}
	for row := range streams {
		if at := CheckLeaf(column[row*size:(row+1)*size], leaf.DType, streams[row], numbers[row], index); at >= 0 {
			return row, at
		}
	}
	return -1, -1
}
