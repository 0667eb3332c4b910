//go:build linux && !race

package cheader

import (
	"encoding/hex"
	"encoding/json"
	"math/rand/v2"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

// TestJSON compares the header's reader with encoding/json: on texts that are legal, nearly legal, and random changes of them. The header refuses what is
// nested deeper than 32, and strings that are not UTF-8; in everything else both agree.
func TestJSON(t *testing.T) {
	seeds := []string{
		`{"code":"bad_peer","reason":"a\u00e9\ud83d\ude00\n\"\\\/\b\f\r\t","diff":[{"leaf":"x","got":"","want":"F32[8]"}],"spec":{"leaves":[]}}`,
		`{"leaves":[{"name":"image","dtype":"F32","shape":[8,8]},{"name":"label","dtype":"I32","shape":[]}]}`,
		`[0,-1,1.5,1e9,1E+9,1e-9,-0,-0.0,true,false,null,"",{},[[]]," \u0000 "]`, ` { "a" : [ 1 , 2 ] } `, `"\ud800"`, `"\udc00\ud800x"`,
		"\"\xf0\x9f\x98\x80\"",
		`01`, `-`, `1.`, `.5`, `1e`, `+1`, `tru`, `nulll`,
		`"`, `"\`, `"\u12`, `"\x"`, "\"\n\"", `[1,]`, `[,1]`, `{"a"}`, `{"a":}`, `{a:1}`, `{"a":1,}`, `{"a":1 "b":2}`,
		`[1 2]`, `]`, `}`, `{]`, ``, ` `, `1 1`, "\x00", "1\x00", "\xff", "\"\xff\"", "\"\xed\xa0\x80\"", "\"\xc0\x80\"", "\"\xf5\x80\x80\x80\"", `"a"b`,
		strings.Repeat("[", 32) + "1" + strings.Repeat("]", 32), strings.Repeat("[", 33) + "1" + strings.Repeat("]", 33),
		strings.Repeat(`{"a":`, 32) + "1" + strings.Repeat("}", 32), strings.Repeat("[", 10000),
	}
	each(t, func(t *testing.T, b built) {
		p := start(t, b)
		seed := uint64(1)
		r := rand.New(rand.NewPCG(seed, 0))
		texts := seeds
		for len(texts) < 20_000 {
			texts = append(texts, mutate(r, seeds[r.IntN(len(seeds)-4)]))
		}
		for _, text := range texts {
			got := p.do("json skip %s", hex.EncodeToString([]byte(text)))
			want := json.Valid([]byte(text)) && utf8.ValidString(text) && depth(text) <= 32
			if strings.HasPrefix(got, "ok ") != want {
				t.Fatalf("%q: %s, want ok: %v (seed %d)", text, got, want, seed)
			}
		}
	})
}

func mutate(r *rand.Rand, text string) string {
	b := []byte(text)
	for range 1 + r.IntN(3) {
		if len(b) == 0 {
			break
		}
		i := r.IntN(len(b))
		switch r.IntN(4) {
		case 0:
			b[i] ^= 1 << r.IntN(8)
		case 1:
			b = append(b[:i], b[i+1:]...)
		case 2:
			b[i] = `{}[]",:\0u9ae-+. `[r.IntN(17)]
		case 3:
			b = b[:i]
		}
	}
	return string(b)
}

// depth is how deep arrays and objects are nested, in text that is legal JSON.
func depth(text string) int {
	dec := json.NewDecoder(strings.NewReader(text))
	at, most := 0, 0
	for {
		token, err := dec.Token()
		if err != nil {
			return most
		}
		switch token {
		case json.Delim('{'), json.Delim('['):
			at++
			most = max(most, at)
		case json.Delim('}'), json.Delim(']'):
			at--
		}
	}
}

// TestJSONStrings: strings decode as encoding/json decodes them, but for control characters, which become '?'.
func TestJSONStrings(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		p := start(t, b)
		seed := uint64(2)
		r := rand.New(rand.NewPCG(seed, 0))
		parts := []string{"a", "é", "€", "😀", `\n`, `\u0041`, `\u00e9`, `\u20ac`, `\ud83d\ude00`, `\ud83d`, `\ude00`, `\ud83dx`, `\ud83d\u0041`,
			`\u0000`, `\u009b`, `\\`, `\"`, `\/`, "\u007f", `\ud83d\ud83d\ude00`}
		for range 5000 {
			var text strings.Builder
			text.WriteByte('"')
			for range r.IntN(12) {
				text.WriteString(parts[r.IntN(len(parts))])
			}
			text.WriteByte('"')
			var want string
			if err := json.Unmarshal([]byte(text.String()), &want); err != nil {
				t.Fatal(err)
			}
			want = strings.Map(func(c rune) rune {
				if c < 0x20 || c >= 0x7f && c < 0xa0 {
					return '?'
				}
				return c
			}, want)
			got, ok := strings.CutPrefix(p.do("json string %s", hex.EncodeToString([]byte(text.String()))), "ok 0 ")
			if !ok || got != hex.EncodeToString([]byte(want)) {
				t.Fatalf("%s: %s, want %x (seed %d)", text.String(), got, want, seed)
			}
		}
	})
}

func TestJSONWholeNumbers(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		p := start(t, b)
		for _, text := range []string{
			"0", "1", "9", "10", "18446744073709551615", "18446744073709551616", "99999999999999999999999", "-1", "01", "00",
			"1.0", "1e3", "1E3", "", "x", " 7", "+7", "0x7", "7x",
		} {
			want, err := strconv.ParseUint(strings.TrimSpace(text), 10, 64)
			legal := err == nil && (text == "0" || strings.TrimLeft(strings.TrimSpace(text), "0") == strings.TrimSpace(text))
			got := p.do("json whole %s", hex.EncodeToString([]byte(text)))
			if (legal && got != "ok "+strconv.FormatUint(want, 10)+" ") || (!legal && !strings.HasPrefix(got, "bad ")) {
				t.Errorf("%q: %s, want %d, %v", text, got, want, legal)
			}
		}
	})
}
