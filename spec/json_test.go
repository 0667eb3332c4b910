package spec

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"
)

const digitsJSON = `{"leaves":[{"name":"image","dtype":"F32","shape":[8,8]},{"name":"label","dtype":"I32","shape":[]}]}`

func TestJSON(t *testing.T) {
	s := must(t, digits...)
	if string(s.JSON()) != digitsJSON {
		t.Errorf("JSON() = %s", s.JSON())
	}
	marshalled, err := json.Marshal(s)
	if err != nil || string(marshalled) != digitsJSON {
		t.Errorf("Marshal: %s, %v", marshalled, err)
	}
	var back Spec
	if err := json.Unmarshal(marshalled, &back); err != nil || !reflect.DeepEqual(&back, s) {
		t.Errorf("Unmarshal: %v, %v", &back, err)
	}
	var zero Spec
	if _, err := json.Marshal(&zero); err == nil {
		t.Error("a zero Spec was marshalled")
	}
	before := back.Text()
	if err := json.Unmarshal([]byte(`{"leaves":[]}`), &back); err == nil || back.Text() != before {
		t.Errorf("a refused UnmarshalJSON: %v, spec now %s", err, &back)
	}
}

func TestJSONNames(t *testing.T) {
	s := must(t, Leaf{`q"b\<&>` + "\u2028é", U8, nil})
	for _, form := range []func() ([]byte, error){s.MarshalJSON, func() ([]byte, error) { return json.Marshal(s) }} {
		data, err := form()
		if err != nil {
			t.Fatal(err)
		}
		if back, err := ParseJSON(data); err != nil || !back.Equal(s) {
			t.Errorf("%s: %v", data, err)
		}
	}
	s, err := ParseJSON([]byte(`{ "leaves" : [ {"shape": [ 2 ] , "name":"\u00e9\ud83d\ude00", "dtype":"U8"} ] } `))
	if err != nil || s.Text() != "é😀:U8[2]" {
		t.Errorf("%v, %v", s, err)
	}
}

func leafJSON(leaf string) string { return `{"leaves":[` + leaf + `]}` }

func TestJSONRefused(t *testing.T) {
	for text, says := range map[string]string{
		"":                                    "not JSON: at byte 0",
		"image:F32[8]":                        "not JSON: at byte 1",
		`{"leaves":[}`:                        "not JSON: at byte 12",
		digitsJSON + "x":                      fmt.Sprintf("not JSON: at byte %d", len(digitsJSON)+1),
		digitsJSON + " " + "{}":               "after top-level value",
		"{\"leaves\":\"\xff\"}":               "byte 11 (0xff) is not UTF-8",
		"null":                                "the spec must be an object, not null",
		"[1]":                                 "the spec must be an object, not an array",
		`{}`:                                  `lacks the field "leaves"`,
		`{"leaves":[]}`:                       "no leaves",
		`{"leaves":{}}`:                       `"leaves" must be an array, not an object`,
		`{"leaves":[],"leaves":1}`:            "twice",
		`{"leaves":[],"x":1}`:                 `the spec has the unknown field "x"`,
		`{"Leaves":[]}`:                       `unknown field "Leaves"`,
		leafJSON(`1`):                         "leaf 0 must be an object, not the number 1",
		leafJSON(`{"name":"a","dtype":"U8"}`): `leaf 0 lacks the field "shape"`,
		leafJSON(`{"name":"a","dtype":"U8","shape":null}`):                                  "must be an array, not null",
		leafJSON(`{"name":"a","dtype":"U8","shape":[1.0]}`):                                 "not the number 1.0",
		leafJSON(`{"name":"a","dtype":"U8","shape":["1"]}`):                                 `not the string "1"`,
		leafJSON(`{"name":"a","dtype":"U8","shape":[1e3]}`):                                 "not the number 1e3",
		leafJSON(`{"name":"a","dtype":"U8","shape":[[1]]}`):                                 "not an array",
		leafJSON(`{"name":"a","dtype":"U8","shape":[true]}`):                                "not true",
		leafJSON(`{"name":"a","dtype":"U8","shape":[` + strings.Repeat("9", 500) + `]}`):    "9999...",
		leafJSON(`{"name":"a","dtype":"U8","shape":[1,1,1,1,1,1,1,1,1]}`):                   "leaf 0: more than 8 dimensions",
		leafJSON(`{"name":1,"dtype":"U8","shape":[]}`):                                      `"name" must be a string, not the number 1`,
		leafJSON(`{"name":"a","dtype":null,"shape":[]}`):                                    `"dtype" must be a string, not null`,
		leafJSON(`{"name":"a","dtype":"float32","shape":[]}`):                               "leaf 0: dtype \"float32\" is written F32 here",
		leafJSON(`{"name":"a","dtype":"U8","shape":[],"offset":0}`):                         `leaf 0 has the unknown field "offset"`,
		leafJSON(`{"name":"a","name":"b","dtype":"U8","shape":[]}`):                         `the field "name" twice`,
		leafJSON(strings.Repeat(`{"name":"a","dtype":"U8","shape":[]},`, LeavesMax) + `{}`): "more than 4096 leaves",
		strings.Repeat(" ", TextBytesMax+1):                                                 "at most 2097152",
		strings.Repeat("[", 100000):                                                         "not JSON",
	} {
		_, err := ParseJSON([]byte(text))
		wantError(t, err, "spec: ", says)
		if err != nil && len(err.Error()) > 1000 {
			t.Errorf("an error of %d bytes", len(err.Error()))
		}
	}
}
