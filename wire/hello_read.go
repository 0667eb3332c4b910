package wire

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/ingestd/ingestd/spec"
)

// ReadHello reads one hello and not a byte beyond it. Whatever the peer did wrong comes back as a *Refusal to
// send it, also that the read deadline passed first or that it stopped half-way. A peer that closed before its first byte
// is io.EOF; other errors of r are wrapped.
func ReadHello(r io.Reader) (*Hello, error) {
	h, _, err := ReadHelloFrame(r)
	return h, err
}

// ReadHelloFrame is ReadHello that also returns all bytes of the hello as they came, from which both sides make the Transcript.
func ReadHelloFrame(r io.Reader) (*Hello, []byte, error) {
	return ReadHelloFrameAsking(r, nil)
}

// ReadHelloFrameAsking is ReadHelloFrame for a daemon that does not know yet whom it listens to: before it takes in a body of more than HelloBytesSmall it asks large, which may
// wait, and a refusal of which it returns. Nil allows all.
func ReadHelloFrameAsking(r io.Reader, large func(bytes int) *Refusal) (*Hello, []byte, error) {
	var header [headerBytes]byte
	n, ok, err := readHeader(r, &header)
	switch {
	case !ok:
		return nil, nil, Refuse(CodeBadMagic, "the first bytes %q are not a hello, which starts with %q%s", header[:n], Magic, guess(header[:n]))
	case err != nil:
		return nil, nil, helloReadError(err, n)
	}
	h := &Hello{
		VersionMin: binary.LittleEndian.Uint16(header[8:]),
		VersionMax: binary.LittleEndian.Uint16(header[10:]),
	}
	if refusal := checkVersions(h.VersionMin, h.VersionMax); refusal != nil {
		return nil, nil, refusal
	}
	length := binary.LittleEndian.Uint32(header[12:])
	if length < bodyBytesMin || length > BodyBytesMax {
		return nil, nil, Refuse(CodeBadHandshake, "the hello's body has %d bytes; it may have %d to %d", length, bodyBytesMin, BodyBytesMax)
	}
	if length > HelloBytesSmall && large != nil {
		if refusal := large(int(length)); refusal != nil {
			return nil, nil, refusal
		}
	}
	frame, err := readBody(r, header[:], int(length))
	if err != nil {
		return nil, nil, helloReadError(err, len(frame))
	}
	if refusal := h.parse(frame[headerBytes:]); refusal != nil {
		return nil, nil, refusal
	}
	return h, frame, nil
}

// guess names the protocol that a stranger's first bytes belong to.
func guess(first []byte) string {
	text := string(first)
	switch {
	case strings.HasPrefix(text, "GET "), strings.HasPrefix(text, "POST"), strings.HasPrefix(text, "HEAD"), strings.HasPrefix(text, "PRI "):
		return "; this looks like HTTP, which the daemon's admin address speaks"
	case strings.HasPrefix(text, "\x16\x03"):
		return "; this looks like TLS, which this port does not speak"
	}
	return ""
}

func helloReadError(err error, arrived int) error {
	var timeout interface{ Timeout() bool }
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout():
		return Refuse(CodeHandshakeTimeout, "the hello was not complete in time, %d bytes of it came; send it whole right after connecting", arrived)
	case arrived == 0 && err == io.EOF:
		return io.EOF
	case err == io.EOF || err == io.ErrUnexpectedEOF:
		return Refuse(CodeBadHandshake, "the hello ended after %d bytes, before it was complete", arrived)
	}
	return fmt.Errorf("wire: read the hello, after %d bytes: %w", arrived, err)
}

func (h *Hello) parse(body []byte) *Refusal {
	given, err := h.fields(body)
	if err != nil {
		var refusal *Refusal
		if errors.As(err, &refusal) {
			return refusal
		}
		return Refuse(CodeBadHandshake, "the hello's body: %v", err)
	}
	if refusal := h.check(given); refusal != nil {
		return refusal
	}
	if !slices.Contains(given, "byte_order") {
		return Refuse(CodeBadHandshake, `the field "byte_order" is missing; it is %q`, ByteOrder)
	}
	if h.Role == RolePush && h.Ack == "" {
		h.Ack = AckQueued
	}
	return nil
}

// fields fills h and returns the names of the fields that were there.
func (h *Hello) fields(body []byte) (given []string, err error) {
	if !utf8.Valid(body) {
		return nil, errors.New("not UTF-8")
	}
	// What follows meets well-formed JSON only. Into an empty struct, nothing is kept and the offset is exact.
	var nothing struct{}
	var syntax *json.SyntaxError
	if err := json.Unmarshal(body, &nothing); errors.As(err, &syntax) {
		return nil, fmt.Errorf("not JSON: at byte %d: %w", syntax.Offset, err)
	}
	m, ok := membersOf(body)
	if !ok {
		return nil, errors.New("not a JSON object")
	}
	for m.more() {
		key, raw := m.next()
		var name string
		if err := json.Unmarshal(key, &name); err != nil {
			return nil, err
		}
		if slices.Contains(given, name) {
			return nil, fmt.Errorf("the field %q is there twice", name)
		}
		target := h.target(name)
		if target == nil {
			return nil, fmt.Errorf("the field %s is not known; take it out", short(name))
		}
		given = append(given, name)
		if err := decodeField(name, raw, target); err != nil {
			return nil, err
		}
	}
	return given, nil
}

// byteOrder is the field byte_order, which has one legal value and so no place in Hello.
type byteOrder struct{}

// target is where the field of that name goes, nil if there is none.
func (h *Hello) target(name string) any {
	switch name {
	case "role":
		return (*string)(&h.Role)
	case "table":
		return &h.Table
	case "byte_order":
		return byteOrder{}
	case "spec":
		return &h.Spec
	case "fingerprint":
		return &h.Fingerprint
	case "session":
		return &h.Session
	case "ack":
		return (*string)(&h.Ack)
	case "window_samples":
		return &h.WindowSamples
	case "window_bytes":
		return &h.WindowBytes
	case "prefetch":
		return &h.Prefetch
	case "group":
		return &h.Group
	case "notes":
		return &h.Notes
	case "client":
		return &h.Client
	case "compression":
		return (*string)(&h.Compression)
	case "token":
		return &h.Token
	case "nonce":
		return &h.Nonce
	}
	return h.tensorsTarget(name)
}

// tensorsTarget is target for the fields of tensors and weights.
func (h *Hello) tensorsTarget(name string) any {
	switch name {
	case "manifest":
		return &h.Manifest
	case "manifest_id":
		return &h.ManifestID
	case "session_of":
		return &h.SessionOf
	case "in_place":
		return &h.InPlace
	case "wait":
		return &h.Wait
	case "stream":
		return &h.Stream
	case "delta":
		return &h.Delta
	case "have":
		return &h.Have
	case "have_digest":
		return &h.HaveDigest
	case "resume":
		return &h.Resume
	case "resume_digest":
		return &h.ResumeDigest
	case "resume_offset":
		return &h.ResumeOffset
	}
	return nil
}

func decodeField(name string, raw []byte, target any) (err error) {
	switch t := target.(type) {
	case **spec.Spec:
		if *t, err = spec.ParseJSON(raw); err != nil {
			return Refuse(CodeBadOption, "the field %q: %v", name, err)
		}
		return nil
	case *json.RawMessage:
		if raw[0] != '{' {
			return fmt.Errorf("the field %q must be an object, not %s", name, cutText(string(raw), 40))
		}
		*t = raw
		return nil
	case *int64:
		if raw[0] == 'n' || json.Unmarshal(raw, t) != nil {
			return fmt.Errorf("the field %q must be a whole number, not %s", name, cutText(string(raw), 40))
		}
		return nil
	case *bool:
		if raw[0] == 'n' || json.Unmarshal(raw, t) != nil {
			return fmt.Errorf("the field %q must be true or false, not %s", name, cutText(string(raw), 40))
		}
		return nil
	}
	var text string
	if raw[0] != '"' || json.Unmarshal(raw, &text) != nil {
		return fmt.Errorf("the field %q must be a string, not %s", name, cutText(string(raw), 40))
	}
	switch t := target.(type) {
	case *string:
		*t = text
	case *spec.Fingerprint:
		if *t, err = spec.ParseFingerprint(text); err != nil {
			return Refuse(CodeBadOption, "the field %q: %v", name, err)
		}
	case *Nonce:
		if err = t.UnmarshalText([]byte(text)); err != nil {
			return Refuse(CodeBadOption, "the field %q: %v", name, err)
		}
	case byteOrder:
		if text != ByteOrder {
			return Refuse(CodeBadOption, "the byte order %s is not served; send samples as %q", short(text), ByteOrder)
		}
	}
	return nil
}
