package wire

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"strings"
)

// Limits of authentication.
const (
	SecretBytesMin    = 32      // a daemon's proof lets who asked for it guess secrets in peace, so they must be too long for that
	SecretBytesMax    = 1 << 10 //
	ChallengeBytesMax = 4 << 10 // body of a challenge
	ProofBytesMax     = 256     // body of a proof
	ProofsMax         = 2       // proofs in a challenge: a token has two secrets while it is rotated
	ExporterBytes     = 32      // of the TLS exporter
)

// ExporterLabel is the label under which TLS gives the ExporterBytes that bind a proof to one connection (RFC 8446, 7.5, and RFC 9266's idea), without a context.
const ExporterLabel = "EXPORTER-ingestd-auth-1"

// What is hashed first: the transcript, and the proofs of both sides, which so cannot stand for each other.
const (
	transcriptLabel = "ingestd-auth-1\n"
	daemonLabel     = "daemon\n"
	clientLabel     = "client\n"
)

// Nonce is a number used once: each side makes one at random for every handshake.
type Nonce [32]byte

// Proof shows that its maker knows a token's secret, for one transcript.
type Proof [sha256.Size]byte

// Transcript is the digest of all that both sides of an exchange must have seen alike.
type Transcript [sha256.Size]byte

// NewNonce makes a nonce at random.
func NewNonce() Nonce {
	var n Nonce
	_, _ = rand.Read(n[:]) // never fails
	return n
}

// IsZero says that there is none.
func (n Nonce) IsZero() bool { return n == Nonce{} }

func (n Nonce) String() string { return hex.EncodeToString(n[:]) }

// MarshalText writes 64 hex digits.
func (n Nonce) MarshalText() ([]byte, error) { return hexText(n[:]), nil }

// UnmarshalText reads 64 hex digits, 0 to 9 and a to f.
func (n *Nonce) UnmarshalText(text []byte) error { return parseHex(n[:], text) }

func (p Proof) String() string { return hex.EncodeToString(p[:]) }

// MarshalText writes 64 hex digits.
func (p Proof) MarshalText() ([]byte, error) { return hexText(p[:]), nil }

// UnmarshalText reads 64 hex digits, 0 to 9 and a to f.
func (p *Proof) UnmarshalText(text []byte) error { return parseHex(p[:], text) }

// Equal compares in a time that does not depend on where they differ.
func (p Proof) Equal(other Proof) bool { return hmac.Equal(p[:], other[:]) }

func hexText(b []byte) []byte { return hex.AppendEncode(nil, b) }

func parseHex(dst, text []byte) error {
	if len(text) != 2*len(dst) || strings.ContainsFunc(string(text), func(c rune) bool { return !isHexDigit(c) }) {
		return fmt.Errorf("it must be %d hex digits, 0 to 9 and a to f", 2*len(dst))
	}
	_, err := hex.Decode(dst, text)
	return err
}

func isHexDigit(c rune) bool { return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' }

// NewTranscript digests a handshake: the frame of the hello exactly as it was sent, header included, the daemon's nonce, and what TLS exports under ExporterLabel, or
// nil where there is no TLS. An exporter of another length than ExporterBytes panics: it is ours.
func NewTranscript(hello []byte, daemon Nonce, exporter []byte) Transcript {
	var none [ExporterBytes]byte
	switch {
	case exporter == nil:
		exporter = none[:]
	case len(exporter) != ExporterBytes:
		panic(fmt.Sprintf("wire: the TLS exporter has %d bytes, want %d", len(exporter), ExporterBytes))
	}
	h := sha256.New()
	h.Write([]byte(transcriptLabel))
	h.Write(binary.LittleEndian.AppendUint32(nil, uint32(len(hello))))
	h.Write(hello)
	h.Write(daemon[:])
	h.Write(exporter)
	return Transcript(h.Sum(nil))
}

// DaemonProof is what a daemon shows of a secret.
func (t Transcript) DaemonProof(s Secret) Proof { return t.prove(s, daemonLabel) }

// ClientProof is what a client shows of it.
func (t Transcript) ClientProof(s Secret) Proof { return t.prove(s, clientLabel) }

func (t Transcript) prove(s Secret, label string) Proof {
	mac := hmac.New(sha256.New, s.bytes())
	mac.Write([]byte(label))
	mac.Write(t[:])
	return Proof(mac.Sum(nil))
}

// Challenge answers a hello that names a token: the daemon proves that it knows the token's secret, and wants the client to do the same. ReadReply returns it as an
// error, which it is to a client that named none.
type Challenge struct {
	Nonce  Nonce   `json:"nonce"`
	Proofs []Proof `json:"proofs"` // 1 to ProofsMax: one of them is right
}

func (c *Challenge) Error() string {
	return "the daemon asks for the proof of a token where none was named"
}

// Proves says whether one of the proofs is the daemon's for this secret.
func (c *Challenge) Proves(t Transcript, s Secret) bool {
	want, ok := t.DaemonProof(s), false
	for _, p := range c.Proofs {
		ok = p.Equal(want) || ok
	}
	return ok
}

// AppendChallenge appends the encoded challenge. It panics on another number of proofs than a client takes.
func AppendChallenge(dst []byte, c *Challenge) []byte {
	if len(c.Proofs) < 1 || len(c.Proofs) > ProofsMax {
		panic(fmt.Sprintf("wire: a challenge with %d proofs", len(c.Proofs)))
	}
	body, _ := encode(c) // texts always encode
	return appendFrame(dst, Version, statusChallenge, body)
}

// WriteChallenge writes the encoded challenge with one Write.
func WriteChallenge(w io.Writer, c *Challenge) error { return write(w, AppendChallenge(nil, c)) }

// parseChallenge returns the *Challenge, or what is wrong with it.
func parseChallenge(body []byte) error {
	var c struct {
		Nonce  Nonce     `json:"nonce"`
		Proofs proofList `json:"proofs"`
	}
	if err := json.Unmarshal(body, &c); err != nil {
		return protocolError("the challenge's body: %w", err)
	}
	if c.Nonce.IsZero() || len(c.Proofs) == 0 {
		return protocolError("the challenge has no nonce, or no proof")
	}
	return &Challenge{c.Nonce, c.Proofs}
}

// proofList refuses more than ProofsMax, and null, which would be a proof of zeros.
type proofList []Proof

func (l *proofList) UnmarshalJSON(data []byte) error {
	var texts []string
	if err := json.Unmarshal(data, &texts); err != nil {
		return err
	}
	if len(texts) > ProofsMax {
		return fmt.Errorf("it has %d proofs, at most %d are allowed", len(texts), ProofsMax)
	}
	*l = make([]Proof, len(texts))
	for i, text := range texts {
		if err := (*l)[i].UnmarshalText([]byte(text)); err != nil {
			return fmt.Errorf("a proof: %w", err)
		}
	}
	return nil
}

// AppendProof appends the encoded proof of a client.
func AppendProof(dst []byte, p Proof) []byte {
	body, _ := encode(struct { // a text always encodes
		Proof Proof `json:"proof"`
	}{p})
	return appendFrame(dst, Version, 0, body)
}

// WriteProof writes the encoded proof with one Write.
func WriteProof(w io.Writer, p Proof) error {
	if _, err := w.Write(AppendProof(nil, p)); err != nil {
		return fmt.Errorf("wire: write the proof: %w", err)
	}
	return nil
}

// ReadProof reads one proof and not a byte beyond it. What is not a proof wraps ErrProtocol; an end before it is complete wraps io.ErrUnexpectedEOF.
func ReadProof(r io.Reader) (Proof, error) {
	var header [headerBytes]byte
	n, ok, err := readHeader(r, &header)
	switch {
	case !ok:
		return Proof{}, protocolError("the proof starts with %q", header[:n])
	case err != nil:
		return Proof{}, fmt.Errorf("wire: read the proof, after %d bytes: %w", n, unexpected(err))
	}
	version, zero, length := binary.LittleEndian.Uint16(header[8:]), binary.LittleEndian.Uint16(header[10:]), binary.LittleEndian.Uint32(header[12:])
	switch {
	case version != Version || zero != 0:
		return Proof{}, protocolError("the proof is of version %d with %d beside it", version, zero)
	case length < bodyBytesMin || length > ProofBytesMax:
		return Proof{}, protocolError("the proof's body has %d bytes; it may have %d to %d", length, bodyBytesMin, ProofBytesMax)
	}
	body, err := readBody(r, nil, int(length))
	if err != nil {
		return Proof{}, fmt.Errorf("wire: read the proof, after %d bytes: %w", headerBytes+len(body), unexpected(err))
	}
	var fields map[string]string
	if err := json.Unmarshal(body, &fields); err != nil {
		return Proof{}, protocolError("the proof's body: %w", err)
	}
	var p Proof
	if err := p.UnmarshalText([]byte(fields["proof"])); err != nil || len(fields) != 1 {
		return Proof{}, protocolError(`the proof's body must have one field, "proof", of %d hex digits`, 2*len(p))
	}
	return p, nil
}
