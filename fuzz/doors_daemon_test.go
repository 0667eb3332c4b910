package fuzz

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/ingest/ingesttest"
	"github.com/ingestd/ingestd/internal/quicconn"
	"github.com/ingestd/ingestd/tcpingest"
	"github.com/ingestd/ingestd/wire"
)

// impostor is what has a certificate that clients believe and says it is a daemon.
type impostor struct {
	tls         net.Listener
	quic        *quic.Listener
	authorities string
}

func newImpostor(f *testing.F) *impostor {
	f.Helper()
	certs := ingesttest.NewCertificates(f)
	secure := tcpingest.TLSConfig(&tls.Config{Certificates: certs.Server.Certificates})
	i := &impostor{authorities: filepath.Join(f.TempDir(), "ca.pem")}
	if err := os.WriteFile(i.authorities, certs.CA.CertificatePEM(), 0o600); err != nil {
		f.Fatal(err)
	}
	i.tls = tls.NewListener(must(tcpingest.Listen(context.Background(), "tcp", "127.0.0.1:0")), secure)
	i.quic = must(quic.ListenAddr("127.0.0.1:0", secure, nil))
	f.Cleanup(func() {
		if err := errors.Join(i.tls.Close(), i.quic.Close()); err != nil {
			f.Error(err)
		}
	})
	return i
}

// address is where to dial, over QUIC or TLS.
func (i *impostor) address(overQUIC bool) string {
	if overQUIC {
		return "quic://" + i.quic.Addr().String()
	}
	return "tls://" + i.tls.Addr().String()
}

// accept returns a client's connection, and what ends all of it.
func (i *impostor) accept(ctx context.Context, overQUIC bool) (net.Conn, func(), error) {
	if !overQUIC {
		c, err := i.tls.Accept()
		if err != nil {
			return nil, nil, err
		}
		return c, func() { _ = c.Close() }, nil
	}
	c, err := i.quic.Accept(ctx)
	if err != nil {
		return nil, nil, err
	}
	s, err := c.AcceptStream(ctx)
	if err != nil {
		return nil, nil, err
	}
	return quicconn.New(c, s), func() { _ = c.CloseWithError(quicconn.CodeDone, "") }, nil
}

// speak hears a client's hello, proves the token if it knows it, says the rest, and returns all that came after the hello and the proof that was due.
func (i *impostor) speak(t *testing.T, overQUIC, knows bool, rest []byte) (heard []byte) {
	conn, leave, err := i.accept(t.Context(), overQUIC)
	if err != nil {
		t.Errorf("accept: %v", err)
		return nil
	}
	defer leave()
	_ = conn.SetDeadline(time.Now().Add(patience))
	_, hello, err := wire.ReadHelloFrame(conn)
	if err != nil {
		t.Errorf("the hello: %v", err)
		return nil
	}
	if knows {
		state := conn.(interface{ ConnectionState() tls.ConnectionState }).ConnectionState()
		nonce := wire.NewNonce()
		transcript := wire.NewTranscript(hello, nonce, must(state.ExportKeyingMaterial(wire.ExporterLabel, nil, wire.ExporterBytes)))
		secret := fuzzToken().Secret
		if err := wire.WriteChallenge(conn, &wire.Challenge{Nonce: nonce, Proofs: []wire.Proof{transcript.DaemonProof(secret)}}); err != nil {
			t.Errorf("the challenge: %v", err)
		}
		if proof, err := wire.ReadProof(conn); err != nil || !proof.Equal(transcript.ClientProof(secret)) {
			t.Errorf("the client does not prove its token: %v", err)
		}
	}
	_, _ = conn.Write(rest) // the client may have heard enough
	_ = conn.(interface{ CloseWrite() error }).CloseWrite()
	heard, _ = io.ReadAll(conn) // however it leaves
	return heard
}

// FuzzDaemon: a client with a token that meets, over TLS or QUIC, who does not know that token ends with an error that says so, and has told nothing but its hello; also where the certificate
// is one that it believes. Whatever the true daemon answers, the client is let in, refused for the reason given, or says what came instead.
func FuzzDaemon(f *testing.F) {
	i := newImpostor(f)
	layout := mustSpec(f, connectionShapes[0].spec)
	accepted := must(wire.AppendAccepted(nil, &wire.AcceptedPush{
		Table: connectionTable, Fingerprint: layout.Fingerprint(), Stream: 1, Ack: wire.AckQueued, WindowSamples: 10, WindowBytes: 1000,
	}))
	challenge := wire.AppendChallenge(nil, &wire.Challenge{Nonce: wire.Nonce{1}, Proofs: []wire.Proof{{2}}})
	for _, how := range []byte{0, 1, 2, 3} {
		for _, b := range [][]byte{
			{}, accepted, accepted[:len(accepted)-1], challenge, append(bytes.Clone(challenge), accepted...), wire.AppendRefusal(nil, wire.Refuse(wire.CodeUnknownTable, "no")),
			[]byte("HTTP/1.1 400 Bad Request\r\n\r\n"), frame(1, 0, 2, "{}"), frame(1, 0, wire.BodyBytesMax, "{"), frame(1, 0, 1<<31, "{"), frame(1, 2, 2, "{}"), frame(1, 3, 2, "{}"),
		} {
			f.Add(how, b)
		}
	}
	f.Fuzz(func(t *testing.T, how byte, rest []byte) {
		overQUIC, knows := how&1 != 0, how&2 != 0
		rest = rest[:min(len(rest), 8<<10)]
		spoken := make(chan []byte, 1)
		go func() { spoken <- i.speak(t, overQUIC, knows, rest) }()
		p, err := client.Dial(t.Context(), i.address(overQUIC), client.Config{
			Table: connectionTable, Spec: layout, Token: fuzzToken(), TLS: client.TLS{Authorities: i.authorities}, HandshakeTimeout: patience,
		})
		if err == nil {
			p.Abort()
		}
		heard := <-spoken
		reply := new(wire.AcceptedPush)
		want := wire.ReadReply(bytes.NewReader(rest), reply)
		var refusal, said *wire.Refusal
		switch {
		case err == nil && (!knows || want != nil):
			t.Fatalf("let in by who knows the token: %v, and answered %v", knows, want)
		case bytes.Contains(heard, []byte(fuzzSecret)), err != nil && strings.Contains(err.Error(), fuzzSecret):
			t.Fatalf("the secret was shown: %v", err)
		case len(heard) > 0:
			t.Fatalf("%d bytes came after the hello and the proof", len(heard))
		case errors.As(want, &refusal) && (!errors.As(err, &said) || said.Code != refusal.Code):
			t.Fatalf("refused with %v, the client says %v", refusal, err)
		case err == nil || errors.As(err, &said) || errors.Is(err, wire.ErrProtocol) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF):
		case !knows && (errors.Is(err, wire.ErrNotChallenged) || errors.Is(err, wire.ErrDaemonUnproven)):
		case knows && want == nil: // what it agreed to is not what was asked for
		default:
			t.Fatalf("an error of no known kind: %v", err)
		}
	})
}
