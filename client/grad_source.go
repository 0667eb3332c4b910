//go:build linux

package client

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

// gradArrival is a batch that came.
type gradArrival struct {
	lease            gradLease
	headers, data    []byte // of all rows
	streams, numbers []uint64
	created          int64 // when its ring was made: with another one, numbers begin anew
}

// gradSource is where a GradReader gets its batches.
type gradSource interface {
	next(ctx context.Context) (gradArrival, error)
	most() int                                                      // batches that may be held
	fetch(ctx context.Context, id uint64) (*tensor.Manifest, error) // nil, nil: there is none of that id
	name(ctx context.Context, stream uint64) (string, error)        // "", nil: no producer has that stream
	close() error
}

// namesMax is how many names a ringSource remembers.
const namesMax = 1 << 12

// ringSource is a Trainer's batches, and a daemon that knows more of them.
type ringSource struct {
	t       *Trainer
	cfg     TrainerConfig // of t, complete
	network string
	address string
	names   map[uint64]string // of streams; "": it has none. Where memory is mapped it is not used
	created int64             // when the ring was made of whose streams names is
}

func (s *ringSource) next(ctx context.Context) (gradArrival, error) {
	b, err := s.t.Next(ctx)
	if err != nil {
		return gradArrival{}, err
	}
	a := gradArrival{lease: b, headers: b.Column(headerColumn), data: b.Column(dataColumn), streams: b.Streams(), numbers: b.Numbers()}
	if b.received != nil {
		a.created = b.received.created
		if a.created != s.created {
			s.created = a.created
			clear(s.names)
		}
	}
	return a, nil
}

// most says how many batches may be held. Over a connection it is half of those that come without an answer, so that others are on their way all the time.
func (s *ringSource) most() int {
	if s.t.remote == nil {
		return s.t.Prefetch()
	}
	return max(1, s.t.Prefetch()/2)
}

func (s *ringSource) close() error { return s.t.Close() }

// fetch asks the daemon for a manifest.
func (s *ringSource) fetch(ctx context.Context, id uint64) (*tensor.Manifest, error) {
	var accepted wire.AcceptedManifest
	switch err := s.ask(ctx, wire.Hello{ManifestID: fmt.Sprintf("%016x", id)}, &accepted); {
	case codeOf(err) == wire.CodeUnknownManifest:
		return nil, nil
	case err != nil:
		return nil, err
	}
	m, err := tensor.ParseManifest(accepted.Manifest)
	if err == nil && m.ID() != id {
		err = fmt.Errorf("%w: the daemon gave manifest %016x where %016x was asked for", wire.ErrProtocol, m.ID(), id)
	}
	return m, err
}

// name looks in the segment, or asks the daemon where that is not mapped.
func (s *ringSource) name(ctx context.Context, stream uint64) (string, error) {
	if s.t.remote == nil {
		name, _ := s.t.StreamName(stream)
		return name, nil
	}
	if name, known := s.names[stream]; known {
		return name, nil
	}
	var accepted wire.AcceptedManifest
	if int64(stream) <= 0 {
		return "", nil
	}
	if err := s.ask(ctx, wire.Hello{SessionOf: int64(stream)}, &accepted); err != nil && codeOf(err) != wire.CodeUnknownSession {
		return "", err
	}
	if len(s.names) >= namesMax {
		clear(s.names)
	}
	s.names[stream] = accepted.Session
	return accepted.Session, nil
}

// ask makes a connection for one question. Where the daemon is reached over a network, it tries again as long as the Trainer would.
func (s *ringSource) ask(ctx context.Context, hello wire.Hello, accepted *wire.AcceptedManifest) error {
	hello.Role, hello.Table, hello.Client = wire.RoleManifest, s.t.Table(), s.cfg.Client
	hello.SetToken(s.cfg.Token)
	o := outage{began: time.Now()}
	for {
		err := s.askOnce(ctx, &hello, accepted)
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case s.t.remote == nil || s.cfg.ReconnectFor < 0 || !passing(err):
			return err
		}
		o.last = err
		o.tries++
		if err := o.rest(ctx, s.cfg.ReconnectFor, s.cfg.ReconnectFrom, s.cfg.ReconnectTo); errors.Is(err, os.ErrClosed) {
			return ctx.Err()
		} else if err != nil {
			return err
		}
	}
}

func (s *ringSource) askOnce(ctx context.Context, hello *wire.Hello, accepted *wire.AcceptedManifest) error {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.HandshakeTimeout)
	defer cancel()
	conn, err := s.cfg.Dialer(ctx, s.network, s.address)
	if err != nil {
		return fmt.Errorf("dial %s://%s: %w; %s", s.network, s.address, err, dialAdvice(err))
	}
	defer conn.Close()
	return greet(ctx, conn, hello, accepted)
}
