//go:build linux

package remote

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ingestd/ingestd/internal/devcert"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/sampler"
	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// daemon has one table, "t", of batches of two samples.
type daemon struct {
	t       testing.TB
	spec    *spec.Spec
	ring    *ring.Ring
	memory  *shm.Memory // nil: the heap
	fifo    *sampler.FIFO
	seats   *shm.Server
	server  *Server
	network string
	address string
	served  chan error
	stop    context.CancelFunc
	next    uint64
	trust   *tls.Config // of who connects over TLS
}

func (d *daemon) Table(name string) (shm.Table, bool) {
	return shm.Table{Name: "t", Spec: d.spec, View: &d.ring.View, Memory: d.memory, Source: d.fifo}, name == "t"
}

func (d *daemon) Names() []string { return []string{"t"} }

func specOf(t testing.TB, text string) *spec.Spec {
	t.Helper()
	s, err := spec.ParseText(text)
	check(t, err)
	return s
}

const (
	rows    = 2
	batches = 6
)

// start serves over a network: tcp, tls, unix, or pipe, which is no socket. The heap stands for tables that cannot be mapped.
func start(t testing.TB, network, text string, heap bool, cfg Config) *daemon {
	t.Helper()
	return setup{network: network, text: text, heap: heap, cfg: cfg}.start(t)
}

// setup is all that tests choose.
type setup struct {
	network, text string
	heap          bool
	path          string // of a file for the memory; "": it has none
	group         sampler.GroupConfig
	cfg           Config
}

func (o setup) start(t testing.TB) *daemon {
	t.Helper()
	ignore := goleak.IgnoreCurrent()
	network, text, heap, cfg := o.network, o.text, o.heap, o.cfg
	s := specOf(t, text)
	d := &daemon{t: t, spec: s, network: network, served: make(chan error, 100)}
	layout := ring.Layout{BatchSize: rows, Batches: batches, Columns: s.LeafBytes(), Spec: s.JSON(), Fingerprint: s.Fingerprint(), Table: "t", Created: time.Unix(1, 0)}
	size, err := layout.Bytes()
	check(t, err)
	memory := ring.AlignedBytes(size)
	if !heap {
		d.memory, err = shm.NewMemory(shm.MemoryConfig{Name: "t", Size: size, Path: o.path})
		check(t, err)
		memory = d.memory.Bytes()
	}
	d.ring, err = ring.Format(memory, layout)
	check(t, err)
	d.ring.Poison = true
	d.fifo, err = sampler.New(d.ring, sampler.Config{Default: o.group}, nil)
	check(t, err)
	d.seats, err = shm.NewServer(shm.ServerConfig{Tables: d})
	check(t, err)
	cfg.Trainers = d.seats
	d.server, err = NewServer(cfg)
	check(t, err)
	ctx, stop := context.WithCancel(context.Background())
	d.stop = stop
	var all sync.WaitGroup
	done := func() {}
	if network != "pipe" {
		d.address = "127.0.0.1:0"
		if network == "unix" {
			d.address = filepath.Join(t.TempDir(), "s")
		}
		l, err := net.Listen(below(network), d.address)
		check(t, err)
		if network == "tls" {
			l = d.secure(l)
		}
		d.address, done = l.Addr().String(), func() { l.Close() }
		all.Go(func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				all.Go(func() { d.serve(ctx, conn) })
			}
		})
	} else {
		d.address = "pipe"
	}
	t.Cleanup(func() {
		stop()
		done()
		all.Wait()
		if n := len(d.seats.Stats().Trainers); n != 0 {
			t.Errorf("%d trainers are left", n)
		}
		if d.memory != nil {
			check(t, d.memory.Close())
		}
		goleak.VerifyNone(t, ignore)
	})
	return d
}

// below is the network that another one goes over.
func below(network string) string {
	if network == "tls" {
		return "tcp"
	}
	return network
}

// secure puts TLS over a listener.
func (d *daemon) secure(l net.Listener) net.Listener {
	ca, err := devcert.NewAuthority("test", time.Hour)
	check(d.t, err)
	pair, err := ca.NewServer([]string{"127.0.0.1"}, time.Hour)
	check(d.t, err)
	d.trust = &tls.Config{RootCAs: ca.Pool(), ServerName: "127.0.0.1", MinVersion: tls.VersionTLS13}
	return tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{pair.TLS()}, MinVersion: tls.VersionTLS13})
}

func (d *daemon) serve(ctx context.Context, conn net.Conn) {
	hello, err := wire.ReadHello(conn)
	if err != nil {
		conn.Close()
	} else {
		err = d.server.Serve(ctx, conn, hello)
	}
	d.served <- err
}

// peer is a trainer without a client.
type peer struct {
	net.Conn
	socket   net.Conn // below TLS; nil: none
	t        testing.TB
	accepted wire.AcceptedRemoteTrain
	headers  wire.BatchReader
}

func (d *daemon) dial(hello wire.Hello) (*peer, error) {
	d.t.Helper()
	p := &peer{t: d.t}
	if d.network == "pipe" {
		ours, theirs := net.Pipe()
		go d.serve(d.t.Context(), theirs)
		p.Conn = ours
	} else {
		conn, err := net.Dial(below(d.network), d.address)
		check(d.t, err)
		p.Conn, p.socket = conn, conn
		if d.network == "tls" {
			p.Conn = tls.Client(conn, d.trust)
		}
	}
	d.t.Cleanup(func() { p.Close() })
	hello.Role = wire.RoleTrain
	if hello.Table == "" {
		hello.Table = "t"
	}
	err := wire.Greet(p, p, &hello, nil, &p.accepted)
	p.headers = wire.BatchReader{R: p, Shape: wire.BatchShape{BatchSize: rows, SampleBytes: d.spec.SampleBytes(), Leaves: d.spec.NumLeaves()}}
	return p, err
}

func (d *daemon) attach(hello wire.Hello) *peer {
	d.t.Helper()
	p, err := d.dial(hello)
	check(d.t, err)
	return p
}

// push publishes so many batches.
func (d *daemon) push(n int) {
	d.t.Helper()
	for range n * rows {
		run, ok := d.ring.TryReserve(1)
		if !ok {
			d.t.Fatal("the ring is full")
		}
		for leaf := range d.spec.NumLeaves() {
			for i, to := 0, d.ring.RunColumn(run, leaf); i < len(to); i++ {
				to[i] = byte(d.next) + byte(i)*7 + byte(i>>8)
			}
		}
		d.ring.Commit(run, 7, d.next, 1000+d.next, ring.Mark{})
		d.next++
	}
}

// take reads a batch and returns its number and payload.
func (p *peer) take() (uint64, []byte) {
	p.t.Helper()
	var h wire.BatchHeader
	check(p.t, p.headers.Next(&h))
	b := make([]byte, h.PayloadBytes)
	_, err := io.ReadFull(p, b)
	check(p.t, err)
	return h.Number, b
}

func (p *peer) answer(numbers ...uint64) {
	p.t.Helper()
	var b []byte
	for _, n := range numbers {
		b = binary.LittleEndian.AppendUint64(b, n)
	}
	_, err := p.Write(b)
	check(p.t, err)
}

// group returns what the group default has.
func (d *daemon) group() sampler.GroupStats { return d.fifo.Stats().Groups[0] }

// TestPayload: the columns come one after the other, over sockets and what is none, from a memfd and from the heap. Large ones go to a socket straight from the memfd.
func TestPayload(t *testing.T) {
	for _, network := range []string{"tcp", "tls", "unix", "pipe"} {
		for _, heap := range []bool{false, true} {
			for text, large := range map[string]uint64{"a:U8": 0, "a:U8[20000],b:U16": rows * (20000 + 2), "a:U8[3],b:U8[60000],c:U8[40000]": rows * (60000 + 40000)} {
				d := start(t, network, text, heap, Config{})
				p := d.attach(wire.Hello{Prefetch: 1})
				for k := range uint64(3) {
					d.push(1)
					number, payload := p.take()
					var want []byte
					for _, column := range []uint64{7, 2 * k, 1000 + 2*k} {
						for row := range uint64(rows) {
							if column == 7 {
								row = 0
							}
							want = binary.LittleEndian.AppendUint64(want, column+row)
						}
					}
					for _, n := range d.spec.LeafBytes() {
						for row := range uint64(rows) {
							for i := range n {
								want = append(want, byte(2*k+row)+byte(i)*7+byte(i>>8))
							}
						}
					}
					if number != k || string(payload) != string(want) {
						t.Fatalf("%s, heap %v, %s: batch %d (%d bytes) differs from %d (%d bytes)", network, heap, text, number, len(payload), k, len(want))
					}
					p.answer(number)
				}
				p.Close()
				check(t, <-d.served)
				inPlace := 3 * large
				if heap || network == "tls" || network == "pipe" {
					inPlace = 0
				}
				if st := d.seats.Stats(); st.Detached != 1 || st.GivenBack != 3 || st.Sent != 3*uint64(rows*(d.spec.SampleBytes()+24)) || st.SentInPlace != inPlace {
					t.Errorf("%s, heap %v, %s: %+v", network, heap, text, st)
				}
			}
		}
	}
}

// TestBadAnswers: whoever answers what it does not hold is ended alone, told why, counted, and its batches are offered again.
func TestBadAnswers(t *testing.T) {
	for name, numbers := range map[string][]uint64{
		"not sent": {9}, "twice": {0, 0}, "junk": {1 << 62}, "one too many": {0, 1, 2}, "begun more than sent": {1<<63 + 3}, "begun far more": {1<<64 - 1},
	} {
		t.Run(name, func(t *testing.T) {
			d := start(t, "tcp", "a:U8[9]", false, Config{})
			p := d.attach(wire.Hello{Prefetch: 2})
			d.push(2)
			p.take()
			p.take()
			p.answer(numbers...)
			var h wire.BatchHeader
			err := p.headers.Next(&h)
			if n := (*wire.Notice)(nil); !errors.As(err, &n) || n.Code != wire.CodeBadPeer {
				t.Errorf("the peer reads %v", err)
			}
			p.Close()
			if n := (*wire.Notice)(nil); !errors.As(<-d.served, &n) || n.Code != wire.CodeBadPeer {
				t.Errorf("Serve returned %v", n)
			}
			st := d.seats.Stats()
			if st.BadPeers != 1 || d.group().Leased != 0 || d.group().Unread != 2-int(st.GivenBack) {
				t.Errorf("%+v, %+v", st, d.group())
			}
		})
	}
}

// TestEarlyAnswer: an answer before the batch is all written gives it back when it is.
func TestEarlyAnswer(t *testing.T) {
	d := start(t, "pipe", "a:U8[5000]", false, Config{})
	p := d.attach(wire.Hello{Prefetch: 1})
	d.push(1)
	var h wire.BatchHeader
	check(t, p.headers.Next(&h))
	p.answer(h.Number)
	if g := d.group(); g.Released != 0 {
		t.Errorf("given back while it is sent: %+v", g)
	}
	_, err := io.CopyN(io.Discard, p, int64(h.PayloadBytes))
	check(t, err)
	d.push(1)
	if number, _ := p.take(); number != 1 {
		t.Errorf("batch %d", number)
	}
	if g := d.group(); g.Released != 1 || g.Leased != 1 {
		t.Errorf("%+v", g)
	}
	p.Close()
	check(t, <-d.served)
}

// TestNeverAnswers: a trainer that says nothing is sent what it may hold and no more, producers go on, and with its connection all comes back in order.
func TestNeverAnswers(t *testing.T) {
	d := start(t, "tcp", "a:U8[9]", false, Config{})
	p := d.attach(wire.Hello{Prefetch: 2})
	d.push(4)
	p.take()
	p.take()
	check(t, p.SetReadDeadline(time.Now().Add(20*time.Millisecond)))
	if n, err := p.Read(make([]byte, 1)); n != 0 {
		t.Errorf("sent more than it may hold: %d, %v", n, err)
	}
	st := d.seats.Stats().Trainers[0]
	if st.State != shm.StateAtLimit || len(st.Held) != 2 || st.Peer != p.LocalAddr().String() {
		t.Errorf("%+v", st)
	}
	p.Close()
	check(t, <-d.served)
	other := d.attach(wire.Hello{Prefetch: 3})
	for want := range uint64(4) {
		number, _ := other.take()
		if number != want {
			t.Errorf("batch %d, want %d", number, want)
		}
		other.answer(number)
	}
	other.Close()
	check(t, <-d.served)
}

// TestStall: a trainer that takes nothing for StallTimeout is cut off, and its batches are offered again.
func TestStall(t *testing.T) {
	d := start(t, "pipe", "a:U8[100000]", false, Config{StallTimeout: 30 * time.Millisecond})
	p := d.attach(wire.Hello{Prefetch: 2})
	d.push(2)
	if n := (*wire.Notice)(nil); !errors.As(<-d.served, &n) || n.Code != wire.CodeStalled {
		t.Errorf("Serve returned %v", n)
	}
	if st := d.seats.Stats(); st.Stalled != 1 || st.Returned != 1 || d.group().Unread != 2 {
		t.Errorf("%+v, %+v", st, d.group())
	}
	p.Close()
}

// TestEnd: after the last batch the trainer is told of the end; answers still count.
func TestEnd(t *testing.T) {
	d := start(t, "tcp", "a:U8[9]", false, Config{})
	p := d.attach(wire.Hello{})
	d.push(1)
	d.ring.Close()
	number, _ := p.take()
	var h wire.BatchHeader
	if n := (*wire.Notice)(nil); !errors.As(p.headers.Next(&h), &n) || n.Code != wire.CodeEndOfStream {
		t.Errorf("at the end: %v", n)
	}
	p.answer(number)
	p.Close()
	check(t, <-d.served)
	if st := d.seats.Stats(); st.Detached != 1 || st.GivenBack != 1 {
		t.Errorf("%+v", st)
	}
}

// TestStop: a trainer that waits is told that the daemon stops.
func TestStop(t *testing.T) {
	d := start(t, "tcp", "a:U8[9]", false, Config{})
	p := d.attach(wire.Hello{})
	d.stop()
	var h wire.BatchHeader
	if n := (*wire.Notice)(nil); !errors.As(p.headers.Next(&h), &n) || n.Code != wire.CodeShuttingDown {
		t.Errorf("cut off: %v", n)
	}
	p.Close()
	<-d.served
	if _, err := d.dial(wire.Hello{}); refused(err) != wire.CodeShuttingDown {
		t.Errorf("attaching to a daemon that stops: %v", err)
	}
}

func refused(err error) wire.Code {
	if r := (*wire.Refusal)(nil); errors.As(err, &r) {
		return r.Code
	}
	return ""
}

// TestRefusals: the rules are those of trainers that map the memory, and both count against the same limits.
func TestRefusals(t *testing.T) {
	d := start(t, "tcp", "a:U8[9]", false, Config{})
	other, err := spec.ParseText("a:I8[9]")
	check(t, err)
	for _, c := range []struct {
		hello wire.Hello
		code  wire.Code
	}{{wire.Hello{Table: "u"}, wire.CodeUnknownTable}, {wire.Hello{Spec: other}, wire.CodeSpecMismatch}} {
		if _, err := d.dial(c.hello); refused(err) != c.code {
			t.Errorf("%v, want %s", err, c.code)
		}
	}
	var granted int64
	for {
		p, err := d.dial(wire.Hello{Prefetch: 100})
		if err != nil {
			p.Close()
			if refused(err) != wire.CodeTooManyConnections {
				t.Errorf("%v", err)
			}
			break
		}
		granted += p.accepted.Prefetch
	}
	if granted != batches-1 {
		t.Errorf("trainers may hold %d batches of %d", granted, batches)
	}
	for k := range 70 { // the table's share is used up: groups are not looked at before that
		p, err := d.dial(wire.Hello{Group: string(rune('a' + k%26))})
		if refused(err) != wire.CodeTooManyConnections {
			t.Fatalf("%v", err)
		}
		p.Close()
		<-d.served
	}
	if st := d.seats.Stats(); st.Refused[wire.CodeTooManyConnections] != 71 || st.Refused[wire.CodeSpecMismatch] != 1 {
		t.Errorf("%+v", st.Refused)
	}
}

// TestConfig: what cannot be is refused.
func TestConfig(t *testing.T) {
	seats, err := shm.NewServer(shm.ServerConfig{Tables: &daemon{}})
	check(t, err)
	for _, cfg := range []Config{{}, {Trainers: seats, StallTimeout: -1}, {Trainers: seats, LingerTimeout: -1}} {
		if _, err := NewServer(cfg); err == nil {
			t.Errorf("%+v was taken", cfg)
		}
	}
	_, err = NewServer(Config{Trainers: seats})
	check(t, err)
}

// FuzzAnswers: whatever a trainer says, it is ended or served, and no batch is lost.
func FuzzAnswers(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Add([]byte{0, 0, 0})
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 0x80})
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0x80, 1, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, say []byte) {
		d := start(t, "unix", "a:U8[9]", false, Config{LingerTimeout: time.Millisecond})
		p := d.attach(wire.Hello{Prefetch: 2})
		d.push(3)
		p.take()
		_, _ = p.Write(say)
		p.Close()
		<-d.served
		if g := d.group(); g.Leased != 0 || uint64(g.Unread)+g.Released != 3 {
			t.Errorf("%+v", g)
		}
	})
}
