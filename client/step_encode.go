package client

import (
	"encoding/binary"
	"math"

	"github.com/ingestd/ingestd/tensor"
)

// encode returns the bytes of an F32 tensor as they are sent: the memory of values itself, or memory of the producer that is used again in the next transaction.
func (p *StepProducer) encode(i int, t *tensor.Tensor, values []float32) ([]byte, error) {
	if t.Encoding.Kind == tensor.Raw && littleEndian {
		return bytesOfFloats(values), nil
	}
	if p.encoded[i] == nil {
		p.encoded[i] = make([]byte, p.manifest.EncodedBytes(i))
	}
	to := p.encoded[i]
	if t.Encoding.Kind == tensor.Raw {
		for k, x := range values {
			binary.LittleEndian.PutUint32(to[4*k:], math.Float32bits(x))
		}
		return to, nil
	}
	panic("not yet")
}
