package main

import (
	"strings"
	"testing"

	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/internal/daemon"
)

// TestStatusOfQUIC: how near its connections are to their limit is said, where there is a listener of QUIC.
func TestStatusOfQUIC(t *testing.T) {
	var s daemon.Status
	if text := statusText(&s); strings.Contains(text, "QUIC") {
		t.Errorf("without a listener of QUIC: %s", text)
	}
	s.Producers.QUIC = &ingest.Carriers{Open: 7, Strangers: 3, HalfOpen: 2, Max: 90}
	if text, want := statusText(&s), "9 of 90 QUIC connections; of them, nobody was let in yet on 3, and 2 are shaking hands\n"; !strings.Contains(text, want) {
		t.Errorf("got %s, want %s", text, want)
	}
}
