package inspect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/ingestd/ingestd/ring"
)

// Offsets of what Save reads and puts right; docs/segment-format.md. The header was validated before they are used.
const (
	offStates    = 80
	offData      = 88
	offStride    = 96
	offReserved  = 256
	offPublished = 320
	offLeased    = 384
	offClosed    = 448
	offStreams   = 456
	offBoot      = 464
	lineBytes    = 64
)

// Save copies a segment, which may be live, to a new file that passes Check.
//
// The ring moves meanwhile, so that the copy is put right. The published cursor is read first and the leased one last: a batch between them is in the same state
// before and after, so its bytes were copied whole. All other places are free in the copy, the batch being filled too.
func Save(path string, v *ring.View, mem []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".ingestd-*.seg")
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err == nil {
			err = os.Link(f.Name(), path)
		}
		err = errors.Join(err, os.Remove(f.Name()))
		if err != nil {
			err = fmt.Errorf("save %s: %w", path, err)
		}
	}()
	mem = mem[:v.SegmentBytes()]
	closed, published := v.Closed(), v.Published()
	before := states(v)
	if err := copyLive(f, mem, before); err != nil {
		return err
	}
	after := states(v)
	leased := min(v.Leased(), published)
	size := uint64(v.BatchSize())
	return errors.Join(fix(f, mem, before, after, cursors{v.Reserved() / size * size, published, leased, closed}), f.Sync())
}

type cursors struct {
	reserved, published, leased uint64
	closed                      bool
}

func states(v *ring.View) []ring.BatchState {
	all := make([]ring.BatchState, v.Batches())
	for i := range all {
		all[i] = v.BatchState(i)
	}
	return all
}

// copyLive copies the fixed part and the batches that can be read; the rest is a hole.
func copyLive(f *os.File, mem []byte, places []ring.BatchState) error {
	data := int64(binary.LittleEndian.Uint64(mem[offData:]))
	stride := int64(binary.LittleEndian.Uint64(mem[offStride:]))
	if err := f.Truncate(int64(len(mem))); err != nil {
		return err
	}
	if _, err := f.WriteAt(mem[:data], 0); err != nil {
		return err
	}
	for i, b := range places {
		if b.State != ring.Published && b.State != ring.Leased {
			continue
		}
		at := data + int64(i)*stride
		if _, err := f.WriteAt(mem[at:at+stride], at); err != nil {
			return err
		}
	}
	return nil
}

// fix writes the cursors and state lines of the copy.
func fix(f *os.File, mem []byte, before, after []ring.BatchState, c cursors) error {
	whole := func(i int) bool { return before[i].State == after[i].State && before[i].Number == after[i].Number }
	held := map[uint64]bool{}
	for i, b := range before {
		if b.State == ring.Published && whole(i) {
			held[b.Number] = true
		}
	}
	// A batch that is being leased has the cursor moved first and its state a moment later.
	for n := c.leased; n < c.published; n++ {
		if !held[n] {
			c.leased = n + 1
		}
	}
	lines := make([]byte, lineBytes*len(before))
	for i, b := range before {
		line, state := lines[lineBytes*i:], b.Number<<3
		waits := b.State == ring.Published && b.Number >= c.leased && b.Number < c.published
		reads := b.State == ring.Leased && b.Number < c.leased
		if whole(i) && (waits || reads) {
			state |= uint64(b.State)
			binary.LittleEndian.PutUint64(line[8:], uint64(b.Void)<<32|uint64(b.Committed))
			binary.LittleEndian.PutUint64(line[16:], uint64(b.Count))
			binary.LittleEndian.PutUint64(line[32:], b.Pending)
		}
		binary.LittleEndian.PutUint64(line, state)
	}
	header := make([]byte, 4*lineBytes)
	put := func(off int, v uint64) { binary.LittleEndian.PutUint64(header[off-offReserved:], v) }
	put(offReserved, c.reserved)
	put(offPublished, c.published)
	put(offLeased, c.leased)
	if c.closed {
		put(offClosed, 1)
	}
	copy(header[offStreams-offReserved:], mem[offStreams:offBoot+16])
	if _, err := f.WriteAt(header, offReserved); err != nil {
		return err
	}
	_, err := f.WriteAt(lines, int64(binary.LittleEndian.Uint64(mem[offStates:])))
	return err
}
