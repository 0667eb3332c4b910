package weights

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/ingestd/ingestd/tensor"
)

// The format of docs/weights.md, "Segment".
const (
	version      = 1
	lineBytes    = 64
	pageBytes    = 4096
	headerBytes  = 192
	headerSummed = 128 // header_crc is of bytes offSegmentBytes to headerSummed, and the manifest

	offVersion        = 8
	offHeaderCRC      = 12
	offSegmentBytes   = 16
	offPlaces         = 24
	offTensors        = 32
	offManifestOffset = 40
	offManifestBytes  = 48
	offPlacesOffset   = 56
	offPlaceStride    = 64
	offDataOffset     = 72
	offDataBytes      = 80
	offNewest         = 128

	placeGeneration = 0 // offsets in a place
	placePublished  = 8
	placeDigest     = 16
	placePublisher  = 48
	placeSums       = 64
)

var magic = [8]byte{'I', 'N', 'G', 'W', 'G', 'T', 'S', '1'}

// Limits of a segment.
const (
	PlacesMin         = 2
	PlacesMax         = 64
	PlacesDefault     = 3
	manifestBytesMax  = 2_000_000
	tensorsMax        = 65_536
	dataBytesMax      = 1<<40 + 256*tensorsMax
	segmentBytesMax   = math.MaxInt64 / 2
	GenerationMax     = 1<<58 - 1 // newest holds a generation times 64
	PinsBytes         = pageBytes // a reader's page of pins
	generationsPerRow = 64        // places that newest and a page of pins can name
)

// FormatError says that memory is no segment of weights that this program can use.
type FormatError struct{ Reason string }

func (e *FormatError) Error() string { return "weights: not a segment: " + e.Reason }

func formatError(format string, args ...any) error { return &FormatError{fmt.Sprintf(format, args...)} }

// Layout says where what lies in a segment. All are bytes but Places and Tensors.
type Layout struct {
	Places, Tensors int64

	ManifestOffset, ManifestBytes int64
	PlacesOffset, PlaceStride     int64 // of the first place; from one to the next
	DataOffset, DataBytes         int64 // in a place; of one generation
	SegmentBytes                  int64
}

// LayoutOf returns the layout of a segment that holds so many generations of the manifest's tensors.
func LayoutOf(m *tensor.Manifest, places int) Layout {
	l := Layout{Places: int64(places), Tensors: int64(m.Len()), ManifestOffset: pageBytes, ManifestBytes: int64(len(m.JSON())), DataBytes: m.DataBytes()}
	l.PlacesOffset = l.ManifestOffset + roundUp(l.ManifestBytes)
	l.DataOffset = roundUp(placeSums + 4*l.Tensors)
	l.PlaceStride = l.DataOffset + roundUp(l.DataBytes)
	l.SegmentBytes = l.PlacesOffset + l.Places*l.PlaceStride
	return l
}

func roundUp(n int64) int64 { return (n + pageBytes - 1) / pageBytes * pageBytes }

// place returns the offset of a place.
func (l *Layout) place(i int) int64 { return l.PlacesOffset + int64(i)*l.PlaceStride }

// check refuses what no segment of this version has. It is for words that another process wrote: every product below is bounded before it is made.
func (l *Layout) check() error {
	for _, f := range [...]struct {
		name          string
		value, lo, hi int64
	}{
		{"places", l.Places, PlacesMin, PlacesMax},
		{"tensors", l.Tensors, 1, tensorsMax},
		{"manifest_offset", l.ManifestOffset, pageBytes, pageBytes},
		{"manifest_bytes", l.ManifestBytes, 2, manifestBytesMax},
		{"data_bytes", l.DataBytes, 0, dataBytesMax},
		{"places_offset", l.PlacesOffset, l.ManifestOffset + l.ManifestBytes, segmentBytesMax / 2},
		{"data_offset", l.DataOffset, placeSums + 4*l.Tensors, segmentBytesMax / PlacesMax / 8},
		{"place_stride", l.PlaceStride, l.DataOffset + l.DataBytes, segmentBytesMax / PlacesMax / 2},
		{"segment_bytes", l.SegmentBytes, l.PlacesOffset + l.Places*l.PlaceStride, segmentBytesMax},
	} {
		if f.value < f.lo || f.value > f.hi {
			return formatError("%s is %d, must be from %d to %d", f.name, f.value, f.lo, f.hi)
		}
	}
	if l.PlacesOffset%pageBytes != 0 || l.PlaceStride%pageBytes != 0 || l.DataOffset%pageBytes != 0 {
		return formatError("places at %d by %d with data at %d: all must be multiples of %d", l.PlacesOffset, l.PlaceStride, l.DataOffset, pageBytes)
	}
	return nil
}

// header returns the first 128 bytes of a segment but for header_crc.
func (l *Layout) header() (b [headerSummed]byte) {
	copy(b[:], magic[:])
	binary.LittleEndian.PutUint32(b[offVersion:], version)
	for off, v := range map[int]int64{
		offSegmentBytes: l.SegmentBytes, offPlaces: l.Places, offTensors: l.Tensors, offManifestOffset: l.ManifestOffset, offManifestBytes: l.ManifestBytes,
		offPlacesOffset: l.PlacesOffset, offPlaceStride: l.PlaceStride, offDataOffset: l.DataOffset, offDataBytes: l.DataBytes,
	} {
		binary.LittleEndian.PutUint64(b[off:], uint64(v))
	}
	return b
}

// headerCRC is the CRC that stands in a header.
func headerCRC(header *[headerSummed]byte, manifest []byte) uint32 {
	return tensor.CombineCRC(tensor.CRC(header[offSegmentBytes:]), tensor.CRC(manifest), int64(len(manifest)))
}

// format makes memory, which is all zero, an empty segment.
func format(mem []byte, m *tensor.Manifest, l Layout) {
	text, header := m.JSON(), l.header()
	binary.LittleEndian.PutUint32(header[offHeaderCRC:], headerCRC(&header, text))
	copy(mem, header[:])
	copy(mem[l.ManifestOffset:], text)
}
