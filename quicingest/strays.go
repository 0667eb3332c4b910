package quicingest

import (
	"context"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/qlog"
	"github.com/quic-go/quic-go/qlogwriter"
)

// strays counts datagrams that belong to no connection and begin none: quic-go tells of those that look like QUIC on its trace. Not counted are empty ones, first packets
// that are answered with Retry or not at once, and what belongs to a connection and cannot be read there.
type strays Server

// RecordEvent implements qlogwriter.Recorder.
func (s *strays) RecordEvent(e qlogwriter.Event) {
	switch e.(type) {
	case qlog.PacketDropped, qlog.VersionNegotiationSent: // the latter answers a version that there is not
		s.stray.Add(1)
	}
}

// Close implements qlogwriter.Recorder.
func (s *strays) Close() error { return nil }

// count counts what does not even look like QUIC, from now on until the transport is closed. run runs what it does in a goroutine.
func (s *strays) count(tr *quic.Transport, run func(func())) {
	begun, cancel := context.WithCancel(context.Background())
	cancel()
	s.one(begun, tr) // which has the transport keep them from now on
	run(func() {
		for s.one(context.Background(), tr) {
		}
	})
}

// one waits for one, and returns false when there are no more.
func (s *strays) one(ctx context.Context, tr *quic.Transport) bool {
	_, _, err := tr.ReadNonQUICPacket(ctx, nil)
	if err == nil {
		s.stray.Add(1)
	}
	return err == nil
}
