package ingest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/engine"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/sampler"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/steps"
	"github.com/ingestd/ingestd/wire"
)

// Transport is a way for samples to come in, as the daemon sees it. How it is started depends on what it listens on and is its own affair.
type Transport interface {
	// Shutdown stops accepting, takes the whole samples that are at hand (over TLS and QUIC those that were read ahead), tells each peer why, and returns when all connections are gone. When
	// ctx ends first the rest are cut off and ctx's error is returned.
	Shutdown(ctx context.Context) error
	Stats() Stats
}

// Table is what a transport needs of a table.
type Table interface {
	Name() string
	Spec() *spec.Spec
	// OpenStream makes the queue of one producer, waiting, until ctx ends, for the one before of its session. The transport closes it. Errors are those of
	// engine.Table.
	OpenStream(ctx context.Context, cfg engine.StreamConfig) (*drainer.Stream, error)
	// Steps returns what is known of the producers of a table of kind tensors; nil of one of samples.
	Steps() *steps.Keeper
	// CommittedAcks tells whether no sample is acked before it is in the ring, whatever a producer asks for.
	CommittedAcks() bool
	// Holder returns whom writers wait for when the ring is full; false where nobody is to blame.
	Holder() (sampler.Holder, bool)
}

// Tables finds tables by name.
type Tables interface {
	Lookup(name string) (Table, bool) // of kinds samples and tensors
	Names() []string                  // of all
	Kind(name string) Kind            // "": there is no such table
}

// Window bounds what a producer may have under way without an ack.
type Window struct {
	Samples  int64 // most samples
	Bytes    int64 // what a producer gets that asks for no number, unless two samples are more
	BytesMax int64 // most bytes
}

// bytes returns the window in bytes for a producer that asked for so many, 0 for no number.
func (w Window) bytes(asked, sample int64) int64 {
	if asked <= 0 {
		asked = max(w.Bytes, 2*sample)
	}
	return min(asked, w.BytesMax)
}

// OpenPush judges the hello of a producer: table, spec, options, session. It returns the open stream with the answer for the peer, or what to refuse with.
// Where another connection has the session, it is ended by its taken, and OpenPush waits for that until ctx ends. taken is called once, from any goroutine,
// when this one's turn has come to be ended; it must not wait.
func OpenPush(ctx context.Context, tables Tables, h *wire.Hello, limit Window, taken func()) (Table, *drainer.Stream, *wire.AcceptedPush, *wire.Refusal) {
	if r := CheckKind(tables, h); r != nil {
		return nil, nil, nil, r
	}
	t, ok := tables.Lookup(h.Table)
	if !ok {
		return nil, nil, nil, unknownTable(tables, h)
	}
	if r := h.CheckSpec(t.Spec()); r != nil {
		return nil, nil, nil, r
	}
	m, r := ReadManifest(h)
	if r != nil {
		return nil, nil, nil, r
	}
	s, err := t.OpenStream(ctx, engine.StreamConfig{Session: h.Session, Manifest: m, Taken: taken})
	if err != nil {
		return nil, nil, nil, RefuseStream(h, err)
	}
	ack := h.Ack
	if t.CommittedAcks() {
		ack = wire.AckCommitted
	}
	accepted := &wire.AcceptedPush{
		Table:         t.Name(),
		Fingerprint:   t.Spec().Fingerprint(),
		Stream:        s.ID(),
		Ack:           ack,
		WindowSamples: within(h.WindowSamples, limit.Samples),
		WindowBytes:   limit.bytes(h.WindowBytes, t.Spec().SampleBytes()),
		Held:          s.Held(),
	}
	if k := t.Steps(); k != nil {
		accepted.ChunkBytes = int64(k.ChunkBytes())
	}
	return t, s, accepted, nil
}

// RefuseStream turns an error of a table's OpenStream into what the peer is told.
func RefuseStream(h *wire.Hello, err error) *wire.Refusal {
	var full *ring.SessionsFullError
	var mismatch *steps.MismatchError
	switch {
	case errors.As(err, &mismatch):
		r := wire.Refuse(wire.CodeManifestMismatch, "table %q: %v; all producers of a table that are connected have one manifest: end the others first, or use another table",
			h.Table, mismatch)
		r.Diff = mismatch.Diff
		return r
	case errors.Is(err, os.ErrClosed):
		return wire.Refuse(wire.CodeShuttingDown, "table %q takes no new streams: %v", h.Table, err)
	case errors.Is(err, engine.ErrSessionTaken):
		return wire.Refuse(wire.CodeSessionTaken, "another connection has asked for session %q of table %q since; two producers must not have one session",
			h.Session, h.Table)
	case errors.As(err, &full):
		return wire.Refuse(wire.CodeTooManySessions, "table %q knows %d sessions, and none of them is old enough to be forgotten: reconnect under the same names, "+
			"do without a session, or raise sessions or lower session_ttl in the daemon's configuration", h.Table, full.Sessions)
	case errors.Is(err, context.Canceled):
		return wire.Refuse(wire.CodeShuttingDown, "the daemon is stopping")
	case errors.Is(err, context.DeadlineExceeded):
		return wire.Refuse(wire.CodeTooManyConnections,
			"a session has one connection at a time, and the one that has session %q of table %q has not ended yet; try again", h.Session, h.Table)
	}
	return wire.Refuse(wire.CodeInternal, "table %q: %v", h.Table, err)
}

// RingFull makes the note for a producer of t whose stream has waited for a free slot since then; a zero time leaves out for how long.
func RingFull(t Table, since, now time.Time) *wire.Note {
	h, _ := t.Holder()
	waited := ""
	if !since.IsZero() {
		waited = fmt.Sprintf(" for %v", now.Sub(since).Round(time.Millisecond))
	}
	n := &wire.Note{
		Code:    wire.NoteRingFull,
		Reason:  fmt.Sprintf("no slot of table %q is free%s, waiting for %s", t.Name(), waited, engine.Blame(h, now)),
		Trainer: h.Trainer, Group: h.Group, Client: h.Client, PID: h.PID, Batch: h.Batch,
	}
	if !h.Since.IsZero() {
		n.Since = h.Since.UnixNano()
	}
	return n
}

func within(asked, limit int64) int64 {
	if asked <= 0 {
		return limit
	}
	return min(asked, limit)
}

// Reasons for which a stream ends that no notice tells; the others are wire codes.
const (
	EndClean = "clean" // the producer closed after a whole sample
	EndReset = "reset" // the connection broke
)

// What is counted as refused though nothing could be told; the other reasons are wire codes.
const (
	RefusedTLS         = "bad_tls"         // the handshake of TLS failed, for another reason than the next two: no TLS 1.3, not this protocol, no certificate
	RefusedCertificate = "bad_certificate" // the peer's certificate is not one that is taken: of another authority, expired, for something else
	RefusedByPeer      = "tls_alert"       // the peer ended the handshake of TLS, most likely since it does not take our certificate
	RefusedDatagram    = "bad_datagram"    // a datagram belonged to no connection and began none
)

// RefusedUntold lists them, for counters with a fixed set of labels.
func RefusedUntold() []string {
	return []string{RefusedTLS, RefusedCertificate, RefusedByPeer, RefusedDatagram}
}

// Stats is a snapshot of a transport.
type Stats struct {
	Transport    string
	Accepted     uint64 // connections
	Open         int    // connections
	Samples      uint64 // taken into queues
	Bytes        uint64 // of those samples
	CutShort     uint64 // samples of which only a part came
	Notes        uint64 // notes sent to producers that wait for a slot
	Ended        map[string]uint64
	Refused      map[string]uint64
	AcceptErrors uint64
	Connections  []Connection
	Carriers     *Carriers // nil if each connection is alone
}

// Carriers are connections that each carry some of the others: those of QUIC, whose streams count as connections.
type Carriers struct {
	Open      int               `json:"open"`      // now; their handshake is done
	Strangers int               `json:"strangers"` // of those; nobody was let in on one of their streams yet
	HalfOpen  int               `json:"half_open"` // now; their handshake is under way
	Max       int               `json:"max"`       // open and half open, at once
	Ended     map[string]uint64 `json:"ended"`     // by reason; of whom nobody had any use is refused
}

// Connection is the state of one producer's connection.
type Connection struct {
	ID      uint64    `json:"id"`
	Peer    string    `json:"peer"`
	Table   string    `json:"table,omitempty"`
	Session string    `json:"session,omitempty"`
	Client  string    `json:"client,omitempty"`
	Token   string    `json:"token,omitempty"` // with which it was let in
	Stream  uint64    `json:"stream"`
	Ack     string    `json:"ack,omitempty"` // queued, committed
	State   string    `json:"state"`         // handshake, receiving, waiting-for-slot, waiting-for-data, closing
	Since   time.Time `json:"since"`         // when the state began
	Opened  time.Time `json:"opened"`
	Samples uint64    `json:"samples"`
	Bytes   uint64    `json:"bytes"`
}

// Reasons counts ends by reason. The zero value is ready.
type Reasons struct {
	mu sync.Mutex
	n  map[string]uint64
}

// Add counts one end.
func (r *Reasons) Add(reason string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.n == nil {
		r.n = map[string]uint64{}
	}
	r.n[reason]++
}

// Snapshot returns a copy.
func (r *Reasons) Snapshot() map[string]uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make(map[string]uint64, len(r.n))
	for k, v := range r.n {
		out[k] = v
	}
	return out
}

// Counters are the totals of a transport. The zero value is ready.
type Counters struct {
	Accepted, Samples, Bytes, CutShort, Notes, AcceptErrors atomic.Uint64
	Ended, Refused                                          Reasons
}

// Snapshot fills the totals of a Stats.
func (c *Counters) Snapshot(transport string) Stats {
	return Stats{
		Transport:    transport,
		Accepted:     c.Accepted.Load(),
		Samples:      c.Samples.Load(),
		Bytes:        c.Bytes.Load(),
		CutShort:     c.CutShort.Load(),
		Notes:        c.Notes.Load(),
		AcceptErrors: c.AcceptErrors.Load(),
		Ended:        c.Ended.Snapshot(),
		Refused:      c.Refused.Snapshot(),
	}
}
