package wire

import "bytes"

// members walks over the members of an object of well-formed JSON, of which it copies nothing: a hello is read for peers of whom nothing is known yet, and must not take several
// times its own size.
type members struct{ rest []byte }

// jsonSpace is the white space of JSON (RFC 8259, 2).
const jsonSpace = " \t\r\n"

// membersOf begins at an object's first member. The text must be well-formed; ok is false if it is no object.
func membersOf(text []byte) (m members, ok bool) {
	text = bytes.TrimLeft(text, jsonSpace)
	if len(text) == 0 || text[0] != '{' {
		return m, false
	}
	return members{bytes.TrimLeft(text[1:], jsonSpace)}, true
}

func (m *members) more() bool { return len(m.rest) > 0 && m.rest[0] != '}' }

// next returns the next member's name, with its quotes, and its value.
func (m *members) next() (name, value []byte) {
	name = m.take(endOfString(m.rest))
	m.take(1) // the colon
	value = m.take(endOfValue(m.rest))
	if m.rest[0] == ',' {
		m.take(1)
	}
	return name, value
}

// take returns n bytes, and goes on after the space behind them.
func (m *members) take(n int) []byte {
	taken := m.rest[:n:n]
	m.rest = bytes.TrimLeft(m.rest[n:], jsonSpace)
	return taken
}

// endOfString returns the length of the string that a text begins with.
func endOfString(text []byte) int {
	for i := 1; ; i++ {
		switch text[i] {
		case '\\':
			i++
		case '"':
			return i + 1
		}
	}
}

// endOfValue returns the length of the value that a text begins with, and which something follows.
func endOfValue(text []byte) int {
	for i, depth := 0, 0; ; i++ {
		switch text[i] {
		case '"':
			i += endOfString(text[i:]) - 1
		case '{', '[':
			depth++
		case '}', ']':
			if depth == 0 { // of the object around a number or a word
				return i
			}
			depth--
		case ',', ' ', '\t', '\r', '\n':
			if depth == 0 {
				return i
			}
			continue
		default:
			continue
		}
		if depth == 0 {
			return i + 1
		}
	}
}
