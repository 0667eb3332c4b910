package fuzz

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/ingestd/ingestd/auth"
	"github.com/ingestd/ingestd/bans"
	"github.com/ingestd/ingestd/ingest"
	"github.com/ingestd/ingestd/ingest/ingesttest"
	"github.com/ingestd/ingestd/internal/quicconn"
	"github.com/ingestd/ingestd/quicingest"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tcpingest"
	"github.com/ingestd/ingestd/wire"
)

// doors is a daemon's network side: one table of samples, tokens, bans, and every transport that crosses a network. It lives as long as its target.
type doors struct {
	certs    *ingesttest.Certificates
	tcp      *tcpingest.Server
	quic     *quicingest.Server
	gate     *auth.Gate
	bans     *bans.Table
	halfOpen []*bans.HalfOpen
	at       map[string]string // addresses by transport
	attached atomic.Uint64     // connections of other roles that were handed on
	visitors atomic.Uint32     // addresses used
}

// transports of doors.
var transports = []string{"tcp", "tls", "quic"}

func newDoors(f *testing.F) *doors {
	f.Helper()
	d := &doors{certs: ingesttest.NewCertificates(f), bans: bans.New(bans.Config{Loopback: true}), at: map[string]string{}}
	d.gate = auth.NewGate(auth.GateConfig{Tokens: must(auth.Parse([]byte(`tokens: [{name: worker, secret: ` + fuzzSecret + `, rights: [push, read], tables: [samples]}]`)))})
	table := ingesttest.NewTable(f, connectionTable, connectionShapes[0].spec, 4, 4)
	finish := ingesttest.Drain(f, table)
	door := func() *bans.Door {
		h := bans.NewHalfOpen(bans.HalfOpenConfig{Loopback: true})
		d.halfOpen = append(d.halfOpen, h)
		return &bans.Door{Table: d.bans, HalfOpen: h}
	}
	config := func() tcpingest.Config {
		return tcpingest.Config{
			Tables: ingesttest.Tables{connectionTable: table}, Gate: d.gate, Door: door(), Attach: d.attach, Compression: []wire.Compression{wire.CompressionS2, wire.CompressionZstd},
		}
	}
	ctx := context.Background()
	var running sync.WaitGroup
	d.tcp = must(tcpingest.New(config()))
	plain, secure := must(tcpingest.Listen(ctx, "tcp", "127.0.0.1:0")), must(tcpingest.Listen(ctx, "tcp", "127.0.0.1:0"))
	d.at["tcp"], d.at["tls"] = plain.Addr().String(), secure.Addr().String()
	running.Go(func() { _ = d.tcp.Serve(ctx, plain) })
	running.Go(func() { _ = d.tcp.Serve(ctx, tcpingest.NewTLSListener(secure, d.certs.Server)) })
	streams := config()
	d.quic = must(quicingest.New(quicingest.Config{TLS: d.certs.Server, Streams: streams}))
	socket := must((&net.ListenConfig{}).ListenPacket(ctx, "udp", "127.0.0.1:0"))
	d.at["quic"] = socket.LocalAddr().String()
	running.Go(func() { _ = d.quic.Serve(ctx, socket) })
	f.Cleanup(func() {
		if err := errors.Join(d.tcp.Shutdown(ctx), d.quic.Shutdown(ctx), d.quic.Close()); err != nil {
			f.Error(err)
		}
		running.Wait()
		finish()
	})
	return d
}

// attach takes the other roles, and has nothing for them.
func (d *doors) attach(conn net.Conn, _ *wire.Hello) error {
	defer d.attached.Add(1)
	defer conn.Close()
	if err := wire.WriteRefusal(conn, wire.Refuse(wire.CodeUnknownTable, "nobody serves this role here")); err != nil {
		return err
	}
	if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, conn) // who closed over unread bytes would take the refusal back
	return err
}

// visitor is one peer, at an address of this machine that is nobody else's.
type visitor struct {
	net.Conn
	from  netip.Addr
	leave func()
}

const patience = time.Minute // of a peer; a daemon that forgets it fails the target then

func (d *doors) visit(t *testing.T, transport string) *visitor {
	t.Helper()
	n := d.visitors.Add(1)
	v := &visitor{from: netip.AddrFrom4([4]byte{127, 1 + byte(n>>16)%250, byte(n >> 8), byte(n)})}
	ctx, stop := context.WithTimeout(t.Context(), patience)
	defer stop()
	if transport == "quic" {
		socket := must(net.ListenUDP("udp", &net.UDPAddr{IP: v.from.AsSlice()}))
		tr := &quic.Transport{Conn: socket}
		to := must(net.ResolveUDPAddr("udp", d.at[transport]))
		c, err := tr.Dial(ctx, to, d.certs.Client, &quic.Config{MaxIncomingStreams: -1, MaxIncomingUniStreams: -1})
		if err != nil {
			t.Fatal(err)
		}
		v.Conn = quicconn.New(c, must(c.OpenStreamSync(ctx)))
		v.leave = func() {
			_ = c.CloseWithError(quicconn.CodeDone, "")
			_ = tr.Close()
			_ = socket.Close()
		}
	} else {
		c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: v.from.AsSlice()}}).DialContext(ctx, "tcp", d.at[transport])
		if err != nil {
			t.Fatal(err)
		}
		v.Conn = c
		if transport == "tls" {
			secure := tls.Client(c, d.certs.Client)
			v.Conn = secure
			if err := secure.HandshakeContext(ctx); err != nil { // else who says nothing cannot end it either
				t.Fatal(err)
			}
		}
		v.leave = func() { _ = v.Close() }
	}
	_ = v.SetDeadline(time.Now().Add(patience))
	return v
}

// exporter is what TLS binds proofs to, nil without it.
func (v *visitor) exporter(t *testing.T) []byte {
	t.Helper()
	c, ok := v.Conn.(interface{ ConnectionState() tls.ConnectionState })
	if !ok {
		return nil
	}
	state := c.ConnectionState()
	return must(state.ExportKeyingMaterial(wire.ExporterLabel, nil, wire.ExporterBytes))
}

// say writes in pieces; the daemon may have had enough before all was said.
func (v *visitor) say(b []byte, piece int) {
	for len(b) > 0 {
		n := min(piece, len(b))
		if _, err := v.Write(b[:n]); err != nil {
			return
		}
		b = b[n:]
	}
}

// counts are what a server says of all of its connections so far.
type counts struct {
	accepted, ended uint64
	open            int
}

func (d *doors) counts() (c counts) {
	for _, st := range []ingest.Stats{d.tcp.Stats(), d.quic.Stats()} {
		c.accepted += st.Accepted
		c.open += st.Open
		for reason, n := range st.Refused {
			if reason != ingest.RefusedDatagram {
				c.ended += n
			}
		}
		for _, n := range st.Ended {
			c.ended += n
		}
	}
	c.ended += d.attached.Load()
	return c
}

// settled waits until the visitors so far are gone and counted, each once, and no place is taken any more.
func (d *doors) settled(t *testing.T, visitors uint64) {
	t.Helper()
	over := time.NewTimer(patience)
	defer over.Stop()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		c, taken := d.counts(), 0
		for _, h := range d.halfOpen {
			open, addresses, _ := h.Stats()
			taken += open + addresses
		}
		if c.accepted == visitors && c.ended == visitors && c.open == 0 && taken == 0 {
			return
		}
		if c.accepted > visitors || c.ended > visitors {
			t.Fatalf("%d visitors were counted as %+v", visitors, c)
		}
		select {
		case <-tick.C:
		case <-over.C:
			t.Fatalf("%d visitors: counted %+v, places taken %d", visitors, c, taken)
		}
	}
}

// helloField is a field of the hello and what it holds unless the input says otherwise; "" for those of other roles.
var helloFields = []struct{ name, value string }{
	{"role", `"push"`}, {"table", `"samples"`}, {"byte_order", `"little"`}, {"token", `"worker"`}, {"nonce", `"` + strings.Repeat("5a", 32) + `"`},
	{"spec", string(must(must(spec.ParseText(connectionShapes[0].spec)).MarshalJSON()))}, {"fingerprint", ""}, {"session", ""}, {"ack", `"queued"`}, {"window_samples", "10"}, {"window_bytes", "4096"},
	{"prefetch", ""}, {"group", ""}, {"notes", "true"}, {"client", `"fuzz/1"`}, {"compression", ""}, {"manifest", ""}, {"manifest_id", ""}, {"session_of", ""}, {"in_place", ""}, {"wait", ""},
	{"stream", ""}, {"delta", ""}, {"have", ""}, {"have_digest", ""}, {"resume", ""}, {"resume_digest", ""}, {"resume_offset", ""},
}

// helloWith is a hello whose field has another value, which need not be JSON. Beyond the fields, value is all of the body, or all of the frame.
func helloWith(field byte, value []byte) []byte {
	switch n := int(field) % (len(helloFields) + 2); n {
	case len(helloFields):
		return frame(wire.Version, wire.Version, len(value), string(value))
	case len(helloFields) + 1:
		return bytes.Clone(value)
	default:
		var body strings.Builder
		for i, f := range helloFields {
			v := f.value
			if i == n {
				v = string(value)
			}
			if v != "" {
				body.WriteString(`,"` + f.name + `":` + v)
			}
		}
		return frame(wire.Version, wire.Version, body.Len()+1, "{"+body.String()[min(1, body.Len()):]+"}")
	}
}

// What a visitor answers when it is challenged.
const (
	proofRight     = iota
	proofReflected // the daemon's own
	proofReplayed  // one that was right for the visitor before
	proofGiven     // what the input says
	proofs
)
