package quicingest

import (
	"github.com/quic-go/quic-go/qlog"
	"github.com/quic-go/quic-go/qlogwriter"
)

// strays counts datagrams that belong to no connection and begin none: quic-go tells of them on its trace.
type strays Server

// RecordEvent implements qlogwriter.Recorder.
func (s *strays) RecordEvent(e qlogwriter.Event) {
	if _, ok := e.(qlog.PacketDropped); ok {
		s.stray.Add(1)
	}
}

// Close implements qlogwriter.Recorder.
func (s *strays) Close() error { return nil }
