package tcpingest

import (
	"encoding/binary"
	"fmt"
	"math"
	"time"

	"github.com/ingestd/ingestd/engine"
	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// echoHello is what a server of echo 0.1 sends on accept: ECHO, u8 version, u32 arrays, and for each u32 bytes per element, u32
// dimensions, u32 per dimension, little-endian. A spec whose shapes do not fit in 32 bits cannot be said.
func echoHello(s *spec.Spec) ([]byte, error) {
	b := append([]byte("ECHO"), 1)
	b = binary.LittleEndian.AppendUint32(b, uint32(s.NumLeaves()))
	for i := range s.NumLeaves() {
		leaf := s.Leaf(i)
		b = binary.LittleEndian.AppendUint32(b, uint32(leaf.DType.Bytes()))
		b = binary.LittleEndian.AppendUint32(b, uint32(len(leaf.Shape)))
		for _, n := range leaf.Shape {
			if n > math.MaxUint32 {
				return nil, fmt.Errorf("echo: leaf %q has a dimension of %d, the protocol's limit is %d: serve this table over tcp://", leaf.Name, n, uint32(math.MaxUint32))
			}
			b = binary.LittleEndian.AppendUint32(b, uint32(n))
		}
	}
	return b, nil
}

// serveEcho serves one connection of echo's protocol: no handshake from the client, no reason at the end.
func (s *Server) serveEcho(c *conn, table ingest.Table, hello []byte) {
	c.visit.Leave()
	stream, err := table.OpenStream(c.ctx, engine.StreamConfig{})
	if err != nil {
		s.counters.Refused.Add(string(wire.CodeShuttingDown))
		return
	}
	defer stream.Close()
	ack := wire.AckQueued
	if table.CommittedAcks() {
		ack = wire.AckCommitted
	}
	c.agreed.Store(&agreed{table: table.Name(), client: "echo", ack: ack, stream: stream.ID()})
	_ = c.SetWriteDeadline(time.Now().Add(s.cfg.HandshakeTimeout))
	if _, err := c.Write(hello); err != nil {
		s.counters.Ended.Add(ingest.EndReset)
		return
	}
	ses := newSession(c, stream, newPlan(table.Spec()), &wire.AcceptedPush{
		Ack: ack,
		// Clients of echo may hold as few as one sample under way: an ack is never held back for more to come.
		WindowSamples: 1,
		WindowBytes:   s.cfg.WindowBytes,
	})
	reason, _ := ses.ending(ses.run())
	s.ended(c, reason)
	if reason != ingest.EndReset {
		c.dismiss(s.cut, nil)
	}
}
