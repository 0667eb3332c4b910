package quicconn

import (
	"bytes"
	"errors"
	"io"
	"os"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"go.uber.org/goleak"

	"github.com/ingestd/ingestd/ingest/ingesttest"
	"github.com/ingestd/ingestd/tcpingest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair returns both ends of a stream that the first has opened.
func pair(t *testing.T) (client, server *Conn) {
	t.Helper()
	certs := ingesttest.NewCertificates(t)
	l, err := quic.ListenAddr("127.0.0.1:0", tcpingest.TLSConfig(certs.Server), &quic.Config{InitialStreamReceiveWindow: 1 << 10, MaxStreamReceiveWindow: 1 << 10})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	c, err := quic.DialAddr(t.Context(), l.Addr().String(), certs.Client, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.CloseWithError(CodeDone, "") })
	s, err := l.Accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.CloseWithError(CodeDone, "") })
	opened, err := c.OpenStreamSync(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	client = New(c, opened)
	if _, err := client.Write([]byte("?")); err != nil { // a stream is not there until something is said on it
		t.Fatal(err)
	}
	accepted, err := s.AcceptStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	server = New(s, accepted)
	for _, c := range []*Conn{client, server} {
		_ = c.SetDeadline(time.Now().Add(time.Minute))
	}
	if _, err := io.ReadFull(server, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	return client, server
}

// TestCloseDelivers: what was written before Close arrives, as on a socket, and then the end.
func TestCloseDelivers(t *testing.T) {
	for name, write := range map[string]func(*Conn) int{
		"written": func(c *Conn) int { n, _ := c.Write([]byte("last words")); return n },
		"offered": func(c *Conn) int { return c.Offer([]byte("last words")) },
		"closed twice": func(c *Conn) int {
			n, _ := c.Write([]byte("last words"))
			_ = c.CloseWrite()
			return n
		},
	} {
		t.Run(name, func(t *testing.T) {
			client, server := pair(t)
			if n := write(server); n != len("last words") {
				t.Fatalf("%d bytes written", n)
			}
			if err := server.Close(); err != nil {
				t.Fatal(err)
			}
			if b, err := io.ReadAll(client); err != nil || string(b) != "last words" {
				t.Errorf("read %q, %v", b, err)
			}
			if _, err := server.Write([]byte("more")); err == nil {
				t.Error("written after Close")
			}
		})
	}
}

// TestCloseBreaksOff: who was not sent all is told so.
func TestCloseBreaksOff(t *testing.T) {
	big := bytes.Repeat([]byte{7}, 64<<10) // above the window of what is written to a server
	broken := func(t *testing.T, c *Conn) {
		t.Helper()
		var reset *quic.StreamError
		if _, err := io.ReadAll(c); !errors.As(err, &reset) || !reset.Remote || reset.ErrorCode != CodeStopped {
			t.Errorf("got %v, want a reset", err)
		}
	}
	t.Run("nothing was written", func(t *testing.T) {
		client, server := pair(t)
		_ = server.Close()
		broken(t, client)
	})
	t.Run("a write timed out", func(t *testing.T) {
		client, server := pair(t)
		_ = client.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
		if n, err := client.Write(big); n == len(big) || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("%d bytes written, %v", n, err)
		}
		_ = client.Close()
		broken(t, server)
	})
	t.Run("a write waits", func(t *testing.T) {
		client, server := pair(t)
		wrote := make(chan error, 1)
		go func() {
			_, err := client.Write(big)
			wrote <- err
		}()
		if _, err := io.ReadFull(server, make([]byte, 1)); err != nil { // it has begun
			t.Fatal(err)
		}
		_ = client.Close()
		if err := <-wrote; err == nil {
			t.Error("all was written to who reads nothing")
		}
		broken(t, server)
	})
}

// TestHungUp: a peer that wants no more is noticed while nothing is written, and an end of one's own is no such thing.
func TestHungUp(t *testing.T) {
	client, server := pair(t)
	if server.HungUp() || client.HungUp() {
		t.Error("hung up at once")
	}
	client.CancelRead(CodeStopped)
	<-server.Context().Done()
	if !server.HungUp() {
		t.Error("not noticed")
	}
	_ = client.CloseWrite()
	if client.HungUp() {
		t.Error("who closes its writing side hangs up on itself")
	}
}
