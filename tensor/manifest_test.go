package tensor

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"strings"
	"testing"

	"github.com/ingestd/ingestd/spec"
)

// mlp is the manifest of docs/tensors.md.
const mlp = `{"tensors":[{"name":"layers.0.w","dtype":"F32","shape":[512,64]},{"name":"layers.0.b","dtype":"F32","shape":[512],"encoding":"bf16"}],"metadata":{"model":"mlp"}}`

func parsed(t testing.TB, text string) *Manifest {
	t.Helper()
	m, err := ParseManifest([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func made(t testing.TB, tensors ...Tensor) *Manifest {
	t.Helper()
	m, err := NewManifest(tensors, nil)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func u8(name string, n int64) Tensor { return Tensor{Name: name, DType: spec.U8, Shape: []int64{n}} }

func f32(name string, n int64, e Encoding) Tensor {
	return Tensor{Name: name, DType: spec.F32, Shape: []int64{n}, Encoding: e}
}

func TestManifest(t *testing.T) {
	m := parsed(t, mlp)
	if m.Len() != 2 || string(m.JSON()) != mlp || !maps.Equal(m.Metadata(), map[string]string{"model": "mlp"}) {
		t.Errorf("%d tensors, %v, %s", m.Len(), m.Metadata(), m.JSON())
	}
	b := m.Tensor(1)
	if i, ok := m.Index("layers.0.b"); !ok || i != 1 || b.Type() != "F32[512] bf16" || b.Elements() != 512 {
		t.Errorf("%v %v %s %d", i, ok, b.Type(), b.Elements())
	}
	if _, ok := m.Index("b"); ok {
		t.Error("found a tensor that is not there")
	}
	if m.Offset(0) != 0 || m.EncodedBytes(0) != 131072 || m.Offset(1) != 131072 || m.EncodedBytes(1) != 1024 || m.DataBytes() != 132096 {
		t.Errorf("layout %d %d %d", m.offsets, m.ends, m.dataBytes)
	}
	// The encoding of the docs, by hand.
	canonical := "ingestd-manifest-1\n" + "\x02\x00\x00\x00" +
		"\x0a\x00layers.0.w\x03F32\x02\x00\x02\x00\x00\x00\x00\x00\x00\x40\x00\x00\x00\x00\x00\x00\x00\x00" +
		"\x0a\x00layers.0.b\x03F32\x01\x00\x02\x00\x00\x00\x00\x00\x00\x04bf16"
	sum := sha256.Sum256([]byte(canonical))
	if m.Fingerprint() != sum {
		t.Errorf("fingerprint %v, want %s", m.Fingerprint(), hex.EncodeToString(sum[:]))
	}
	if got := fmt.Sprintf("%016x", m.ID()); got != hex.EncodeToString([]byte{sum[7], sum[6], sum[5], sum[4], sum[3], sum[2], sum[1], sum[0]}) {
		t.Errorf("id %s of %x", got, sum)
	}
	other := parsed(t, strings.Replace(mlp, `{"model":"mlp"}`, `{"model":"cnn","x":"y"}`, 1))
	if !m.Equal(other) || other.Fingerprint() != m.Fingerprint() {
		t.Error("metadata counts in the fingerprint")
	}
	if m.Equal(parsed(t, strings.Replace(mlp, "bf16", "f16", 1))) {
		t.Error("the encoding does not count in the fingerprint")
	}
	var again Manifest
	if text, err := json.Marshal(m); err != nil || json.Unmarshal(text, &again) != nil || !again.Equal(m) {
		t.Errorf("JSON round trip: %v", err)
	}
	if _, err := json.Marshal(&Manifest{}); err == nil {
		t.Error("a zero Manifest was written")
	}
	if ProducerID("worker-1") == ProducerID("worker-2") {
		t.Error("two names have one id")
	}
}

func TestManifestIsImmutable(t *testing.T) {
	shape, metadata := []int64{3}, map[string]string{"a": "b"}
	m, err := NewManifest([]Tensor{{Name: "x", DType: spec.U8, Shape: shape}}, metadata)
	if err != nil {
		t.Fatal(err)
	}
	shape[0], metadata["a"] = 9, "c"
	m.Metadata()["a"] = "d"
	if x := m.Tensor(0); x.Shape[0] != 3 || m.Metadata()["a"] != "b" {
		t.Error("the manifest changed with its caller's memory")
	}
}

func TestLayout(t *testing.T) {
	m := made(t, u8("a", 1), u8("empty", 0), u8("b", 256), f32("c", 300, Encoding{Kind: F8E4M3}), f32("d", 300, Encoding{Kind: TopK, K: 3}),
		f32("e", 0, Encoding{Kind: F8E5M2}), Tensor{Name: "scalar", DType: spec.F64})
	wantOffset, wantBytes := []int64{0, 256, 256, 512, 1280, 1536, 1536}, []int64{1, 0, 256, 556, 24, 0, 8}
	for i := range m.Len() {
		if m.Offset(i) != wantOffset[i] || m.EncodedBytes(i) != wantBytes[i] {
			t.Errorf("tensor %d: offset %d, bytes %d", i, m.Offset(i), m.EncodedBytes(i))
		}
	}
	if m.DataBytes() != 1792 {
		t.Errorf("data bytes %d", m.DataBytes())
	}
	for flat, want := range map[int64]int{0: 0, 511: 2, 256: 2, 512: 3, 1067: 3, 1068: 4, 1279: 4, 1280: 4, 1303: 4, 1536: 6, 1543: 6, 1544: 7, 1791: 7, 1 << 40: 7} {
		if got := m.At(flat); got != want {
			t.Errorf("At(%d) = %d, want %d", flat, got, want)
		}
	}
	if m := made(t, u8("a", 0)); m.DataBytes() != 0 || m.At(0) != 1 {
		t.Errorf("an empty manifest has %d bytes", m.DataBytes())
	}
}

// one is a manifest with these fields in its only tensor.
func one(fields string) string { return `{"tensors":[{` + fields + `}]}` }

func TestManifestRefuses(t *testing.T) {
	many := func(n int, entry string) string { return strings.TrimSuffix(strings.Repeat(entry+",", n), ",") }
	metadata := func(n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, `,"%d":""`, i)
		}
		return `{"tensors":[{"name":"a","dtype":"U8","shape":[]}],"metadata":{` + b.String()[1:] + `}}`
	}
	const a = `"name":"a","dtype":"U8","shape":[1]`
	for text, want := range map[string]string{
		``:                                       "ends too early",
		`[]`:                                     "want an object",
		`{}`:                                     `"tensors" is missing`,
		`{"tensors":[]}`:                         "no tensors",
		`{"tensors":null}`:                       "found null",
		`{"tensors":[{` + a + `}],"x":1}`:        `"x" is unknown`,
		`{"tensors":[],"tensors":[]}`:            `"tensors" is there twice`,
		one(a) + `x`:                             "follows the end",
		one(a + `,"name":"b"`):                   `"name" is there twice`,
		one(a + `,"size":1`):                     `"size" is unknown`,
		one(`"name":"a","dtype":"U8"`):           `"shape" is missing`,
		one(a + `,"encoding":""`):                "leave it out",
		one(a + `,"encoding":null`):              "found null",
		one(a + `,"encoding":"bf16"`):            "for F32 only",
		one(a + `,"encoding":"zip"`):             `encoding "zip" is not known`,
		one(`"name":"","dtype":"U8","shape":[]`): "name is empty",
		one(`"name":"a\nb","dtype":"U8","shape":[]`):                                                            "control character U+000A",
		one(`"name":"a\u0085b","dtype":"U8","shape":[]`):                                                        "control character U+0085",
		one(`"name":"\ud800","dtype":"U8","shape":[]`):                                                          "escape of a whole character",
		one("\"name\":\"\xff\",\"dtype\":\"U8\",\"shape\":[]"):                                                  "not UTF-8",
		one(`"name":"` + strings.Repeat("x", 513) + `","dtype":"U8","shape":[]`):                                "513 bytes",
		one(`"name":"a","dtype":"float32","shape":[]`):                                                          "written F32",
		one(`"name":"a","dtype":"C64","shape":[]`):                                                              "not known",
		one(`"name":"a","dtype":8,"shape":[]`):                                                                  "want a string",
		one(`"name":"a","dtype":"U8","shape":[-1]`):                                                             "dimension 0 of shape [-1] is -1",
		one(`"name":"a","dtype":"U8","shape":[1.0]`):                                                            "without fraction",
		one(`"name":"a","dtype":"U8","shape":[9223372036854775808]`):                                            "64 bits",
		one(`"name":"a","dtype":"U8","shape":[1,1,1,1,1,1,1,1,1]`):                                              "more than 8 dimensions",
		one(`"name":"a","dtype":"U8","shape":[1099511627777]`):                                                  "must be 0 to",
		one(`"name":"a","dtype":"U8","shape":[1099511627776,2]`):                                                "more than 1099511627776 elements",
		one(`"name":"a","dtype":"U16","shape":[549755813889]`):                                                  "larger than all tensors together",
		one(`"name":"a","dtype":"F32","shape":[1099511627521],"encoding":"f8_e4m3"`):                            "larger than all tensors together",
		one(`"name":"a","dtype":"F32","shape":[4],"encoding":"topk:5"`):                                         "at most the number of elements",
		one(`"name":"a","dtype":"F32","shape":[4],"encoding":"topk:0"`):                                         "topk must be followed",
		one(`"name":"a","dtype":"F32","shape":[4],"encoding":"topk:01"`):                                        "topk must be followed",
		one(`"name":"a","dtype":"F32","shape":[4],"encoding":"topk:+1"`):                                        "topk must be followed",
		one(`"name":"a","dtype":"F32","shape":[0],"encoding":"topk:1"`):                                         "at most the number of elements",
		one(`"name":"a","dtype":"F32","shape":[4294967295],"encoding":"topk:1"`):                                "less than 4294967295",
		`{"tensors":[{` + a + `},{` + a + `}]}`:                                                                 `tensors 0 and 1 are both named "a"`,
		`{"tensors":[{"name":"a","dtype":"U8","shape":[1]},{"name":"b","dtype":"U8","shape":[1099511627776]}]}`: "larger than they may be together",
		`{"tensors":[` + many(65537, `{}`) + `]}`:                                                               `"name" is missing`,
		`{"tensors":[{` + a + `}],"metadata":{"a":1}}`:                                                          "want a string",
		`{"tensors":[{` + a + `}],"metadata":{"a":"","a":""}}`:                                                  `"a" is there twice`,
		metadata(1025): "more than 1024 entries",
		one(a) + strings.Repeat(" ", TextBytesMax): "at most 2000000 are allowed",
	} {
		if _, err := ParseManifest([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.100s: got %v, want %q", text, err, want)
		}
	}
	for _, text := range []string{
		one(a) + strings.Repeat(" ", TextBytesMax-len(one(a))),
		one(`"name":"` + strings.Repeat("x", 512) + `","dtype":"U8","shape":[]`),
		one(`"name":"a","dtype":"U8","shape":[1,1,1,1,1,1,1,1]`),
		one(`"name":"a","dtype":"U8","shape":[1099511627776]`),
		one(`"name":"a","dtype":"F64","shape":[0,1099511627776,1099511627776]`),
		one(`"name":"a","dtype":"F32","shape":[1099511627520],"encoding":"f8_e4m3"`),
		one(`"name":"a","dtype":"F32","shape":[4294967294],"encoding":"topk:4294967294"`),
		`{"metadata":{"":"\u0000\n"},"tensors":[{` + a + `}]}`,
		metadata(1024),
	} {
		if m := parsed(t, text); !parsed(t, string(m.JSON())).Equal(m) {
			t.Errorf("%.100s: another manifest after a round trip", text)
		}
	}
}

func TestManifestLimits(t *testing.T) {
	tensors := make([]Tensor, TensorsMax+1)
	for i := range tensors {
		tensors[i] = u8(fmt.Sprint(i), 0)
	}
	if _, err := NewManifest(tensors, nil); err == nil || !strings.Contains(err.Error(), "at most 65536") {
		t.Errorf("%d tensors: %v", len(tensors), err)
	}
	// Their text would be larger than it may be, so that the limits meet: short names and scalars fit.
	if _, err := NewManifest(tensors[:TensorsMax], nil); err == nil || !strings.Contains(err.Error(), "at most 2000000") {
		t.Errorf("%d tensors with a long text: %v", TensorsMax, err)
	}
	if m, err := NewManifest(tensors[:40_000], nil); err != nil || !reflect.DeepEqual(parsed(t, string(m.JSON())), m) {
		t.Errorf("40,000 tensors: %v", err)
	}
	for _, bad := range []struct {
		tensor Tensor
		want   string
	}{
		{Tensor{Name: "a", Shape: []int64{1}}, "not a dtype"},
		{Tensor{Name: "a", DType: spec.F32, Encoding: Encoding{Kind: 77}}, "not an encoding"},
		{Tensor{Name: "a", DType: spec.F32, Encoding: Encoding{Kind: BF16, K: 3}}, "only topk has a K"},
		{Tensor{Name: "a", DType: spec.U8, Shape: make([]int64, 9)}, "9 dimensions"},
	} {
		if _, err := NewManifest([]Tensor{bad.tensor}, nil); err == nil || !strings.Contains(err.Error(), bad.want) {
			t.Errorf("%+v: got %v, want %q", bad.tensor, err, bad.want)
		}
	}
	if _, err := NewManifest([]Tensor{u8("a", 1)}, map[string]string{"a": "\xff"}); err == nil {
		t.Error("metadata that is not UTF-8 was taken")
	}
}

func TestFromMap(t *testing.T) {
	m, err := FromMap(map[string]Tensor{"b": u8("", 2), "a/x": u8("a/x", 1), "a": f32("", 3, Encoding{Kind: BF16})}, map[string]string{"k": "v"})
	if err != nil {
		t.Fatal(err)
	}
	if want := made(t, f32("a", 3, Encoding{Kind: BF16}), u8("a/x", 1), u8("b", 2)); !m.Equal(want) || m.Metadata()["k"] != "v" {
		t.Errorf("got %s", m.JSON())
	}
	if _, err := FromMap(map[string]Tensor{"a": u8("b", 1)}, nil); err == nil || !strings.Contains(err.Error(), `under "a" is named "b"`) {
		t.Errorf("got %v", err)
	}
	if _, err := FromMap(nil, nil); err == nil {
		t.Error("a manifest without tensors was made")
	}
}

func TestDiffManifests(t *testing.T) {
	want := made(t, u8("a", 1), f32("b", 2, Encoding{Kind: BF16}), u8("c", 3), u8("d", 4))
	for _, c := range []struct {
		got  *Manifest
		want []spec.Difference
	}{
		{want, nil},
		{made(t, u8("a", 1), f32("b", 2, Encoding{Kind: BF16}), u8("d", 4)), []spec.Difference{{Leaf: "c", Want: "U8[3]"}}},
		{made(t, u8("a", 1), f32("b", 2, Encoding{}), u8("c", 3), u8("e", 4)),
			[]spec.Difference{{Leaf: "b", Got: "F32[2]", Want: "F32[2] bf16"}, {Leaf: "d", Want: "U8[4]"}, {Leaf: "e", Got: "U8[4]"}}},
		{made(t, u8("a", 1), f32("b", 2, Encoding{Kind: BF16}), u8("d", 4), u8("c", 3)),
			[]spec.Difference{{Leaf: "c", Got: "U8[3] at index 3", Want: "U8[3] at index 2"}, {Leaf: "d", Got: "U8[4] at index 2", Want: "U8[4] at index 3"}}},
	} {
		if diff := DiffManifests(c.got, want); !reflect.DeepEqual(diff, c.want) {
			t.Errorf("got %+v, want %+v", diff, c.want)
		}
	}
}

func FuzzParseManifest(f *testing.F) {
	f.Add([]byte(mlp))
	f.Add([]byte(one(`"name":"\u00e9\ud83d\ude00","dtype":"F32","shape":[0,3],"encoding":"f8_e5m2"`)))
	f.Add([]byte(`{"metadata":{},"tensors":[{"name":"a","dtype":"U8","shape":[]}]}`))
	f.Add([]byte(`{"metadata":{"a":"\t"},"tensors":[{"shape":[7],"name":"a","encoding":"topk:7","dtype":"F32"}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		m, err := ParseManifest(text)
		if err != nil {
			return
		}
		if !json.Valid(text) {
			t.Fatal("read what is not JSON")
		}
		again, err := ParseManifest(m.JSON())
		if err != nil || !reflect.DeepEqual(again, m) {
			t.Fatalf("another manifest after a round trip: %v", err)
		}
		for i := range m.Len() {
			if m.Offset(i)%Align != 0 || m.EncodedBytes(i) < 0 || m.Offset(i)+m.EncodedBytes(i) > m.DataBytes() || m.EncodedBytes(i) > 0 && m.At(m.Offset(i)) != i {
				t.Fatalf("tensor %d lies at %d", i, m.Offset(i))
			}
		}
	})
}
