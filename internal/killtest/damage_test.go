//go:build linux && !race

package killtest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/ingestd/ingestd/internal/inspect"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/spec"
)

// leftBehind kills an owner of a ring at a failpoint and returns the segment that it leaves, as a file.
func leftBehind(t *testing.T, rnd *rand.Rand, dir, point string) string {
	t.Helper()
	segment := filepath.Join(dir, strings.ReplaceAll(point, "/", "-"))
	for hit := 500; ; hit = max(1, hit/3) {
		p, err := spawn(peerPath, fmt.Sprintf("%s:%d", point, hit), nil, "own", "--addr", segment, "--ledger", segment, "--table", "own", "--spec", ownSpec,
			"--seed", strconv.FormatUint(rnd.Uint64(), 10))
		check(t, err)
		within(patience, func() bool { return p.lines.Load() > 1000 || !p.running() })
		if p.running() {
			p.kill()
			continue
		}
		if !p.struck() {
			t.Fatal(p.ending())
		}
		return segment
	}
}

var ownSpec = SpecText("a:U8[13],b:F32[3]")

// damagedPoints are those at which an owner leaves most to its successor.
var damagedPoints = []string{"ring/mark/row", "ring/closeup/copied", "ring/place/publish", "ring/lease/taken", "ring/recover/announced"}

// TestEachByteDamaged flips each byte of header, columns, spec, state lines and tables of segments that were left behind by a kill. Recovery refuses, and leaves the segment
// as it is; or it gives a ring of which each place comes back, in which no row is torn, and that the check finds to be whole.
func TestEachByteDamaged(t *testing.T) {
	t.Parallel()
	eachByteDamaged(t, newSeed(t))
}

func eachByteDamaged(t *testing.T, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 2))
	dir := memoryDir(t)
	s, err := spec.ParseText(ownSpec)
	check(t, err)
	refused, taken := 0, 0
	for _, point := range damagedPoints {
		whole, err := os.ReadFile(leftBehind(t, rnd, dir, point))
		check(t, err)
		v, err := ring.OpenView(aligned(whole))
		check(t, err)
		layout := v.Layout()
		if err := damaged(s, whole, layout, func([]byte) {}); err != nil {
			t.Fatalf("%s: the segment is not even taken whole: %v", point, err)
		}
		// Where things lie: docs/segment-format.md, "Header". The 64 group entries that were never used are all alike: a few are enough.
		const groupsOffset, entry = 216, 256
		groups := binary.LittleEndian.Uint64(whole[groupsOffset:])
		for at := range groups + 4*entry {
			for _, flip := range []byte{1 << rnd.IntN(8), 0xFF} {
				err := damaged(s, whole, layout, func(mem []byte) { mem[at] ^= flip })
				var refusal *refusedError
				switch {
				case errors.As(err, &refusal):
					refused++
				case err != nil:
					t.Fatalf("%s: byte %d changed by %#x: %v", point, at, flip, err)
				default:
					taken++
				}
			}
		}
	}
	t.Logf("seed %d; %d damaged segments refused, %d taken, whole", seed, refused, taken)
	if refused == 0 || taken == 0 {
		t.Error("one of both never happened: nothing was tested")
	}
}

// refusedError is a recovery that said no.
type refusedError struct{ err error }

func (e *refusedError) Error() string { return e.err.Error() }

func aligned(text []byte) []byte {
	mem := ring.AlignedBytes(int64(len(text)))
	copy(mem, text)
	return mem
}

// damaged recovers a copy of a segment after a change, and says what is wrong with the outcome.
func damaged(s *spec.Spec, whole []byte, layout ring.Layout, change func([]byte)) error {
	mem := aligned(whole)
	change(mem)
	before := bytes.Clone(mem)
	r, found, err := ring.Recover(mem, layout)
	if err != nil {
		if !bytes.Equal(before, mem) {
			return fmt.Errorf("refused (%w), and changed", err)
		}
		return &refusedError{err}
	}
	if _, problems, err := inspect.Check(mem); err != nil || len(problems) > 0 {
		return fmt.Errorf("what was taken up is not whole: %v %q", err, problems)
	}
	for _, b := range found.Batches {
		rows := Rows{Streams: b.Streams(), Numbers: b.Numbers()}
		for leaf := range b.Columns() {
			rows.Columns = append(rows.Columns, b.Column(leaf))
		}
		if _, err := rows.Read(s); err != nil {
			return fmt.Errorf("batch %d: %w", b.Number, err)
		}
		r.Release(b.Batch)
	}
	for n := range layout.Batches * layout.BatchSize {
		if _, ok := r.TryReserve(1); !ok {
			return fmt.Errorf("only %d of %d slots came back", n, layout.Batches*layout.BatchSize)
		}
	}
	return nil
}

// TestTruncated: a segment of each shorter length, and a longer one, is refused or taken, and never reached beyond its end.
func TestTruncated(t *testing.T) {
	t.Parallel()
	rnd := rand.New(rand.NewPCG(newSeed(t), 3))
	whole, err := os.ReadFile(leftBehind(t, rnd, memoryDir(t), "ring/mark/row"))
	check(t, err)
	v, err := ring.OpenView(aligned(whole))
	check(t, err)
	for n := int64(0); n < v.SegmentBytes(); n += 1 + n/97 {
		if _, _, err := ring.Recover(aligned(whole[:n]), v.Layout()); err == nil {
			t.Errorf("%d of %d bytes were taken for a segment", n, v.SegmentBytes())
		}
	}
}
