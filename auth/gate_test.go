package auth

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/ingestd/ingestd/wire"
)

// Example is all that a transport does with a Gate.
func Example() {
	secret, _ := wire.NewSecret("0123456789abcdef0123456789abcdef")
	tokens, err := Parse([]byte(`tokens: [{name: trainer, secret: 0123456789abcdef0123456789abcdef, rights: [read], tables: ["w*"]}]`))
	if err != nil {
		fmt.Println(err)
		return
	}
	gate := NewGate(GateConfig{Tokens: tokens})

	client, daemon := net.Pipe()
	go func() { // the transport; a real one sets a deadline on the connection first
		defer daemon.Close()
		hello, frame, err := wire.ReadHelloFrame(daemon)
		if err != nil {
			return
		}
		peer, err := PeerOf(daemon)
		if err != nil {
			return
		}
		id, refusal := gate.Admit(daemon, hello, frame, peer)
		if refusal != nil {
			_ = wire.WriteRefusal(daemon, refusal) // and bans.Table.Failed, if bans.Failure says so of the code
			return
		}
		_ = wire.WriteAccepted(daemon, &wire.AcceptedManifest{Table: hello.Table, Manifest: []byte(`{"let in":"` + id.Token + `"}`)})
	}()

	hello := &wire.Hello{Role: wire.RoleManifest, Table: "weights", ManifestID: "0123456789abcdef"}
	hello.SetToken(wire.Token{Name: "trainer", Secret: secret})
	var accepted wire.AcceptedManifest
	err = wire.Greet(client, client, hello, nil, &accepted)
	fmt.Println(string(accepted.Manifest), err)
	// Output: {"let in":"trainer"} <nil>
}

// TestUnixPeers: the kernel says who is at the other end of a unix socket; others need a token.
func TestUnixPeers(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	daemon, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer daemon.Close()
	peer, err := PeerOf(daemon)
	if err != nil || !peer.Local || peer.User != os.Getuid() || peer.Exporter != nil {
		t.Fatalf("%+v, %v", peer, err)
	}
	hello, frame := helloOf(t, wire.RolePublish, "any", wire.Token{})
	tokens := testTokens(t)
	for _, c := range []struct {
		name  string
		users []int
		peer  Peer
		ok    bool
	}{
		{"own user", nil, peer, true},
		{"listed user", []int{peer.User + 5, peer.User + 7}, Peer{Local: true, User: peer.User + 7}, true},
		{"another user", []int{peer.User + 5}, Peer{Local: true, User: peer.User + 7}, false},
		{"no known user", []int{-1}, Peer{Local: true, User: -1}, false},
		{"own number, not a unix socket", nil, Peer{User: peer.User}, false},
	} {
		gate := NewGate(GateConfig{Tokens: tokens, Users: c.users})
		id, refusal := gate.Admit(daemon, hello, frame, c.peer)
		if c.ok && (refusal != nil || !id.May(Publish, "any") || id.Token != "" || gate.Stats().ByUser != 1) {
			t.Errorf("%s: %v", c.name, refusal)
		} else if !c.ok {
			wantRefused(t, id, refusal, wire.CodeNotAuthenticated)
		}
	}
	// With a token its rights count, also for the own user.
	worker := token(t, "worker", workerSecret)
	hello, frame = helloOf(t, wire.RolePublish, "grads", worker)
	id, refusal := NewGate(GateConfig{Tokens: tokens}).Admit(&tape{answer: honest(t, frame, worker, nil)}, hello, frame, peer)
	wantRefused(t, id, refusal, wire.CodeNotPermitted)
}

// TestPeerOfTCP: a TCP connection has neither a user nor TLS.
func TestPeerOfTCP(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if peer, err := PeerOf(client); err != nil || peer.Local || peer.Exporter != nil {
		t.Errorf("%+v, %v", peer, err)
	}
}

// TestWithoutTokens: a daemon without tokens lets everybody in, but who named a token.
func TestWithoutTokens(t *testing.T) {
	var none *Gate
	for _, gate := range []*Gate{none, NewGate(GateConfig{})} {
		hello, frame := helloOf(t, wire.RolePush, "any", wire.Token{})
		id, refusal := gate.Admit(nil, hello, frame, Peer{})
		if refusal != nil || !id.May(Push, "any") || id.Token != "" || gate.Tokens() != nil {
			t.Errorf("%v, %v", id, refusal)
		}
		hello, frame = helloOf(t, wire.RolePush, "any", token(t, "worker", workerSecret))
		id, refusal = gate.Admit(nil, hello, frame, Peer{})
		wantRefused(t, id, refusal, wire.CodeBadOption)
	}
	if none.Stats() != (GateStats{}) {
		t.Error(none.Stats())
	}
}

// BenchmarkAdmit is what a handshake with a token costs a daemon beside its messages.
func BenchmarkAdmit(b *testing.B) {
	gate := NewGate(GateConfig{Tokens: testTokens(b)})
	for _, name := range []string{"worker", "nobody"} {
		b.Run(name, func(b *testing.B) {
			by := token(b, name, workerSecret)
			hello, frame := helloOf(b, wire.RolePush, "grads", by)
			b.ReportAllocs()
			for b.Loop() {
				_, refusal := gate.Admit(&tape{answer: honest(b, frame, by, nil)}, hello, frame, Peer{})
				if (refusal == nil) != (name == "worker") {
					b.Fatal(refusal)
				}
			}
		})
	}
}
