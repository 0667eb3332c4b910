//go:build linux && !race

package e2e

import (
	"encoding/binary"
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/ingestd/ingestd/wire"
)

// relay is between a client and a daemon, and counts how often the word passes from one to the other until the daemon lets the client in.
type relay struct {
	addr string

	mu      sync.Mutex
	speaker string
	flights int
	said    []byte // by the daemon
	in      bool   // the client was let in: the rest is no handshake
}

func newRelay(t *testing.T, to string) *relay {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	check(t, err)
	r := &relay{addr: "tcp://" + l.Addr().String()}
	var running sync.WaitGroup
	running.Go(func() {
		client, err := l.Accept()
		_ = l.Close() // one client, one connection
		if err != nil {
			return
		}
		daemon, err := new(net.Dialer).DialContext(t.Context(), "tcp", strings.TrimPrefix(to, "tcp://"))
		if err != nil {
			t.Error(err)
			_ = client.Close()
			return
		}
		running.Go(func() { r.pass("client", client, daemon) })
		r.pass("daemon", daemon, client)
	})
	t.Cleanup(func() {
		_ = l.Close()
		running.Wait() // the client has ended, and its connection with it
	})
	return r
}

// pass lets one side's bytes through, and its end.
func (r *relay) pass(speaker string, from, to net.Conn) {
	b := make([]byte, 64<<10)
	for {
		n, err := from.Read(b)
		r.hear(speaker, b[:n])
		if _, failed := to.Write(b[:n]); failed != nil || err != nil {
			_ = to.(*net.TCPConn).CloseWrite()
			return
		}
	}
}

// hear notes who speaks. The handshake is over with the accepted reply.
func (r *relay) hear(speaker string, b []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.in || len(b) == 0 {
		return
	}
	if speaker != r.speaker {
		r.speaker = speaker
		r.flights++
	}
	if speaker == "client" {
		return
	}
	const header, accepted = len(wire.Magic) + 8, 0 // magic, version, status, length
	for r.said = append(r.said, b...); len(r.said) >= header; {
		size := header + int(binary.LittleEndian.Uint32(r.said[header-4:]))
		if len(r.said) < size {
			return
		}
		r.in = binary.LittleEndian.Uint16(r.said[header-6:]) == accepted
		r.said = r.said[size:]
		if r.in {
			return
		}
	}
}

func (r *relay) result(t *testing.T) int {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.in {
		t.Error("nobody was let in")
	}
	return r.flights
}

// TestFlights: a handshake is one round trip, and with a token one more, for producers and for trainers.
func TestFlights(t *testing.T) {
	t.Parallel()
	k := newKeyring(t)
	k.add("worker", "push", small.name)
	k.add("trainer", "read", small.name)
	open, guarded := serve(t, []table{small}), serve(t, []table{small}, "--tokens", k.path())
	for _, tc := range []struct {
		name string
		d    *server
		args []string
		want int
	}{
		{"producer", open, []string{"push", "--generate", "16", "--spec", small.spec}, 2},
		{"producer with a token", guarded, []string{"push", "--generate", "16", "--spec", small.spec, "--token-file", k.file("worker")}, 4},
		{"trainer", open, []string{"pull", "--samples", "16"}, 2},
		{"trainer with a token", guarded, []string{"pull", "--samples", "16", "--token-file", k.file("trainer")}, 4},
	} {
		r := newRelay(t, tc.d.TCP)
		run(t, exitOK, append(tc.args, "--addr", r.addr, "--table", small.name)...)
		if got := r.result(t); got != tc.want {
			t.Errorf("%s: the word passed %d times until it was let in, want %d", tc.name, got, tc.want)
		}
	}
}
