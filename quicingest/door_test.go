package quicingest

import (
	"io"
	"net/netip"
	"testing"

	"github.com/quic-go/quic-go"

	"github.com/ingestd/ingestd/bans"
	"github.com/ingestd/ingestd/internal/quicconn"
	"github.com/ingestd/ingestd/wire"
)

// TestDoor: each stream is a handshake of its address. Once that is banned, neither new streams nor new connections are begun, and what goes on on one goes on.
func TestDoor(t *testing.T) {
	door := &bans.Door{Table: bans.New(bans.Config{Loopback: true}), HalfOpen: bans.NewHalfOpen(bans.HalfOpenConfig{Loopback: true})}
	s := newSite(t, func(c *Config) { c.Streams.Door = door })
	finish := s.honest(t)
	here := netip.MustParseAddr("127.0.0.1")
	c := s.dial(t)
	bad, err := c.OpenStreamSync(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	st := quicconn.New(c, bad)
	if _, err := st.Write([]byte("this is no hello")); err != nil {
		t.Fatal(err)
	}
	if text, err := io.ReadAll(st); err != nil || len(text) == 0 {
		t.Errorf("it hears %q, %v", text, err)
	}
	if n := door.Table.Stats().Failures; n != 1 {
		t.Fatalf("%d failures", n)
	}
	for range bans.FailuresMax - 1 {
		door.Table.Failed(here)
	}
	if _, _, err := s.tryPush(t.Context(), c); err == nil {
		t.Error("a stream of a banned address is served")
	}
	if c, err := quic.DialAddr(t.Context(), s.addr.String(), s.certs.Client, clientQUIC); err == nil {
		_ = c.CloseWithError(quicconn.CodeDone, "")
		t.Error("a connection of a banned address is begun")
	}
	s.await(string(wire.CodeBanned), 2)
	finish()
	s.finish(t)
}
