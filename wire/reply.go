package wire

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"

	"github.com/ingestd/ingestd/spec"
)

// The status of a reply.
const (
	statusAccepted  = 0
	statusRefused   = 1
	statusChallenge = 2
)

// Accepted is a reply that accepts: *AcceptedPush, *AcceptedFill, *AcceptedTrain, *AcceptedRemoteTrain, *AcceptedObserve, *AcceptedPublish,
// *AcceptedSubscribe or *AcceptedManifest.
type Accepted interface {
	// check says what a peer of this protocol would never send.
	check() error
}

// AcceptedPush answers role push.
type AcceptedPush struct {
	Table         string           `json:"table"`
	Fingerprint   spec.Fingerprint `json:"fingerprint"`
	Stream        uint64           `json:"stream"` // number of the stream: the same for all connections of a session
	Ack           AckMode          `json:"ack"`
	WindowSamples int64            `json:"window_samples"`        // in force, at least 1
	WindowBytes   int64            `json:"window_bytes"`          // in force, at least 1; one sample may always be under way
	Held          uint64           `json:"held"`                  // samples of the session that the daemon already holds
	ChunkBytes    int64            `json:"chunk_bytes,omitempty"` // tables of tensors only: most data bytes of a chunk
	Compression   Compression      `json:"compression,omitempty"` // as asked for
}

// AcceptedFill answers role fill. Its first byte carries four descriptors: see the docs, "Fill".
type AcceptedFill struct {
	Table        string           `json:"table"`
	Spec         *spec.Spec       `json:"spec"`
	Fingerprint  spec.Fingerprint `json:"fingerprint"`
	Stream       uint64           `json:"stream"` // number of the stream: the same for all connections of a session
	Held         uint64           `json:"held"`   // samples of the session that the daemon already holds
	BatchSize    int64            `json:"batch_size"`
	Batches      int64            `json:"batches"`
	SegmentBytes int64            `json:"segment_bytes"`
	ChannelBytes int64            `json:"channel_bytes"`
	Prefetch     int64            `json:"prefetch"` // most places lent at once
}

// AcceptedTrain answers role train. Its first byte carries four descriptors: see the docs, "Attach".
type AcceptedTrain struct {
	Table        string           `json:"table"`
	Spec         *spec.Spec       `json:"spec"`
	Fingerprint  spec.Fingerprint `json:"fingerprint"`
	Trainer      uint64           `json:"trainer"` // number of the trainer in this daemon's life
	Group        string           `json:"group"`   // the trainers of a group share the batches
	BatchSize    int64            `json:"batch_size"`
	Batches      int64            `json:"batches"`
	SegmentBytes int64            `json:"segment_bytes"`
	ChannelBytes int64            `json:"channel_bytes"`
	Prefetch     int64            `json:"prefetch"` // most batches held at once
}

// AcceptedRemoteTrain answers role train where the batches are sent: see the docs, "Remote trainers".
type AcceptedRemoteTrain struct {
	Table       string           `json:"table"`
	Spec        *spec.Spec       `json:"spec"`
	Fingerprint spec.Fingerprint `json:"fingerprint"`
	Trainer     uint64           `json:"trainer"` // number of the trainer in this daemon's life
	Group       string           `json:"group"`   // the trainers of a group share the batches
	BatchSize   int64            `json:"batch_size"`
	Prefetch    int64            `json:"prefetch"`          // most batches without an answer
	Created     int64            `json:"created,omitempty"` // Unix nanoseconds: when the ring was made; with another one, all numbers begin anew
}

// AcceptedObserve answers role observe. Its first byte carries one descriptor, the segment.
type AcceptedObserve struct {
	Table        string           `json:"table"`
	Spec         *spec.Spec       `json:"spec"`
	Fingerprint  spec.Fingerprint `json:"fingerprint"`
	BatchSize    int64            `json:"batch_size"`
	Batches      int64            `json:"batches"`
	SegmentBytes int64            `json:"segment_bytes"`
}

// AcceptedPublish answers role publish. With SegmentBytes its first byte carries one descriptor, the segment.
type AcceptedPublish struct {
	Table        string `json:"table"`
	Publisher    uint64 `json:"publisher"`   // number of the publisher in this daemon's life
	Newest       uint64 `json:"newest"`      // generation; 0: there is none
	ChunkBytes   int64  `json:"chunk_bytes"` // most data bytes of one chunk
	SegmentBytes int64  `json:"segment_bytes,omitempty"`
}

// AcceptedSubscribe answers role subscribe. With SegmentBytes its first byte carries two descriptors, the segment and the page of pins; else it holds the
// manifest.
type AcceptedSubscribe struct {
	Table        string          `json:"table"`
	Reader       uint64          `json:"reader"` // number of the reader in this daemon's life
	Newest       uint64          `json:"newest"` // generation
	SegmentBytes int64           `json:"segment_bytes,omitempty"`
	Manifest     json.RawMessage `json:"manifest,omitempty"`
}

// AcceptedManifest answers role manifest: with the one of both that was asked for.
type AcceptedManifest struct {
	Table    string          `json:"table"`
	Manifest json.RawMessage `json:"manifest,omitempty"`
	Session  string          `json:"session,omitempty"`
}

func (a *AcceptedPublish) check() error {
	if a.SegmentBytes < 0 {
		return fmt.Errorf("the field \"segment_bytes\" is %d", a.SegmentBytes)
	}
	return positive(named{"chunk_bytes", a.ChunkBytes})
}

func (a *AcceptedSubscribe) check() error {
	if (a.SegmentBytes > 0) == (len(a.Manifest) > 0) || a.SegmentBytes < 0 {
		return fmt.Errorf("it must have either a segment or a manifest")
	}
	return nil
}

func (a *AcceptedManifest) check() error {
	if a.Session != "" && len(a.Manifest) == 0 {
		if err := checkText(a.Session); err != nil {
			return fmt.Errorf("the session %w", err)
		}
		return nil
	}
	if len(a.Manifest) == 0 || a.Manifest[0] != '{' || a.Session != "" {
		return fmt.Errorf("it must have either a manifest, which is an object, or a session")
	}
	return nil
}

func (a *AcceptedPush) check() error {
	if a.Ack != AckQueued && a.Ack != AckCommitted {
		return fmt.Errorf("the ack mode is %s", short(string(a.Ack)))
	}
	if a.Fingerprint.IsZero() {
		return fmt.Errorf("the fingerprint is missing")
	}
	if !a.Compression.Known() {
		return fmt.Errorf("the compression is %s", short(string(a.Compression)))
	}
	return positive(named{"window_samples", a.WindowSamples}, named{"window_bytes", a.WindowBytes})
}

func (a *AcceptedFill) check() error {
	if err := checkSegment(a.Spec, a.Fingerprint, a.BatchSize, a.Batches, a.SegmentBytes); err != nil {
		return err
	}
	return positive(named{"channel_bytes", a.ChannelBytes}, named{"prefetch", a.Prefetch})
}

func (a *AcceptedTrain) check() error {
	if err := checkSegment(a.Spec, a.Fingerprint, a.BatchSize, a.Batches, a.SegmentBytes); err != nil {
		return err
	}
	return positive(named{"channel_bytes", a.ChannelBytes}, named{"prefetch", a.Prefetch})
}

func (a *AcceptedRemoteTrain) check() error {
	if err := checkSpec(a.Spec, a.Fingerprint); err != nil {
		return err
	}
	return positive(named{"batch_size", a.BatchSize}, named{"prefetch", a.Prefetch})
}

func (a *AcceptedObserve) check() error {
	return checkSegment(a.Spec, a.Fingerprint, a.BatchSize, a.Batches, a.SegmentBytes)
}

func checkSegment(s *spec.Spec, f spec.Fingerprint, batchSize, batches, segmentBytes int64) error {
	if err := checkSpec(s, f); err != nil {
		return err
	}
	return positive(named{"batch_size", batchSize}, named{"batches", batches}, named{"segment_bytes", segmentBytes})
}

func checkSpec(s *spec.Spec, f spec.Fingerprint) error {
	if s == nil {
		return fmt.Errorf("the spec is missing")
	}
	if s.Fingerprint() != f {
		return fmt.Errorf("the fingerprint %v is not that of the spec, which has %v", f, s.Fingerprint())
	}
	return nil
}

type named struct {
	name  string
	value int64
}

func positive(fields ...named) error {
	for _, f := range fields {
		if f.value < 1 {
			return fmt.Errorf("the field %q is %d or missing; it must be at least 1", f.name, f.value)
		}
	}
	return nil
}

// AppendAccepted appends the encoded reply. It fails only on a reply that a client would not take.
func AppendAccepted(dst []byte, a Accepted) ([]byte, error) {
	if err := a.check(); err != nil {
		return dst, fmt.Errorf("wire: reply: %w", err)
	}
	body, err := encode(a)
	if err != nil {
		return dst, fmt.Errorf("wire: reply: %w", err)
	}
	if len(body) > BodyBytesMax {
		return dst, fmt.Errorf("wire: reply: the body has %d bytes, at most %d are allowed", len(body), BodyBytesMax)
	}
	return appendFrame(dst, Version, statusAccepted, body), nil
}

// WriteAccepted writes the encoded reply with one Write.
func WriteAccepted(w io.Writer, a Accepted) error {
	b, err := AppendAccepted(nil, a)
	if err != nil {
		return err
	}
	return write(w, b)
}

// AppendRefusal appends the encoded refusal, cut to the limits where it must be.
func AppendRefusal(dst []byte, r *Refusal) []byte {
	cut := *r
	cut.Code = Code(cutText(string(r.Code), NameBytesMax))
	cut.Reason = cutText(r.Reason, ReasonBytesMax)
	cut.Diff = r.Diff[:min(len(r.Diff), DiffMax)]
	body, err := encode(&cut)
	if err != nil || len(body) > BodyBytesMax {
		// Code and reason cannot fail and always fit.
		body, _ = encode(&Refusal{Code: cut.Code, Reason: cut.Reason})
	}
	return appendFrame(dst, Version, statusRefused, body)
}

// WriteRefusal writes the encoded refusal with one Write.
func WriteRefusal(w io.Writer, r *Refusal) error { return write(w, AppendRefusal(nil, r)) }

func write(w io.Writer, b []byte) error {
	if _, err := w.Write(b); err != nil {
		return fmt.Errorf("wire: write the reply: %w", err)
	}
	return nil
}

// ReadReply reads one reply and not a byte beyond it. Accepted: it fills in into and returns nil. Refused: it returns
// the daemon's *Refusal. Asked for the proof of a token: it returns the *Challenge, see Greet. Anything that is not a reply wraps ErrProtocol; an end before the reply is complete wraps
// io.ErrUnexpectedEOF.
func ReadReply(r io.Reader, into Accepted) error {
	var header [headerBytes]byte
	n, ok, err := readHeader(r, &header)
	switch {
	case !ok && bytes.HasPrefix(header[:n], []byte("ECHO")):
		return protocolError("this is an echo:// address of a daemon; use its tcp:// or unix:// address")
	case !ok:
		return protocolError("the answer starts with %q; is this the address of an ingestd daemon?", header[:n])
	case err != nil:
		return fmt.Errorf("wire: read the reply, after %d bytes: %w", n, unexpected(err))
	}
	version, status := binary.LittleEndian.Uint16(header[8:]), binary.LittleEndian.Uint16(header[10:])
	length := binary.LittleEndian.Uint32(header[12:])
	switch {
	case status > statusChallenge:
		return protocolError("the reply's status is %d", status)
	case status != statusRefused && version != Version:
		return protocolError("the daemon chose protocol version %d; this client speaks %d", version, Version)
	case length < bodyBytesMin || length > BodyBytesMax:
		return protocolError("the reply's body has %d bytes; it may have %d to %d", length, bodyBytesMin, BodyBytesMax)
	case status == statusChallenge && length > ChallengeBytesMax:
		return protocolError("the challenge's body has %d bytes; it may have %d to %d", length, bodyBytesMin, ChallengeBytesMax)
	}
	body, err := readBody(r, nil, int(length))
	if err != nil {
		return fmt.Errorf("wire: read the reply, after %d bytes: %w", headerBytes+len(body), unexpected(err))
	}
	switch status {
	case statusRefused:
		return readRefusal(body)
	case statusChallenge:
		return parseChallenge(body)
	}
	if err := json.Unmarshal(body, into); err != nil {
		return protocolError("the reply's body: %w", err)
	}
	if err := into.check(); err != nil {
		return protocolError("the reply's body: %w", err)
	}
	return nil
}

func readRefusal(body []byte) error {
	var fields struct {
		Code   Code       `json:"code"`
		Reason string     `json:"reason"`
		Diff   diffList   `json:"diff"`
		Spec   *spec.Spec `json:"spec"`
	}
	if err := json.Unmarshal(body, &fields); err != nil {
		return protocolError("the refusal's body: %w", err)
	}
	if fields.Code == "" {
		return protocolError("the refusal has no code")
	}
	return &Refusal{fields.Code, fields.Reason, fields.Diff, fields.Spec}
}

// diffList stops reading at DiffMax, so that a short body cannot become a long list.
type diffList []spec.Difference

func (l *diffList) UnmarshalJSON(data []byte) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	if token, err := dec.Token(); err != nil || token != json.Delim('[') {
		return fmt.Errorf("the field \"diff\" is not an array")
	}
	for dec.More() && len(*l) < DiffMax {
		var d spec.Difference
		if err := dec.Decode(&d); err != nil {
			return err
		}
		*l = append(*l, d)
	}
	return nil
}
