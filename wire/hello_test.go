package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/ingestd/ingestd/spec"
)

func parse(t testing.TB, text string) *spec.Spec {
	t.Helper()
	s, err := spec.ParseText(text)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func pushHello(t testing.TB) *Hello {
	s := parse(t, "image:F32[8,8],label:I32")
	return &Hello{
		VersionMin: 1, VersionMax: 3, Role: RolePush, Table: "digits", Spec: s, Fingerprint: s.Fingerprint(), Session: "w1",
		Ack: AckCommitted, WindowSamples: 64, WindowBytes: 1 << 20, Client: "test <1>",
	}
}

// frame makes a hello from a body as it is.
func frame(body string) []byte { return appendFrame(nil, 1, 1, []byte(body)) }

func wantRefusal(t *testing.T, err error, code Code, says string) {
	t.Helper()
	var r *Refusal
	if !errors.As(err, &r) {
		t.Fatalf("got %v, want a refusal %s that says %q", err, code, says)
	}
	if r.Code != code || !strings.Contains(r.Reason, says) {
		t.Errorf("refused with %s %q, want %s and %q", r.Code, r.Reason, code, says)
	}
	if len(r.Reason) > 2000 {
		t.Errorf("the reason has %d bytes", len(r.Reason))
	}
}

func TestHelloRoundTrip(t *testing.T) {
	s := parse(t, "image:F32[8,8],label:I32")
	for _, h := range []*Hello{
		pushHello(t),
		{VersionMin: 1, VersionMax: 1, Role: RolePush, Table: "d", Fingerprint: s.Fingerprint(), Ack: AckQueued},
		{VersionMin: 1, VersionMax: 65535, Role: RoleTrain, Table: strings.Repeat("t", NameBytesMax), Prefetch: 4, Spec: s},
		{VersionMin: 1, VersionMax: 1, Role: RoleTrain, Table: "d"},
		{VersionMin: 1, VersionMax: 1, Role: RoleObserve, Table: "d", Client: "c"},
		{VersionMin: 1, VersionMax: 1, Role: RoleTrain, Table: "d", Stream: true, Token: strings.Repeat("t", NameBytesMax), Nonce: Nonce{31: 1}},
		{VersionMin: 1, VersionMax: 1, Role: RolePush, Table: "d", Spec: s, Ack: AckQueued, Compression: CompressionZstdShuffle},
	} {
		b, err := AppendHello([]byte("before"), h)
		if err != nil {
			t.Fatal(err)
		}
		after := "samples that follow"
		for _, wrap := range []func(io.Reader) io.Reader{
			func(r io.Reader) io.Reader { return r }, iotest.OneByteReader, iotest.HalfReader, iotest.DataErrReader,
		} {
			rest := strings.NewReader(string(b[len("before"):]) + after)
			got, raw, err := ReadHelloFrame(wrap(rest))
			if err != nil || !reflect.DeepEqual(got, h) || !bytes.Equal(raw, b[len("before"):]) {
				t.Errorf("read back %+v, %v; want %+v", got, err, h)
			}
			if left, _ := io.ReadAll(rest); string(left) != after && rest.Len() != 0 {
				t.Errorf("the reader took bytes beyond the hello; left %q", left)
			}
		}
	}
}

func TestHelloDefaults(t *testing.T) {
	var b bytes.Buffer
	s := parse(t, "a:U8")
	if err := WriteHello(&b, &Hello{Role: RolePush, Table: "t", Spec: s}); err != nil {
		t.Fatal(err)
	}
	h, err := ReadHello(&b)
	if err != nil || h.VersionMin != Version || h.VersionMax != Version || h.Ack != AckQueued {
		t.Errorf("%+v, %v", h, err)
	}
}

func TestHelloEveryCut(t *testing.T) {
	whole, err := AppendHello(nil, pushHello(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ReadHello(bytes.NewReader(nil)); err != io.EOF {
		t.Errorf("nothing at all: %v", err)
	}
	for n := 1; n < len(whole); n++ {
		_, err := ReadHello(bytes.NewReader(whole[:n]))
		wantRefusal(t, err, CodeBadHandshake, fmt.Sprintf("ended after %d bytes", n))
		timeout := io.MultiReader(bytes.NewReader(whole[:n]), iotest.ErrReader(os.ErrDeadlineExceeded))
		_, err = ReadHello(timeout)
		wantRefusal(t, err, CodeHandshakeTimeout, fmt.Sprintf("%d bytes of it came", n))
	}
	_, err = ReadHello(iotest.ErrReader(os.ErrDeadlineExceeded))
	wantRefusal(t, err, CodeHandshakeTimeout, "0 bytes")
	reset := errors.New("connection reset")
	if _, err = ReadHello(iotest.ErrReader(reset)); !errors.Is(err, reset) {
		t.Errorf("a reset: %v", err)
	}
	if _, err = ReadHello(stuck{}); !errors.Is(err, io.ErrNoProgress) {
		t.Errorf("a reader that gives nothing: %v", err)
	}
}

// stuck never gives a byte nor an error.
type stuck struct{}

func (stuck) Read([]byte) (int, error) { return 0, nil }

func TestHelloHeaderRefused(t *testing.T) {
	header := func(low, high uint16, length uint32) []byte {
		b := appendFrame(nil, low, high, nil)
		binary.LittleEndian.PutUint32(b[12:], length)
		return b
	}
	for name, c := range map[string]struct {
		bytes []byte
		code  Code
		says  string
	}{
		"HTTP":           {[]byte("GET / HTTP/1.1\r\n"), CodeBadMagic, "admin address"},
		"TLS":            {[]byte("\x16\x03\x01\x02\x00"), CodeBadMagic, "TLS"},
		"big-endian":     {[]byte("\nDTSEGNI........"), CodeBadMagic, "not a hello"},
		"last byte":      {[]byte("INGESTD\r........"), CodeBadMagic, "not a hello"},
		"one byte":       {[]byte("X"), CodeBadMagic, `"X"`},
		"version 0":      {header(0, 1, 2), CodeBadHandshake, "versions 0 to 1"},
		"versions turn":  {header(3, 2, 2), CodeBadHandshake, "versions 3 to 2"},
		"later versions": {header(2, 9, 2), CodeBadVersion, "versions 2 to 9"},
		"no body":        {header(1, 1, 0), CodeBadHandshake, "has 0 bytes"},
		"short body":     {header(1, 1, 1), CodeBadHandshake, "has 1 bytes"},
		"long body":      {header(1, 1, BodyBytesMax+1), CodeBadHandshake, "2097153 bytes"},
		"1 GiB body":     {header(1, 1, 1<<30), CodeBadHandshake, "1073741824 bytes"},
		"4 GiB body":     {header(1, 1, 1<<32-1), CodeBadHandshake, "4294967295 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ReadHello(bytes.NewReader(c.bytes))
			wantRefusal(t, err, c.code, c.says)
		})
	}
}

func TestHelloBodyRefused(t *testing.T) {
	long, ones := strings.Repeat("x", NameBytesMax+1), strings.Repeat("11", 32)
	base := `{"role":"push","table":"t","byte_order":"little","spec":{"leaves":[{"name":"a","dtype":"U8","shape":[]}]}`
	with := func(field string) string { return base + "," + field + "}" }
	for body, c := range map[string]struct {
		code Code
		says string
	}{
		`[]`:                           {CodeBadHandshake, "not a JSON object"},
		`{"role":}`:                    {CodeBadHandshake, "not JSON: at byte 9"},
		base + "} x":                   {CodeBadHandshake, "not JSON: at byte"},
		"{\"role\":\"\xff\"}":          {CodeBadHandshake, "not UTF-8"},
		`{}`:                           {CodeBadHandshake, `"role" is missing`},
		`{"role":"push"}`:              {CodeBadHandshake, `"table" is missing`},
		`{"role":"read","table":"t"}`:  {CodeBadOption, `the role "read" is not known`},
		`{"role":5}`:                   {CodeBadHandshake, `"role" must be a string, not 5`},
		`{"role":null}`:                {CodeBadHandshake, `"role" must be a string, not null`},
		`{"Role":"push"}`:              {CodeBadHandshake, `the field "Role" is not known`},
		with(`"password":"x"`):         {CodeBadHandshake, `the field "password" is not known`},
		with(`"token":"x"`):            {CodeBadHandshake, `"token" and "nonce" go together`},
		with(`"nonce":"` + ones + `"`): {CodeBadHandshake, `"token" and "nonce" go together`},
		with(`"token":"","nonce":"` + ones + `"`):                             {CodeBadHandshake, `"token" and "nonce" go together`},
		with(`"token":"x","nonce":"` + strings.Repeat("0", 64) + `"`):         {CodeBadHandshake, `"token" and "nonce" go together`},
		with(`"token":"x","nonce":"` + ones[1:] + `"`):                        {CodeBadOption, "64 hex digits"},
		with(`"token":"x","nonce":"` + strings.Repeat("AB", 32) + `"`):        {CodeBadOption, "64 hex digits"},
		with(`"token":"x","nonce":["` + ones + `"]`):                          {CodeBadHandshake, `"nonce" must be a string`},
		with(`"token":"` + long + `","nonce":"` + ones + `"`):                 {CodeBadOption, `"token" has 129 bytes`},
		with(`"compression":"lz4"`):                                           {CodeBadOption, `the compression "lz4" is not known`},
		`{"role":"train","table":"t","byte_order":"little","compression":""}`: {CodeBadOption, `"compression" is not for the role train`},
		with(`"table":"t"`):                                                 {CodeBadHandshake, `"table" is there twice`},
		with(`"prefetch":1`):                                                {CodeBadOption, `"prefetch" is not for the role push`},
		with(`"session":"` + long + `"`):                                    {CodeBadOption, `"session" has 129 bytes`},
		with(`"client":"a\nb"`):                                             {CodeBadOption, "control character"},
		with(`"ack":"later"`):                                               {CodeBadOption, `the ack mode "later"`},
		with(`"window_samples":-1`):                                         {CodeBadOption, `"window_samples" is -1`},
		with(`"window_samples":1.5`):                                        {CodeBadHandshake, "must be a whole number, not 1.5"},
		with(`"window_bytes":null`):                                         {CodeBadHandshake, "not null"},
		with(`"window_bytes":"1"`):                                          {CodeBadHandshake, `not "1"`},
		with(`"window_bytes":99999999999999999999`):                         {CodeBadHandshake, "not 99999999999999999999"},
		with(`"fingerprint":"abc"`):                                         {CodeBadOption, "3 characters"},
		with(`"fingerprint":"` + ones + `"`):                                {CodeBadHandshake, "is not that of the spec beside it"},
		`{"role":"push","table":"t"}`:                                       {CodeBadHandshake, "must give the spec"},
		`{"role":"train","table":"t"}`:                                      {CodeBadHandshake, `"byte_order" is missing`},
		`{"role":"train","table":"t","byte_order":"big"}`:                   {CodeBadOption, `byte order "big"`},
		`{"role":"observe","table":"t","byte_order":"little","session":""}`: {CodeBadOption, `"session" is not for the role observe`},
		`{"role":"observe","table":"t","byte_order":"little","fingerprint":"` + ones + `"}`:                           {CodeBadOption, "not for the role observe"},
		`{"role":"push","table":"` + long + `","byte_order":"little"}`:                                                {CodeBadOption, `"table" has 129 bytes`},
		`{"role":"push","table":"t","byte_order":"little","spec":null}`:                                               {CodeBadOption, "must be an object, not null"},
		`{"role":"push","table":"t","byte_order":"little","spec":{"leaves":[]}}`:                                      {CodeBadOption, "no leaves"},
		`{"role":"push","table":"t","byte_order":"little","spec":{"leaves":[{"name":"a","dtype":"U8","shape":[0]}]}}`: {CodeBadOption, "is 0"},
	} {
		_, err := ReadHello(bytes.NewReader(frame(body)))
		wantRefusal(t, err, c.code, c.says)
	}
}

func TestHelloCheckedBeforeSending(t *testing.T) {
	for says, change := range map[string]func(h *Hello){
		"role":                  func(h *Hello) { h.Role = "" },
		`"table" is missing`:    func(h *Hello) { h.Table = "" },
		`"prefetch" is not for`: func(h *Hello) { h.Prefetch = 1 },
		`"window_bytes" is -1`:  func(h *Hello) { h.WindowBytes = -1 },
		"not UTF-8":             func(h *Hello) { h.Client = "\xff" },
		"no range":              func(h *Hello) { h.VersionMin = 4 },
		"not that of the spec":  func(h *Hello) { h.Fingerprint[0]++ },
	} {
		h := pushHello(t)
		change(h)
		if b, err := AppendHello(nil, h); err == nil || !strings.Contains(err.Error(), says) || len(b) > 0 {
			t.Errorf("%v; want %q", err, says)
		}
	}
}

// claims is a body that says it is long and of which little comes; it notes the largest buffer it was given.
type claims struct {
	data    io.Reader
	arrived int
	t       *testing.T
}

func (c *claims) Read(p []byte) (int, error) {
	if len(p) > max(4096, 2*c.arrived) {
		c.t.Errorf("a buffer of %d bytes when %d had arrived", len(p), c.arrived)
	}
	n, err := c.data.Read(p)
	c.arrived += n
	return n, err
}

func TestHelloMemoryFollowsArrival(t *testing.T) {
	b := appendFrame(nil, 1, 1, []byte(`{"role":`+strings.Repeat(" ", 100_000)))
	binary.LittleEndian.PutUint32(b[12:], BodyBytesMax)
	_, err := ReadHello(&claims{data: bytes.NewReader(b), t: t})
	wantRefusal(t, err, CodeBadHandshake, fmt.Sprintf("ended after %d bytes", len(b)))
}

func TestHelloLargestSpec(t *testing.T) {
	leaves := make([]spec.Leaf, spec.LeavesMax)
	for i := range leaves {
		n := fmt.Sprint(i)
		leaves[i] = spec.Leaf{Name: n + strings.Repeat("<", spec.NameBytesMax-len(n)), DType: spec.F8_E4M3, Shape: make([]int64, spec.DimsMax)}
		for d := range leaves[i].Shape {
			leaves[i].Shape[d] = 1
		}
	}
	s, err := spec.New(leaves)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := WriteHello(&b, &Hello{Role: RolePush, Table: "t", Spec: s}); err != nil {
		t.Fatal(err)
	}
	h, err := ReadHello(&b)
	if err != nil || !h.Spec.Equal(s) {
		t.Fatalf("%v", err)
	}
	// The refusal of a spec that differs everywhere carries the table's spec and as many differences as fit.
	other := parse(t, "a:U8")
	h.Spec = other
	if err := WriteRefusal(&b, h.CheckSpec(s)); err != nil {
		t.Fatal(err)
	}
	var refusal *Refusal
	if err := ReadReply(&b, new(AcceptedPush)); !errors.As(err, &refusal) || !refusal.Spec.Equal(s) || len(refusal.Diff) != DiffMax {
		t.Errorf("%v", err)
	}
}

func TestCheckSpec(t *testing.T) {
	table := parse(t, "image:F32[8,8],label:I32")
	for name, c := range map[string]struct {
		h    Hello
		says string
		diff int
	}{
		"same spec":         {Hello{Spec: table}, "", 0},
		"same fingerprint":  {Hello{Fingerprint: table.Fingerprint()}, "", 0},
		"neither":           {Hello{}, "", 0},
		"dtype":             {Hello{Spec: parse(t, "image:I32[8,8],label:I32")}, `leaf "image": got I32[8,8], want F32[8,8]`, 1},
		"renamed":           {Hello{Spec: parse(t, "img:F32[8,8],label:I32")}, `"image" is missing, got "img"`, 2},
		"transposed":        {Hello{Spec: parse(t, "image:F32[4,16],label:I32")}, "in 1 leaf;", 1},
		"order":             {Hello{Spec: parse(t, "label:I32,image:F32[8,8]")}, "in 2 leaves;", 2},
		"other fingerprint": {Hello{Fingerprint: spec.Fingerprint{1}}, "stands for image:F32[8,8],label:I32", 0},
	} {
		t.Run(name, func(t *testing.T) {
			c.h.Table = "digits"
			r := c.h.CheckSpec(table)
			if c.says == "" {
				if r != nil {
					t.Errorf("refused: %v", r)
				}
				return
			}
			if r == nil || r.Code != CodeSpecMismatch || r.Spec != table || len(r.Diff) != c.diff ||
				!strings.Contains(r.Error(), c.says) || !strings.Contains(r.Error(), `"digits"`) {
				t.Errorf("%v, %d differences; want %q", r, len(r.Diff), c.says)
			}
		})
	}
}
