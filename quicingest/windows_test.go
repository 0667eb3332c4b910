package quicingest

import (
	"errors"
	"io"
	"os"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/ingestd/ingestd/ingest/ingesttest"
	"github.com/ingestd/ingestd/internal/quicconn"
	"github.com/ingestd/ingestd/tcpingest"
	"github.com/ingestd/ingestd/wire"
)

// TestDefaultsReachEveryField: also of Streams, which has them from its own package.
func TestDefaultsReachEveryField(t *testing.T) {
	given := Config{Streams: tcpingest.Config{Tables: ingesttest.Tables{}}, TLS: ingesttest.NewCertificates(t).Server}
	full, err := given.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	v := reflect.ValueOf(full)
	for i := range v.NumField() {
		if name := v.Type().Field(i).Name; v.Field(i).IsZero() && name != "ResetKey" {
			t.Errorf("Config.%s has no default", name)
		}
	}
	if full.Streams.Transport != "quic" || full.Streams.WindowBytes == 0 {
		t.Errorf("Streams has %+v", full.Streams)
	}
	for name, change := range map[string]func(*Config){
		"no certificates":      func(c *Config) { c.TLS = nil },
		"no tables":            func(c *Config) { c.Streams.Tables = nil },
		"MaxConnections":       func(c *Config) { c.MaxConnections = -1 },
		"StreamsPerConnection": func(c *Config) { c.StreamsPerConnection = -1 },
		"HandshakeTimeout":     func(c *Config) { c.HandshakeTimeout = -1 },
		"IdleTimeout":          func(c *Config) { c.IdleTimeout = -1 },
	} {
		bad := given
		change(&bad)
		if _, err := New(bad); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// TestQUICConfig: each number that quic-go is given is one of ours.
func TestQUICConfig(t *testing.T) {
	given := Config{
		Streams: tcpingest.Config{Tables: ingesttest.Tables{}, WindowBytes: 3000, WindowBytesMax: 5000}, TLS: ingesttest.NewCertificates(t).Server,
		StreamsPerConnection: 7, HandshakeTimeout: 11 * time.Second, IdleTimeout: 13 * time.Second,
	}
	full, err := given.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	if got, want := full.quic(), (&quic.Config{
		HandshakeIdleTimeout: 11 * time.Second, MaxIdleTimeout: 13 * time.Second,
		InitialStreamReceiveWindow: 3000, MaxStreamReceiveWindow: 5000,
		InitialConnectionReceiveWindow: 7 * 5000, MaxConnectionReceiveWindow: 7 * 5000,
		MaxIncomingStreams: 7, MaxIncomingUniStreams: -1,
	}); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// TestStalledStreamsStandAlone: streams whose table is full hold what they may, and no more; others of their connection, those too that come later, go on as if there were none.
func TestStalledStreamsStandAlone(t *testing.T) {
	const window, stalled, samples = 128 << 10, 6, 400
	const spec = "a:U8[1024]"
	full := ingesttest.NewTable(t, "full", spec, 8, 4) // which nobody empties
	s := newSite(t, func(c *Config) {
		c.Streams.WindowBytes, c.Streams.WindowBytesMax = window, window
		c.StreamsPerConnection = stalled + 2
		c.Streams.Tables.(ingesttest.Tables)["full"] = full
	})
	c := s.dial(t)
	open := func(table, spec string) *quicconn.Conn {
		t.Helper()
		st, err := c.OpenStreamSync(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		conn := quicconn.New(c, st)
		_ = conn.SetDeadline(time.Now().Add(time.Minute))
		if err := wire.WriteHello(conn, &wire.Hello{Role: wire.RolePush, Table: table, Spec: s.tables[table].Spec()}); err != nil {
			t.Fatal(err)
		}
		if err := wire.ReadReply(conn, &wire.AcceptedPush{}); err != nil {
			t.Fatalf("a stream to table %s: %v", table, err)
		}
		return conn
	}
	before := open("t", siteSpec)
	var pushing sync.WaitGroup
	taken := make([]int, stalled)
	for i := range taken {
		st := open("full", spec)
		_ = st.SetWriteDeadline(time.Now().Add(time.Second))
		pushing.Go(func() { // far more than anybody takes
			n, err := st.Write(make([]byte, 4<<20))
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%d bytes written, %v", n, err)
			}
			taken[i] = n
		})
	}
	pushing.Wait()
	const read, ring, packet = 64 << 10, 8 * 4 << 10, 1500 // what was read ahead, what the table holds, and what the client keeps of what it wrote
	for i, n := range taken {
		if n < window/2 || n > window+read+ring+packet {
			t.Errorf("stalled stream %d: %d bytes were taken of it, with a window of %d", i, n, window)
		}
	}
	for name, st := range map[string]*quicconn.Conn{"one from before": before, "one that comes later": open("t", siteSpec)} {
		send(t, st, samples, -1, nil)
		_ = st.CloseWrite()
		if _, err := io.Copy(io.Discard, st); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	_ = c.CloseWithError(quicconn.CodeDone, "")
	total := uint64(0)
	for _, n := range s.finish(t) {
		total += n
	}
	if total != 2*samples {
		t.Errorf("%d samples taken, want %d", total, 2*samples)
	}
}
