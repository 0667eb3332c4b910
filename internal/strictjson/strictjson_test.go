package strictjson

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"
)

// anything reads one value whose kind the next byte tells, so that every method meets every text.
func anything(r *Reader, depth int) (any, error) {
	if depth > 20 {
		return nil, fmt.Errorf("too deep for this test")
	}
	switch c := r.next(); {
	case c == '{':
		object := map[string]any{}
		return object, r.Map(func(key string) (err error) {
			if _, again := object[key]; again {
				return fmt.Errorf("twice")
			}
			object[key], err = anything(r, depth+1)
			return err
		})
	case c == '[':
		array := []any{}
		return array, r.Array(func() error {
			x, err := anything(r, depth+1)
			array = append(array, x)
			return err
		})
	case c == '-' || digit(c):
		return r.Int()
	}
	return r.String()
}

func read(text string) (any, error) {
	r := New([]byte(text))
	x, err := anything(r, 0)
	if array, ok := x.([]any); ok && len(array) == 0 {
		x = []any{}
	}
	if err == nil {
		err = r.End()
	}
	return x, err
}

func TestReader(t *testing.T) {
	for text, want := range map[string]any{
		` "" `:                     "",
		`"a\"\\\/\b\f\n\r\tz"`:     "a\"\\/\b\f\n\r\tz",
		`"\u00e9\ud83d\ude00é"`:    "é😀é",
		`"\u0000\uFFFF"`:           "\x00\uffff",
		"\"\x7f\"":                 "\x7f",
		`0`:                        int64(0),
		`-0`:                       int64(0),
		`9223372036854775807`:      int64(1<<63 - 1),
		`-9223372036854775807`:     int64(-1<<63 + 1),
		"[ ]":                      []any{},
		"\t{ }\r\n":                map[string]any{},
		` { "a" : 1 , "b" : { } }`: map[string]any{"a": int64(1), "b": map[string]any{}},
	} {
		if got, err := read(text); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %#v, %v", text, got, err)
		}
	}
	var numbers []int64
	r := New([]byte("[1, 2 ,3]"))
	if err := r.Array(func() error {
		n, err := r.Int()
		numbers = append(numbers, n)
		return err
	}); err != nil || !reflect.DeepEqual(numbers, []int64{1, 2, 3}) || r.Offset() != 9 {
		t.Errorf("%v, %v", numbers, err)
	}
}

func TestReaderRefuses(t *testing.T) {
	for text, want := range map[string]string{
		``:                     "ends too early",
		`{`:                    "ends too early",
		`{"a"`:                 "ends too early",
		`{"a":1`:               "ends too early",
		`{"a":1,}`:             "want a string, found \"}\"",
		`{"a" 1}`:              "want ':', found a number",
		`{"a":1 "b":2}`:        "want ',' or '}', found a string",
		`{1:2}`:                "want a string, found a number",
		`[1`:                   "ends too early",
		`[1 2]`:                "want ',' or ']', found a number",
		`[null]`:               "want a string, found null",
		`[tru]`:                "found tru",
		`"a`:                   "ends too early",
		`"a\`:                  "ends too early",
		`"a\n`:                 "ends too early",
		"\"a\nb\"":             "control character 0x0a",
		"\"\\n\x00\"":          "control character 0x00",
		`"\x"`:                 "is no escape",
		`"\u12"`:               "whole character",
		`"\u12g4"`:             "whole character",
		`"\ud800"`:             "whole character",
		`"\ud800\u0041"`:       "whole character",
		`"\udc00\ud800"`:       "whole character",
		"\"\xff\"":             "not UTF-8",
		"\"\\n\xff\"":          "not UTF-8",
		`-`:                    "not a JSON number",
		`01`:                   "not a JSON number",
		`-01`:                  "not a JSON number",
		`1.0`:                  "without fraction and exponent",
		`1e3`:                  "without fraction and exponent",
		`1E3`:                  "without fraction and exponent",
		`9223372036854775808`:  "64 bits",
		`-9223372036854775808`: "64 bits",
		`99999999999999999999`: "64 bits",
		`1 2`:                  "at byte 2: something follows",
		"1\x00":                "at byte 1: something follows",
	} {
		if got, err := read(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %#v, %v, want %q", text, got, err, want)
		}
	}
}

func TestIgnore(t *testing.T) {
	for _, text := range []string{`1.5e3`, `-0`, `null`, `true`, `"a\n"`, `[]`, `[1,[2,{"a":null}], false ]`, strings.Repeat("[", depthMax+1) + strings.Repeat("]", depthMax+1)} {
		r := New([]byte(" " + text + " "))
		if err := r.Ignore(); err != nil || r.End() != nil {
			t.Errorf("%s: %v", text, err)
		}
	}
	for text, want := range map[string]string{
		``: "ends too early", `tru`: "want a value, found tru", `nulls`: "found nulls", `1.`: "want a value", `01`: "want a value", `+1`: "want a value", `NaN`: "want a value", `[1,]`: "want a value",
		`{"a"}`: "want ':'", "\"\xff\"": "not UTF-8", strings.Repeat("[", depthMax+2) + strings.Repeat("]", depthMax+2): "nested deeper than 64", strings.Repeat("[", 1_000_000): "nested deeper",
	} {
		if err := New([]byte(text)).Ignore(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.80s: got %v, want %q", text, err, want)
		}
	}
}

func TestFields(t *testing.T) {
	fields := func(text string) (got []string, err error) {
		r := New([]byte(text))
		err = r.Fields([]string{"a", "b"}, []string{"c"}, func(field string) error {
			n, err := r.Int()
			got = append(got, fmt.Sprint(field, n))
			return err
		})
		return got, err
	}
	for text, want := range map[string]string{`{"b":2,"a":1}`: "b2 a1", `{"a":1,"c":3,"b":2}`: "a1 c3 b2"} {
		if got, err := fields(text); err != nil || strings.Join(got, " ") != want {
			t.Errorf("%s: %v, %v", text, got, err)
		}
	}
	for text, want := range map[string]string{
		`{"a":1}`:             `"b" is missing`,
		`{"a":1,"b":2,"b":2}`: `"b" is there twice`,
		`{"a":1,"b":2,"B":2}`: `"B" is unknown`,
		`{"a":1,"b":"x"}`:     `"b": at byte 11: want a whole number`,
		`[]`:                  "want an object",
		`{"` + strings.Repeat("x", 1000) + `":1}`: "...",
	} {
		if _, err := fields(text); err == nil || !strings.Contains(err.Error(), want) || len(err.Error()) > 300 {
			t.Errorf("%.50s: got %v, want %q", text, err, want)
		}
	}
}

func TestAppendString(t *testing.T) {
	var all strings.Builder
	for c := range rune(0x300) {
		all.WriteRune(c)
	}
	text := AppendString(nil, all.String()+"😀")
	var again string
	if err := json.Unmarshal(text, &again); err != nil || again != all.String()+"😀" {
		t.Errorf("encoding/json reads something else: %v", err)
	}
	if got, err := New(text).String(); err != nil || got != again {
		t.Errorf("reads something else: %v", err)
	}
}

func FuzzReader(f *testing.F) {
	f.Add(`{"a":[1,-2,{"b":"\ud83d\ude00\n"}],"":{}}`)
	f.Add(` [ 0 , "x" ] `)
	f.Fuzz(func(t *testing.T, text string) {
		if r := New([]byte(text)); r.Ignore() == nil && r.End() == nil && !json.Valid([]byte(text)) {
			t.Fatalf("%q is not JSON, and was skipped", text)
		}
		got, err := read(text)
		if err != nil {
			return
		}
		decoder := json.NewDecoder(strings.NewReader(text))
		decoder.UseNumber()
		var want any
		if err := decoder.Decode(&want); err != nil {
			t.Fatalf("%q is not JSON, and was read as %#v", text, got)
		}
		if g, w := fmt.Sprint(got), fmt.Sprint(want); strings.ReplaceAll(g, "-0", "0") != strings.ReplaceAll(w, "-0", "0") {
			t.Fatalf("%q: got %s, want %s", text, g, w)
		}
	})
}
