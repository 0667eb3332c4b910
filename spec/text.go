package spec

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// ParseText reads the text form: leaves separated by commas, each name:DTYPE[dim,dim,..], the brackets
// left out for a scalar: image:F32[8,8],label:I32. A name with any of , : [ ] " \ { or blanks in it is
// written in double quotes as in Go. Blanks around the parts are ignored.
func ParseText(text string) (*Spec, error) {
	if len(text) > TextBytesMax {
		return nil, fmt.Errorf("spec: the text has %d bytes; at most %d are allowed", len(text), TextBytesMax)
	}
	p := textParser{text: text}
	leaves, err := p.leaves()
	if err != nil {
		return nil, fmt.Errorf("spec: at byte %d of the text: %w", p.at, err)
	}
	return New(leaves)
}

// special holds what a bare name may not contain, beside blanks and unprintable characters.
const special = `,:[]"\{`

type textParser struct {
	text string
	at   int
}

func (p *textParser) leaves() ([]Leaf, error) {
	var leaves []Leaf
	for {
		if len(leaves) == LeavesMax {
			return nil, fmt.Errorf("more than %d leaves; merge some", LeavesMax)
		}
		leaf, err := p.leaf()
		if err != nil {
			return nil, err
		}
		leaves = append(leaves, leaf)
		p.blanks()
		if p.at == len(p.text) {
			return leaves, nil
		}
		if !p.take(',') {
			return nil, fmt.Errorf("found %s after leaf %q; leaves are separated by a comma", p.next(), leaf.Name)
		}
	}
}

func (p *textParser) leaf() (leaf Leaf, err error) {
	if leaf.Name, err = p.name(); err != nil {
		return leaf, err
	}
	if !p.take(':') {
		return leaf, fmt.Errorf("found %s after the name %s; a leaf is written name:DTYPE[dims], such as image:F32[8,8]",
			p.next(), quoteShort(leaf.Name))
	}
	if leaf.DType, err = ParseDType(p.word()); err != nil {
		return leaf, err
	}
	if !p.take('[') || p.take(']') {
		return leaf, nil
	}
	for {
		if len(leaf.Shape) == DimsMax {
			return leaf, fmt.Errorf("more than %d dimensions; merge some", DimsMax)
		}
		word := p.word()
		d, err := strconv.ParseInt(word, 10, 64)
		if err != nil {
			return leaf, fmt.Errorf("dimension %d of leaf %s must be a whole number up to %d, not %s",
				len(leaf.Shape), quoteShort(leaf.Name), int64(SampleBytesMax), quoteShort(word))
		}
		leaf.Shape = append(leaf.Shape, d)
		if p.take(']') {
			return leaf, nil
		}
		if !p.take(',') {
			return leaf, fmt.Errorf("found %s in the shape of leaf %s; it is written [8,8]", p.next(), quoteShort(leaf.Name))
		}
	}
}

func (p *textParser) name() (string, error) {
	p.blanks()
	if rest := p.text[p.at:]; strings.HasPrefix(rest, `"`) {
		quoted, err := strconv.QuotedPrefix(rest)
		if err != nil {
			return "", fmt.Errorf("the quoted name that starts here does not end, or is not quoted as in Go")
		}
		p.at += len(quoted)
		return strconv.Unquote(quoted)
	}
	name := p.word()
	if name == "" {
		return "", fmt.Errorf("found %s where a leaf's name must be", p.next())
	}
	return name, nil
}

// word takes everything up to the next special character or blank.
func (p *textParser) word() string {
	p.blanks()
	end := strings.IndexFunc(p.text[p.at:], func(r rune) bool { return unicode.IsSpace(r) || strings.ContainsRune(special, r) })
	if end < 0 {
		end = len(p.text) - p.at
	}
	word := p.text[p.at : p.at+end]
	p.at += end
	return word
}

func (p *textParser) take(c byte) bool {
	p.blanks()
	if p.at == len(p.text) || p.text[p.at] != c {
		return false
	}
	p.at++
	return true
}

func (p *textParser) blanks() {
	rest := p.text[p.at:]
	p.at += len(rest) - len(strings.TrimLeftFunc(rest, unicode.IsSpace))
}

// next names what comes next, for an error.
func (p *textParser) next() string {
	if p.at == len(p.text) {
		return "the end"
	}
	_, n := utf8.DecodeRuneInString(p.text[p.at:])
	return strconv.Quote(p.text[p.at : p.at+n])
}

// Text returns the text form without blanks; ParseText reads it back to an equal spec.
func (s *Spec) Text() string {
	var b []byte
	for i, l := range s.leaves {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, quoteName(l.Name)...)
		b = append(b, ':')
		b = l.appendType(b)
	}
	return string(b)
}

// quoteName quotes a name that ParseText would not read as one word.
func quoteName(name string) string {
	quoted := strconv.Quote(name)
	if strings.ContainsAny(name, special) || strings.ContainsFunc(name, unicode.IsSpace) || quoted[1:len(quoted)-1] != name {
		return quoted
	}
	return name
}
