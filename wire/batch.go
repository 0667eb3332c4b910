package wire

import (
	"encoding/binary"
	"fmt"
	"io"
)

// Of batches that are sent to trainers, see the docs, "Remote trainers".
const (
	BatchHeaderBytes = 64
	AnswerBytes      = 8          // the number of a batch that is given back, as a u64
	AnswerLeaves     = 1 << 63    // set: the trainer leaves, and the rest is how many of the batches of this connection it has begun to read
	BatchMagic       = 0x48435442 // "BTCH"; its first byte is no NoticeMark
	BatchOwnColumns  = 3          // stream, number, arrival: a u64 per row each
)

// BatchHeader stands before each batch, and alone, with Count 0, where only a loss is told.
type BatchHeader struct {
	Count        uint32 // rows
	Number       uint64
	LostFirst    uint64 // the number of the first batch that the group lost before this one
	LostCount    uint64 // how many it lost; 0: none
	PayloadBytes uint64 // that follow
	Columns      uint32 // that they are, BatchOwnColumns included
}

// AppendBatchHeader appends the encoded header.
func AppendBatchHeader(dst []byte, h *BatchHeader) []byte {
	dst = binary.LittleEndian.AppendUint32(dst, BatchMagic)
	dst = binary.LittleEndian.AppendUint32(dst, h.Count)
	dst = binary.LittleEndian.AppendUint64(dst, h.Number)
	dst = binary.LittleEndian.AppendUint64(dst, h.LostFirst)
	dst = binary.LittleEndian.AppendUint64(dst, h.LostCount)
	dst = binary.LittleEndian.AppendUint64(dst, h.PayloadBytes)
	dst = binary.LittleEndian.AppendUint32(dst, h.Columns)
	var zeros [BatchHeaderBytes - 44]byte
	return append(dst, zeros[:]...)
}

// BatchShape is what a trainer over a connection knows of its batches before the first one comes.
type BatchShape struct {
	BatchSize   int64 // most rows
	SampleBytes int64
	Leaves      int
}

// PayloadBytes returns those of a batch of so many rows.
func (s BatchShape) PayloadBytes(rows int64) int64 { return rows * (s.SampleBytes + 8*BatchOwnColumns) }

// BatchReader reads the headers of batches of a shape.
type BatchReader struct {
	R     io.Reader
	Shape BatchShape

	buf [BatchHeaderBytes]byte
}

// Next reads a header and checks that the batch is one of the shape. A closing notice in its place is returned as the *Notice. Else the error wraps
// ErrProtocol, or is that of the reader; io.EOF only before the first byte.
func (r *BatchReader) Next(h *BatchHeader) error {
	b := r.buf[:]
	if _, err := io.ReadFull(r.R, b[:1]); err != nil {
		return err
	}
	if b[0] == NoticeMark {
		notice, err := ReadNotice(r.R)
		if err != nil {
			return err
		}
		return notice
	}
	if _, err := io.ReadFull(r.R, b[1:]); err != nil {
		return fmt.Errorf("wire: read the header of a batch: %w", unexpected(err))
	}
	if magic := binary.LittleEndian.Uint32(b); magic != BatchMagic {
		return protocolError("%#08x stands where the header of a batch should begin", magic)
	}
	*h = BatchHeader{
		Count: binary.LittleEndian.Uint32(b[4:]), Number: binary.LittleEndian.Uint64(b[8:]), LostFirst: binary.LittleEndian.Uint64(b[16:]),
		LostCount: binary.LittleEndian.Uint64(b[24:]), PayloadBytes: binary.LittleEndian.Uint64(b[32:]), Columns: binary.LittleEndian.Uint32(b[40:]),
	}
	return h.check(r.Shape, b[44:])
}

func (h *BatchHeader) check(shape BatchShape, rest []byte) error {
	for _, zero := range rest {
		if zero != 0 {
			return protocolError("the header of batch %d does not end with zeros", h.Number)
		}
	}
	switch {
	case h.Count == 0 && (h.LostCount == 0 || h.Number != 0 || h.PayloadBytes != 0 || h.Columns != 0):
		return protocolError("batch %d has no rows", h.Number)
	case h.Count == 0:
		return nil
	case int64(h.Count) > shape.BatchSize:
		return protocolError("batch %d has %d rows, of a table whose batches have %d", h.Number, h.Count, shape.BatchSize)
	case h.PayloadBytes != uint64(shape.PayloadBytes(int64(h.Count))) || int64(h.Columns) != int64(shape.Leaves)+BatchOwnColumns:
		return protocolError("batch %d of %d rows has %d columns and %d bytes; they must be %d and %d",
			h.Number, h.Count, h.Columns, h.PayloadBytes, shape.Leaves+BatchOwnColumns, shape.PayloadBytes(int64(h.Count)))
	}
	return nil
}
