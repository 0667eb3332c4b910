package inspect

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/spec"
)

// Offsets of the slots' own columns in the header; docs/segment-format.md.
const (
	offStreamCol  = 104
	offNumberCol  = 112
	offArrivalCol = 120
)

func newRing(t *testing.T, batchSize, batches int) (*ring.Ring, []byte) {
	t.Helper()
	s, err := spec.ParseText("a:U16[4],b:U8")
	if err != nil {
		t.Fatal(err)
	}
	l := ring.Layout{BatchSize: batchSize, Batches: batches, Columns: s.LeafBytes(), Spec: s.JSON(), Fingerprint: s.Fingerprint(), Table: "t"}
	n, err := l.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	mem := ring.AlignedBytes(n)
	r, err := ring.Format(mem, l)
	if err != nil {
		t.Fatal(err)
	}
	return r, mem
}

// put commits samples first.. of a stream, one run at a time; it returns false when the ring is full.
func put(r *ring.Ring, stream, first uint64, n int) bool {
	for n > 0 {
		run, ok := r.TryReserve(n)
		if !ok {
			return false
		}
		for leaf := range 2 {
			col := r.RunColumn(run, leaf)
			for i := range col {
				col[i] = byte(first)
			}
		}
		r.Commit(run, stream, first, 1, ring.Mark{})
		first += uint64(run.N)
		n -= int(run.N)
	}
	return true
}

// sample ring: batch 0 leased, 1 and 2 published, 3 open.
func filled(t *testing.T) (*ring.Ring, []byte) {
	r, mem := newRing(t, 4, 6)
	r.NextStream()
	r.NextStream()
	put(r, 1, 0, 7)
	put(r, 2, 0, 7)
	if _, ok := r.TryLease(); !ok {
		t.Fatal("nothing to lease")
	}
	return r, mem
}

func TestReportAndCheck(t *testing.T) {
	_, mem := filled(t)
	rep, problems, err := Check(mem)
	if err != nil || len(problems) > 0 {
		t.Fatal(err, problems)
	}
	if rep.Reserved != 14 || rep.Published != 3 || rep.Leased != 1 || rep.States["leased"] != 1 || rep.States["published"] != 2 || rep.States["open"] != 1 || rep.States["free"] != 2 {
		t.Errorf("%+v", rep)
	}
	for _, want := range []string{"a:U16[4],b:U8", "published 3 batches", "1 open", "leased"} {
		if !strings.Contains(rep.Text(), want) {
			t.Errorf("%q is not in\n%s", want, rep.Text())
		}
	}
}

// TestCheckFindsPlantedFaults: a check that cannot fail proves nothing.
func TestCheckFindsPlantedFaults(t *testing.T) {
	_, whole := filled(t)
	get := func(off int) int { return int(binary.LittleEndian.Uint64(whole[off:])) }
	place := map[ring.State]int{} // the last place in that state
	rep, _, _ := Check(whole)
	for _, p := range rep.Places {
		for _, s := range []ring.State{ring.Open, ring.Published, ring.Leased} {
			if p.State == s.String() {
				place[s] = p.Index
			}
		}
	}
	line := func(s ring.State) int { return get(offStates) + lineBytes*place[s] }
	row := func(s ring.State, column, row int) int {
		return get(offData) + get(offStride)*place[s] + get(column) + 8*row
	}
	for name, c := range map[string]struct {
		off  int
		v    uint64
		want string
	}{
		"leased above published":   {offLeased, 4, "the cursor leased is 4, at most 3"},
		"published far ahead":      {offPublished, 1 << 50, "the cursor published"},
		"no such state":            {line(ring.Open), 3<<3 | 6, "state 6"},
		"same batch twice":         {line(ring.Leased), 1<<3 | 3, "both hold batch 1"},
		"opening far ahead":        {line(ring.Open), 100<<3 | 1, "opening 100"},
		"leased too early":         {line(ring.Published), 2<<3 | 4, "batch 2 is leased"},
		"not published":            {line(ring.Published), 5<<3 | 3, "with 3 published"},
		"too many slots":           {line(ring.Published) + 8, 5, "5 slots"},
		"more void than committed": {line(ring.Published) + 8, 5<<32 | 4, "5 of them given up"},
		"too many rows":            {line(ring.Published) + 16, 5, "5 rows"},
		"never arrived":            {row(ring.Published, offArrivalCol, 1), 0, "not all of them were written"},
		"order":                    {row(ring.Published, offNumberCol, 1), 9, "comes after"},
		"no such stream":           {row(ring.Published, offStreamCol, 1), 9, "only 2 were given a number"},
		"moved from beyond":        {line(ring.Open) + 24, 1<<63 | 9, "the move word"},
	} {
		mem := ring.AlignedBytes(int64(len(whole)))
		copy(mem, whole)
		binary.LittleEndian.PutUint64(mem[c.off:], c.v)
		_, problems, err := Check(mem)
		if err != nil || !slices.ContainsFunc(problems, func(p string) bool { return strings.Contains(p, c.want) }) {
			t.Errorf("%s: got %v %q, want %q", name, err, problems, c.want)
		}
	}
	for _, n := range []int{0, 100, 511, len(whole) - 1} {
		var format *ring.FormatError
		if _, _, err := Check(whole[:n]); !errors.As(err, &format) {
			t.Errorf("cut to %d bytes: %v", n, err)
		}
	}
	if _, problems, err := Check(append(slices.Clone(whole), make([]byte, 4096)...)); err != nil || len(problems) != 1 {
		t.Errorf("longer: %v %q", err, problems)
	}
}

// TestCheckSurvivesAnything: random words over everything that the checksum does not cover.
func TestCheckSurvivesAnything(t *testing.T) {
	_, whole := filled(t)
	seed := uint64(0x5eed)
	rng := rand.New(rand.NewPCG(seed, 0))
	mem := ring.AlignedBytes(int64(len(whole)))
	for range 3000 {
		copy(mem, whole)
		for range 1 + rng.IntN(4) {
			off := 256 + 8*rng.IntN((len(mem)-256)/8)
			if off >= 512 && off < int(binary.LittleEndian.Uint64(whole[offStates:])) {
				continue
			}
			binary.LittleEndian.PutUint64(mem[off:], rng.Uint64()>>rng.IntN(64))
		}
		if _, _, err := Check(mem); err != nil {
			t.Fatalf("seed %#x: %v", seed, err)
		}
	}
}

func TestSaveOfALiveSegmentPasses(t *testing.T) {
	if raceDetector {
		t.Skip("Save reads bytes that may change and drops what did change: the race detector must object, and be wrong")
	}
	r, mem := newRing(t, 4, 5)
	r.NextStream()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() { // writes and reads as fast as it can
		for n := uint64(0); ; {
			select {
			case <-stop:
				return
			default:
			}
			for put(r, 1, n, 1) {
				n++
			}
			for range 2 {
				if b, ok := r.TryLease(); ok {
					r.Release(b)
				}
			}
		}
	})
	folder := t.TempDir()
	for range 50 {
		path := filepath.Join(folder, "saved.seg")
		if err := Save(path, &r.View, mem); err != nil {
			t.Fatal(err)
		}
		saved, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		aligned := ring.AlignedBytes(int64(len(saved)))
		copy(aligned, saved)
		if rep, problems, err := Check(aligned); err != nil || len(problems) > 0 {
			t.Fatalf("%v %q\n%s", err, problems, rep.Text())
		}
		if err := Save(path, &r.View, mem); !errors.Is(err, os.ErrExist) {
			t.Fatalf("saved over a file: %v", err)
		}
		_ = os.Remove(path)
	}
	close(stop)
	wg.Wait()
	if entries, _ := os.ReadDir(folder); len(entries) > 0 {
		t.Errorf("left behind: %v", entries)
	}
}

func TestSaveOfAQuietSegmentKeepsItsBatches(t *testing.T) {
	r, mem := filled(t)
	path := filepath.Join(t.TempDir(), "saved.seg")
	if err := Save(path, &r.View, mem); err != nil {
		t.Fatal(err)
	}
	saved, _ := os.ReadFile(path)
	aligned := ring.AlignedBytes(int64(len(saved)))
	copy(aligned, saved)
	rep, problems, err := Check(aligned)
	if err != nil || len(problems) > 0 || rep.States["published"] != 2 || rep.States["leased"] != 1 || rep.Leased != 1 || rep.Published != 3 {
		t.Errorf("%v %q\n%s", err, problems, rep.Text())
	}
}
