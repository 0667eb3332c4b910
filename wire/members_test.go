package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"testing"
)

// decoded is what encoding/json finds, as names and values.
func decoded(text []byte) (list []string) {
	dec := json.NewDecoder(bytes.NewReader(text))
	if token, err := dec.Token(); err != nil || token != json.Delim('{') {
		return nil
	}
	for dec.More() {
		name, err := dec.Token()
		if err != nil {
			return nil
		}
		var raw json.RawMessage
		if err := dec.Decode(&raw); err != nil {
			return nil
		}
		list = append(list, name.(string), string(raw))
	}
	return list
}

func walked(text []byte) (list []string) {
	m, ok := membersOf(text)
	if !ok {
		return nil
	}
	for m.more() {
		key, value := m.next()
		var name string
		if err := json.Unmarshal(key, &name); err != nil {
			return []string{err.Error()}
		}
		list = append(list, name, string(value))
	}
	return list
}

var memberSeeds = []string{
	`{}`, ` { } `, `[]`, `1`, `"{"`, `{"a":1}`, `{"a":1,"b":-2.5e+7 , "c" : true}`, "{\n\t\"a\" :\r\n null }", `{"a":"x"}`, `{"a":"\"}","b":"\\"}`,
	`{"a\"b":{"c":[1,{"d":"]}"},[]],"e":{}}, "f":[] }`, `{"a":[],"b":[[],[1,2]],"":""}`, `{"a":{"b":"{["},"c":[ "}" , "\\\"" ] }`, `{"a":1,"a":2}`, `{"é":"ü"}`,
}

// TestMembers: what is walked over is what encoding/json finds.
func TestMembers(t *testing.T) {
	for _, text := range memberSeeds {
		if got, want := walked([]byte(text)), decoded([]byte(text)); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: %q, want %q", text, got, want)
		}
	}
}

func FuzzMembers(f *testing.F) {
	for _, text := range memberSeeds {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		if !json.Valid(text) {
			t.Skip("not well-formed, which is looked at before")
		}
		if got, want := walked(text), decoded(text); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: %q, want %q", text, got, want)
		}
	})
}

// helloWith is a hello whose body has exactly so many bytes.
func helloWith(t *testing.T, bytes int) []byte {
	t.Helper()
	h := &Hello{Role: RolePublish, Table: "t", Manifest: json.RawMessage(`{"a":""}`)}
	least, err := AppendHello(nil, h)
	if err != nil {
		t.Fatal(err)
	}
	h.Manifest = json.RawMessage(`{"a":"` + strings.Repeat("x", bytes-(len(least)-headerBytes)) + `"}`)
	text, err := AppendHello(nil, h)
	if err != nil || len(text) != headerBytes+bytes {
		t.Fatalf("%d bytes: %v", len(text), err)
	}
	return text
}

// TestLargeHelloAsks: a body of more than HelloBytesSmall is not taken in before that was allowed, and one of less without asking.
func TestLargeHelloAsks(t *testing.T) {
	for _, bytesOfBody := range []int{HelloBytesSmall, HelloBytesSmall + 1} {
		text := helloWith(t, bytesOfBody)
		r, asked := bytes.NewReader(text), 0
		_, _, err := ReadHelloFrameAsking(r, func(n int) *Refusal {
			asked = n
			return Refuse(CodeTooManyConnections, "no")
		})
		var refusal *Refusal
		if large := bytesOfBody > HelloBytesSmall; large != (asked == bytesOfBody) || large != errors.As(err, &refusal) {
			t.Errorf("body of %d bytes: asked for %d, %v", bytesOfBody, asked, err)
		} else if large && r.Len() != bytesOfBody {
			t.Errorf("%d bytes of the body were read", bytesOfBody-r.Len())
		}
		r.Reset(text)
		h, frame, err := ReadHelloFrameAsking(r, func(int) *Refusal { return nil })
		if err != nil || !bytes.Equal(frame, text) || h.Manifest == nil {
			t.Errorf("body of %d bytes, allowed: %v", bytesOfBody, err)
		}
	}
}

// TestHelloMemory: to read the largest hello takes little more than twice its size, the memory given back on the way included.
func TestHelloMemory(t *testing.T) {
	text := helloWith(t, BodyBytesMax-headerBytes)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if _, _, err := ReadHelloFrame(io.LimitReader(bytes.NewReader(text), int64(len(text)))); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if took := after.TotalAlloc - before.TotalAlloc; took > 5*BodyBytesMax/2 {
		t.Errorf("%d bytes were allocated for a hello of %d", took, len(text))
	}
}
