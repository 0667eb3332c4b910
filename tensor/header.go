package tensor

import (
	"encoding/binary"
	"fmt"
	"slices"
)

// HeaderBytes is the size of a chunk's header.
const HeaderBytes = 64

// What chunk_bytes may be: a multiple of ChunkBytesUnit.
const (
	ChunkBytesMin     = 64 << 10
	ChunkBytesMax     = 64 << 20
	ChunkBytesDefault = 1 << 20
	ChunkBytesUnit    = 4096
)

// CheckChunkBytes says whether n may be the chunk_bytes of a table.
func CheckChunkBytes(n int) error {
	if n < ChunkBytesMin || n > ChunkBytesMax || n%ChunkBytesUnit != 0 {
		return fmt.Errorf("chunks of %d bytes: must be %d to %d and a multiple of %d", n, ChunkBytesMin, ChunkBytesMax, ChunkBytesUnit)
	}
	return nil
}

// Flags of a chunk (docs/tensors.md, "Chunks").
const (
	FlagBegin   = 1 << iota // first chunk of a transaction
	FlagEnd                 // the data lists the tensors of which the transaction consists
	FlagAbort               // the producer gives the step up
	FlagNoCRC               // the data was not summed
	FlagRefused             // by the daemon: the step was too old
	FlagOpened              // by the daemon: a stream begins or goes on
	FlagClosed              // by the daemon: a stream's connection has ended

	flagsAll = 1<<iota - 1
)

const (
	headerMagic   = 0x4B484349 // ICHK
	headerVersion = 1
	flagsAt       = 6
	sumAt         = 60
)

// Header is what comes before the data of a chunk.
type Header struct {
	Flags    uint16
	Step     uint64 // of a gradient; the generation of weights
	Stream   uint64
	Producer uint64 // ProducerID of the name
	Manifest uint64 // Manifest.ID
	Offset   uint64 // of the first data byte in the encoded bytes of its tensor
	Tensor   uint32 // in which the data starts
	Length   uint32 // bytes of data
	DataCRC  uint32 // of the data; 0 with FlagNoCRC
}

// ChunkError says what is wrong with a chunk.
type ChunkError struct {
	Tensor string // where the data starts, empty if that is not known
	Offset int64  // in the encoded bytes of that tensor
	Reason string
}

func (e *ChunkError) Error() string {
	if e.Tensor == "" {
		return "chunk: " + e.Reason
	}
	return fmt.Sprintf("chunk of tensor %q at byte %d: %s", e.Tensor, e.Offset, e.Reason)
}

func chunkErrorf(format string, args ...any) *ChunkError {
	return &ChunkError{Reason: fmt.Sprintf(format, args...)}
}

// Put writes the header into the first HeaderBytes bytes of dst, with its sum.
func (h *Header) Put(dst []byte) {
	dst = dst[:HeaderBytes]
	le := binary.LittleEndian
	le.PutUint32(dst, headerMagic)
	le.PutUint16(dst[4:], headerVersion)
	le.PutUint16(dst[flagsAt:], h.Flags)
	le.PutUint64(dst[8:], h.Step)
	le.PutUint64(dst[16:], h.Stream)
	le.PutUint64(dst[24:], h.Producer)
	le.PutUint64(dst[32:], h.Manifest)
	le.PutUint64(dst[40:], h.Offset)
	le.PutUint32(dst[48:], h.Tensor)
	le.PutUint32(dst[52:], h.Length)
	le.PutUint32(dst[56:], h.DataCRC)
	le.PutUint32(dst[sumAt:], headerSum(dst))
}

// headerSum is the CRC of a header as it is without FlagRefused. A CRC is linear: that bit changes the sum of so many bytes always in the same way, so nothing is copied.
func headerSum(b []byte) uint32 {
	sum := CRC(b[:sumAt])
	if b[flagsAt]&FlagRefused != 0 {
		sum ^= refusedChanges
	}
	return sum
}

var refusedChanges = func() uint32 {
	var b [sumAt]byte
	plain := CRC(b[:])
	b[flagsAt] = FlagRefused
	return plain ^ CRC(b[:])
}()

// ParseHeader reads a header of at least HeaderBytes bytes and checks magic, version, sum and flags; Check does the rest. Errors are *ChunkError.
func ParseHeader(b []byte) (Header, error) {
	if len(b) < HeaderBytes {
		return Header{}, chunkErrorf("the header has %d bytes, not %d", len(b), HeaderBytes)
	}
	b = b[:HeaderBytes]
	le := binary.LittleEndian
	if magic := le.Uint32(b); magic != headerMagic {
		return Header{}, chunkErrorf("starts with %#08x, which is not the magic of a chunk", magic)
	}
	if version := le.Uint16(b[4:]); version != headerVersion {
		return Header{}, chunkErrorf("version %d of chunks is not known; this is version %d", version, headerVersion)
	}
	if want, got := le.Uint32(b[sumAt:]), headerSum(b); got != want {
		return Header{}, chunkErrorf("the header is damaged: its sum is %08x and it says %08x", got, want)
	}
	h := Header{
		Flags: le.Uint16(b[flagsAt:]), Step: le.Uint64(b[8:]), Stream: le.Uint64(b[16:]), Producer: le.Uint64(b[24:]), Manifest: le.Uint64(b[32:]),
		Offset: le.Uint64(b[40:]), Tensor: le.Uint32(b[48:]), Length: le.Uint32(b[52:]), DataCRC: le.Uint32(b[56:]),
	}
	if unknown := h.Flags &^ flagsAll; unknown != 0 {
		return Header{}, chunkErrorf("has the unknown flags %#x", unknown)
	}
	return h, nil
}

// MarkRefused sets FlagRefused in an encoded header; its sum stays right.
func MarkRefused(header []byte) { header[flagsAt] |= FlagRefused }

// HasData says whether the chunk carries bytes of tensors.
func (h *Header) HasData() bool { return h.Length > 0 && h.Flags&FlagEnd == 0 }

// Flat is the flat offset of the first data byte. It is for headers that Check has passed and that have data.
func (h *Header) Flat(m *Manifest) int64 { return m.offsets[h.Tensor] + int64(h.Offset) }

// Check checks a header against the manifest of its stream and the table's chunk_bytes: flags that go together, manifest and place. Errors are *ChunkError.
func (h *Header) Check(m *Manifest, chunkBytes int) error {
	const own = FlagOpened | FlagClosed
	bare := h.Tensor == 0 && h.Offset == 0
	switch {
	case h.Manifest != m.ID():
		return chunkErrorf("its manifest is %016x, that of the stream is %016x", h.Manifest, m.ID())
	case int64(h.Length) > int64(chunkBytes):
		return h.errorf(m, "%d bytes of data; at most %d fit a chunk", h.Length, chunkBytes)
	case h.Flags&FlagNoCRC != 0 && h.DataCRC != 0:
		return h.errorf(m, "the flags say that the data was not summed, and there is a sum")
	case h.Flags&own == own, h.Flags&own != 0 && h.Flags&(FlagBegin|FlagEnd|FlagAbort) != 0, h.Flags&FlagEnd != 0 && h.Flags&FlagAbort != 0:
		return h.errorf(m, "the flags %#x do not go together", h.Flags)
	case h.Flags&(own|FlagAbort) != 0 && (h.Length != 0 || !bare):
		return h.errorf(m, "a chunk with the flags %#x has no data and no place", h.Flags)
	case h.Flags&FlagEnd != 0:
		return h.checkEnd(m)
	case h.Length > 0:
		return h.checkPlace(m)
	case !bare:
		return h.errorf(m, "no data, so tensor and offset must be 0")
	case h.Flags&(own|FlagAbort|FlagBegin) == 0:
		return h.errorf(m, "no data, and no flag that says why")
	}
	return nil
}

func (h *Header) checkEnd(m *Manifest) error {
	switch {
	case h.Tensor != 0 || h.Offset != 0:
		return chunkErrorf("the end of a step has no place, so tensor and offset must be 0")
	case h.Length%4 != 0 || int64(h.Length/4) > int64(m.Len()):
		return chunkErrorf("the end of a step lists tensors in %d bytes; it must be 4 per tensor, and there are %d tensors", h.Length, m.Len())
	}
	return nil
}

// checkPlace: the data is a run of flat bytes that starts inside its tensor and cuts no element.
func (h *Header) checkPlace(m *Manifest) error {
	if int64(h.Tensor) >= int64(m.Len()) {
		return chunkErrorf("is of tensor %d; the manifest has %d", h.Tensor, m.Len())
	}
	i := int(h.Tensor)
	if size := uint64(m.EncodedBytes(i)); h.Offset >= size {
		return h.errorf(m, "lies outside its tensor, which has %d bytes", size)
	}
	if h.Offset%Align != 0 {
		return h.errorf(m, "must start on a multiple of %d bytes", Align)
	}
	end := h.Flat(m) + int64(h.Length)
	if end > m.dataBytes {
		return h.errorf(m, "%d bytes of data run %d bytes beyond the last tensor", h.Length, end-m.dataBytes)
	}
	if _, whole := slices.BinarySearch(m.ends, end); end%Align != 0 && !whole {
		return h.errorf(m, "%d bytes of data end neither on a multiple of %d bytes nor with a tensor", h.Length, Align)
	}
	return nil
}

// CheckData compares the data with its sum. data must have the header's length. Errors are *ChunkError.
func (h *Header) CheckData(m *Manifest, data []byte) error {
	if len(data) != int(h.Length) {
		return h.errorf(m, "has %d bytes of data, its header says %d", len(data), h.Length)
	}
	if h.Flags&FlagNoCRC != 0 {
		return nil
	}
	if sum := CRC(data); sum != h.DataCRC {
		return h.errorf(m, "the data is damaged: its sum is %08x and the header says %08x", sum, h.DataCRC)
	}
	return nil
}

// errorf names the tensor, if there is one.
func (h *Header) errorf(m *Manifest, format string, args ...any) *ChunkError {
	e := chunkErrorf(format, args...)
	if h.Length > 0 && h.Flags&FlagEnd == 0 && int64(h.Tensor) < int64(m.Len()) {
		e.Tensor, e.Offset = m.tensors[h.Tensor].Name, int64(h.Offset)
	}
	return e
}
