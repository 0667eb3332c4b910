package fuzz

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// dribble gives what it has in pieces of at most piece bytes, then an end.
type dribble struct {
	left  []byte
	piece int
}

func (d *dribble) Read(b []byte) (int, error) {
	if len(d.left) == 0 {
		return 0, io.EOF
	}
	n := copy(b[:min(len(b), d.piece)], d.left)
	d.left = d.left[n:]
	return n, nil
}

// messageMax is the longest input of these targets. Far above it only the limits matter, and the tests of wire have both sides of those.
const messageMax = 64 << 10

func mustSpec(t testing.TB, text string) *spec.Spec {
	t.Helper()
	s, err := spec.ParseText(text)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// frame is a message with a body of any kind and length.
func frame(a, b uint16, announced int, body string) []byte {
	out := binary.LittleEndian.AppendUint16([]byte(wire.Magic), a)
	out = binary.LittleEndian.AppendUint16(out, b)
	out = binary.LittleEndian.AppendUint32(out, uint32(announced))
	return append(out, body...)
}

// FuzzHello: whatever comes, ReadHello returns a hello, a refusal that can be sent, or io.EOF for nothing at all. It takes exactly the hello from the
// stream, and what it takes can be said again: written and read it is the same.
func FuzzHello(f *testing.F) {
	digits := mustSpec(f, "image:F32[8,8],label:I32")
	for _, h := range []*wire.Hello{
		{Role: wire.RolePush, Table: "digits", Spec: digits, Session: "worker-1", WindowBytes: 1 << 20, Client: "example/1.0"},
		{Role: wire.RolePush, Table: "d", Fingerprint: digits.Fingerprint(), Ack: wire.AckCommitted, WindowSamples: 1},
		{Role: wire.RoleTrain, Table: "grüße", Prefetch: 3, Spec: digits, Fingerprint: digits.Fingerprint()},
		{Role: wire.RoleObserve, Table: strings.Repeat("t", wire.NameBytesMax)},
	} {
		b := must(wire.AppendHello(nil, h))
		f.Add(b, byte(0))
		f.Add(append(b, "and samples"...), byte(1))
		f.Add(b[:len(b)-1], byte(7))
	}
	f.Add([]byte{}, byte(0))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"), byte(3))
	f.Add(frame(1, 1, wire.BodyBytesMax, "{"), byte(0))
	f.Add(frame(1, 1, 1<<30, "{}"), byte(0))
	f.Add(frame(2, 9, 2, "{}"), byte(0))
	f.Add(frame(1, 1, 54, `{"role":"observe","table":"t","byte_order":"little"} x`), byte(0))
	f.Add(frame(1, 1, 54, `{"role":"push","role":"push","table":null,"spec":[[[[]]`), byte(0))
	f.Fuzz(func(t *testing.T, in []byte, piece byte) {
		in = in[:min(len(in), messageMax)]
		var r *dribble
		var h *wire.Hello
		var err error
		checkAllocated(t, len(in), func() {
			r = &dribble{left: in, piece: 1 + int(piece)}
			h, err = wire.ReadHello(r)
		})
		if err != nil {
			checkRefused(t, err, in)
			return
		}
		want := 16 + int(binary.LittleEndian.Uint32(in[12:]))
		if len(in)-len(r.left) != want {
			t.Fatalf("took %d bytes of a hello of %d", len(in)-len(r.left), want)
		}
		body := in[16:want]
		if !json.Valid(body) {
			t.Fatalf("accepted, and not JSON: %q", body)
		}
		again, err := wire.AppendHello(nil, h)
		if err != nil {
			t.Fatalf("a hello was accepted that cannot be said: %v\n%s", err, body)
		}
		h2, err := wire.ReadHello(bytes.NewReader(again))
		if err != nil || !reflect.DeepEqual(h, h2) {
			t.Fatalf("said again it is another hello (%v):\n%+v\n%+v", err, h, h2)
		}
	})
}

// checkRefused: the peer can be told why, and reads what it was told.
func checkRefused(t *testing.T, err error, in []byte) {
	t.Helper()
	var refusal *wire.Refusal
	if err == io.EOF {
		if len(in) > 0 {
			t.Fatalf("io.EOF after %d bytes", len(in))
		}
		return
	}
	if !errors.As(err, &refusal) {
		t.Fatalf("not a refusal: %v", err)
	}
	if refusal.Code == "" || refusal.Reason == "" {
		t.Fatalf("a refusal without code or reason: %+v", refusal)
	}
	told := wire.ReadReply(bytes.NewReader(wire.AppendRefusal(nil, refusal)), new(wire.AcceptedPush))
	var got *wire.Refusal
	if !errors.As(told, &got) || got.Code != refusal.Code || got.Reason == "" {
		t.Fatalf("told as %v, was %v", told, refusal)
	}
}

// FuzzReply: whatever a daemon answers, the client gets a reply that makes sense, a refusal, or an error that says what came instead.
func FuzzReply(f *testing.F) {
	digits := mustSpec(f, "image:F32[8,8],label:I32")
	for _, a := range []wire.Accepted{
		&wire.AcceptedPush{Table: "digits", Fingerprint: digits.Fingerprint(), Stream: 1, Ack: wire.AckQueued, WindowSamples: 4032, WindowBytes: 1 << 20},
		&wire.AcceptedTrain{Table: "t", Spec: digits, Fingerprint: digits.Fingerprint(), Trainer: 7, BatchSize: 1, Batches: 2, SegmentBytes: 9, ChannelBytes: 9, Prefetch: 1},
		&wire.AcceptedObserve{Table: "t", Spec: digits, Fingerprint: digits.Fingerprint(), BatchSize: 1, Batches: 2, SegmentBytes: 1 << 40},
	} {
		b := must(wire.AppendAccepted(nil, a))
		for kind := range byte(3) {
			f.Add(b, byte(kind), kind)
		}
		f.Add(append(b, wire.Ack, wire.NoticeMark), byte(0), byte(0))
	}
	mismatch := wire.Refuse(wire.CodeSpecMismatch, "the label differs")
	mismatch.Diff, mismatch.Spec = spec.Diff(mustSpec(f, "label:I64,image:F32[8,8]"), digits), digits
	f.Add(wire.AppendRefusal(nil, mismatch), byte(255), byte(0))
	f.Add(wire.AppendRefusal(nil, wire.Refuse(wire.CodeInternal, "%s", strings.Repeat("why ", 4096))), byte(255), byte(0))
	f.Add(frame(1, 1, 32, `{"code":"x","diff":[{},{},null]}`), byte(0), byte(1))
	f.Add([]byte("ECHO\x01\x01\x00\x00\x00"), byte(0), byte(0))
	f.Add(frame(1, 0, wire.BodyBytesMax, "{"), byte(0), byte(0))
	f.Fuzz(func(t *testing.T, in []byte, piece, kind byte) {
		in = in[:min(len(in), messageMax)]
		fresh := func() wire.Accepted {
			return [...]wire.Accepted{new(wire.AcceptedPush), new(wire.AcceptedTrain), new(wire.AcceptedObserve)}[kind%3]
		}
		var r *dribble
		var a wire.Accepted
		var err error
		checkAllocated(t, len(in), func() {
			r, a = &dribble{left: in, piece: 1 + int(piece)}, fresh()
			err = wire.ReadReply(r, a)
		})
		var refusal *wire.Refusal
		switch {
		case errors.As(err, &refusal):
			checkRefusalAgain(t, refusal)
			return
		case err != nil:
			if !errors.Is(err, wire.ErrProtocol) && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatalf("an error of no known kind: %v", err)
			}
			return
		}
		if want := 16 + int(binary.LittleEndian.Uint32(in[12:])); len(in)-len(r.left) != want {
			t.Fatalf("took %d bytes of a reply of %d", len(in)-len(r.left), want)
		}
		b, err := wire.AppendAccepted(nil, a)
		if err != nil {
			t.Fatalf("a reply was accepted that cannot be said: %v", err)
		}
		a2 := fresh()
		if err := wire.ReadReply(bytes.NewReader(b), a2); err != nil || !reflect.DeepEqual(a, a2) {
			t.Fatalf("said again it is another reply (%v):\n%+v\n%+v", err, a, a2)
		}
	})
}

// checkRefusalAgain: a refusal within the limits is the same when it is said again; a longer one is cut, once.
func checkRefusalAgain(t *testing.T, refusal *wire.Refusal) {
	t.Helper()
	say := func(r *wire.Refusal) *wire.Refusal {
		var got *wire.Refusal
		if err := wire.ReadReply(bytes.NewReader(wire.AppendRefusal(nil, r)), new(wire.AcceptedPush)); !errors.As(err, &got) {
			t.Fatalf("a refusal was said as %v", err)
		}
		return got
	}
	if refusal.Error() == "" {
		t.Fatal("a refusal that says nothing")
	}
	once := say(refusal)
	if long := len(refusal.Reason) > wire.ReasonBytesMax || len(refusal.Code) > wire.NameBytesMax; !long && !reflect.DeepEqual(once, refusal) {
		t.Fatalf("said again it is another refusal:\n%+v\n%+v", refusal, once)
	}
	if twice := say(once); !reflect.DeepEqual(once, twice) {
		t.Fatalf("cut twice:\n%+v\n%+v", once, twice)
	}
}

// FuzzNotice: whatever follows the mark, the client gets a notice with a code or an error that says what came instead.
func FuzzNotice(f *testing.F) {
	for _, n := range []*wire.Notice{
		{Code: wire.CodeShuttingDown, Reason: "the daemon is stopping; connect again later"},
		{Code: wire.CodeStalled, Reason: strings.Repeat("\x00\"ü", 3000)},
	} {
		f.Add(wire.AppendNotice(nil, n)[1:], byte(0))
		f.Add(wire.AppendNotice(nil, n)[1:], byte(255))
	}
	f.Add([]byte{}, byte(0))
	f.Add([]byte{2, 0, 0, 0, '{', '}'}, byte(0))
	f.Add([]byte{255, 255, 255, 255, '{'}, byte(0))
	f.Fuzz(func(t *testing.T, in []byte, piece byte) {
		in = in[:min(len(in), messageMax)]
		var r *dribble
		var n *wire.Notice
		var err error
		checkAllocated(t, len(in), func() {
			r = &dribble{left: in, piece: 1 + int(piece)}
			n, err = wire.ReadNotice(r)
		})
		if err != nil {
			if !errors.Is(err, wire.ErrProtocol) && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatalf("an error of no known kind: %v", err)
			}
			return
		}
		if want := 4 + int(binary.LittleEndian.Uint32(in)); len(in)-len(r.left) != want {
			t.Fatalf("took %d bytes of a notice of %d", len(in)-len(r.left), want)
		}
		say := func(n *wire.Notice) *wire.Notice {
			b := wire.AppendNotice(nil, n)
			got, err := wire.ReadNotice(bytes.NewReader(b[1:]))
			if b[0] != wire.NoticeMark || err != nil {
				t.Fatalf("said again: mark %#x, %v", b[0], err)
			}
			return got
		}
		once := say(n)
		if long := len(n.Reason) > wire.ReasonBytesMax || len(n.Code) > wire.NameBytesMax; !long && *once != *n {
			t.Fatalf("said again it is another notice:\n%+v\n%+v", n, once)
		}
		if twice := say(once); *once != *twice {
			t.Fatalf("cut twice:\n%+v\n%+v", once, twice)
		}
	})
}
