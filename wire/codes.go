package wire

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/ingestd/ingestd/spec"
)

// Version is the protocol version that this package speaks, the only one so far.
const Version = 1

// Limits of the handshake.
const (
	BodyBytesMax    = 2 << 20  // body of a hello or a reply
	HelloBytesSmall = 64 << 10 // body of a hello that is no large one; specs of many leaves and manifests need more
	NoticeBytesMax  = 64 << 10 // body of a closing notice or a note
	NameBytesMax    = 128      // table, session, group, client
	ReasonBytesMax  = 8 << 10  // a reason is cut to this
	DiffMax         = 64       // differences in a refusal
)

// What the daemon sends after its reply: one Ack per sample; NoteMark starts a note, NoticeMark the closing notice.
const (
	Ack        = 0x01
	NoteMark   = 0x02
	NoticeMark = 0x00
)

// ALPN names this protocol where TLS asks which is spoken.
const ALPN = "ingestd/1"

// Magic starts every hello and reply.
const Magic = "INGESTD\n"

// ErrProtocol is wrapped when the peer's bytes are not this protocol.
var ErrProtocol = errors.New("wire: not the ingestd protocol")

// Code says why a connection was refused or ended. The docs list when each is used.
type Code string

// The codes of docs/wire-protocol.md, "Codes".
const (
	CodeBadMagic           Code = "bad_magic"
	CodeBadVersion         Code = "bad_version"
	CodeBadHandshake       Code = "bad_handshake"
	CodeHandshakeTimeout   Code = "handshake_timeout"
	CodeUnknownTable       Code = "unknown_table"
	CodeSpecMismatch       Code = "spec_mismatch"
	CodeBadOption          Code = "bad_option"
	CodeWrongRole          Code = "wrong_role"
	CodeNotPermitted       Code = "not_permitted"
	CodeTooManyConnections Code = "too_many_connections"
	CodeShuttingDown       Code = "shutting_down"
	CodeIdleTimeout        Code = "idle_timeout"
	CodeStalled            Code = "stalled"
	CodeCutShort           Code = "cut_short"
	CodeAckTimeout         Code = "ack_timeout"
	CodeBadPeer            Code = "bad_peer"
	CodeSessionTaken       Code = "session_taken"
	CodeTooManySessions    Code = "too_many_sessions"
	CodeTooManyGroups      Code = "too_many_groups"
	CodeWrongKind          Code = "wrong_kind"
	CodeBadChunk           Code = "bad_chunk"
	CodeManifestMismatch   Code = "manifest_mismatch"
	CodeUnknownManifest    Code = "unknown_manifest"
	CodeUnknownSession     Code = "unknown_session"
	CodeNoGeneration       Code = "no_generation"
	CodePublisherActive    Code = "publisher_active"
	CodeReplaced           Code = "replaced"
	CodeNotAuthenticated   Code = "not_authenticated"
	CodeBanned             Code = "banned"
	CodeEndOfStream        Code = "end_of_stream"
	CodeBadCompression     Code = "bad_compression"
	CodeInternal           Code = "internal"
)

// Codes returns every code, for counters with a fixed set of labels.
func Codes() []Code {
	return []Code{
		CodeBadMagic, CodeBadVersion, CodeBadHandshake, CodeHandshakeTimeout, CodeUnknownTable, CodeSpecMismatch,
		CodeBadOption, CodeWrongRole, CodeNotPermitted, CodeTooManyConnections, CodeShuttingDown, CodeIdleTimeout,
		CodeStalled, CodeCutShort, CodeAckTimeout, CodeBadPeer, CodeSessionTaken,
		CodeTooManySessions, CodeTooManyGroups, CodeWrongKind, CodeBadChunk, CodeManifestMismatch, CodeUnknownManifest, CodeUnknownSession, CodeNoGeneration,
		CodePublisherActive, CodeReplaced, CodeNotAuthenticated, CodeBanned, CodeEndOfStream, CodeBadCompression,
		CodeInternal,
	}
}

// Refusal answers a hello with no. It is an error on both sides.
type Refusal struct {
	Code   Code              `json:"code"`
	Reason string            `json:"reason"`         // for a person: what was wrong and what to do
	Diff   []spec.Difference `json:"diff,omitempty"` // CodeSpecMismatch and CodeManifestMismatch only; at most DiffMax are sent
	Spec   *spec.Spec        `json:"spec,omitempty"` // CodeSpecMismatch only: the table's
}

// Refuse makes a Refusal without a difference.
func Refuse(code Code, format string, args ...any) *Refusal {
	return &Refusal{Code: code, Reason: fmt.Sprintf(format, args...)}
}

func (r *Refusal) Error() string {
	text := fmt.Sprintf("refused (%s): %s", r.Code, r.Reason)
	if len(r.Diff) > 0 {
		text += ": " + spec.FormatDiff(r.Diff)
	}
	return text
}

// Notice is the daemon's last word on an accepted connection: why it ends the stream.
type Notice struct {
	Code   Code   `json:"code"`
	Reason string `json:"reason"`
}

func (n *Notice) Error() string {
	return fmt.Sprintf("the daemon ended the stream (%s): %s", n.Code, n.Reason)
}

// The codes of notes.
const (
	NoteRingFull    Code = "ring_full"    // the stream waits for a free slot
	NoteStepRefused Code = "step_refused" // the chunks of a step are not used
)

// Note is what the daemon says while a stream goes on: what it waits for. It is sent only to a client whose hello asked for notes.
type Note struct {
	Code    Code   `json:"code"`
	Reason  string `json:"reason"`            // for a person; names who is waited for
	Trainer uint64 `json:"trainer,omitempty"` // the trainer that has held a batch for longest; 0 if none holds one
	Group   string `json:"group,omitempty"`   // its group, or the group that nobody reads for
	Client  string `json:"client,omitempty"`  // what that trainer calls itself
	PID     int    `json:"pid,omitempty"`     // its process; 0 where the kernel did not say
	Batch   uint64 `json:"batch,omitempty"`   // number of the batch it holds
	Since   int64  `json:"since,omitempty"`   // Unix nanoseconds since when it does
	Step    uint64 `json:"step,omitempty"`    // NoteStepRefused only
}

// cutText shortens s to legal UTF-8 of at most the given bytes.
func cutText(s string, bytes int) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) <= bytes {
		return s
	}
	const mark = "..."
	cut := bytes - len(mark)
	for cut > 0 && !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut] + mark
}
