package client

import (
	"github.com/ingestd/ingestd/tensor"
)

// stepEncoders hold the encoded bytes of tensors until the transaction is over, and what top-k encodings have not sent.
type stepEncoders struct {
	bytes    [][]byte           // by tensor; nil: not needed so far
	feedback []*tensor.Feedback // by tensor; nil: none
	used     []bool             // by tensor: bytes are those of this transaction
	encoded  []int              // tensors whose feedback has encoded something in this transaction
}

func newStepEncoders(m *tensor.Manifest) stepEncoders {
	return stepEncoders{bytes: make([][]byte, m.Len()), feedback: make([]*tensor.Feedback, m.Len()), used: make([]bool, m.Len())}
}

// encode returns the bytes of an F32 tensor as they are sent: the memory of values itself, or memory that is used again in the next transaction.
func (e *stepEncoders) encode(i int, t *tensor.Tensor, encodedBytes int64, values []float32) ([]byte, error) {
	if t.Encoding.Kind == tensor.Raw && littleEndian {
		return bytesOfFloats(values), nil
	}
	if e.used[i] {
		return nil, &tensor.PlaceError{Tensor: t.Name, Reason: "it was put before"}
	}
	e.used[i] = true
	if e.bytes[i] == nil {
		e.bytes[i] = make([]byte, encodedBytes)
	}
	if t.Encoding.Kind != tensor.TopK {
		return e.bytes[i], tensor.Encode(e.bytes[i], t, values)
	}
	if e.feedback[i] == nil {
		f, err := tensor.NewFeedback(t)
		if err != nil {
			return nil, err
		}
		e.feedback[i] = f
	}
	e.encoded = append(e.encoded, i)
	return e.bytes[i], e.feedback[i].Encode(e.bytes[i], values)
}

// end settles what top-k encodings have not sent: the transaction was committed, or aborted.
func (e *stepEncoders) end(committed bool) {
	for _, i := range e.encoded {
		if !committed {
			e.feedback[i].Rollback()
			continue
		}
		_ = e.feedback[i].Commit() // of what was put again it knows
	}
	e.encoded = e.encoded[:0]
	clear(e.used)
}
