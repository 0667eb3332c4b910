package weights

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"sync/atomic"
	"time"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
)

// Segment is a segment of weights as its readers see it: in memory that the daemon writes and they map. Its words may change at any time; its header and
// manifest were checked when it was opened, and copied. All methods may be called from any goroutine.
type Segment struct {
	mem      []byte
	layout   Layout
	manifest *tensor.Manifest
}

// OpenSegment checks the header and the manifest of a segment. A *FormatError says what is wrong with them.
func OpenSegment(mem []byte) (*Segment, error) {
	if len(mem) < headerBytes {
		return nil, formatError("%d bytes, shorter than the header of %d", len(mem), headerBytes)
	}
	if err := checkBase(mem); err != nil {
		return nil, err
	}
	header := [headerSummed]byte(mem)
	if [8]byte(header[:]) != magic {
		return nil, formatError("it starts with % x, not with % x", header[:8], magic)
	}
	if v := binary.LittleEndian.Uint32(header[offVersion:]); v != version {
		return nil, formatError("version %d, this program speaks %d", v, version)
	}
	field := func(off int) int64 { return int64(binary.LittleEndian.Uint64(header[off:])) }
	l := Layout{
		Places: field(offPlaces), Tensors: field(offTensors), ManifestOffset: field(offManifestOffset), ManifestBytes: field(offManifestBytes),
		PlacesOffset: field(offPlacesOffset), PlaceStride: field(offPlaceStride), DataOffset: field(offDataOffset), DataBytes: field(offDataBytes),
		SegmentBytes: field(offSegmentBytes),
	}
	if err := l.check(); err != nil {
		return nil, err
	}
	if l.SegmentBytes > int64(len(mem)) {
		return nil, formatError("it says it has %d bytes, there are %d", l.SegmentBytes, len(mem))
	}
	text := bytes.Clone(mem[l.ManifestOffset : l.ManifestOffset+l.ManifestBytes])
	if got, want := binary.LittleEndian.Uint32(header[offHeaderCRC:]), headerCRC(&header, text); got != want {
		return nil, formatError("the sum of its header is %#x, its bytes have %#x", got, want)
	}
	m, err := tensor.ParseManifest(text)
	if err != nil {
		return nil, formatError("its manifest: %v", err)
	}
	if int64(m.Len()) != l.Tensors || m.DataBytes() != l.DataBytes {
		return nil, formatError("its header says %d tensors in %d bytes, its manifest %d in %d", l.Tensors, l.DataBytes, m.Len(), m.DataBytes())
	}
	return &Segment{mem: mem, layout: l, manifest: m}, nil
}

// Layout returns where what lies.
func (s *Segment) Layout() Layout { return s.layout }

// Manifest returns what tensors a generation has.
func (s *Segment) Manifest() *tensor.Manifest { return s.manifest }

func (s *Segment) newestWord() *atomic.Uint64 { return word(s.mem, offNewest) }

func (s *Segment) generationWord(place int) *atomic.Uint64 {
	return word(s.mem, s.layout.place(place)+placeGeneration)
}

// Newest returns the newest generation and its place; generation 0: there is none.
func (s *Segment) Newest() (generation uint64, place int) {
	// edge(newest): acquire - the place named here holds that generation, whole, until it is taken for another.
	n := s.newestWord().Load()
	generation, place = n/generationsPerRow, int(n%generationsPerRow)
	if int64(place) >= s.layout.Places { // only a publisher that means harm writes that
		return 0, 0
	}
	return generation, place
}

// Generation returns what a place holds now; 0: nothing whole.
func (s *Segment) Generation(place int) uint64 { return s.generationWord(place).Load() }

// at returns n bytes of a place.
func (s *Segment) at(place int, off, n int64) []byte {
	from := s.layout.place(place) + off
	return s.mem[from : from+n : from+n]
}

// What follows may be read of a place that is pinned, or that is being written by who asks.

// Published returns when the generation in a place was published.
func (s *Segment) Published(place int) time.Time {
	return time.Unix(0, int64(binary.LittleEndian.Uint64(s.at(place, placePublished, 8))))
}

// Digest returns the digest in a place.
func (s *Segment) Digest(place int) spec.Fingerprint {
	return spec.Fingerprint(s.at(place, placeDigest, sha256.Size))
}

// Publisher returns the number of who published what is in a place.
func (s *Segment) Publisher(place int) uint64 {
	return binary.LittleEndian.Uint64(s.at(place, placePublisher, 8))
}

// SumBytes returns the tensors' sums in a place: little-endian CRCs, in the order of the manifest. It is the segment's own memory.
func (s *Segment) SumBytes(place int) []byte { return s.at(place, placeSums, 4*s.layout.Tensors) }

// Data returns the tensors in a place, each at its flat offset. It is the segment's own memory.
func (s *Segment) Data(place int) []byte { return s.at(place, s.layout.DataOffset, s.layout.DataBytes) }

// DataOffset returns where Data of a place starts in the segment, for sendfile.
func (s *Segment) DataOffset(place int) int64 { return s.layout.place(place) + s.layout.DataOffset }

// Digest returns the digest of a generation of the manifest's tensors with these sums.
func Digest(m *tensor.Manifest, sums []uint32) spec.Fingerprint {
	fingerprint := m.Fingerprint()
	b := slices.Grow(fingerprint[:], 4*len(sums))
	for _, sum := range sums {
		b = binary.LittleEndian.AppendUint32(b, sum)
	}
	return sha256.Sum256(b)
}

func decodeSums(b []byte) []uint32 {
	sums := make([]uint32, len(b)/4)
	for i := range sums {
		sums[i] = binary.LittleEndian.Uint32(b[4*i:])
	}
	return sums
}
