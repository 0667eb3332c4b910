package killtest

import (
	"encoding/binary"
	"fmt"

	"github.com/ingestd/ingestd/internal/proof"
	"github.com/ingestd/ingestd/spec"
)

// The first two leaves of every table here.
const (
	leafSession = 0
	leafNumber  = 1
	idText      = "session:U64,number:U64,"
)

// SpecText completes the text of a spec with the leaves that name a sample.
func SpecText(rest string) string { return idText + rest }

// Fill makes a sample: session and number as they are, and all other leaves following from these.
func Fill(dst []byte, s *spec.Spec, session, number uint64) {
	proof.Sample(dst, s, session, number)
	binary.LittleEndian.PutUint64(dst[s.Offset(leafSession):], session)
	binary.LittleEndian.PutUint64(dst[s.Offset(leafNumber):], number)
}

// FillLeaf makes one leaf of a sample.
func FillLeaf(dst []byte, s *spec.Spec, leaf int, session, number uint64) {
	switch leaf {
	case leafSession:
		binary.LittleEndian.PutUint64(dst, session)
	case leafNumber:
		binary.LittleEndian.PutUint64(dst, number)
	default:
		proof.Leaf(dst, s.Leaf(leaf).DType, session, number, leaf)
	}
}

// Rows are the columns of a batch as a trainer sees them.
type Rows struct {
	Columns          [][]byte
	Streams, Numbers []uint64
}

// Read checks every byte of every row against the session and number that it names, and the number beside it, and says what is there.
func (r Rows) Read(s *spec.Spec) ([]Span, error) {
	var spans []Span
	for row := range r.Numbers {
		at := func(leaf int) []byte {
			n := int(s.Leaf(leaf).Bytes())
			return r.Columns[leaf][row*n : (row+1)*n]
		}
		session, number := binary.LittleEndian.Uint64(at(leafSession)), binary.LittleEndian.Uint64(at(leafNumber))
		if number != r.Numbers[row] {
			return nil, fmt.Errorf("row %d: sample %d of session %d lies beside number %d of stream %d", row, number, session, r.Numbers[row], r.Streams[row])
		}
		for leaf := leafNumber + 1; leaf < s.NumLeaves(); leaf++ {
			if wrong := proof.CheckLeaf(at(leaf), s.Leaf(leaf).DType, session, number, leaf); wrong >= 0 {
				return nil, fmt.Errorf("row %d: sample %d of session %d is torn from byte %d of leaf %q on", row, number, session, wrong, s.Leaf(leaf).Name)
			}
		}
		if n := len(spans); n > 0 && spans[n-1].Session == session && spans[n-1].Stream == r.Streams[row] && spans[n-1].First+spans[n-1].N == number {
			spans[n-1].N++
			continue
		}
		spans = append(spans, Span{Session: session, Stream: r.Streams[row], First: number, N: 1})
	}
	return spans, nil
}
