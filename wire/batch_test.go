package wire

import (
	"bytes"
	"errors"
	"io"
	"testing"
)

// TestBatchHeader: what is written is read again; every changed byte but those of number and loss is refused, and so is what was cut short.
func TestBatchHeader(t *testing.T) {
	shape := BatchShape{BatchSize: 16, SampleBytes: 260, Leaves: 2}
	want := BatchHeader{Count: 16, Number: 7, LostFirst: 3, LostCount: 2, PayloadBytes: 16 * (260 + 24), Columns: 5}
	b := AppendBatchHeader(nil, &want)
	var got BatchHeader
	if err := (&BatchReader{R: bytes.NewReader(b), Shape: shape}).Next(&got); err != nil || got != want || len(b) != BatchHeaderBytes {
		t.Fatalf("%+v, %v", got, err)
	}
	for i := range b {
		bad := bytes.Clone(b)
		bad[i] ^= 0x10
		err := (&BatchReader{R: bytes.NewReader(bad), Shape: shape}).Next(&got)
		if free := i >= 8 && i < 32; free != (err == nil) || !free && !errors.Is(err, ErrProtocol) {
			t.Errorf("byte %d changed: %v", i, err)
		}
		err = (&BatchReader{R: bytes.NewReader(b[:i]), Shape: shape}).Next(&got)
		if want := map[bool]error{true: io.EOF, false: io.ErrUnexpectedEOF}[i == 0]; !errors.Is(err, want) {
			t.Errorf("cut at %d: %v", i, err)
		}
	}
}

// TestBatchHeaderLimits: rows up to the batch size, and none only with a loss.
func TestBatchHeaderLimits(t *testing.T) {
	shape := BatchShape{BatchSize: 16, SampleBytes: 260, Leaves: 2}
	full := func(rows uint32) BatchHeader {
		return BatchHeader{Count: rows, PayloadBytes: uint64(shape.PayloadBytes(int64(rows))), Columns: 5}
	}
	for _, c := range []struct {
		h  BatchHeader
		ok bool
	}{
		{full(1), true}, {full(16), true}, {full(17), false}, {full(1<<32 - 1), false},
		{BatchHeader{}, false}, {BatchHeader{LostCount: 1}, true}, {BatchHeader{LostCount: 1, Number: 1}, false}, {BatchHeader{LostCount: 1, Columns: 5}, false},
		{BatchHeader{LostCount: 1, PayloadBytes: 1}, false},
	} {
		var got BatchHeader
		if err := (&BatchReader{R: bytes.NewReader(AppendBatchHeader(nil, &c.h)), Shape: shape}).Next(&got); (err == nil) != c.ok {
			t.Errorf("%+v: %v", c.h, err)
		}
	}
}

// TestBatchHeaderNotice: a closing notice may stand in its place.
func TestBatchHeaderNotice(t *testing.T) {
	var got BatchHeader
	r := bytes.NewReader(AppendNotice(nil, &Notice{CodeEndOfStream, "over"}))
	err := (&BatchReader{R: r, Shape: BatchShape{1, 1, 1}}).Next(&got)
	if n := (*Notice)(nil); !errors.As(err, &n) || n.Code != CodeEndOfStream || r.Len() != 0 {
		t.Errorf("%v, %d bytes left", err, r.Len())
	}
}
