//go:build linux

package client

import (
	"fmt"
	"io"

	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// receivedBatch is a batch that came over a connection, in memory of this process's own.
type receivedBatch struct {
	memory     []byte // starts on a multiple of 64
	columns    [][]byte
	own        [wire.BatchOwnColumns][]uint64 // streams, numbers, arrivals
	number     uint64
	count      int
	connection uint64 // of which it came
	created    int64  // when the daemon's ring was made
}

// receivedLayout says where the columns of a batch lie in its memory: each on a multiple of 64.
type receivedLayout struct {
	shape wire.BatchShape
	rows  []int64 // bytes of a row, per column, those that are no leaves first
	at    []int64
	bytes int64 // of a full batch
}

// newReceivedLayout checks what a daemon said of its batches before any memory is asked for.
func newReceivedLayout(s *spec.Spec, batchSize int64) (*receivedLayout, error) {
	if batchSize > ring.BatchSizeMax {
		return nil, fmt.Errorf("%w: batches of %d rows; the most there can be are %d", wire.ErrProtocol, batchSize, ring.BatchSizeMax)
	}
	l := &receivedLayout{
		shape: wire.BatchShape{BatchSize: batchSize, SampleBytes: s.SampleBytes(), Leaves: s.NumLeaves()},
		rows:  append([]int64{8, 8, 8}, s.LeafBytes()...),
	}
	for _, n := range l.rows {
		l.at = append(l.at, l.bytes)
		if n > (ring.SegmentMax-l.bytes)/batchSize {
			return nil, fmt.Errorf("%w: batches of %d rows of %d bytes, which no segment can hold", wire.ErrProtocol, batchSize, s.SampleBytes())
		}
		l.bytes = (l.bytes + n*batchSize + 63) &^ 63
	}
	return l, nil
}

func (l *receivedLayout) newBuffer() *receivedBatch {
	return &receivedBatch{memory: alignedBytes(l.bytes), columns: make([][]byte, l.shape.Leaves)}
}

// read reads what follows a header that was checked.
func (l *receivedLayout) read(r io.Reader, h *wire.BatchHeader, into *receivedBatch) error {
	into.number, into.count = h.Number, int(h.Count)
	for i, n := range l.rows {
		end := l.at[i] + n*int64(h.Count)
		column := into.memory[l.at[i]:end:end]
		if _, err := io.ReadFull(r, column); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("batch %d was cut short: %w", h.Number, err)
		}
		if leaf := i - wire.BatchOwnColumns; leaf >= 0 {
			into.columns[leaf] = column
		} else {
			into.own[i] = words(column)
		}
	}
	return nil
}
