package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
	"unicode/utf8"

	"github.com/ingestd/ingestd/spec"
)

func replies(t testing.TB) []Accepted {
	s := parse(t, "image:F32[8,8],label:I32")
	return []Accepted{
		&AcceptedPush{Table: "digits", Fingerprint: s.Fingerprint(), Stream: 1<<64 - 1, Ack: AckQueued, WindowSamples: 1, WindowBytes: 1 << 40, Held: 7},
		&AcceptedTrain{Table: "digits", Spec: s, Fingerprint: s.Fingerprint(), Trainer: 2, BatchSize: 32, Batches: 8, SegmentBytes: 1 << 20,
			ChannelBytes: 4096, Prefetch: 2},
		&AcceptedObserve{Table: "digits", Spec: s, Fingerprint: s.Fingerprint(), BatchSize: 32, Batches: 8, SegmentBytes: 1 << 20},
		&AcceptedPush{Table: "digits", Fingerprint: s.Fingerprint(), Ack: AckQueued, WindowSamples: 1, WindowBytes: 1, Compression: CompressionS2},
		&AcceptedRemoteTrain{Table: "digits", Spec: s, Fingerprint: s.Fingerprint(), Trainer: 2, Group: "g", BatchSize: 32, Prefetch: 2, Created: 1_700_000_000_000_000_000},
	}
}

func TestAcceptedRoundTrip(t *testing.T) {
	for _, want := range replies(t) {
		var b bytes.Buffer
		if err := WriteAccepted(&b, want); err != nil {
			t.Fatal(err)
		}
		whole := bytes.Clone(b.Bytes())
		b.WriteString("acks")
		got := reflect.New(reflect.TypeOf(want).Elem()).Interface().(Accepted)
		if err := ReadReply(iotest.OneByteReader(&b), got); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("read back %+v, %v", got, err)
		}
		if b.String() != "acks" {
			t.Errorf("left over: %q", b.String())
		}
		for n := range whole {
			if err := ReadReply(bytes.NewReader(whole[:n]), got); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatalf("cut at %d: %v", n, err)
			}
		}
	}
}

func TestAcceptedIgnoresUnknownFields(t *testing.T) {
	s := parse(t, "a:U8")
	body := `{"table":"t","new":{"x":[1]},"fingerprint":"` + s.Fingerprint().String() +
		`","stream":3,"ack":"queued","window_samples":4,"window_bytes":5,"held":0}`
	var a AcceptedPush
	if err := ReadReply(bytes.NewReader(appendFrame(nil, 1, 0, []byte(body))), &a); err != nil || a.Stream != 3 {
		t.Errorf("%+v, %v", a, err)
	}
}

func TestAcceptedChecked(t *testing.T) {
	for _, a := range []Accepted{
		&AcceptedPush{}, &AcceptedTrain{}, &AcceptedObserve{}, &AcceptedRemoteTrain{},
		&AcceptedPush{Ack: AckQueued, Fingerprint: spec.Fingerprint{1}, WindowSamples: 1, WindowBytes: 1, Compression: "lz4"},
		&AcceptedRemoteTrain{Spec: parse(t, "a:U8"), Fingerprint: spec.Fingerprint{1}, BatchSize: 1, Prefetch: 1},
		&AcceptedRemoteTrain{Spec: parse(t, "a:U8"), Fingerprint: parse(t, "a:U8").Fingerprint(), BatchSize: 1},
		&AcceptedPush{Ack: AckQueued, Fingerprint: spec.Fingerprint{1}, WindowSamples: 0, WindowBytes: 1},
		&AcceptedObserve{Spec: parse(t, "a:U8"), BatchSize: 1, Batches: 2, SegmentBytes: 1},
	} {
		if b, err := AppendAccepted(nil, a); err == nil || len(b) > 0 {
			t.Errorf("%+v was encoded", a)
		}
	}
}

func TestReplyIsNotOurs(t *testing.T) {
	long := appendFrame(nil, 1, 0, nil)
	binary.LittleEndian.PutUint32(long[12:], BodyBytesMax+1)
	for name, c := range map[string]struct {
		bytes []byte
		says  string
	}{
		"http":        {[]byte("HTTP/1.1 400 Bad Request\r\n"), "is this the address of an ingestd daemon?"},
		"echo":        {[]byte("ECHO\x01\x02\x00\x00\x00"), "echo:// address"},
		"status":      {appendFrame(nil, 1, 3, []byte("{}")), "status is 3"},
		"version":     {appendFrame(nil, 2, 0, []byte("{}")), "chose protocol version 2"},
		"long":        {long, "2097153 bytes"},
		"not JSON":    {appendFrame(nil, 1, 0, []byte("{x")), "the reply's body"},
		"empty":       {appendFrame(nil, 1, 0, []byte("{}")), "ack mode"},
		"no code":     {appendFrame(nil, 1, 1, []byte("{}")), "no code"},
		"bad refusal": {appendFrame(nil, 1, 1, []byte(`{"code":1}`)), "the refusal's body"},
		"bad diff":    {appendFrame(nil, 1, 1, []byte(`{"code":"x","diff":{}}`)), "not an array"},
	} {
		t.Run(name, func(t *testing.T) {
			err := ReadReply(bytes.NewReader(c.bytes), new(AcceptedPush))
			if !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v; want %q", err, c.says)
			}
		})
	}
	if err := ReadReply(iotest.ErrReader(os.ErrDeadlineExceeded), new(AcceptedPush)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a deadline: %v", err)
	}
}

func TestRefusal(t *testing.T) {
	table := parse(t, "a:U8,b:F32[2]")
	h := Hello{Table: "t", Spec: parse(t, "a:I8,c:F32[2]")}
	want := h.CheckSpec(table)
	var b bytes.Buffer
	if err := WriteRefusal(&b, want); err != nil {
		t.Fatal(err)
	}
	var got *Refusal
	if err := ReadReply(&b, new(AcceptedPush)); !errors.As(err, &got) || !reflect.DeepEqual(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	// A refusal is read whatever version the daemon speaks.
	late := appendFrame(nil, 9, statusRefused, []byte(`{"code":"bad_version","reason":"update","hint":1}`))
	if err := ReadReply(bytes.NewReader(late), new(AcceptedPush)); !errors.As(err, &got) || got.Code != CodeBadVersion {
		t.Errorf("%v", err)
	}
}

func TestRefusalIsCut(t *testing.T) {
	r := Refuse(CodeInternal, "%s", strings.Repeat("é\x01\xff", ReasonBytesMax))
	for range 3 * DiffMax {
		r.Diff = append(r.Diff, spec.Difference{Leaf: "x", Got: "U8"})
	}
	var got *Refusal
	if err := ReadReply(bytes.NewReader(AppendRefusal(nil, r)), new(AcceptedPush)); !errors.As(err, &got) {
		t.Fatal(err)
	}
	if len(got.Reason) > ReasonBytesMax || len(got.Reason) < ReasonBytesMax-8 || !utf8.ValidString(got.Reason) ||
		!strings.HasSuffix(got.Reason, "...") || len(got.Diff) != DiffMax {
		t.Errorf("a reason of %d bytes, %d differences", len(got.Reason), len(got.Diff))
	}
	r.Diff[0].Leaf = strings.Repeat("x", BodyBytesMax)
	if err := ReadReply(bytes.NewReader(AppendRefusal(nil, r)), new(AcceptedPush)); !errors.As(err, &got) || got.Diff != nil || got.Code != CodeInternal {
		t.Errorf("a difference too long to send: %v", err)
	}
}

func TestManyDifferencesReadAreCut(t *testing.T) {
	body := `{"code":"spec_mismatch","reason":"r","diff":[{}` + strings.Repeat(",{}", 100_000) + `]}`
	var got *Refusal
	if err := ReadReply(bytes.NewReader(appendFrame(nil, 1, 1, []byte(body))), new(AcceptedPush)); !errors.As(err, &got) || len(got.Diff) != DiffMax {
		t.Errorf("%v", err)
	}
}

func TestNotice(t *testing.T) {
	want := &Notice{CodeStalled, "a sample stopped <half-way>"}
	b := AppendNotice([]byte{Ack}, want)
	if b[0] != Ack || b[1] != NoticeMark {
		t.Errorf("starts with % x", b[:2])
	}
	got, err := ReadNotice(iotest.OneByteReader(bytes.NewReader(b[2:])))
	if err != nil || *got != *want || got.Error() != "the daemon ended the stream (stalled): a sample stopped <half-way>" {
		t.Errorf("%v, %v", got, err)
	}
	for n := range b[2:] {
		if _, err := ReadNotice(bytes.NewReader(b[2 : 2+n])); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut at %d: %v", n, err)
		}
	}
	hard := AppendNotice(nil, &Notice{CodeInternal, strings.Repeat("\x01", 1<<20)})
	if got, err := ReadNotice(bytes.NewReader(hard[1:])); err != nil || len(got.Reason) != ReasonBytesMax {
		t.Errorf("a long reason: %v", err)
	}
	for says, b := range map[string]string{
		"has 1 bytes": "\x01\x00\x00\x00{", "has 65537 bytes": "\x01\x00\x01\x00", "no code": "\x02\x00\x00\x00{}", "the closing notice:": "\x02\x00\x00\x00{{",
	} {
		if _, err := ReadNotice(strings.NewReader(b)); !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), says) {
			t.Errorf("%v; want %q", err, says)
		}
	}
}

func TestCodesAreListedOnce(t *testing.T) {
	seen := map[Code]bool{}
	for _, c := range Codes() {
		if seen[c] {
			t.Errorf("%s twice", c)
		}
		seen[c] = true
	}
}
