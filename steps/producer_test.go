package steps

import (
	"encoding/binary"
	"strings"
	"testing"

	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

// TestBadChunks: whatever is wrong with a chunk, those before it are taken, it is not, and its kind is counted.
func TestBadChunks(t *testing.T) {
	for name, test := range map[string]struct {
		spoil       func(p *Producer, h *tensor.Header)
		kind, words string
	}{
		"opened": {func(_ *Producer, h *tensor.Header) {
			*h = tensor.Header{Flags: tensor.FlagOpened, Stream: h.Stream, Producer: h.Producer, Manifest: h.Manifest}
		}, "forged", "only the daemon"},
		"closed":         {func(_ *Producer, h *tensor.Header) { h.Flags |= tensor.FlagClosed }, "forged", "only the daemon"},
		"another stream": {func(_ *Producer, h *tensor.Header) { h.Stream++ }, "stream", "number 5"},
		"another name":   {func(_ *Producer, h *tensor.Header) { h.Producer = tensor.ProducerID("a") }, "stream", `session "w0"`},
		"manifest":       {func(_ *Producer, h *tensor.Header) { h.Manifest++ }, "manifest", "that of the hello"},
		"no tensor":      {func(_ *Producer, h *tensor.Header) { h.Tensor = 2 }, "place", "the manifest has 2"},
		"outside":        {func(_ *Producer, h *tensor.Header) { h.Offset = 2 * chunkBytes }, "place", `"w" at byte 131072`},
		"not aligned":    {func(_ *Producer, h *tensor.Header) { h.Offset += 4 }, "place", "multiple of 256"},
		"too long":       {func(_ *Producer, h *tensor.Header) { h.Length = chunkBytes + 256 }, "place", "at most 65536 fit"},
		"overlap":        {func(_ *Producer, h *tensor.Header) { h.Offset, h.Length = 256, 256 }, "overlap", "overlaps"},
		"same place":     {func(_ *Producer, h *tensor.Header) { h.Offset, h.DataCRC = 0, 77 }, "overlap", "overlaps"},
		"list of none":   {func(p *Producer, h *tensor.Header) { *h = p.chunk(1, tensor.FlagEnd, 0, 0, 12) }, "place", "4 per tensor"},
		"list twice":     {func(p *Producer, h *tensor.Header) { *h = p.chunk(1, tensor.FlagEnd, 0, 0, 8) }, "list", "ascend"},
		"list damaged":   {func(p *Producer, h *tensor.Header) { *h = p.chunk(1, tensor.FlagEnd, 0, 0, 4); h.DataCRC = 1 }, "list", "damaged"},
	} {
		t.Run(name, func(t *testing.T) {
			k := newKeeper(t, Config{})
			p := open(t, k, "w0", 5, manifest(t))
			first, bad := p.chunk(1, tensor.FlagBegin, 0, 0, chunkBytes), p.chunk(1, 0, 0, chunkBytes, chunkBytes)
			test.spoil(p, &bad)
			good, err := p.Check(columnsOf(first, bad).columns())
			if good != 1 {
				t.Errorf("%d chunks are good, want 1", good)
			}
			wantBad(t, err, test.kind, test.words)
			st := k.Stats()
			for kind, n := range st.BadChunks {
				if (kind == test.kind) != (n == 1) {
					t.Errorf("%d bad chunks of kind %s", n, kind)
				}
			}
		})
	}
}

// TestEveryByteOfAHeaderCounts: a header in which any byte differs is turned down, but for the flag REFUSED, which is judged anew.
func TestEveryByteOfAHeaderCounts(t *testing.T) {
	k := newKeeper(t, Config{})
	p := open(t, k, "w0", 5, manifest(t))
	plain := columnsOf(p.chunk(1, tensor.FlagBegin, 0, 0, 256))
	for i := range tensor.HeaderBytes {
		for bit := range 8 {
			r := run{append([]byte(nil), plain.headers...), plain.data}
			r.headers[i] ^= 1 << bit
			good, err := p.Check(r.columns())
			if refused := i == flagsByte && 1<<bit == tensor.FlagRefused; refused {
				if err != nil || good != 1 || r.refused() != "." {
					t.Errorf("a chunk that was refused before: %v, %s", err, r.refused())
				}
			} else if good != 0 {
				t.Errorf("byte %d bit %d does not count", i, bit)
			} else {
				wantBad(t, err, "header", "")
			}
		}
	}
}

// TestSteps: what is complete, given up, sent again and cut short is counted so.
func TestSteps(t *testing.T) {
	list := make([]byte, 4)
	binary.LittleEndian.PutUint32(list, 1)
	for name, test := range map[string]struct {
		chunks func(p *Producer) []tensor.Header
		data   []byte // of the last one
		want   Stats
		state  string
		bytes  int64
	}{
		"whole":    {func(p *Producer) []tensor.Header { return p.whole(3) }, nil, Stats{Completed: 1, Newest: 3}, "complete", 2*chunkBytes + 64},
		"in parts": {func(p *Producer) []tensor.Header { return p.whole(3)[:2] }, nil, Stats{Newest: 3}, "incomplete", 2 * chunkBytes},
		"any order": {func(p *Producer) []tensor.Header {
			w := p.whole(3)
			w[0].Flags, w[2].Flags = 0, tensor.FlagBegin
			return []tensor.Header{w[2], w[1], w[0]}
		}, nil, Stats{Completed: 1, Newest: 3}, "complete", 2*chunkBytes + 64},
		"again": {func(p *Producer) []tensor.Header { return append(p.whole(3), p.whole(3)...) }, nil, Stats{Completed: 1, Newest: 3}, "complete", 2*chunkBytes + 64},
		"a chunk twice": {func(p *Producer) []tensor.Header {
			w := p.whole(3)
			return []tensor.Header{w[0], w[1], w[1], w[2]}
		}, nil, Stats{Completed: 1, Newest: 3}, "complete", 2*chunkBytes + 64},
		"begun anew": {func(p *Producer) []tensor.Header { return append(p.whole(3)[:1], p.whole(3)...) }, nil, Stats{Completed: 1, CutShort: 1, Newest: 3}, "complete",
			2*chunkBytes + 64},
		"left for the next": {func(p *Producer) []tensor.Header { return append(p.whole(3)[:1], p.whole(4)...) }, nil, Stats{Completed: 1, CutShort: 1, Newest: 4}, "complete",
			2*chunkBytes + 64},
		"aborted": {func(p *Producer) []tensor.Header {
			return append(p.whole(3)[:1], p.chunk(3, tensor.FlagAbort, 0, 0, 0))
		}, nil, Stats{Aborted: 1, Newest: 3}, "aborted",
			chunkBytes},
		"aborted and begun": {func(p *Producer) []tensor.Header {
			return append([]tensor.Header{p.whole(3)[0], p.chunk(3, tensor.FlagAbort, 0, 0, 0)}, p.whole(3)...)
		}, nil, Stats{Aborted: 1, Completed: 1, Newest: 3}, "complete", 2*chunkBytes + 64},
		"subset": {func(p *Producer) []tensor.Header {
			return []tensor.Header{p.chunk(3, tensor.FlagBegin, 1, 0, 64), p.chunk(3, tensor.FlagEnd|tensor.FlagNoCRC, 0, 0, 4)}
		}, list, Stats{Completed: 1, Newest: 3}, "complete", 64},
		"another subset": {func(p *Producer) []tensor.Header {
			return []tensor.Header{p.chunk(3, tensor.FlagBegin, 0, 0, 256), p.chunk(3, tensor.FlagEnd|tensor.FlagNoCRC, 0, 0, 4)}
		}, list, Stats{Newest: 3}, "incomplete", 256},
		"nothing": {func(p *Producer) []tensor.Header {
			return []tensor.Header{p.chunk(0, tensor.FlagBegin|tensor.FlagEnd, 0, 0, 0)}
		}, nil, Stats{Completed: 1}, "complete", 0},
	} {
		t.Run(name, func(t *testing.T) {
			k := newKeeper(t, Config{})
			p := open(t, k, "w0", 5, manifest(t))
			r := columnsOf(test.chunks(p)...)
			if test.data != nil {
				copy(r.data[len(r.data)-chunkBytes:], test.data)
			}
			if _, err := p.Check(r.columns()); err != nil {
				t.Fatal(err)
			}
			st := k.Stats()
			if st.Completed != test.want.Completed || st.Aborted != test.want.Aborted || st.CutShort != test.want.CutShort || st.Newest != test.want.Newest || st.Refused != 0 {
				t.Errorf("got %+v, want %+v", st, test.want)
			}
			if got := st.Producers[0]; got.State != test.state || got.Bytes != test.bytes {
				t.Errorf("producer is at %+v, want %s with %d bytes", got, test.state, test.bytes)
			}
			p.Close()
			if cut := k.Stats().CutShort - st.CutShort; (cut == 1) != (test.state == "incomplete") {
				t.Errorf("%d steps were cut short at its end", cut)
			}
		})
	}
}

// TestTooOld: with a lag of 2, step 7 refuses what is before 5, from any producer; the producer is told once per step, and its chunks are marked.
func TestTooOld(t *testing.T) {
	k := newKeeper(t, Config{MaxLag: 2})
	m := manifest(t)
	ahead, behind := open(t, k, "ahead", 1, m), open(t, k, "behind", 2, m)
	if got := behind.takes(t, behind.whole(4)[:1]...); got != "." {
		t.Errorf("before anybody is ahead: %s", got)
	}
	ahead.takes(t, ahead.whole(7)[:1]...)
	if got := behind.takes(t, append(behind.whole(4)[1:], behind.whole(5)...)...); got != "xx..." {
		t.Errorf("steps 4 and 5: %s", got)
	}
	notes := behind.told(t)
	if len(notes) != 1 || notes[0].Code != wire.NoteStepRefused || notes[0].Step != 4 || !strings.Contains(notes[0].Reason, "max_lag is 2") {
		t.Errorf("notes: %+v", notes)
	}
	if again := behind.told(t); again != nil {
		t.Errorf("told again: %+v", again[0])
	}
	st := k.Stats()
	if st.Refused != 1 || st.Late != 2 || st.Completed != 1 || st.CutShort != 1 || st.Newest != 7 {
		t.Errorf("%+v", st)
	}
}

// TestStepsOnlyGrow: a step before one that came whole is refused, whatever the lag, until the producer connects anew.
func TestStepsOnlyGrow(t *testing.T) {
	k := newKeeper(t, Config{})
	p := open(t, k, "w0", 5, manifest(t))
	p.takes(t, p.whole(9)...)
	if got := p.takes(t, append(p.whole(8), p.whole(9)[0], p.whole(10)[0])...); got != "xxx.." {
		t.Errorf("steps 8, 9 and 10 after 9: %s", got)
	}
	if notes := p.told(t); len(notes) != 1 || notes[0].Step != 8 || !strings.Contains(notes[0].Reason, "after step 9") {
		t.Errorf("%+v", notes)
	}
	p.Close()
	if k.Stats().Newest != 0 {
		t.Error("the newest step is still known, with nobody there")
	}
	p = open(t, k, "w0", 5, manifest(t))
	if got := p.takes(t, p.whole(8)...); got != "..." {
		t.Errorf("step 8 of a new connection: %s", got)
	}
}

// TestGoesOnAfterReconnect: a step that a broken connection cut short becomes complete by the chunks that were not sent yet.
func TestGoesOnAfterReconnect(t *testing.T) {
	k := newKeeper(t, Config{})
	p := open(t, k, "w0", 5, manifest(t))
	p.takes(t, p.whole(3)[:2]...)
	p.Close()
	p = open(t, k, "w0", 5, manifest(t))
	p.takes(t, p.whole(3)[2:]...)
	if st := k.Stats(); st.Completed != 1 || st.CutShort != 1 {
		t.Errorf("%+v", st)
	}
	// What many left is not remembered for ever.
	m := manifest(t)
	for i := range uint64(awayMax + 1) {
		p := open(t, k, string(rune('a'+i)), 100+i, m)
		p.takes(t, p.whole(3)[:2]...)
		p.Close()
	}
	if len(k.away) != awayMax || k.away[0].stream != 101 {
		t.Errorf("%d steps are remembered, the first of stream %d", len(k.away), k.away[0].stream)
	}
}

func TestCheckAllocatesNothing(t *testing.T) {
	k := newKeeper(t, Config{MaxLag: 3})
	p := open(t, k, "w0", 5, manifest(t))
	step := uint64(1)
	columns := columnsOf(p.whole(step)...)
	check := func() {
		for i, h := range p.whole(step) {
			h.Put(columns.headers[i*tensor.HeaderBytes:])
		}
		step++
		if good, err := p.Check(columns.columns()); good != 3 || err != nil {
			t.Fatal(err)
		}
	}
	check()
	if n := testing.AllocsPerRun(100, check); n > 2 { // the slices of this test
		t.Errorf("%v allocations per step", n)
	}
}
