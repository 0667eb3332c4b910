//go:build linux

package weights

import (
	"testing"

	"github.com/ingestd/ingestd/wire"
)

// TestStreamWaits: a publisher that finds all places pinned is told by whom, gets a place when one is let go, gives up at its deadline, and can say so itself.
func TestStreamWaits(t *testing.T) {
	for _, network := range []string{"tcp", "unix", "tls", "quic"} {
		t.Run(network, func(t *testing.T) { streamWaits(t, network) })
	}
}

func streamWaits(t *testing.T, network string) {
	m := manifestOf(t, 1000)
	d := listenWeights(t, network, ServerConfig{}, StoreConfig{Heap: true, Generations: 2})
	p := d.publisher(t, m)
	publish := func() {
		t.Helper()
		g := p.begin()
		p.send(g, 0, m.DataBytes(), 512)
		if a := p.ask(&Ask{Op: OpCommit, Generation: g}); a.Op != OpPublished {
			t.Fatalf("answer %+v", a)
		}
	}
	publish()
	r := must(d.store.OpenReader(Who{Client: "holder", PID: 7}))(t)
	held, _ := r.Latest(0)
	publish()
	a := p.ask(&Ask{Op: OpBegin, DeadlineMS: 1})
	if a.Op != OpFailed || a.Code != FailedPinned || len(a.Pins) != 1 || a.Pins[0].Client != "holder" || a.Pins[0].PID != 7 || a.Pins[0].Generation != 1 {
		t.Errorf("answer %+v", a)
	}
	a = p.ask(&Ask{Op: OpBegin, DeadlineMS: 60_000})
	if a.Op != OpWaiting || len(a.Pins) != 1 {
		t.Errorf("answer %+v", a)
	}
	if a := p.ask(&Ask{Op: OpAbort}); a.Op != OpAborted {
		t.Errorf("answer %+v", a)
	}
	b := must(wire.AppendMessage(nil, &Ask{Op: OpBegin, DeadlineMS: 60_000}, wire.MessageBytesMax))(t)
	b = must(wire.AppendMessage(b, &Ask{Op: OpAbort}, wire.MessageBytesMax))(t)
	if _, err := p.Write(b); err != nil { // at once, in one record of TLS
		t.Fatal(err)
	}
	if a := p.answer(); a.Op != OpAborted {
		t.Errorf("answer %+v", a)
	}
	a = p.ask(&Ask{Op: OpBegin, DeadlineMS: 60_000})
	if a.Op != OpWaiting {
		t.Errorf("answer %+v", a)
	}
	held.Release()
	if a := p.answer(); a.Op != OpPlace || a.Generation != 3 {
		t.Errorf("answer %+v", a)
	}
	check(t, r.Close())
}

// TestStreamLeavesWhileItWaits: a publisher that dies while it waits for a place has the table no longer.
func TestStreamLeavesWhileItWaits(t *testing.T) {
	for _, network := range []string{"tcp", "unix", "tls", "quic"} {
		t.Run(network, func(t *testing.T) { streamLeavesWhileItWaits(t, network) })
	}
}

func streamLeavesWhileItWaits(t *testing.T, network string) {
	m := manifestOf(t, 1000)
	d := listenWeights(t, network, ServerConfig{}, StoreConfig{Heap: true, Generations: 2})
	p := d.publisher(t, m)
	r := (*Reader)(nil)
	for range 2 {
		g := p.begin()
		p.send(g, 0, m.DataBytes(), 512)
		p.ask(&Ask{Op: OpCommit, Generation: g})
		if r == nil {
			r = must(d.store.OpenReader(Who{}))(t)
			held, _ := r.Latest(0)
			defer held.Release()
		}
	}
	if a := p.ask(&Ask{Op: OpBegin, DeadlineMS: 3_600_000}); a.Op != OpWaiting {
		t.Errorf("answer %+v", a)
	}
	p.Close()
	check(t, <-d.ends)
	if st := d.store.Stats(); st.Publisher != nil {
		t.Errorf("publisher %+v", st.Publisher)
	}
	check(t, r.Close())
}
