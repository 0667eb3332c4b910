package wire

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/ingestd/ingestd/spec"
)

// Role says what a client is.
type Role string

// The roles.
const (
	RolePush      Role = "push"      // sends samples
	RoleTrain     Role = "train"     // attaches as a trainer
	RoleFill      Role = "fill"      // fills slots of the segment in place
	RoleObserve   Role = "observe"   // maps the segment read-only
	RolePublish   Role = "publish"   // writes generations of weights
	RoleSubscribe Role = "subscribe" // reads generations of weights
	RoleManifest  Role = "manifest"  // asks for a manifest, or for the session of a stream
)

// roles are all of them, for messages.
const roles = "push, fill, train, observe, publish, subscribe or manifest"

// AckMode says what an ack promises.
type AckMode string

// The ack modes.
const (
	AckQueued    AckMode = "queued"    // the sample is in the stream's queue
	AckCommitted AckMode = "committed" // the sample is in the ring
)

// GroupDefault is the group of a trainer that names none.
const GroupDefault = "default"

// Compression says how the samples of a connection are compressed, see package compress.
type Compression string

// The ways to compress.
const (
	CompressionNone        Compression = ""
	CompressionS2          Compression = "s2"
	CompressionZstd        Compression = "zstd"
	CompressionS2Shuffle   Compression = "s2+shuffle"
	CompressionZstdShuffle Compression = "zstd+shuffle"
)

// Known says whether the protocol has it; a daemon need not offer it.
func (c Compression) Known() bool {
	switch c {
	case CompressionNone, CompressionS2, CompressionZstd, CompressionS2Shuffle, CompressionZstdShuffle:
		return true
	}
	return false
}

// ByteOrder is the only byte order of samples.
const ByteOrder = "little"

// Hello is what a client says first. Zero values are not sent; fields of another role must be zero.
type Hello struct {
	VersionMin, VersionMax uint16 // 0 is Version when sending

	Role          Role
	Table         string
	Spec          *spec.Spec       // push, fill and train
	Fingerprint   spec.Fingerprint // push, fill and train; push gives this or Spec or both
	Session       string           // push, fill and train
	Ack           AckMode          // push; ReadHello fills in AckQueued
	WindowSamples int64            // push; 0: the daemon's limit
	WindowBytes   int64            // push; 0: the daemon's limit
	Prefetch      int64            // train and fill: most batches held at once; 0: the daemon's default
	Group         string           // train; empty: GroupDefault
	Notes         bool             // push and fill: the client reads notes
	Client        string           // free text for status and logs
	Compression   Compression      // push; the way of the samples
	Token         string           // name of the token that the client proves to have; needs Nonce
	Nonce         Nonce            // of the client, made anew for every hello: Greet does
	Secret        Secret           // of the token; it is never sent: Greet proves it

	Manifest   json.RawMessage // push, fill and publish: the tensors that will come, a JSON object
	ManifestID string          // manifest: 16 hex digits
	SessionOf  int64           // manifest: the stream of which the session is asked for, instead of ManifestID

	// Of weights, see docs/weights.md.
	InPlace      bool             // publish: wants to write into the segment
	Wait         bool             // subscribe: answer when something was published, however long that takes
	Stream       bool             // subscribe and train: over the connection, on a unix socket too
	Delta        bool             // subscribe: of the next generation, only what differs from Have
	Have         int64            // subscribe: the generation that the reader holds whole; 0: none
	HaveDigest   spec.Fingerprint // subscribe: its digest
	Resume       int64            // subscribe: the generation that it holds in part; 0: none
	ResumeDigest spec.Fingerprint // subscribe: its digest
	ResumeOffset int64            // subscribe: bytes of it
}

// helloBody is the JSON of a hello, in this order.
type helloBody struct {
	Role          Role             `json:"role"`
	Table         string           `json:"table"`
	ByteOrder     string           `json:"byte_order"`
	Spec          *spec.Spec       `json:"spec,omitempty"`
	Fingerprint   spec.Fingerprint `json:"fingerprint,omitzero"`
	Session       string           `json:"session,omitempty"`
	Ack           AckMode          `json:"ack,omitempty"`
	WindowSamples int64            `json:"window_samples,omitempty"`
	WindowBytes   int64            `json:"window_bytes,omitempty"`
	Prefetch      int64            `json:"prefetch,omitempty"`
	Group         string           `json:"group,omitempty"`
	Notes         bool             `json:"notes,omitempty"`
	Manifest      json.RawMessage  `json:"manifest,omitempty"`
	ManifestID    string           `json:"manifest_id,omitempty"`
	SessionOf     int64            `json:"session_of,omitempty"`
	InPlace       bool             `json:"in_place,omitempty"`
	Wait          bool             `json:"wait,omitempty"`
	Stream        bool             `json:"stream,omitempty"`
	Delta         bool             `json:"delta,omitempty"`
	Have          int64            `json:"have,omitempty"`
	HaveDigest    spec.Fingerprint `json:"have_digest,omitzero"`
	Resume        int64            `json:"resume,omitempty"`
	ResumeDigest  spec.Fingerprint `json:"resume_digest,omitzero"`
	ResumeOffset  int64            `json:"resume_offset,omitempty"`
	Client        string           `json:"client,omitempty"`
	Compression   Compression      `json:"compression,omitempty"`
	Token         string           `json:"token,omitempty"`
	Nonce         Nonce            `json:"nonce,omitzero"`
}

// ErrHello is wrapped when a hello cannot be said.
var ErrHello = errors.New("wire: hello")

// SetToken puts a token's name and secret into the hello, for Greet. The zero Token takes them out.
func (h *Hello) SetToken(t Token) { h.Token, h.Secret = t.Name, t.Secret }

// AppendHello appends the encoded hello, or says which field a daemon would refuse.
func AppendHello(dst []byte, h *Hello) ([]byte, error) {
	low, high := h.VersionMin, h.VersionMax
	if low == 0 && high == 0 {
		low, high = Version, Version
	}
	refusal := checkVersions(low, high)
	if refusal == nil {
		refusal = h.check(h.given())
	}
	if refusal != nil {
		return dst, fmt.Errorf("%w: %s", ErrHello, refusal.Reason)
	}
	body, err := encode(helloBody{
		h.Role, h.Table, ByteOrder, h.Spec, h.Fingerprint, h.Session, h.Ack, h.WindowSamples, h.WindowBytes, h.Prefetch, h.Group, h.Notes,
		h.Manifest, h.ManifestID, h.SessionOf, h.InPlace, h.Wait, h.Stream, h.Delta, h.Have, h.HaveDigest, h.Resume, h.ResumeDigest, h.ResumeOffset, h.Client,
		h.Compression, h.Token, h.Nonce,
	})
	if err != nil {
		return dst, fmt.Errorf("%w: %w", ErrHello, err)
	}
	if len(body) > BodyBytesMax {
		return dst, fmt.Errorf("%w: the body has %d bytes, at most %d are allowed; shorten the names of leaves or tensors", ErrHello, len(body), BodyBytesMax)
	}
	return appendFrame(dst, low, high, body), nil
}

// WriteHello writes the encoded hello with one Write.
func WriteHello(w io.Writer, h *Hello) error {
	b, err := AppendHello(nil, h)
	if err != nil {
		return err
	}
	if _, err = w.Write(b); err != nil {
		return fmt.Errorf("wire: write the hello: %w", err)
	}
	return nil
}

// given lists the fields of one role that are set.
func (h *Hello) given() []string {
	var names []string
	for _, f := range [...]struct {
		name string
		set  bool
	}{
		{"spec", h.Spec != nil}, {"fingerprint", !h.Fingerprint.IsZero()}, {"session", h.Session != ""}, {"ack", h.Ack != ""},
		{"window_samples", h.WindowSamples != 0}, {"window_bytes", h.WindowBytes != 0}, {"prefetch", h.Prefetch != 0},
		{"group", h.Group != ""}, {"notes", h.Notes}, {"compression", h.Compression != ""},
		{"manifest", h.Manifest != nil}, {"manifest_id", h.ManifestID != ""}, {"session_of", h.SessionOf != 0}, {"in_place", h.InPlace},
		{"wait", h.Wait}, {"stream", h.Stream}, {"delta", h.Delta}, {"have", h.Have != 0}, {"have_digest", !h.HaveDigest.IsZero()},
		{"resume", h.Resume != 0}, {"resume_digest", !h.ResumeDigest.IsZero()}, {"resume_offset", h.ResumeOffset != 0},
	} {
		if f.set {
			names = append(names, f.name)
		}
	}
	return names
}

// rolesOf says which roles a field is for; one that is not listed is for all.
var rolesOf = map[string][]Role{
	"spec": {RolePush, RoleFill, RoleTrain}, "fingerprint": {RolePush, RoleFill, RoleTrain},
	"session": {RolePush, RoleFill, RoleTrain}, "ack": {RolePush}, "window_samples": {RolePush}, "window_bytes": {RolePush},
	"prefetch": {RoleTrain, RoleFill}, "group": {RoleTrain}, "notes": {RolePush, RoleFill}, "compression": {RolePush},
	"manifest": {RolePush, RoleFill, RolePublish}, "manifest_id": {RoleManifest}, "session_of": {RoleManifest}, "in_place": {RolePublish},
	"wait": {RoleSubscribe}, "stream": {RoleSubscribe, RoleTrain}, "delta": {RoleSubscribe}, "have": {RoleSubscribe}, "have_digest": {RoleSubscribe},
	"resume": {RoleSubscribe}, "resume_digest": {RoleSubscribe}, "resume_offset": {RoleSubscribe},
}

// check holds all rules on the values. given lists the fields that were given.
func (h *Hello) check(given []string) *Refusal {
	switch h.Role {
	case RolePush, RoleFill, RoleTrain, RoleObserve, RolePublish, RoleSubscribe, RoleManifest:
	case "":
		return Refuse(CodeBadHandshake, `the field "role" is missing; it is `+roles)
	default:
		return Refuse(CodeBadOption, "the role %s is not known; it is %s", short(string(h.Role)), roles)
	}
	for _, name := range given {
		if roles := rolesOf[name]; roles != nil && !slices.Contains(roles, h.Role) {
			return Refuse(CodeBadOption, "the field %q is not for the role %s; take it out", name, h.Role)
		}
	}
	if h.Table == "" {
		return Refuse(CodeBadHandshake, `the field "table" is missing; name the table to use`)
	}
	for _, f := range [...][2]string{{"table", h.Table}, {"session", h.Session}, {"group", h.Group}, {"client", h.Client}, {"token", h.Token}} {
		if err := checkText(f[1]); err != nil {
			return Refuse(CodeBadOption, "the field %q %v", f[0], err)
		}
	}
	for _, f := range [...]struct {
		name  string
		value int64
	}{
		{"window_samples", h.WindowSamples}, {"window_bytes", h.WindowBytes}, {"prefetch", h.Prefetch},
		{"have", h.Have}, {"resume", h.Resume}, {"resume_offset", h.ResumeOffset}, {"session_of", h.SessionOf},
	} {
		if f.value < 0 {
			return Refuse(CodeBadOption, "the field %q is %d; it must not be negative", f.name, f.value)
		}
	}
	switch h.Ack {
	case "", AckQueued, AckCommitted:
	default:
		return Refuse(CodeBadOption, "the ack mode %s is not known; it is queued or committed", short(string(h.Ack)))
	}
	if !h.Compression.Known() {
		return Refuse(CodeBadOption, "the compression %s is not known; it is s2, zstd, s2+shuffle or zstd+shuffle", short(string(h.Compression)))
	}
	if (h.Token != "") != !h.Nonce.IsZero() {
		return Refuse(CodeBadHandshake, `the fields "token" and "nonce" go together`)
	}
	if h.Role == RolePush && h.Spec == nil && h.Fingerprint.IsZero() && h.Manifest == nil {
		return Refuse(CodeBadHandshake, "a producer must give the spec of its samples or the fingerprint of it, or both; one of tensors gives its manifest")
	}
	if r := h.checkTensors(); r != nil {
		return r
	}
	if h.Spec != nil && !h.Fingerprint.IsZero() && h.Fingerprint != h.Spec.Fingerprint() {
		return Refuse(CodeBadHandshake, "the fingerprint %v is not that of the spec beside it, which has %v; leave one out or compute it anew",
			h.Fingerprint, h.Spec.Fingerprint())
	}
	return nil
}

// checkTensors checks the fields of tensors and weights. What a manifest says is left to those who use it.
func (h *Hello) checkTensors() *Refusal {
	switch {
	case h.Manifest != nil && h.Manifest[0] != '{':
		return Refuse(CodeBadHandshake, `the field "manifest" is not a JSON object`)
	case h.Role == RolePublish && h.Manifest == nil:
		return Refuse(CodeBadHandshake, "a publisher must give the manifest of its tensors")
	case h.SessionOf != 0 && h.ManifestID != "":
		return Refuse(CodeBadHandshake, `the fields "manifest_id" and "session_of" do not go together: ask for one, then for the other`)
	case h.Role == RoleManifest && h.SessionOf == 0 && !isManifestID(h.ManifestID):
		return Refuse(CodeBadOption, "the field \"manifest_id\" is %s; it is 16 hex digits, 0 to 9 and a to f", short(h.ManifestID))
	case (h.Have != 0) != !h.HaveDigest.IsZero():
		return Refuse(CodeBadHandshake, `the fields "have" and "have_digest" go together`)
	case (h.Resume != 0) != !h.ResumeDigest.IsZero():
		return Refuse(CodeBadHandshake, `the fields "resume" and "resume_digest" go together`)
	case h.ResumeOffset != 0 && h.Resume == 0:
		return Refuse(CodeBadHandshake, `the field "resume_offset" needs "resume"`)
	}
	return nil
}

func isManifestID(s string) bool {
	return len(s) == 16 && !strings.ContainsFunc(s, func(c rune) bool { return !isHexDigit(c) })
}

func checkText(s string) error {
	if len(s) > NameBytesMax {
		return fmt.Errorf("has %d bytes; at most %d are allowed", len(s), NameBytesMax)
	}
	if !utf8.ValidString(s) {
		return errors.New("is not UTF-8")
	}
	if strings.ContainsFunc(s, unicode.IsControl) {
		return fmt.Errorf("holds a control character: %q", s)
	}
	return nil
}

func checkVersions(low, high uint16) *Refusal {
	if low < 1 || low > high {
		return Refuse(CodeBadHandshake, "versions %d to %d are no range; the lowest is at least 1 and not above the highest", low, high)
	}
	if low > Version || high < Version {
		return Refuse(CodeBadVersion, "the client speaks protocol versions %d to %d, the daemon version %d; update the older of the two",
			low, high, Version)
	}
	return nil
}

// CheckSpec compares what the client said of its samples with the table's spec: nil, or the refusal to send.
// A trainer, or a producer that fills in place, that gave neither spec nor fingerprint takes what there is.
func (h *Hello) CheckSpec(table *spec.Spec) *Refusal {
	switch {
	case h.Spec != nil && !h.Spec.Equal(table):
		diff := spec.Diff(h.Spec, table)
		leaves := fmt.Sprintf("%d leaves", len(diff))
		if len(diff) == 1 {
			leaves = "1 leaf"
		}
		r := Refuse(CodeSpecMismatch, "the spec differs from that of table %q in %s; send samples of the table's spec, or use another table",
			h.Table, leaves)
		r.Diff, r.Spec = diff, table
		return r
	case h.Spec == nil && !h.Fingerprint.IsZero() && h.Fingerprint != table.Fingerprint():
		r := Refuse(CodeSpecMismatch, "the spec's fingerprint %v is not that of table %q, which is %v and stands for %s",
			h.Fingerprint, h.Table, table.Fingerprint(), cutText(table.Text(), 1024))
		r.Spec = table
		return r
	}
	return nil
}

// short quotes a peer's text for a reason.
func short(s string) string { return fmt.Sprintf("%q", cutText(s, NameBytesMax)) }
