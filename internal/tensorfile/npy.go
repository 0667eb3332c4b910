package tensorfile

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
	"unicode/utf8"
)

// HeaderBytesMax is the longest header of a .npy file that is read.
const HeaderBytesMax = 16 << 20

const npyMagic = "\x93NUMPY"

// array is what a file says of one array.
type array struct {
	element
	descr string
	shape []int64
}

// bytes multiplies shape and element size without overflow.
func (a *array) size() (int64, error) {
	n := a.bytes
	for _, d := range a.shape {
		if d != 0 && n > math.MaxInt64/d {
			return 0, formatErrorf("shape %v is larger than any file", a.shape)
		}
		n *= d
	}
	return n, nil
}

// readNPYHeader reads the header from r and returns the array and the header's length.
func readNPYHeader(r io.Reader) (*array, int64, error) {
	var fixed [12]byte
	if err := readAll(r, fixed[:8]); err != nil {
		return nil, 0, err
	}
	if string(fixed[:6]) != npyMagic {
		return nil, 0, formatErrorf("starts with % x, not with the magic of .npy (93 4e 55 4d 50 59): not a .npy file", fixed[:6])
	}
	major, minor := fixed[6], fixed[7]
	var length, prefix int64
	switch {
	case major == 1 && minor == 0:
		if err := readAll(r, fixed[8:10]); err != nil {
			return nil, 0, err
		}
		length, prefix = int64(binary.LittleEndian.Uint16(fixed[8:])), 10
	case (major == 2 || major == 3) && minor == 0:
		if err := readAll(r, fixed[8:12]); err != nil {
			return nil, 0, err
		}
		length, prefix = int64(binary.LittleEndian.Uint32(fixed[8:])), 12
	default:
		return nil, 0, formatErrorf(".npy version %d.%d; versions 1.0, 2.0 and 3.0 are known", major, minor)
	}
	if length > HeaderBytesMax {
		return nil, 0, formatErrorf("the header says it is %d bytes long; at most %d are read", length, HeaderBytesMax)
	}
	// Grows with what is there, so that a short file that claims a long header costs nothing.
	var text bytes.Buffer
	if n, err := io.CopyN(&text, r, length); err != nil {
		if errors.Is(err, io.EOF) {
			return nil, 0, formatErrorf("the file ends %d bytes into a header of %d: it is cut short", n, length)
		}
		return nil, 0, err
	}
	a, err := parseNPYHeader(text.String())
	return a, prefix + length, err
}

func readAll(r io.Reader, dst []byte) error {
	_, err := io.ReadFull(r, dst)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return formatErrorf("the file ends inside its header: it is empty or cut short")
	}
	return err
}

// parseNPYHeader reads the Python dict of a .npy header; no other expression is accepted.
func parseNPYHeader(text string) (*array, error) {
	p := &literal{text: text}
	a := &array{}
	seen := map[string]bool{}
	fortran := false
	p.expect('{')
	for p.err == nil && !p.accept('}') {
		key := p.str()
		p.expect(':')
		if p.err == nil && seen[key] {
			p.fail("key %q twice", key)
		}
		seen[key] = true
		switch key {
		case "descr":
			if p.peek() == '[' {
				return nil, formatErrorf("it has a structured dtype: save each field as an array of its own, with np.savez(file, **{name: a[name] for name in a.dtype.names})")
			}
			a.descr = p.str()
		case "fortran_order":
			fortran = p.boolean()
		case "shape":
			a.shape = p.tuple()
		default:
			p.fail("unknown key %q", cut(key))
		}
		if !p.accept(',') && p.peek() != '}' {
			p.fail("a comma or } is missing")
		}
	}
	if p.err == nil && strings.TrimSpace(p.text) != "" {
		p.fail("something follows the dict")
	}
	if p.err == nil && !(seen["descr"] && seen["fortran_order"] && seen["shape"]) {
		p.fail("descr, fortran_order or shape is missing")
	}
	if p.err != nil {
		return nil, p.err
	}
	if fortran && len(a.shape) > 1 {
		return nil, formatErrorf("the array is stored column by column (fortran_order), so its samples are not contiguous: save it with np.ascontiguousarray(a)")
	}
	var err error
	a.element, err = parseDescr(a.descr)
	return a, err
}

// literal reads the few Python literals that a .npy header is made of. After the first error every call returns at once.
type literal struct {
	text string
	err  error
}

func (p *literal) fail(format string, args ...any) {
	if p.err == nil {
		p.err = formatErrorf("the .npy header is damaged: %s", fmt.Sprintf(format, args...))
	}
	p.text = ""
}

func (p *literal) peek() byte {
	p.text = strings.TrimLeft(p.text, " \t\r\n")
	if p.text == "" {
		return 0
	}
	return p.text[0]
}

func (p *literal) accept(c byte) bool {
	if p.peek() != c {
		return false
	}
	p.text = p.text[1:]
	return true
}

func (p *literal) expect(c byte) {
	if !p.accept(c) {
		p.fail("%q expected at %q", c, cut(p.text))
	}
}

func (p *literal) str() string {
	quote := p.peek()
	if quote != '\'' && quote != '"' {
		p.fail("a string expected at %q", cut(p.text))
		return ""
	}
	end := strings.IndexByte(p.text[1:], quote)
	if end < 0 {
		p.fail("a string does not end")
		return ""
	}
	s := p.text[1 : 1+end]
	p.text = p.text[end+2:]
	if strings.Contains(s, `\`) || !utf8.ValidString(s) {
		p.fail("a string with escapes or bytes that are not UTF-8")
	}
	return s
}

func (p *literal) boolean() bool {
	p.peek()
	for word, value := range map[string]bool{"True": true, "False": false} {
		if rest, ok := strings.CutPrefix(p.text, word); ok {
			p.text = rest
			return value
		}
	}
	p.fail("True or False expected at %q", cut(p.text))
	return false
}

const npyDimsMax = 64 // numpy's own limit

func (p *literal) tuple() []int64 {
	shape := []int64{}
	p.expect('(')
	for p.err == nil && !p.accept(')') {
		p.peek()
		end := 0
		for end < len(p.text) && p.text[end] >= '0' && p.text[end] <= '9' {
			end++
		}
		n, err := strconv.ParseInt(p.text[:end], 10, 64)
		if err != nil {
			p.fail("a number expected at %q", cut(p.text))
			break
		}
		p.text = strings.TrimPrefix(p.text[end:], "L") // as Python 2 wrote it
		if shape = append(shape, n); len(shape) > npyDimsMax {
			p.fail("more than %d dimensions", npyDimsMax)
		}
		if !p.accept(',') && p.peek() != ')' {
			p.fail("a comma or ) is missing in the shape")
		}
	}
	return shape
}

// npyHeader writes a version 1.0 header of exactly npyHeaderBytes for a C-ordered array.
func npyHeader(descr string, shape []int64) ([]byte, error) {
	dims := make([]string, len(shape))
	for i, d := range shape {
		dims[i] = strconv.FormatInt(d, 10)
	}
	list := strings.Join(dims, ", ")
	if len(shape) == 1 {
		list += ","
	}
	h := make([]byte, 0, npyHeaderBytes)
	h = append(h, npyMagic+"\x01\x00"...)
	h = binary.LittleEndian.AppendUint16(h, npyHeaderBytes-10)
	h = fmt.Appendf(h, "{'descr': '%s', 'fortran_order': False, 'shape': (%s), }", descr, list)
	if len(h) >= npyHeaderBytes {
		return nil, formatErrorf("shape %v does not fit the .npy header", shape)
	}
	for len(h) < npyHeaderBytes-1 {
		h = append(h, ' ')
	}
	return append(h, '\n'), nil
}

const npyHeaderBytes = 320 // a multiple of 64 that holds nine dimensions of 20 digits
