//go:build linux && !race

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/internal/daemon"
	"github.com/ingestd/ingestd/internal/proof"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// pushed is what `ingestd push --json` prints.
type pushed struct {
	Stream, Sent, Acked uint64
	Error               string
}

// pulled is what `ingestd pull --verify --json` prints.
type pulled struct {
	Samples, Batches, Wrong, Gaps uint64
	Disorder                      uint64 `json:"out_of_order"`
	Ended                         bool
	First, Error                  string
}

func result[T any](p *process) T {
	p.t.Helper()
	var r T
	if err := json.Unmarshal([]byte(p.out.String()), &r); err != nil {
		p.t.Errorf("%v printed %q: %v", p.args, p.out.String(), err)
	}
	return r
}

// endless is more samples than a test has time for.
const endless = 1 << 40

// push starts an honest producer process: n samples, at most rate per second (0: as fast as they are taken).
func (d *server) push(name string, n int64, rate int, flags ...string) *process {
	d.t.Helper()
	args := []string{"push", "--addr", d.TCP, "--table", name, "--generate", strconv.FormatInt(n, 10), "--rate", strconv.Itoa(rate), "--json"}
	return start(d.t, append(args, flags...)...)
}

// pull starts an honest trainer process that verifies all it reads and ends with the stream.
func (d *server) pull(name string, flags ...string) *process {
	d.t.Helper()
	return start(d.t, append([]string{"pull", "--addr", d.Unix, "--table", name, "--verify", "--json"}, flags...)...)
}

// pair is an honest producer and an honest trainer.
type pair struct {
	table      string
	push, pull *process
}

// pair starts both and waits until samples go through them.
func (d *server) pair(name string, rate int) *pair {
	d.t.Helper()
	p := &pair{name, d.push(name, endless, rate), d.pull(name, "--gapless")}
	d.moves(name, 2)
	return p
}

// finish waits until the pairs have moved on since now, then ends the daemon under their load: all must end well, and nothing that was acked, by them or beside
// them, may be missing.
func (d *server) finish(beside map[string]uint64, pairs ...*pair) {
	d.t.Helper()
	for _, p := range pairs {
		d.moves(p.table, 2)
	}
	d.signal(syscall.SIGTERM)
	d.ends(exitOK)
	for _, p := range pairs {
		p.push.ends(exitRefused)
		if said := p.push.err.String(); strings.Count(said, "shutting_down") != 1 {
			d.t.Errorf("push does not say once that the daemon is shutting_down; it says:\n%s", said)
		}
		p.pull.ends(exitOK)
		in, out := result[pushed](p.push), result[pulled](p.pull)
		if want := in.Acked + beside[p.table]; out.Samples < want || in.Acked == 0 || !out.Ended || out.Wrong+out.Gaps+out.Disorder > 0 {
			d.t.Errorf("table %s: %d samples acked, %d of them the honest producer's; read %+v", p.table, want, in.Acked, out)
		}
	}
}

// producer is a connection under the test's control, as rude as it likes.
type producer struct {
	net.Conn
	t        *testing.T
	layout   *spec.Spec
	accepted wire.AcceptedPush
	next     uint64
}

// connect dials without a word.
func (d *server) connect() *producer {
	d.t.Helper()
	c, err := new(net.Dialer).DialContext(d.t.Context(), "tcp", strings.TrimPrefix(d.TCP, "tcp://"))
	check(d.t, err)
	d.t.Cleanup(func() { _ = c.Close() })
	check(d.t, c.SetDeadline(time.Now().Add(patience))) // so that a daemon that says nothing fails the test and does not hang it
	return &producer{Conn: c, t: d.t}
}

func (d *server) hello(tb table) *wire.Hello {
	d.t.Helper()
	return &wire.Hello{Role: wire.RolePush, Table: tb.name, Spec: tb.layout(d.t), Client: "rude"}
}

func (d *server) helloBytes(tb table) []byte {
	d.t.Helper()
	b, err := wire.AppendHello(nil, d.hello(tb))
	check(d.t, err)
	return b
}

// join connects and shakes hands.
func (d *server) join(tb table) *producer {
	d.t.Helper()
	c := d.connect()
	c.layout = tb.layout(d.t)
	check(d.t, wire.WriteHello(c, d.hello(tb)))
	check(d.t, wire.ReadReply(c, &c.accepted))
	return c
}

// samples makes the next n samples.
func (c *producer) samples(n int) []byte {
	size := int(c.layout.SampleBytes())
	b := make([]byte, n*size)
	for i := range n {
		proof.Sample(b[i*size:(i+1)*size], c.layout, c.accepted.Stream, c.next)
		c.next++
	}
	return b
}

func (c *producer) write(b []byte) {
	c.t.Helper()
	_, err := c.Write(b)
	check(c.t, err)
}

// shut closes the writing side.
func (c *producer) shut() {
	c.t.Helper()
	check(c.t, c.Conn.(*net.TCPConn).CloseWrite())
}

// die closes with a reset, as the kernel does for a process that is killed with bytes unread.
func (c *producer) die() {
	c.t.Helper()
	check(c.t, errors.Join(c.Conn.(*net.TCPConn).SetLinger(0), c.Close()))
}

// refusal reads the answer, which must be a refusal of that code.
func (c *producer) refusal(code wire.Code) *wire.Refusal {
	c.t.Helper()
	err := wire.ReadReply(c, &c.accepted)
	var r *wire.Refusal
	if !errors.As(err, &r) || r.Code != code {
		c.t.Fatalf("got %v, want a refusal of code %s", err, code)
	}
	return r
}

// ending reads acks to the end and returns how many came, and the closing notice if one did.
func (c *producer) ending() (acks uint64, notice *wire.Notice, err error) {
	one := make([]byte, 1)
	for {
		switch _, err := io.ReadFull(c, one); {
		case err == io.EOF:
			return acks, nil, nil
		case err != nil:
			return acks, nil, err
		case one[0] == wire.NoticeMark:
			notice, err := wire.ReadNotice(c)
			return acks, notice, err
		}
		acks++
	}
}

// told reads to the end, without another ack: to a notice of that code that says the words.
func (c *producer) told(code wire.Code, words ...string) {
	c.t.Helper()
	acks, notice, err := c.ending()
	if acks != 0 || notice == nil || notice.Code != code {
		c.t.Fatalf("got %d more acks, notice %v, error %v; want %s", acks, notice, err, code)
	}
	says(c.t, notice.Reason, words...)
	check(c.t, c.Close())
}

// dribble goes on writing until it cannot: a byte now and then, each of which would start a timeout for silence anew. First comes what is given, then zeros.
func (c *producer) dribble(first ...byte) {
	var done sync.WaitGroup
	c.t.Cleanup(done.Wait)
	c.t.Cleanup(func() { _ = c.Close() })
	done.Go(func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for i := 0; ; i++ {
			one := []byte{0}
			if i < len(first) {
				one = first[i : i+1]
			}
			if _, err := c.Write(one); err != nil {
				return
			}
			<-tick.C
		}
	})
}

// reader is a trainer in the test's own process that keeps account of every sample: for tables of which other trainers take batches and lose them, so that
// samples come late.
type reader struct {
	t       *testing.T
	trainer *client.Trainer
	done    sync.WaitGroup
	seen    map[uint64][]bool // by stream, by number
	err     error
}

// reader attaches and reads until the end of the stream.
func (d *server) reader(name string) *reader {
	d.t.Helper()
	tr, err := client.Attach(d.t.Context(), d.Unix, client.TrainerConfig{Table: name, Client: "reader"})
	check(d.t, err)
	r := &reader{t: d.t, trainer: tr, seen: map[uint64][]bool{}}
	d.t.Cleanup(func() { _ = tr.Close(); r.done.Wait() })
	r.done.Go(func() {
		r.err = errors.Join(r.readAll(), tr.Close()) // at once: the daemon waits for trainers to leave
	})
	return r
}

func (r *reader) readAll() error {
	for {
		b, err := r.trainer.Next(r.t.Context())
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		streams, numbers := b.Streams(), b.Numbers()
		for leaf := range b.Spec().NumLeaves() {
			l := b.Spec().Leaf(leaf)
			if row, at := proof.CheckColumn(b.Column(leaf), l, leaf, streams, numbers); row >= 0 {
				return fmt.Errorf("batch %d row %d: sample %d of stream %d is wrong from byte %d of leaf %q on", b.Number(), row, numbers[row], streams[row], at, l.Name)
			}
		}
		for row, stream := range streams {
			seen, n := r.seen[stream], numbers[row]
			for uint64(len(seen)) <= n {
				seen = append(seen, false)
			}
			if seen[n] {
				return fmt.Errorf("batch %d row %d: sample %d of stream %d came twice", b.Number(), row, n, stream)
			}
			seen[n], r.seen[stream] = true, seen
		}
		b.Release()
	}
}

// account waits for the end and checks that every acked sample of the producers was read once, and nothing that was not sent.
func (r *reader) account(producers ...*process) {
	r.t.Helper()
	r.done.Wait()
	if r.err != nil {
		r.t.Error(r.err)
		return
	}
	for _, p := range producers {
		p.ends(exitRefused)
		in := result[pushed](p)
		says(r.t, p.err.String(), "shutting_down")
		seen := r.seen[in.Stream]
		n := uint64(len(seen))
		for number, ok := range seen {
			if !ok {
				r.t.Errorf("stream %d: sample %d of %d is missing", in.Stream, number, n)
				break
			}
		}
		if in.Acked == 0 || n < in.Acked || n > in.Sent {
			r.t.Errorf("stream %d: sent %d, acked %d, read %d", in.Stream, in.Sent, in.Acked, n)
		}
	}
}

// attached returns the status of the trainer of a process, or nil.
func attached(s *status, p *process) *daemon.TrainerStatus {
	for i := range s.Trainers {
		if s.Trainers[i].PID == p.pid() {
			return &s.Trainers[i]
		}
	}
	return nil
}
