package fuzz

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/ingestd/ingestd/spec"
)

var specSeeds = []string{
	"image:F32[8,8],label:I32", " obs/(0) : U8 [ 84 , 84 ] , obs/(1):BF16[]", `"a,b":BOOL,"\u00ad\"\\{":F8_E4M3[1,1,1,1,1,1,1,1]`, ".:U8[4294967296]", ".:U16[4294967296]",
	"a:F64[536870912,1],b:U8", "a:U8,a:U8", "a:U8[0]", "a:U8[-1]", "a:U8[9223372036854775807,9223372036854775807]", "a:U8[1,1,1,1,1,1,1,1,1]", "a:F33", "", ",", "a:U8,", "\xff:U8",
	`{"leaves":[{"name":"image","dtype":"F32","shape":[8,8]},{"name":"label","dtype":"I32","shape":[]}]}`,
	` {"leaves" : [ {"shape":[2],"dtype":"I16","name":"\u00fc\ud83d\ude00\u2028"} ] } `, `{"leaves":[{"name":"\ud800","dtype":"U8","shape":[1e2]}]}`,
	`{"leaves":[]}`, `{"leaves":null}`, `{"leaves":[{"name":"a","dtype":"U8"}]}`, `{"leaves":[{"name":"a","name":"b","dtype":"U8","shape":[]}],"x":1}`, `{"leaves":[]} x`, "{", "[[[[[[",
}

// FuzzSpec: what is accepted keeps every limit, and all of its forms mean the same spec: text, JSON, its leaves. The fingerprint is the one that
// docs/wire-protocol.md describes, computed here from that description.
func FuzzSpec(f *testing.F) {
	for _, s := range specSeeds {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		in = in[:min(len(in), messageMax)]
		var s, fromText, fromJSON *spec.Spec
		var err error
		checkAllocated(t, len(in), func() { s, err = spec.Parse(in) })
		fromText, textErr := spec.ParseText(string(in))
		fromJSON, jsonErr := spec.ParseJSON(in)
		if err != nil {
			if s != nil || err.Error() == "" {
				t.Fatalf("an error (%v) with a spec (%v)", err, s)
			}
			if asJSON := strings.HasPrefix(strings.TrimLeft(string(in), " \t\r\n"), "{"); asJSON && jsonErr == nil || !asJSON && textErr == nil {
				t.Fatalf("Parse refuses what its own form takes: %v", err)
			}
			return
		}
		for _, other := range []*spec.Spec{fromText, fromJSON} {
			if other != nil && !other.Equal(s) {
				t.Fatalf("read in another form it is another spec:\n%v\n%v", s, other)
			}
		}
		checkSpec(t, s)
	})
}

func checkSpec(t *testing.T, s *spec.Spec) {
	t.Helper()
	if n := s.NumLeaves(); n < 1 || n > spec.LeavesMax {
		t.Fatalf("%d leaves", n)
	}
	names, at := map[string]bool{}, int64(0)
	for i, l := range s.Leaves() {
		control := strings.ContainsFunc(l.Name, unicode.IsControl)
		if l.Name == "" || len(l.Name) > spec.NameBytesMax || !utf8.ValidString(l.Name) || control || names[l.Name] || len(l.Shape) > spec.DimsMax {
			t.Fatalf("leaf %d was accepted: %+v", i, l)
		}
		names[l.Name] = true
		elements := int64(1)
		for _, d := range l.Shape {
			if d < 1 || d > spec.SampleBytesMax {
				t.Fatalf("leaf %d was accepted: %+v", i, l)
			}
			elements *= d
		}
		if s.Offset(i) != at || l.Elements() != elements || l.Bytes() != elements*l.DType.Bytes() || s.LeafBytes()[i] != l.Bytes() {
			t.Fatalf("leaf %d: offset %d for %d, %d elements for %d, %d bytes", i, s.Offset(i), at, l.Elements(), elements, l.Bytes())
		}
		at += l.Bytes()
	}
	if s.SampleBytes() != at || at > spec.SampleBytesMax {
		t.Fatalf("a sample of %d bytes, the leaves have %d", s.SampleBytes(), at)
	}
	if s.Fingerprint() != sha256.Sum256(canonical(s)) {
		t.Fatalf("fingerprint %v is not that of its leaves", s.Fingerprint())
	}
	same := func(form string, other *spec.Spec, err error) {
		t.Helper()
		if err != nil || !other.Equal(s) || other.Text() != s.Text() || !bytes.Equal(other.JSON(), s.JSON()) || other.Fingerprint() != s.Fingerprint() {
			t.Fatalf("through %s it is another spec: %v\n%v\n%v", form, err, s, other)
		}
		if d := spec.Diff(other, s); len(d) > 0 || spec.Check(other, s) != nil {
			t.Fatalf("through %s it differs: %v", form, d)
		}
	}
	other, err := spec.ParseText(s.Text())
	same("its text", other, err)
	other, err = spec.ParseJSON(s.JSON())
	same("its JSON", other, err)
	other, err = spec.New(s.Leaves())
	same("its leaves", other, err)
	other = new(spec.Spec)
	b, err := json.Marshal(s)
	if err == nil {
		err = json.Unmarshal(b, other)
	}
	same("encoding/json", other, err)
	checkPlainJSON(t, s)
}

// checkPlainJSON reads the JSON form as any other program would.
func checkPlainJSON(t *testing.T, s *spec.Spec) {
	t.Helper()
	var plain struct {
		Leaves []struct {
			Name  string
			DType string
			Shape []int64
		}
	}
	if err := json.Unmarshal(s.JSON(), &plain); err != nil || len(plain.Leaves) != s.NumLeaves() {
		t.Fatalf("%s: %d leaves, %v", s.JSON(), len(plain.Leaves), err)
	}
	for i, l := range s.Leaves() {
		if p := plain.Leaves[i]; p.Name != l.Name || p.DType != l.DType.String() || !slices.Equal(p.Shape, l.Shape) || p.Shape == nil {
			t.Fatalf("leaf %d reads as %+v, is %+v", i, p, l)
		}
	}
}

// canonical is the encoding of docs/wire-protocol.md, "Fingerprint".
func canonical(s *spec.Spec) []byte {
	b := binary.LittleEndian.AppendUint32([]byte("ingestd-spec-1\n"), uint32(s.NumLeaves()))
	for _, l := range s.Leaves() {
		b = append(binary.LittleEndian.AppendUint16(b, uint16(len(l.Name))), l.Name...)
		b = append(append(b, byte(len(l.DType.String()))), l.DType.String()...)
		b = append(b, byte(len(l.Shape)))
		for _, d := range l.Shape {
			b = binary.LittleEndian.AppendUint64(b, uint64(d))
		}
	}
	return b
}

// FuzzSpecPair: of two specs, equality, fingerprints and the difference say the same; and the difference names each leaf once.
func FuzzSpecPair(f *testing.F) {
	for i, s := range specSeeds {
		f.Add([]byte(s), []byte(specSeeds[(i+1)%len(specSeeds)]))
		f.Add([]byte(s), []byte(s))
	}
	f.Add([]byte("a:U8,b:I32[2,3],c:F32"), []byte("c:F32,b:I32[3,2],d:U8"))
	f.Fuzz(func(t *testing.T, a, b []byte) {
		got, gotErr := spec.Parse(a[:min(len(a), messageMax)])
		want, wantErr := spec.Parse(b[:min(len(b), messageMax)])
		if gotErr != nil || wantErr != nil {
			return
		}
		diff := spec.Diff(got, want)
		same := bytes.Equal(got.JSON(), want.JSON())
		if (len(diff) == 0) != same || got.Equal(want) != same || (spec.Check(got, want) == nil) != same || (got.Text() == want.Text()) != same {
			t.Fatalf("equal in some ways and not in others: %v\n%v\n%v", diff, got, want)
		}
		if same != (spec.FormatDiff(diff) == "") {
			t.Fatalf("the difference reads %q", spec.FormatDiff(diff))
		}
		seen := map[string]bool{}
		for _, d := range diff {
			if seen[d.Leaf] || d.Got == d.Want || d.String() == "" {
				t.Fatalf("%+v in %+v", d, diff)
			}
			seen[d.Leaf] = true
		}
	})
}
