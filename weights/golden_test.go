package weights

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"math"
	"os"
	"strings"
	"testing"
	"time"

	"encoding/binary"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
)

// example makes the segment of docs/weights.md, "Example".
func example(t *testing.T) (*Store, spec.Fingerprint) {
	t.Helper()
	m := must(tensor.NewManifest([]tensor.Tensor{
		{Name: "w", DType: spec.F32, Shape: []int64{2}}, {Name: "b", DType: spec.U8, Shape: []int64{3}},
	}, nil))(t)
	s := heapStore(t, 2)
	s.now = func() time.Time { return time.Unix(1_700_000_000, 5) }
	p := must(s.OpenPublisher(m, Who{}))(t)
	pl := must(p.TryBegin(7))(t)
	data := pl.Data()
	binary.LittleEndian.PutUint32(data, math.Float32bits(1))
	binary.LittleEndian.PutUint32(data[4:], math.Float32bits(-2))
	copy(data[256:], []byte{1, 2, 3})
	pl.SetSum(0, tensor.CRC(data[:8]))
	pl.SetSum(1, tensor.CRC(data[256:259]))
	digest := must(pl.Commit())(t)
	return s, digest
}

// dump writes memory as in the docs: 16 bytes to a line, lines of zeros left out.
func dump(mem []byte) string {
	var b strings.Builder
	for at := 0; at < len(mem); at += 16 {
		if line := mem[at : at+16]; !bytes.Equal(line, make([]byte, 16)) {
			fmt.Fprintf(&b, "%05x  %x\n", at, line)
		}
	}
	return b.String()
}

// TestExampleOfDocs: the bytes in docs/weights.md are those that a Store writes, and a reader understands them. The Python package's tests read the same
// section.
func TestExampleOfDocs(t *testing.T) {
	page := string(must(os.ReadFile("../docs/weights.md"))(t))
	_, section, ok := strings.Cut(page, "\n## Example\n")
	_, block, ok2 := strings.Cut(section, "```text\n")
	block, _, ok3 := strings.Cut(block, "```")
	if !ok || !ok2 || !ok3 {
		t.Fatal("docs/weights.md has no section Example with a block of text")
	}
	s, digest := example(t)
	mem := s.current.view.mem
	if got := dump(mem); got != block {
		t.Errorf("the docs say\n%s\nand the store writes\n%s", block, got)
	}
	if !strings.Contains(section, digest.String()) {
		t.Errorf("the docs do not name the digest %v", digest)
	}
	if want := fmt.Sprintf("%d bytes", len(mem)); !strings.Contains(section, want) {
		t.Errorf("the docs do not say %q", want)
	}

	read := alignedBytes(int64(len(mem)))
	for line := range strings.Lines(block) {
		var at int
		var text string
		if _, err := fmt.Sscanf(line, "%x %s", &at, &text); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		copy(read[at:], must(hex.DecodeString(text))(t))
	}
	seg := must(OpenSegment(read))(t)
	generation, place := seg.Newest()
	if generation != 7 || place != 0 || seg.Generation(0) != 7 || seg.Generation(1) != 0 || seg.Digest(0) != digest || seg.Publisher(0) != 1 ||
		seg.Published(0).UnixNano() != 1_700_000_000_000_000_005 || seg.Manifest().Tensor(1).Name != "b" || seg.Data(0)[256] != 1 {
		t.Errorf("read back: generation %d in place %d of %+v", generation, place, seg.Layout())
	}
}

// TestOpenSegmentRefuses: every header byte that is changed, and every length that is short, is noticed.
func TestOpenSegmentRefuses(t *testing.T) {
	s, _ := example(t)
	mem := s.current.view.mem
	for at := range headerSummed {
		mem[at] ^= 0x41
		if _, err := OpenSegment(mem); err == nil {
			t.Errorf("byte %d of the header was changed, and the segment opened", at)
		}
		mem[at] ^= 0x41
	}
	l := s.current.view.layout
	for at := range l.ManifestBytes {
		mem[l.ManifestOffset+at] ^= 1
		if _, err := OpenSegment(mem); err == nil {
			t.Errorf("byte %d of the manifest was changed, and the segment opened", at)
		}
		mem[l.ManifestOffset+at] ^= 1
	}
	for _, n := range []int64{0, 7, headerBytes - 1, headerBytes, l.PlacesOffset, l.SegmentBytes - 1} {
		if _, err := OpenSegment(mem[:n:n]); err == nil {
			t.Errorf("%d bytes were taken for a segment", n)
		}
	}
	if _, err := OpenSegment(mem[8:]); err == nil {
		t.Error("memory that starts on no multiple of 64 was taken")
	}
	must(OpenSegment(mem))(t)
}

// TestLayoutCheck: fields that agree with their sum and with nothing else are refused, on both sides of each limit.
func TestLayoutCheck(t *testing.T) {
	s, _ := example(t)
	good := s.current.view.layout
	check(t, good.check())
	for name, change := range map[string]func(l *Layout){
		"one place":          func(l *Layout) { l.Places = 1 },
		"65 places":          func(l *Layout) { l.Places, l.SegmentBytes = 65, 65*l.PlaceStride+l.PlacesOffset },
		"no tensors":         func(l *Layout) { l.Tensors = 0 },
		"too many tensors":   func(l *Layout) { l.Tensors = tensorsMax + 1 },
		"manifest elsewhere": func(l *Layout) { l.ManifestOffset = 2 * pageBytes },
		"manifest too long":  func(l *Layout) { l.ManifestBytes = manifestBytesMax + 1 },
		"no manifest":        func(l *Layout) { l.ManifestBytes = 1 },
		"negative data":      func(l *Layout) { l.DataBytes = -1 },
		"places in manifest": func(l *Layout) { l.PlacesOffset = pageBytes },
		"places off a page":  func(l *Layout) { l.PlacesOffset += 8; l.SegmentBytes += 8 },
		"data in the sums":   func(l *Layout) { l.DataOffset = placeSums },
		"data off a page":    func(l *Layout) { l.DataOffset += 64; l.PlaceStride += pageBytes; l.SegmentBytes += 2 * pageBytes },
		"stride too short":   func(l *Layout) { l.PlaceStride -= pageBytes },
		"stride off a page":  func(l *Layout) { l.PlaceStride += 8; l.SegmentBytes += 16 },
		"segment too short":  func(l *Layout) { l.SegmentBytes-- },
		"products that wrap": func(l *Layout) { l.PlaceStride = math.MaxInt64 / 2; l.SegmentBytes = math.MaxInt64 },
		"negative everything": func(l *Layout) {
			l.PlacesOffset, l.PlaceStride, l.DataOffset, l.SegmentBytes = -4096, -4096, -4096, -4096
		},
	} {
		l := good
		change(&l)
		if err := l.check(); err == nil {
			t.Errorf("%s: %+v was taken", name, l)
		}
	}
}
