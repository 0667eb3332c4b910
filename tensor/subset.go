package tensor

import "encoding/binary"

// AppendEnd appends the data of a chunk with FlagEnd: the tensors of which the transaction consists, ascending.
func AppendEnd(dst []byte, subset []uint32) []byte {
	for _, i := range subset {
		dst = binary.LittleEndian.AppendUint32(dst, i)
	}
	return dst
}

// ParseEnd reads the data of a chunk with FlagEnd whose header has passed Check. The subset is never nil. Errors are *ChunkError.
func ParseEnd(m *Manifest, data []byte) ([]uint32, error) {
	if len(data)%4 != 0 || len(data)/4 > m.Len() {
		return nil, chunkErrorf("the end of a step lists tensors in %d bytes; it must be 4 per tensor, and there are %d tensors", len(data), m.Len())
	}
	subset := make([]uint32, len(data)/4)
	for k := range subset {
		i := binary.LittleEndian.Uint32(data[4*k:])
		switch {
		case int64(i) >= int64(m.Len()):
			return nil, chunkErrorf("the end of a step lists tensor %d; the manifest has %d", i, m.Len())
		case k > 0 && i <= subset[k-1]:
			return nil, chunkErrorf("the end of a step lists tensor %d after %d; they must ascend", i, subset[k-1])
		}
		subset[k] = i
	}
	return subset, nil
}
