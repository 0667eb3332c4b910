package spec

import (
	"reflect"
	"strings"
	"testing"
)

func TestTextRoundTrip(t *testing.T) {
	for _, c := range []struct {
		leaves []Leaf
		text   string
	}{
		{digits, "image:F32[8,8],label:I32"},
		{[]Leaf{{".", U8, []int64{3}}}, ".:U8[3]"},
		{[]Leaf{{"obs/(0)", F16, nil}, {"obs/[1]", BF16, nil}}, `obs/(0):F16,"obs/[1]":BF16`},
		{[]Leaf{{`a,b:c"d\e`, U8, nil}}, `"a,b:c\"d\\e":U8`},
		{[]Leaf{{"with space", U8, nil}, {"{x}", U8, nil}}, `"with space":U8,"{x}":U8`},
		{[]Leaf{{"é/日本", U8, nil}}, "é/日本:U8"},
		{[]Leaf{{"zero\u200bwidth", U8, nil}, {"nb\u00a0sp", U8, nil}}, `"zero\u200bwidth":U8,"nb\u00a0sp":U8`},
		{[]Leaf{{"'q'`", U8, nil}, {" ", U8, nil}}, "'q'`:U8,\" \":U8"},
	} {
		s := must(t, c.leaves...)
		if s.Text() != c.text || s.String() != c.text {
			t.Errorf("Text() = %s, want %s", s.Text(), c.text)
		}
		for _, parse := range []func() (*Spec, error){
			func() (*Spec, error) { return ParseText(c.text) },
			func() (*Spec, error) { return Parse([]byte(c.text)) },
			func() (*Spec, error) { return Parse(append([]byte(" \n"), s.JSON()...)) },
		} {
			if back, err := parse(); err != nil || !back.Equal(s) || !reflect.DeepEqual(back, s) {
				t.Errorf("%s read back: %v, %v", c.text, back, err)
			}
		}
	}
}

func TestTextBlanksAndEmptyShape(t *testing.T) {
	s, err := ParseText(" image : F32 [ 8 , 8 ] ,\n\tlabel : I32[ ] ")
	if err != nil || s.Text() != "image:F32[8,8],label:I32" {
		t.Errorf("%v, %v", s, err)
	}
}

func TestTextLargest(t *testing.T) {
	leaves := many(LeavesMax)
	for i := range leaves {
		n := leaves[i].Name
		leaves[i].Name = n + strings.Repeat("\U000e0001", (NameBytesMax-len(n))/4)
		leaves[i].Shape = dims(DimsMax)
	}
	s := must(t, leaves...)
	for _, form := range [][]byte{[]byte(s.Text()), s.JSON()} {
		if back, err := Parse(form); err != nil || !back.Equal(s) {
			t.Errorf("a form of %d bytes: %v", len(form), err)
		}
	}
}

func TestTextRefused(t *testing.T) {
	for text, says := range map[string]string{
		"":                                   "byte 0 of the text: found the end where a leaf's name must be",
		"image":                              "found the end after the name \"image\"",
		"image:":                             "dtype \"\" is not known",
		"image:float32[2]":                   "is written F32 here",
		"image:F32[":                         "must be a whole number",
		"image:F32[]x:U8":                    `found "x" after leaf "image"`,
		"image:F32[8":                        "found the end in the shape",
		"image:F32[8;8]":                     "not \"8;8\"",
		"image:F32[8.5]":                     "not \"8.5\"",
		"image:F32[99999999999999999999]":    "must be a whole number up to 4294967296",
		"image:F32[8,8],":                    "byte 15 of the text: found the end where",
		"image:F32[8,8],,x:U8":               `found "," where`,
		"a:U8,a:U8":                          "both named",
		"a:U8[0]":                            "is 0",
		"a:U8[1,1,1,1,1,1,1,1,1]":            "more than 8 dimensions",
		"a:U8[-1]":                           "is -1",
		`"a:U8`:                              "does not end",
		`"":U8`:                              "name is empty",
		`"a\n":U8`:                           "control character",
		`"\xff":U8`:                          "not UTF-8",
		"a b:U8":                             `found "b" after the name`,
		strings.Repeat("a:U8,", 5000) + "a:": "more than 4096 leaves",
		strings.Repeat(" ", TextBytesMax+1):  "at most 2097152",
	} {
		_, err := ParseText(text)
		wantError(t, err, "spec: ", says)
	}
}
