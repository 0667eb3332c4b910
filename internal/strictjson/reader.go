package strictjson

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"unicode/utf16"
	"unicode/utf8"
)

// Reader is a place in a text.
type Reader struct {
	text []byte
	at   int
}

// New starts at the first byte of text, which must not change while it is read.
func New(text []byte) *Reader { return &Reader{text: text} }

// Offset is how many bytes were read.
func (r *Reader) Offset() int { return r.at }

// Fields reads an object that has each of required once, each of optional at most once, and nothing else. read is called at each field's value and must read it.
func (r *Reader) Fields(required, optional []string, read func(field string) error) error {
	seen := make([]string, 0, 8)
	err := r.Map(func(key string) error {
		switch {
		case !slices.Contains(required, key) && !slices.Contains(optional, key):
			return fmt.Errorf("the field %s is unknown; the fields are %q", Quote(key), slices.Concat(required, optional))
		case slices.Contains(seen, key):
			return fmt.Errorf("the field %q is there twice", key)
		}
		seen = append(seen, key)
		if err := read(key); err != nil {
			return fmt.Errorf("%q: %w", key, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, field := range required {
		if !slices.Contains(seen, field) {
			return fmt.Errorf("the field %q is missing", field)
		}
	}
	return nil
}

// Map reads an object of any keys. read is called at each value and must read it; that keys differ is the caller's to check.
func (r *Reader) Map(read func(key string) error) error {
	return r.list('{', '}', "an object", func() error {
		key, err := r.String()
		if err != nil {
			return err
		}
		if err := r.take(':'); err != nil {
			return err
		}
		return read(key)
	})
}

// Array reads an array. read is called at each element and must read it.
func (r *Reader) Array(read func() error) error { return r.list('[', ']', "an array", read) }

func (r *Reader) list(first, last byte, kind string, read func() error) error {
	if r.next() != first {
		return r.unexpected(kind)
	}
	r.at++
	if r.next() == last {
		r.at++
		return nil
	}
	for {
		if err := read(); err != nil {
			return err
		}
		switch r.next() {
		case last:
			r.at++
			return nil
		case ',':
			r.at++
		default:
			return r.unexpected(fmt.Sprintf("%q or %q", ',', last))
		}
	}
}

func (r *Reader) take(c byte) error {
	if r.next() != c {
		return r.unexpected(fmt.Sprintf("%q", c))
	}
	r.at++
	return nil
}

// next skips blanks and returns the byte there, 0 at the end and for a byte 0, which is legal nowhere.
func (r *Reader) next() byte {
	for ; r.at < len(r.text); r.at++ {
		switch r.text[r.at] {
		case ' ', '\t', '\r', '\n':
		default:
			return r.text[r.at]
		}
	}
	return 0
}

// Int reads a whole number.
func (r *Reader) Int() (int64, error) {
	c := r.next()
	if c != '-' && !digit(c) {
		return 0, r.unexpected("a whole number")
	}
	start, negative := r.at, c == '-'
	if negative {
		r.at++
	}
	digits := r.at
	var n uint64
	for ; r.at < len(r.text) && digit(r.text[r.at]); r.at++ {
		if n > math.MaxInt64/10 {
			return 0, fmt.Errorf("at byte %d: the number does not fit 64 bits", start)
		}
		n = n*10 + uint64(r.text[r.at]-'0')
	}
	switch {
	case r.at == digits, r.text[digits] == '0' && r.at > digits+1:
		return 0, fmt.Errorf("at byte %d: not a JSON number", start)
	case r.at < len(r.text) && (r.text[r.at] == '.' || r.text[r.at] == 'e' || r.text[r.at] == 'E'):
		return 0, fmt.Errorf("at byte %d: a whole number must be written without fraction and exponent", start)
	case n > math.MaxInt64:
		return 0, fmt.Errorf("at byte %d: the number does not fit 64 bits", start)
	case negative:
		return -int64(n), nil
	}
	return int64(n), nil
}

func digit(c byte) bool { return c >= '0' && c <= '9' }

// String reads a string.
func (r *Reader) String() (string, error) {
	if r.next() != '"' {
		return "", r.unexpected("a string")
	}
	r.at++
	start := r.at
	for ; r.at < len(r.text); r.at++ {
		switch c := r.text[r.at]; {
		case c == '"':
			text := r.text[start:r.at]
			if !utf8.Valid(text) {
				return "", notUTF8(start)
			}
			r.at++
			return string(text), nil
		case c == '\\':
			return r.escaped(start)
		case c < ' ':
			return "", fmt.Errorf("at byte %d: a string holds the control character %#02x; write it as an escape", r.at, c)
		}
	}
	return "", errEnd
}

// escaped reads on in a string that has an escape at r.at.
func (r *Reader) escaped(start int) (string, error) {
	out := append(make([]byte, 0, r.at-start+16), r.text[start:r.at]...)
	for r.at < len(r.text) {
		c := r.text[r.at]
		switch {
		case c == '"':
			if !utf8.Valid(out) {
				return "", notUTF8(start)
			}
			r.at++
			return string(out), nil
		case c < ' ':
			return "", fmt.Errorf("at byte %d: a string holds the control character %#02x; write it as an escape", r.at, c)
		case c != '\\':
			out = append(out, c)
			r.at++
		default:
			var err error
			if out, err = r.escape(out); err != nil {
				return "", err
			}
		}
	}
	return "", errEnd
}

func (r *Reader) escape(out []byte) ([]byte, error) {
	if r.at+1 >= len(r.text) {
		return nil, errEnd
	}
	const from, to = `"\/bfnrt`, "\"\\/\b\f\n\r\t"
	c := r.text[r.at+1]
	for i := range len(from) {
		if from[i] == c {
			r.at += 2
			return append(out, to[i]), nil
		}
	}
	if c != 'u' {
		return nil, fmt.Errorf("at byte %d: %s is no escape of JSON", r.at, Quote(string(r.text[r.at:r.at+2])))
	}
	code, ok := r.hex4(r.at)
	if ok && utf16.IsSurrogate(code) {
		low, second := r.hex4(r.at + 6)
		code = utf16.DecodeRune(code, low)
		ok = second && code != utf8.RuneError
		r.at += 6
	}
	if !ok {
		return nil, fmt.Errorf("at byte %d: not a \\u escape of a whole character", r.at)
	}
	r.at += 6
	return utf8.AppendRune(out, code), nil
}

// hex4 reads \uXXXX at a place without moving.
func (r *Reader) hex4(at int) (rune, bool) {
	if at+6 > len(r.text) || r.text[at] != '\\' || r.text[at+1] != 'u' {
		return 0, false
	}
	var code rune
	for _, c := range r.text[at+2 : at+6] {
		code <<= 4
		switch {
		case digit(c):
			code |= rune(c - '0')
		case c|0x20 >= 'a' && c|0x20 <= 'f':
			code |= rune(c|0x20-'a') + 10
		default:
			return 0, false
		}
	}
	return code, true
}

// depthMax is how deep a value that is ignored may be nested.
const depthMax = 64

// Ignore reads any value, which must be right JSON too.
func (r *Reader) Ignore() error { return r.skip(0) }

func (r *Reader) skip(depth int) error {
	if depth > depthMax {
		return fmt.Errorf("at byte %d: nested deeper than %d", r.at, depthMax)
	}
	switch c := r.next(); {
	case c == '{':
		return r.Map(func(string) error { return r.skip(depth + 1) })
	case c == '[':
		return r.Array(func() error { return r.skip(depth + 1) })
	case c == '"':
		_, err := r.String()
		return err
	}
	end := r.at
	for end < len(r.text) && (digit(r.text[end]) || r.text[end]|0x20 >= 'a' && r.text[end]|0x20 <= 'z' || bytes.IndexByte([]byte("+-."), r.text[end]) >= 0) {
		end++
	}
	if word := r.text[r.at:end]; !json.Valid(word) {
		return r.unexpected("a value")
	}
	r.at = end
	return nil
}

// End makes sure that only blanks follow.
func (r *Reader) End() error {
	if r.next(); r.at < len(r.text) {
		return fmt.Errorf("at byte %d: something follows the end", r.at)
	}
	return nil
}

var errEnd = errors.New("it ends too early: cut short, or not JSON")

func notUTF8(at int) error { return fmt.Errorf("the string at byte %d is not UTF-8", at) }

func (r *Reader) unexpected(want string) error {
	c := r.next()
	if r.at == len(r.text) {
		return errEnd
	}
	found := Quote(string(r.text[r.at : r.at+1]))
	switch {
	case c == '"':
		found = "a string"
	case c == '-' || digit(c):
		found = "a number"
	case c == '{':
		found = "an object"
	case c == '[':
		found = "an array"
	case c >= 'a' && c <= 'z':
		end := r.at
		for end < len(r.text) && end < r.at+16 && r.text[end] >= 'a' && r.text[end] <= 'z' {
			end++
		}
		found = string(r.text[r.at:end])
	}
	return fmt.Errorf("at byte %d: want %s, found %s", r.at, want, found)
}

// Quote quotes text for an error, cut so that hostile input cannot fill a log.
func Quote(s string) string {
	const most = 160
	if len(s) > most {
		return fmt.Sprintf("%q...", s[:most])
	}
	return fmt.Sprintf("%q", s)
}

// AppendString writes s, which must be UTF-8, as a JSON string in the shortest form.
func AppendString(dst []byte, s string) []byte {
	dst = append(dst, '"')
	for i := range len(s) {
		c := s[i]
		const from, to = "\"\\\b\f\n\r\t", `"\bfnrt`
		switch {
		case c == '"' || c == '\\':
			dst = append(dst, '\\', c)
		case c >= ' ':
			dst = append(dst, c)
		default:
			k := 0
			for k < len(from) && from[k] != c {
				k++
			}
			if k < len(from) {
				dst = append(dst, '\\', to[k])
			} else {
				dst = append(dst, '\\', 'u', '0', '0', '0'+c>>4, "0123456789abcdef"[c&15])
			}
		}
	}
	return append(dst, '"')
}
