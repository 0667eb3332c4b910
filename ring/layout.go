package ring

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"time"
)

// Limits of a segment.
const (
	BatchesMin   = 2
	BatchesMax   = 1 << 16
	BatchSizeMax = 1 << 30
	ColumnsMax   = 4096
	SpecBytesMax = 2 << 20
	SegmentMax   = 1 << 46 // bytes; far above any machine, far below overflow
	SessionsMax  = 1 << 16
	NameBytesMax = 128 // of a session or a group
	GroupsMax    = 64  // groups of trainers: one bit each in a word

	// SessionsDefault is how many sessions a segment has room for unless its layout says otherwise: 256 KiB.
	SessionsDefault = 1024
)

// Version is the format version this package writes and reads.
const Version = 2

// Offsets of the fixed header; see docs/segment-format.md.
const (
	offMagic       = 0
	offVersion     = 8
	offCRC         = 12
	offSegment     = 16
	offBatchSize   = 24
	offBatches     = 32
	offColumns     = 40
	offSample      = 48
	offColumnTable = 56
	offSpec        = 64
	offSpecBytes   = 72
	offStates      = 80
	offData        = 88
	offStride      = 96
	offStreamCol   = 104
	offNumberCol   = 112
	offArrivalCol  = 120
	offFingerprint = 128
	offCreated     = 160
	offTable       = 168
	offSessions    = 200
	offSessionTab  = 208
	offGroupTab    = 216
	crcFrom        = 16
	crcTo          = 256
	offReserved    = 256
	offPublished   = 320
	offLeased      = 384
	offClosed      = 448
	offStreams     = 456
	offBoot        = 464
	offClean       = 480
	headerBytes    = 512
	columnEntry    = 16
	tableBytes     = 32
)

const (
	columnAlign = 64
	batchAlign  = 4096
	lineBytes   = 64
	entryBytes  = 256 // of the session and group tables
)

var magic = [8]byte{'I', 'N', 'G', 'D', 'S', 'E', 'G', '1'}

// Layout is everything that decides the size and the fixed bytes of a segment.
type Layout struct {
	BatchSize   int       // slots in a batch
	Batches     int       // capacity in batches
	Columns     []int64   // bytes of each leaf in one slot, in spec order
	Spec        []byte    // opaque here: the spec as JSON
	Fingerprint [32]byte  // opaque here
	Table       string    // for people; cut to 32 bytes
	Created     time.Time // when the segment was made
	Sessions    int       // sessions there is room for; 0 is SessionsDefault
	Boot        [16]byte  // identifies this run of the machine's kernel; zero where unknown. Not part of what is compared
}

// FormatError says why bytes are not a segment, or a layout not a possible one.
type FormatError struct{ Reason string }

func (e *FormatError) Error() string { return "segment: " + e.Reason }

func formatError(format string, args ...any) error {
	return &FormatError{Reason: fmt.Sprintf(format, args...)}
}

// geometry is where things lie, worked out from a Layout.
type geometry struct {
	specOffset, statesOffset, dataOffset int64
	sessionTable, groupTable             int64
	stride, segment, sample              int64
	streams, numbers, arrivals           int64   // columns of the slots' own data, from the start of a batch
	columns                              []int64 // leaf columns, from the start of a batch
}

func alignUp(n, to int64) int64 { return (n + to - 1) / to * to }

// geometry checks the layout against the limits; every product is checked before it is made.
func (l *Layout) geometry() (*geometry, error) {
	switch {
	case l.BatchSize < 1 || l.BatchSize > BatchSizeMax:
		return nil, formatError("batch size is %d, must be 1 to %d", l.BatchSize, BatchSizeMax)
	case l.Batches < BatchesMin || l.Batches > BatchesMax:
		return nil, formatError("capacity is %d batches, must be %d to %d", l.Batches, BatchesMin, BatchesMax)
	case len(l.Columns) < 1 || len(l.Columns) > ColumnsMax:
		return nil, formatError("%d columns, must be 1 to %d", len(l.Columns), ColumnsMax)
	case len(l.Spec) > SpecBytesMax:
		return nil, formatError("spec text of %d bytes, at most %d", len(l.Spec), SpecBytesMax)
	case l.Sessions < 0 || l.Sessions > SessionsMax:
		return nil, formatError("room for %d sessions, must be 1 to %d", l.Sessions, SessionsMax)
	}
	if l.Sessions == 0 {
		l.Sessions = SessionsDefault
	}
	g := &geometry{columns: make([]int64, len(l.Columns))}
	slots := int64(l.BatchSize)
	g.numbers = alignUp(8*slots, columnAlign)
	g.arrivals = 2 * g.numbers
	at := 3 * g.numbers
	for i, n := range l.Columns {
		if n < 1 || n > (SegmentMax-at)/slots {
			return nil, formatError("column %d has %d bytes per slot: must be at least 1, and a batch must stay below %d bytes", i, n, int64(SegmentMax))
		}
		g.columns[i] = at
		g.sample += n
		at = alignUp(at+n*slots, columnAlign)
	}
	g.stride = alignUp(at, batchAlign)
	g.specOffset = headerBytes + columnEntry*int64(len(l.Columns))
	g.statesOffset = alignUp(g.specOffset+int64(len(l.Spec)), lineBytes)
	g.sessionTable = g.statesOffset + lineBytes*int64(l.Batches)
	g.groupTable = g.sessionTable + entryBytes*int64(l.Sessions)
	g.dataOffset = alignUp(g.groupTable+entryBytes*GroupsMax, batchAlign)
	if g.stride > (SegmentMax-g.dataOffset)/int64(l.Batches) {
		return nil, formatError("%d batches of %d bytes: a segment is at most %d bytes", l.Batches, g.stride, int64(SegmentMax))
	}
	g.segment = g.dataOffset + g.stride*int64(l.Batches)
	return g, nil
}

// Bytes returns the size of a segment of this layout, or a *FormatError that says which limit it breaks.
func (l Layout) Bytes() (int64, error) {
	g, err := l.geometry()
	if err != nil {
		return 0, err
	}
	return g.segment, nil
}

// writeHeader fills the fixed part of mem. The magic comes last, so that a half-written header is not taken for one.
func (l *Layout) writeHeader(mem []byte, g *geometry) {
	clear(mem[:g.dataOffset])
	put := func(off int, v int64) { binary.LittleEndian.PutUint64(mem[off:], uint64(v)) }
	binary.LittleEndian.PutUint32(mem[offVersion:], Version)
	put(offSegment, g.segment)
	put(offBatchSize, int64(l.BatchSize))
	put(offBatches, int64(l.Batches))
	put(offColumns, int64(len(l.Columns)))
	put(offSample, g.sample)
	put(offColumnTable, headerBytes)
	put(offSpec, g.specOffset)
	put(offSpecBytes, int64(len(l.Spec)))
	put(offStates, g.statesOffset)
	put(offData, g.dataOffset)
	put(offStride, g.stride)
	put(offStreamCol, g.streams)
	put(offNumberCol, g.numbers)
	put(offArrivalCol, g.arrivals)
	copy(mem[offFingerprint:], l.Fingerprint[:])
	put(offCreated, l.Created.UnixNano())
	copy(mem[offTable:offTable+tableBytes], l.Table)
	put(offSessions, int64(l.Sessions))
	put(offSessionTab, g.sessionTable)
	put(offGroupTab, g.groupTable)
	copy(mem[offBoot:], l.Boot[:])
	for i, n := range l.Columns {
		entry := headerBytes + columnEntry*i
		put(entry, g.columns[i])
		put(entry+8, n)
	}
	copy(mem[g.specOffset:], l.Spec)
	binary.LittleEndian.PutUint32(mem[offCRC:], headerCRC(mem, g.specOffset+int64(len(l.Spec))))
	copy(mem[offMagic:], magic[:])
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func headerCRC(mem []byte, specEnd int64) uint32 {
	sum := crc32.Update(0, castagnoli, mem[crcFrom:crcTo])
	return crc32.Update(sum, castagnoli, mem[headerBytes:specEnd])
}

// readHeader checks every fixed field of mem against what this package would have written.
func readHeader(mem []byte) (*Layout, *geometry, error) {
	if len(mem) < headerBytes {
		return nil, nil, formatError("%d bytes, shorter than the header of %d", len(mem), headerBytes)
	}
	if [8]byte(mem[:8]) != magic {
		return nil, nil, formatError("starts with % x, not with the magic % x: not a segment, or one that is being written", mem[:8], magic)
	}
	if v := binary.LittleEndian.Uint32(mem[offVersion:]); v != Version {
		return nil, nil, formatError("version %d, this program reads version %d", v, Version)
	}
	get := func(off int) uint64 { return binary.LittleEndian.Uint64(mem[off:]) }
	for _, f := range []struct {
		name string
		off  int
		max  uint64
	}{
		{"batch_size", offBatchSize, BatchSizeMax},
		{"batches", offBatches, BatchesMax},
		{"columns", offColumns, ColumnsMax},
		{"spec_bytes", offSpecBytes, SpecBytesMax},
		{"sessions", offSessions, SessionsMax},
	} {
		if v := get(f.off); v > f.max {
			return nil, nil, formatError("%s is %d, at most %d", f.name, v, f.max)
		}
	}
	l := &Layout{
		BatchSize: int(get(offBatchSize)),
		Batches:   int(get(offBatches)),
		Columns:   make([]int64, get(offColumns)),
		Created:   time.Unix(0, int64(get(offCreated))),
		Sessions:  int(get(offSessions)),
	}
	specOffset := headerBytes + columnEntry*len(l.Columns)
	specEnd := specOffset + int(get(offSpecBytes))
	if specEnd > len(mem) {
		return nil, nil, formatError("the spec ends at byte %d of %d", specEnd, len(mem))
	}
	if got, want := binary.LittleEndian.Uint32(mem[offCRC:]), headerCRC(mem, int64(specEnd)); got != want {
		return nil, nil, formatError("header checksum is %08x, its bytes give %08x: the header is damaged", got, want)
	}
	if l.Sessions == 0 {
		return nil, nil, formatError("room for 0 sessions, must be 1 to %d", SessionsMax)
	}
	l.Fingerprint = [32]byte(mem[offFingerprint:])
	l.Table = trimZero(mem[offTable : offTable+tableBytes])
	l.Spec = append([]byte(nil), mem[specOffset:specEnd]...)
	for i := range l.Columns {
		l.Columns[i] = int64(get(headerBytes + columnEntry*i + 8))
	}
	g, err := l.geometry()
	if err != nil {
		return nil, nil, err
	}
	return l, g, g.compare(mem)
}

// compare checks the offsets stored in mem against the ones that follow from its sizes.
func (g *geometry) compare(mem []byte) error {
	want := func(name string, off int, v int64) error {
		if got := binary.LittleEndian.Uint64(mem[off:]); got != uint64(v) {
			return formatError("%s is %d, must be %d", name, got, v)
		}
		return nil
	}
	for _, f := range []struct {
		name string
		off  int
		want int64
	}{
		{"segment_bytes", offSegment, g.segment},
		{"sample_bytes", offSample, g.sample},
		{"columns_offset", offColumnTable, headerBytes},
		{"spec_offset", offSpec, g.specOffset},
		{"states_offset", offStates, g.statesOffset},
		{"data_offset", offData, g.dataOffset},
		{"batch_stride", offStride, g.stride},
		{"stream_column", offStreamCol, g.streams},
		{"number_column", offNumberCol, g.numbers},
		{"arrival_column", offArrivalCol, g.arrivals},
		{"sessions_offset", offSessionTab, g.sessionTable},
		{"groups_offset", offGroupTab, g.groupTable},
	} {
		if err := want(f.name, f.off, f.want); err != nil {
			return err
		}
	}
	for i, off := range g.columns {
		if err := want(fmt.Sprintf("offset of column %d", i), headerBytes+columnEntry*i, off); err != nil {
			return err
		}
	}
	if int64(len(mem)) < g.segment {
		return formatError("%d bytes, the header says %d: the segment is cut short", len(mem), g.segment)
	}
	return nil
}

func trimZero(b []byte) string {
	for len(b) > 0 && b[len(b)-1] == 0 {
		b = b[:len(b)-1]
	}
	return string(b)
}
