package tensor

import (
	"crypto/sha256"
	"encoding/binary"

	"github.com/ingestd/ingestd/spec"
)

// canonical is the encoding that is hashed (docs/tensors.md, "Manifest").
func (m *Manifest) canonical() []byte {
	b := []byte("ingestd-manifest-1\n")
	b = binary.LittleEndian.AppendUint32(b, uint32(len(m.tensors)))
	for _, t := range m.tensors {
		b = binary.LittleEndian.AppendUint16(b, uint16(len(t.Name)))
		b = append(b, t.Name...)
		b = appendShort(b, t.DType.String())
		b = append(b, byte(len(t.Shape)))
		for _, d := range t.Shape {
			b = binary.LittleEndian.AppendUint64(b, uint64(d))
		}
		b = appendShort(b, t.Encoding.String())
	}
	return b
}

func appendShort(dst []byte, s string) []byte { return append(append(dst, byte(len(s))), s...) }

func (m *Manifest) sum() spec.Fingerprint { return sha256.Sum256(m.canonical()) }

// ID is the first 8 bytes of the fingerprint, as chunks carry it.
func (m *Manifest) ID() uint64 { return binary.LittleEndian.Uint64(m.fingerprint[:]) }

// ProducerID is what chunks carry of a producer's name: the first 8 bytes of its SHA-256.
func ProducerID(name string) uint64 {
	sum := sha256.Sum256([]byte(name))
	return binary.LittleEndian.Uint64(sum[:])
}
