package spec

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"unicode/utf8"
)

// Parse reads either form: JSON if the first byte that is not blank is '{', else the text form.
func Parse(text []byte) (*Spec, error) {
	if t := bytes.TrimLeft(text, " \t\r\n"); len(t) > 0 && t[0] == '{' {
		return ParseJSON(text)
	}
	return ParseText(string(text))
}

// ParseJSON reads {"leaves":[{"name":..,"dtype":..,"shape":[..]},..]}. Unknown, repeated and missing
// fields are refused, and so is anything that follows.
func ParseJSON(data []byte) (*Spec, error) {
	leaves, err := parseJSON(data)
	if err != nil {
		return nil, fmt.Errorf("spec: %w", err)
	}
	return New(leaves)
}

func parseJSON(data []byte) ([]Leaf, error) {
	if len(data) > TextBytesMax {
		return nil, fmt.Errorf("the JSON has %d bytes; at most %d are allowed", len(data), TextBytesMax)
	}
	if err := checkSyntax(data); err != nil {
		return nil, err
	}
	p := jsonParser{json.NewDecoder(bytes.NewReader(data))}
	p.dec.UseNumber()
	var leaves []Leaf
	err := p.object("the spec", []string{"leaves"}, func(string) error {
		return p.array(`"leaves"`, func() error {
			if len(leaves) == LeavesMax {
				return fmt.Errorf("more than %d leaves; merge some", LeavesMax)
			}
			leaf, err := p.leaf(len(leaves))
			leaves = append(leaves, leaf)
			return err
		})
	})
	return leaves, err
}

// checkSyntax makes sure that what follows meets well-formed JSON only, and says where it is not.
func checkSyntax(data []byte) error {
	for i := 0; i < len(data); {
		if data[i] < utf8.RuneSelf {
			i++
			continue
		}
		r, n := utf8.DecodeRune(data[i:])
		if r == utf8.RuneError && n == 1 {
			return fmt.Errorf("not JSON: byte %d (%#02x) is not UTF-8", i, data[i])
		}
		i += n
	}
	var nothing struct{}
	var syntax *json.SyntaxError
	if err := json.Unmarshal(data, &nothing); errors.As(err, &syntax) {
		return fmt.Errorf("not JSON: at byte %d: %w", syntax.Offset, err)
	}
	return nil
}

// jsonParser walks JSON that checkSyntax has passed, and stops at the first thing out of place, so that it never
// holds more than a legal spec.
type jsonParser struct{ dec *json.Decoder }

func (p jsonParser) object(what string, fields []string, read func(field string) error) error {
	if err := p.open(what, '{', "an object"); err != nil {
		return err
	}
	var seen []string
	for p.dec.More() {
		token, err := p.dec.Token()
		if err != nil {
			return err
		}
		field, _ := token.(string)
		switch {
		case !slices.Contains(fields, field):
			return fmt.Errorf("%s has the unknown field %s; it may have %q", what, quoteShort(field), fields)
		case slices.Contains(seen, field):
			return fmt.Errorf("%s has the field %q twice", what, field)
		}
		seen = append(seen, field)
		if err := read(field); err != nil {
			return err
		}
	}
	for _, field := range fields {
		if !slices.Contains(seen, field) {
			return fmt.Errorf("%s lacks the field %q", what, field)
		}
	}
	_, err := p.dec.Token()
	return err
}

func (p jsonParser) array(what string, read func() error) error {
	if err := p.open(what, '[', "an array"); err != nil {
		return err
	}
	for p.dec.More() {
		if err := read(); err != nil {
			return err
		}
	}
	_, err := p.dec.Token()
	return err
}

func (p jsonParser) open(what string, delim json.Delim, kind string) error {
	token, err := p.dec.Token()
	if err != nil {
		return err
	}
	if token != delim {
		return fmt.Errorf("%s must be %s, not %s", what, kind, describe(token))
	}
	return nil
}

func (p jsonParser) leaf(index int) (Leaf, error) {
	var leaf Leaf
	what := fmt.Sprintf("leaf %d", index)
	err := p.object(what, []string{"name", "dtype", "shape"}, func(field string) error {
		if field == "shape" {
			return p.array(what+`: "shape"`, func() error { return p.dimension(what, &leaf) })
		}
		token, err := p.dec.Token()
		if err != nil {
			return err
		}
		text, ok := token.(string)
		if !ok {
			return fmt.Errorf("%s: %q must be a string, not %s", what, field, describe(token))
		}
		if field == "name" {
			leaf.Name = text
			return nil
		}
		if leaf.DType, err = ParseDType(text); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		return nil
	})
	return leaf, err
}

func (p jsonParser) dimension(what string, leaf *Leaf) error {
	token, err := p.dec.Token()
	if err != nil {
		return err
	}
	if len(leaf.Shape) == DimsMax {
		return fmt.Errorf("%s: more than %d dimensions; merge some", what, DimsMax)
	}
	number, ok := token.(json.Number)
	if !ok {
		return fmt.Errorf("%s: dimension %d must be a whole number, not %s", what, len(leaf.Shape), describe(token))
	}
	d, err := strconv.ParseInt(number.String(), 10, 64)
	if err != nil {
		return fmt.Errorf("%s: dimension %d must be a whole number up to %d, not %s",
			what, len(leaf.Shape), int64(SampleBytesMax), describe(token))
	}
	leaf.Shape = append(leaf.Shape, d)
	return nil
}

// describe names a token for an error.
func describe(token json.Token) string {
	switch t := token.(type) {
	case nil:
		return "null"
	case string:
		return "the string " + quoteShort(t)
	case json.Number:
		if len(t) > 40 {
			t = t[:40] + "..."
		}
		return "the number " + t.String()
	case json.Delim:
		if t == '[' {
			return "an array"
		}
		return "an object"
	}
	return fmt.Sprint(token)
}

// JSON returns the compact JSON form, always the same bytes for equal specs.
func (s *Spec) JSON() []byte {
	b := []byte(`{"leaves":[`)
	for i, l := range s.leaves {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, `{"name":`...)
		b = appendJSONString(b, l.Name)
		b = append(b, `,"dtype":"`...)
		b = append(b, l.DType.String()...)
		b = append(b, `","shape":`...)
		b = appendShape(b, l.Shape)
		b = append(b, '}')
	}
	return append(b, "]}"...)
}

// appendJSONString quotes a legal name, which is UTF-8 without control characters.
func appendJSONString(dst []byte, s string) []byte {
	dst = append(dst, '"')
	for i := range len(s) {
		if s[i] == '"' || s[i] == '\\' {
			dst = append(dst, '\\')
		}
		dst = append(dst, s[i])
	}
	return append(dst, '"')
}

// MarshalJSON is JSON.
func (s *Spec) MarshalJSON() ([]byte, error) {
	if len(s.leaves) == 0 {
		return nil, errors.New("spec: this Spec was not made by New or a parser and has no leaves")
	}
	return s.JSON(), nil
}

// UnmarshalJSON is ParseJSON into s.
func (s *Spec) UnmarshalJSON(data []byte) error {
	parsed, err := ParseJSON(data)
	if err != nil {
		return err
	}
	*s = *parsed
	return nil
}
