package tcpingest

import (
	"reflect"
	"testing"

	"github.com/ingestd/ingestd/ingest/ingesttest"
	"github.com/ingestd/ingestd/spec"
)

func TestPlan(t *testing.T) {
	for text, want := range map[string]plan{
		"a:U8":                   {way: direct, atOnce: readBytes},
		"a:U8[65536]":            {way: direct, atOnce: 4},
		"a:U8[65537]":            {way: direct, held: true, atOnce: 3},
		"a:U8[4194304]":          {way: direct, held: true, atOnce: 1},
		"a:U8[1023],b:U8[1024]":  {way: staged, atOnce: 128},
		"a:U8[1024],b:U8[1024]":  {way: vectored, atOnce: 128},
		"a:U8[65535],b:U8":       {way: vectored, atOnce: 4},
		"a:U8[70000],b:U8":       {way: vectored, held: true, atOnce: 3},
		"a:U8,b:U8,c:U8[100000]": {way: vectored, held: true, atOnce: 2},
	} {
		s, err := spec.ParseText(text)
		if err != nil {
			t.Fatal(err)
		}
		p := newPlan(s)
		if got := (plan{way: p.way, held: p.held, atOnce: p.atOnce}); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, want %+v", text, got, want)
		}
		if p.way == staged && p.sample*p.atOnce > readBytes {
			t.Errorf("%s: a staging buffer cannot hold %d samples", text, p.atOnce)
		}
	}
}

// TestDefaultsReachEveryField: a field added to Config without a default, or one that WithDefaults forgets, fails here.
func TestDefaultsReachEveryField(t *testing.T) {
	full, err := Config{Tables: ingesttest.Tables{}}.WithDefaults()
	if err != nil {
		t.Fatal(err)
	}
	v := reflect.ValueOf(full)
	for i := range v.NumField() {
		if name := v.Type().Field(i).Name; name != "Attach" && name != "Gate" && name != "Door" && name != "Compression" && v.Field(i).IsZero() {
			t.Errorf("Config.%s has no default", name)
		}
	}
}

// TestScatterLeaf: every size on both sides of each special case, against a plain copy.
func TestScatterLeaf(t *testing.T) {
	const n = 5
	for size := int64(1); size <= 70; size++ {
		sample := size + 3
		src := make([]byte, n*sample)
		for i := range src {
			src[i] = byte(i*7 + 1)
		}
		col := make([]byte, n*size+1)
		scatterLeaf(col[:n*size], src[2:], size, sample, n)
		for i := range int64(n) {
			if got, want := string(col[i*size:(i+1)*size]), string(src[2+i*sample:2+i*sample+size]); got != want {
				t.Fatalf("size %d sample %d: % x, want % x", size, i, got, want)
			}
		}
		if col[n*size] != 0 {
			t.Fatalf("size %d: wrote past the column", size)
		}
	}
}
