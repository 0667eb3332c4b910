package auth

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"

	"go.yaml.in/yaml/v3"

	"github.com/ingestd/ingestd/wire"
)

// Limits of a file of tokens.
const (
	FileBytesMax = 1 << 20
	TokensMax    = 4096
	TablesMax    = 64 // patterns of one token
)

// FormatError says what is wrong with a file of tokens. It shows nothing of the file but line numbers and names of tokens: anything else may be a secret.
type FormatError struct {
	Line int // 0: of none
	Text string
}

func (e *FormatError) Error() string {
	if e.Line == 0 {
		return e.Text
	}
	return fmt.Sprintf("line %d: %s", e.Line, e.Text)
}

func wrong(n *yaml.Node, format string, args ...any) error {
	return &FormatError{n.Line, fmt.Sprintf(format, args...)}
}

var lineNumber = regexp.MustCompile(`line (\d+)`)

// parse reads the file by hand: the messages of a decoder would show values.
func parse(text []byte) ([]*entry, error) {
	dec := yaml.NewDecoder(bytes.NewReader(text))
	var doc yaml.Node
	if err := dec.Decode(&doc); err != nil {
		bad := &FormatError{Text: "this is not YAML"}
		if m := lineNumber.FindStringSubmatch(err.Error()); m != nil {
			_, _ = fmt.Sscan(m[1], &bad.Line)
		}
		if errors.Is(err, io.EOF) {
			bad.Text = "it is empty; write `tokens: []` for no tokens"
		}
		return nil, bad
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, &FormatError{Text: "more follows after the first YAML document"}
	}
	top, err := fields(doc.Content[0], "tokens")
	if err != nil {
		return nil, err
	}
	list := top["tokens"]
	switch {
	case list == nil:
		return nil, wrong(doc.Content[0], "the field `tokens` is missing")
	case list.Kind != yaml.SequenceNode:
		return nil, wrong(list, "`tokens` must be a list")
	case len(list.Content) > TokensMax:
		return nil, wrong(list, "there are %d tokens, at most %d are allowed", len(list.Content), TokensMax)
	}
	var entries []*entry
	names := map[string]bool{}
	for _, n := range list.Content {
		e, err := parseToken(n)
		if err != nil {
			return nil, err
		}
		if names[e.name] {
			return nil, wrong(n, "%s is there twice", called(e.name))
		}
		names[e.name] = true
		entries = append(entries, e)
	}
	return entries, nil
}

func parseToken(n *yaml.Node) (*entry, error) {
	given, err := fields(n, "name", "secret", "previous", "rights", "tables")
	if err != nil {
		return nil, err
	}
	e := &entry{}
	if e.name, err = text(given["name"]); err == nil {
		err = wire.CheckTokenName(e.name)
	}
	if err != nil {
		return nil, wrong(n, "the token's `name`: %v", err)
	}
	for i, field := range []string{"secret", "previous"} {
		if i > 0 && given[field] == nil {
			continue
		}
		s, err := text(given[field])
		if err == nil {
			e.secrets[i], err = wire.NewSecret(s)
		}
		if err != nil {
			return nil, wrong(n, "`%s` of %s: %v", field, called(e.name), err)
		}
	}
	e.rotating = !e.secrets[1].IsZero()
	if e.rotating && e.secrets[0].Reveal() == e.secrets[1].Reveal() {
		return nil, wrong(n, "`secret` and `previous` of %s are the same", called(e.name))
	}
	rights, err := texts(given["rights"])
	if err != nil || len(rights) == 0 {
		return nil, wrong(n, "`rights` of %s must be a list of some of push, read, publish, admin", called(e.name))
	}
	for _, name := range rights {
		right, err := ParseRight(name)
		if err != nil {
			return nil, wrong(n, "`rights` of %s: %v", called(e.name), err)
		}
		e.rights |= right
	}
	e.tables, err = texts(given["tables"])
	switch {
	case given["tables"] != nil && err != nil:
		return nil, wrong(n, "`tables` of %s must be a list of names or patterns of tables, such as [\"digits\", \"w*\"]", called(e.name))
	case len(e.tables) > TablesMax:
		return nil, wrong(n, "`tables` of %s has %d patterns, at most %d are allowed", called(e.name), len(e.tables), TablesMax)
	case len(e.tables) == 0 && e.rights != Admin:
		return nil, wrong(n, "`tables` of %s is missing; write [\"*\"] for all tables", called(e.name))
	}
	for _, pattern := range e.tables {
		if pattern == "" || len(pattern) > wire.NameBytesMax {
			return nil, wrong(n, "`tables` of %s: a pattern has 1 to %d bytes", called(e.name), wire.NameBytesMax)
		}
	}
	return e, nil
}

// called is a token in an error. What is as long as a secret may be one in the wrong place.
func called(name string) string {
	if len(name) >= wire.SecretBytesMin {
		return "this token"
	}
	return fmt.Sprintf("token %q", name)
}

// fields takes a mapping apart, in which nothing but the names may be.
func fields(n *yaml.Node, names ...string) (map[string]*yaml.Node, error) {
	if n.Kind != yaml.MappingNode {
		return nil, wrong(n, "here must be the fields %q", names)
	}
	given := map[string]*yaml.Node{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key := n.Content[i]
		if key.Kind != yaml.ScalarNode || !slices.Contains(names, key.Value) {
			return nil, wrong(key, "a field that is none of %q", names)
		}
		if given[key.Value] != nil {
			return nil, wrong(key, "the field `%s` is there twice", key.Value)
		}
		given[key.Value] = n.Content[i+1]
	}
	return given, nil
}

func text(n *yaml.Node) (string, error) {
	switch {
	case n == nil:
		return "", errors.New("it is missing")
	case n.Kind != yaml.ScalarNode || n.Tag != "!!str":
		return "", errors.New("it must be a text; put it between quotes")
	}
	return n.Value, nil
}

func texts(n *yaml.Node) ([]string, error) {
	if n == nil || n.Kind != yaml.SequenceNode {
		return nil, errors.New("it must be a list")
	}
	list := make([]string, len(n.Content))
	for i, item := range n.Content {
		var err error
		if list[i], err = text(item); err != nil {
			return nil, err
		}
	}
	return list, nil
}
