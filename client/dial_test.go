package client

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ingestd/ingestd/auth"
	"github.com/ingestd/ingestd/engine"
	"github.com/ingestd/ingestd/ingest/ingesttest"
	"github.com/ingestd/ingestd/internal/devcert"
	"github.com/ingestd/ingestd/quicingest"
	"github.com/ingestd/ingestd/tcpingest"
)

// secured is a daemon's transports with TLS, each with the same table, which wants clients' certificates.
type secured struct {
	table *engine.Table
	addr  map[string]string // by scheme
	files TLS               // what a good client has
	ca    *devcert.Authority
}

func newSecured(t *testing.T, gate *auth.Gate) *secured {
	t.Helper()
	certs := ingesttest.NewCertificates(t)
	s := &secured{table: ingesttest.NewTable(t, "t", "a:U8[70000],b:U64", 4, 4), addr: map[string]string{}, ca: certs.CA}
	s.files.ServerName = "ingestd.test"
	s.files.Authorities, _ = written(t)(&certs.CA.Pair, nil)
	s.files.Certificate, s.files.Key = written(t)(certs.CA.NewClient("producer", time.Hour))
	s.serve(t, gate, certs.Server)
	return s
}

// written writes a pair that was made to files.
func written(t *testing.T) func(*devcert.Pair, error) (certificate, key string) {
	return func(p *devcert.Pair, err error) (certificate, key string) {
		t.Helper()
		if err == nil {
			certificate, key, err = p.Write(t.TempDir(), "pair")
		}
		if err != nil {
			t.Fatal(err)
		}
		return certificate, key
	}
}

// serve starts both transports with what the daemon has of TLS.
func (s *secured) serve(t *testing.T, gate *auth.Gate, server *tls.Config) {
	t.Helper()
	streams := tcpingest.Config{Tables: ingesttest.Tables{"t": s.table}, Gate: gate}
	overTCP, err := tcpingest.New(streams)
	if err != nil {
		t.Fatal(err)
	}
	overUDP, err := quicingest.New(quicingest.Config{Streams: streams, TLS: server})
	if err != nil {
		t.Fatal(err)
	}
	l, err := tcpingest.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	socket, err := quicingest.Listen(t.Context(), "127.0.0.1:0", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	s.addr["tls"], s.addr["quic"] = "tls://"+l.Addr().String(), "quic://"+socket.LocalAddr().String()
	ended := make(chan error, 2)
	go func() { ended <- overTCP.Serve(context.Background(), tcpingest.NewTLSListener(l, server)) }()
	go func() { ended <- overUDP.Serve(context.Background(), socket) }()
	t.Cleanup(func() {
		if err := errors.Join(overTCP.Shutdown(context.Background()), overUDP.Shutdown(context.Background()), <-ended, <-ended); err != nil {
			t.Error(err)
		}
	})
}

func (s *secured) sample(n int) [][]byte {
	return [][]byte{bytes.Repeat([]byte{byte(n)}, 70000), binary.LittleEndian.AppendUint64(nil, uint64(n))}
}

// take has a trainer check so many samples of one stream.
func (s *secured) take(t *testing.T, samples int) {
	t.Helper()
	trainer := s.table.NewTrainer()
	defer trainer.Close()
	for n := 0; n < samples; {
		b, err := trainer.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for row := range b.Count {
			want := s.sample(n)
			if !bytes.Equal(b.Column(0)[row*70000:(row+1)*70000], want[0]) || !bytes.Equal(b.Column(1)[row*8:(row+1)*8], want[1]) {
				t.Fatalf("sample %d is not what was pushed", n)
			}
			n++
		}
		trainer.Release(b)
	}
}

// TestSecureAddresses: a producer pushes over each, with its own certificate and a token that is bound to the connection.
func TestSecureAddresses(t *testing.T) {
	const secret = "a-secret-of-more-than-thirty-two-characters"
	path := filepath.Join(t.TempDir(), "tokens")
	if err := os.WriteFile(path, []byte("tokens:\n- {name: p, secret: \""+secret+"\", rights: [push], tables: [t]}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	tokens, err := auth.Load(path, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	s := newSecured(t, auth.NewGate(auth.GateConfig{Tokens: tokens}))
	token, err := ParseToken("p:" + secret)
	if err != nil {
		t.Fatal(err)
	}
	for scheme, addr := range s.addr {
		t.Run(scheme, func(t *testing.T) {
			const samples = 24
			p, err := Dial(t.Context(), addr, Config{Table: "t", Spec: s.table.Spec(), TLS: s.files, Token: token})
			if err != nil {
				t.Fatal(err)
			}
			pushed := make(chan error, 1)
			go func() {
				for n := range samples {
					if err := p.Push(t.Context(), s.sample(n)...); err != nil {
						pushed <- err
						return
					}
				}
				pushed <- p.Close(t.Context())
			}()
			s.take(t, samples)
			if err := <-pushed; err != nil {
				t.Error(err)
			}
			if _, err := Dial(t.Context(), addr, Config{Table: "t", Spec: s.table.Spec(), TLS: s.files}); err == nil || !strings.Contains(err.Error(), "token") {
				t.Errorf("without a token: %v", err)
			}
		})
	}
}

// TestInterruptedPush: a push that its deadline ends, inside a sample or before it, leaves a Producer that goes on, over TLS as well, where records must go out whole.
func TestInterruptedPush(t *testing.T) {
	for _, scheme := range []string{"tls", "quic"} {
		t.Run(scheme, func(t *testing.T) {
			s := newSecured(t, nil)
			p, err := Dial(t.Context(), s.addr[scheme], Config{Table: "t", Spec: s.table.Spec(), TLS: s.files, WindowBytes: 16 << 20})
			if err != nil {
				t.Fatal(err)
			}
			n := 0
			for stuck := 0; stuck < 3; { // nobody reads: ring, sockets and window fill up
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
				switch err := p.Push(ctx, s.sample(n)...); {
				case err == nil:
					n++
				case errors.Is(err, os.ErrDeadlineExceeded):
					stuck++
				default:
					t.Fatal(err)
				}
				cancel()
			}
			more := 12 - n%4 // whole batches
			pushed := make(chan error, 1)
			go func() {
				for i := range more {
					if err := p.Push(t.Context(), s.sample(n+i)...); err != nil {
						pushed <- err
						return
					}
				}
				pushed <- p.Close(t.Context())
			}()
			s.take(t, n+more)
			if err := <-pushed; err != nil {
				t.Error(err)
			}
		})
	}
}

// TestOutbox: writes over TLS end at their deadline between records, whole, and go on after it; what was taken before a Close arrives.
func TestOutbox(t *testing.T) {
	certs := ingesttest.NewCertificates(t)
	ours, theirs := net.Pipe()
	out := newOutbox(ours)
	client := &tlsConn{Conn: tls.Client(out, certs.Client), out: out}
	server := tls.Server(theirs, certs.Server)
	defer theirs.Close()
	shaken := make(chan error, 1)
	go func() { shaken <- server.Handshake() }()
	if err := client.Handshake(); err != nil {
		t.Fatal(err)
	}
	if err := <-shaken; err != nil {
		t.Fatal(err)
	}
	sent := make([]byte, 4*outboxBytes)
	for i := range sent {
		sent[i] = byte(i / 257)
	}
	_ = client.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
	n, err := client.Write(sent)
	if !errors.Is(err, os.ErrDeadlineExceeded) || n == 0 || n == len(sent) || n%recordBytes != 0 {
		t.Fatalf("wrote %d of %d, %v", n, len(sent), err)
	}
	if m, err := client.Write(sent[n:]); m != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("after the deadline: wrote %d, %v", m, err)
	}
	_ = client.SetWriteDeadline(time.Time{})
	written := make(chan error, 1)
	go func() {
		_, err := client.Write(sent[n:])
		written <- errors.Join(err, client.Close())
	}()
	got, err := io.ReadAll(server)
	if err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d of %d bytes came as they were sent, %v", len(got), len(sent), err)
	}
	if err := <-written; err != nil {
		t.Error(err)
	}
	if _, err := client.Write([]byte{1}); err == nil {
		t.Error("wrote after Close")
	}
}
