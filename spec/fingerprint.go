package spec

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
)

// Fingerprint identifies a spec: SHA-256 of the encoding in docs/wire-protocol.md, "Fingerprint".
type Fingerprint [sha256.Size]byte

// ParseFingerprint reads 64 hex digits.
func ParseFingerprint(text string) (Fingerprint, error) {
	var f Fingerprint
	if len(text) != hex.EncodedLen(len(f)) {
		return f, fmt.Errorf("spec: fingerprint %s has %d characters; it must be %d hex digits",
			quoteShort(text), len(text), hex.EncodedLen(len(f)))
	}
	if _, err := hex.Decode(f[:], []byte(text)); err != nil {
		return Fingerprint{}, fmt.Errorf("spec: fingerprint %q must be hex digits: %w", text, err)
	}
	return f, nil
}

// String returns 64 lower-case hex digits.
func (f Fingerprint) String() string { return hex.EncodeToString(f[:]) }

// IsZero says that no fingerprint was given; no spec has this one.
func (f Fingerprint) IsZero() bool { return f == Fingerprint{} }

// MarshalText is String, for JSON.
func (f Fingerprint) MarshalText() ([]byte, error) { return []byte(f.String()), nil }

// UnmarshalText is ParseFingerprint, for JSON.
func (f *Fingerprint) UnmarshalText(text []byte) error {
	parsed, err := ParseFingerprint(string(text))
	if err == nil {
		*f = parsed
	}
	return err
}

// canonical is the encoding that is hashed. The leaves must be legal.
func canonical(leaves []Leaf) []byte {
	b := []byte("ingestd-spec-1\n")
	b = binary.LittleEndian.AppendUint32(b, uint32(len(leaves)))
	for _, l := range leaves {
		b = binary.LittleEndian.AppendUint16(b, uint16(len(l.Name)))
		b = append(b, l.Name...)
		dtype := l.DType.String()
		b = append(b, byte(len(dtype)))
		b = append(b, dtype...)
		b = append(b, byte(len(l.Shape)))
		for _, d := range l.Shape {
			b = binary.LittleEndian.AppendUint64(b, uint64(d))
		}
	}
	return b
}

func fingerprint(leaves []Leaf) Fingerprint { return sha256.Sum256(canonical(leaves)) }
