package wire

import (
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
	RolePush    Role = "push"    // sends samples
	RoleTrain   Role = "train"   // attaches as a trainer
	RoleFill    Role = "fill"    // fills slots of the segment in place
	RoleObserve Role = "observe" // maps the segment read-only
)

// AckMode says what an ack promises.
type AckMode string

// The ack modes.
const (
	AckQueued    AckMode = "queued"    // the sample is in the stream's queue
	AckCommitted AckMode = "committed" // the sample is in the ring
)

// GroupDefault is the group of a trainer that names none.
const GroupDefault = "default"

// ByteOrder is the only byte order of samples.
const ByteOrder = "little"

// Hello is what a client says first. Zero values are not sent; fields of another role must be zero.
type Hello struct {
	VersionMin, VersionMax uint16 // 0 is Version when sending

	Role          Role
	Table         string
	Spec          *spec.Spec       // push, fill and train
	Fingerprint   spec.Fingerprint // push, fill and train; push gives this or Spec or both
	Session       string           // push and fill
	Ack           AckMode          // push; ReadHello fills in AckQueued
	WindowSamples int64            // push; 0: the daemon's limit
	WindowBytes   int64            // push; 0: the daemon's limit
	Prefetch      int64            // train and fill: most batches held at once; 0: the daemon's default
	Group         string           // train; empty: GroupDefault
	Notes         bool             // push and fill: the client reads notes
	Client        string           // free text for status and logs
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
	Client        string           `json:"client,omitempty"`
}

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
		return dst, fmt.Errorf("wire: hello: %s", refusal.Reason)
	}
	body, err := encode(helloBody{
		h.Role, h.Table, ByteOrder, h.Spec, h.Fingerprint, h.Session, h.Ack, h.WindowSamples, h.WindowBytes, h.Prefetch, h.Group, h.Notes, h.Client,
	})
	if err != nil {
		return dst, fmt.Errorf("wire: hello: %w", err)
	}
	if len(body) > BodyBytesMax {
		return dst, fmt.Errorf("wire: hello: the body has %d bytes, at most %d are allowed; shorten the leaves' names", len(body), BodyBytesMax)
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
		{"group", h.Group != ""}, {"notes", h.Notes},
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
	"session": {RolePush, RoleFill}, "ack": {RolePush}, "window_samples": {RolePush}, "window_bytes": {RolePush},
	"prefetch": {RoleTrain, RoleFill}, "group": {RoleTrain}, "notes": {RolePush, RoleFill},
}

// check holds all rules on the values. given lists the fields that were given.
func (h *Hello) check(given []string) *Refusal {
	switch h.Role {
	case RolePush, RoleFill, RoleTrain, RoleObserve:
	case "":
		return Refuse(CodeBadHandshake, `the field "role" is missing; it is push, fill, train or observe`)
	default:
		return Refuse(CodeBadOption, "the role %s is not known; it is push, fill, train or observe", short(string(h.Role)))
	}
	for _, name := range given {
		if roles := rolesOf[name]; roles != nil && !slices.Contains(roles, h.Role) {
			return Refuse(CodeBadOption, "the field %q is not for the role %s; take it out", name, h.Role)
		}
	}
	if h.Table == "" {
		return Refuse(CodeBadHandshake, `the field "table" is missing; name the table to use`)
	}
	for _, f := range [...][2]string{{"table", h.Table}, {"session", h.Session}, {"group", h.Group}, {"client", h.Client}} {
		if err := checkText(f[1]); err != nil {
			return Refuse(CodeBadOption, "the field %q %v", f[0], err)
		}
	}
	for _, f := range [...]struct {
		name  string
		value int64
	}{{"window_samples", h.WindowSamples}, {"window_bytes", h.WindowBytes}, {"prefetch", h.Prefetch}} {
		if f.value < 0 {
			return Refuse(CodeBadOption, "the field %q is %d; it must not be negative", f.name, f.value)
		}
	}
	switch h.Ack {
	case "", AckQueued, AckCommitted:
	default:
		return Refuse(CodeBadOption, "the ack mode %s is not known; it is queued or committed", short(string(h.Ack)))
	}
	if h.Role == RolePush && h.Spec == nil && h.Fingerprint.IsZero() {
		return Refuse(CodeBadHandshake, "a producer must give the spec of its samples or the fingerprint of it, or both")
	}
	if h.Spec != nil && !h.Fingerprint.IsZero() && h.Fingerprint != h.Spec.Fingerprint() {
		return Refuse(CodeBadHandshake, "the fingerprint %v is not that of the spec beside it, which has %v; leave one out or compute it anew",
			h.Fingerprint, h.Spec.Fingerprint())
	}
	return nil
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
