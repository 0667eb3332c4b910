package weights

import (
	"fmt"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

// The messages of docs/weights.md. A publisher says Ask, the daemon says Answer; a remote reader is told Announcement.

// What a publisher asks for.
const (
	OpBegin  = "begin"
	OpCommit = "commit"
	OpAbort  = "abort"
)

// What the daemon answers, and announces.
const (
	OpPlace      = "place"
	OpWaiting    = "waiting"
	OpFailed     = "failed"
	OpPublished  = "published"
	OpAborted    = "aborted"
	OpGeneration = "generation"
)

// Ask is what a publisher says.
type Ask struct {
	Op         string `json:"op"`
	DeadlineMS int64  `json:"deadline_ms,omitempty"` // begin: how long to wait for a place
	Generation uint64 `json:"generation,omitempty"`  // begin: 0 for the next one; commit: which
}

// Answer is what the daemon says to a publisher.
type Answer struct {
	Op         string           `json:"op"`
	Generation uint64           `json:"generation,omitempty"` // place, published: which; failed with old_generation: the newest
	Place      int              `json:"place"`
	Digest     spec.Fingerprint `json:"digest,omitzero"`
	Code       Failure          `json:"code,omitempty"` // failed
	Reason     string           `json:"reason,omitempty"`
	Pins       []PinText        `json:"pins,omitempty"`
}

// pinsNamedMax is the most pins that an Answer names.
const pinsNamedMax = 16

// PinText is a Pin as it is sent.
type PinText struct {
	Reader     uint64 `json:"reader"`
	Client     string `json:"client"`
	PID        int    `json:"pid,omitempty"`
	Addr       string `json:"addr,omitempty"` // of a remote reader
	Generation uint64 `json:"generation"`
	Since      int64  `json:"since"` // Unix nanoseconds
}

func pinTexts(pins []Pin) []PinText {
	out := make([]PinText, 0, min(len(pins), pinsNamedMax))
	for _, p := range pins[:min(len(pins), pinsNamedMax)] {
		out = append(out, PinText{p.Reader, p.Who.Client, p.Who.PID, p.Who.Addr, p.Generation, p.Since.UnixNano()})
	}
	return out
}

// AnnouncementBytesMax is the most bytes of an Announcement's JSON.
const AnnouncementBytesMax = 4 << 20

// Announcement is what comes before the bytes of a generation: it says which they are.
type Announcement struct {
	Op         string           `json:"op"`
	Generation uint64           `json:"generation"`
	Digest     spec.Fingerprint `json:"digest"`
	Published  int64            `json:"published"` // Unix nanoseconds
	Base       uint64           `json:"base"`      // what lies outside Ranges is as in this generation; 0: nothing does
	Ranges     []Range          `json:"ranges"`    // of flat bytes, ascending
	Bytes      int64            `json:"bytes"`     // of all ranges
	From       int64            `json:"from"`      // of those, how many are left out because they came before
}

// Range is a run of flat bytes: where it starts, and how many they are.
type Range [2]int64

// Check says what a daemon would never announce of a generation of these tensors: it is for readers, who then can rely on every range being whole tensors, in
// bounds and ascending, and on Bytes being their sum.
func (a *Announcement) Check(m *tensor.Manifest) error {
	switch {
	case a.Op != OpGeneration:
		return fmt.Errorf("%w: %q came where a generation was due", wire.ErrProtocol, cutText(a.Op))
	case a.Generation == 0 || a.Generation > GenerationMax:
		return fmt.Errorf("%w: generation %d is announced", wire.ErrProtocol, a.Generation)
	case a.Base == 0 && !a.whole(m):
		return fmt.Errorf("%w: generation %d is announced whole, but not all of its bytes are", wire.ErrProtocol, a.Generation)
	case a.From < 0 || a.From > a.Bytes || a.Base != 0 && a.From != 0:
		return fmt.Errorf("%w: generation %d is announced from byte %d of %d on", wire.ErrProtocol, a.Generation, a.From, a.Bytes)
	}
	end, bytes := int64(0), int64(0)
	for _, r := range a.Ranges {
		if a.Base == 0 {
			return nil
		}
		from, n := r[0], r[1]
		if from < end || n < 1 || from > m.DataBytes() || n > m.DataBytes()-from {
			return fmt.Errorf("%w: generation %d has the range %d of %d bytes, after %d and of %d", wire.ErrProtocol, a.Generation, from, n, end, m.DataBytes())
		}
		end, bytes = from+n, bytes+n
		first, last := m.At(from), m.At(end-1)
		if first == m.Len() || m.Offset(first) != from || last < m.Len() && m.Offset(last) < end && endOf(m, last) != end {
			return fmt.Errorf("%w: generation %d has the range %d of %d bytes, which cuts a tensor", wire.ErrProtocol, a.Generation, from, n)
		}
	}
	if bytes != a.Bytes {
		return fmt.Errorf("%w: generation %d is announced with %d bytes, its ranges have %d", wire.ErrProtocol, a.Generation, a.Bytes, bytes)
	}
	return nil
}

func endOf(m *tensor.Manifest, i int) int64 { return m.Offset(i) + m.EncodedBytes(i) }

func (a *Announcement) whole(m *tensor.Manifest) bool {
	n := m.DataBytes()
	return a.Bytes == n && (len(a.Ranges) == 1 && a.Ranges[0] == Range{0, n} || n == 0 && len(a.Ranges) == 0)
}

// cutText is the beginning of a peer's text.
func cutText(s string) string { return s[:min(len(s), 64)] }
