package wire

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
)

// hidden is what is written instead of a secret.
const hidden = "[secret]"

// Secret is a token's secret. Whatever it is printed, logged or marshalled with, also inside of other values, shows that there is one, and no more.
type Secret struct {
	// A pointer, since fmt calls no method of what lies in fields that are not exported, and follows no pointers there.
	text *string
}

// NewSecret checks length and characters: SecretBytesMin to SecretBytesMax of printable ASCII without space, so that it fits a header of HTTP and a line of a shell.
// Its errors do not show the secret.
func NewSecret(text string) (Secret, error) {
	switch {
	case len(text) < SecretBytesMin:
		return Secret{}, fmt.Errorf("the secret has %d characters, at least %d are needed; `ingestd token new NAME` makes one", len(text), SecretBytesMin)
	case len(text) > SecretBytesMax:
		return Secret{}, fmt.Errorf("the secret has %d characters, at most %d are allowed", len(text), SecretBytesMax)
	case strings.ContainsFunc(text, func(c rune) bool { return c <= ' ' || c > '~' }):
		return Secret{}, errors.New("the secret has a character that is not printable ASCII, or a space")
	}
	return Secret{&text}, nil
}

// IsZero says that there is none.
func (s Secret) IsZero() bool { return s.text == nil }

// Reveal returns the secret itself, for the one who writes it into a file or a header.
func (s Secret) Reveal() string {
	if s.text == nil {
		return ""
	}
	return *s.text
}

func (s Secret) bytes() []byte { return []byte(s.Reveal()) }

func (s Secret) String() string {
	if s.IsZero() {
		return ""
	}
	return hidden
}

// Format writes the same for all verbs.
func (s Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, s.String()) }

// LogValue hides it from slog.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalText hides it from encoders.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Token is what a client proves to have. The zero Token is none.
type Token struct {
	Name   string // as in the daemon's file of tokens
	Secret Secret
}

// ParseToken reads NAME:SECRET. Its errors do not show the secret.
func ParseToken(text string) (Token, error) {
	name, rest, ok := strings.Cut(text, ":")
	if !ok {
		return Token{}, errors.New("a token is written NAME:SECRET")
	}
	if err := CheckTokenName(name); err != nil {
		return Token{}, err
	}
	secret, err := NewSecret(rest)
	switch {
	case err != nil && len(name) >= SecretBytesMin: // it may be the secret, in the wrong place
		return Token{}, fmt.Errorf("this token, if it is NAME:SECRET and not the other way round: %w", err)
	case err != nil:
		return Token{}, fmt.Errorf("token %q: %w", name, err)
	}
	return Token{name, secret}, nil
}

// CheckTokenName says what is wrong with a token's name: it has 1 to NameBytesMax bytes of UTF-8 without control characters and without a colon. Its errors do not
// show the name, which may have a secret in it by mistake.
func CheckTokenName(name string) error {
	if name == "" {
		return errors.New("the token's name is empty")
	}
	switch err := checkText(name); {
	case len(name) > NameBytesMax:
		return fmt.Errorf("the token's name %w", err)
	case err != nil:
		return errors.New("the token's name is not UTF-8, or holds a control character")
	case strings.Contains(name, ":"):
		return errors.New("the token's name has a colon, after which the secret would begin")
	}
	return nil
}

// IsZero says that there is none.
func (t Token) IsZero() bool { return t.Name == "" && t.Secret.IsZero() }

// Check says what is missing: a token has both or neither.
func (t Token) Check() error {
	switch {
	case t.IsZero():
		return nil
	case t.Secret.IsZero():
		return fmt.Errorf("token %q has no secret", t.Name)
	}
	return CheckTokenName(t.Name)
}

func (t Token) String() string {
	if t.IsZero() {
		return ""
	}
	return t.Name + ":" + hidden
}

// LogValue shows the name only.
func (t Token) LogValue() slog.Value { return slog.StringValue(t.Name) }
