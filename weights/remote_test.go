//go:build linux

package weights

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

// rawReader is a reader that answers what it is told to.
type rawReader struct {
	t testing.TB
	net.Conn
	m        *tensor.Manifest
	accepted wire.AcceptedSubscribe
}

func (d *netDaemon) reader(t testing.TB, hello wire.Hello) (*rawReader, error) {
	t.Helper()
	r := &rawReader{t: t, Conn: must(net.Dial(d.network, d.address))(t)}
	t.Cleanup(func() { r.Close() })
	check(t, r.SetDeadline(time.Now().Add(30*time.Second)))
	hello.Role, hello.Table, hello.Stream = wire.RoleSubscribe, "w", d.network == "unix"
	check(t, wire.WriteHello(r, &hello))
	if err := wire.ReadReply(r, &r.accepted); err != nil {
		return nil, err
	}
	r.m = must(tensor.ParseManifest(r.accepted.Manifest))(t)
	return r, nil
}

// announcement reads what comes before a generation's bytes.
func (r *rawReader) announcement() (*Announcement, []uint32) {
	r.t.Helper()
	var a Announcement
	check(r.t, wire.ReadMessage(r, AnnouncementBytesMax, &a))
	check(r.t, a.Check(r.m))
	sums := make([]byte, 4*r.m.Len())
	_, err := io.ReadFull(r, sums)
	check(r.t, err)
	return &a, decodeSums(sums)
}

// bytes reads a generation's bytes into flat ones.
func (r *rawReader) bytes(a *Announcement, into []byte) {
	r.t.Helper()
	skip := a.From
	for _, span := range a.Ranges {
		n := min(skip, span[1])
		skip -= n
		_, err := io.ReadFull(r, into[span[0]+n:span[0]+span[1]])
		check(r.t, err)
	}
}

func (r *rawReader) say(b byte) {
	r.t.Helper()
	_, err := r.Write([]byte{b})
	check(r.t, err)
}

// publish publishes these versions of each tensor's content.
func (d *netDaemon) publish(t testing.TB, p *Publishing, version func(i int) uint64) spec.Fingerprint {
	t.Helper()
	pl := must(p.Begin(t.Context(), 0))(t)
	m := p.Manifest()
	for i := range m.Len() {
		b := pl.Data()[m.Offset(i):][:m.EncodedBytes(i)]
		contentOf(b, version(i), i)
		pl.SetSum(i, tensor.CRC(b))
	}
	return must(pl.Commit())(t)
}

func only(v uint64) func(int) uint64 { return func(int) uint64 { return v } }

func (d *netDaemon) publishing(t testing.TB, m *tensor.Manifest) *Publishing {
	t.Helper()
	p := must(d.store.OpenPublisher(m, Who{Client: "test"}))(t)
	t.Cleanup(p.Close)
	return p
}

// until waits until the store's and the server's counters are as wanted: what the test has caused happens in another goroutine.
func (d *netDaemon) until(t testing.TB, what string, ok func(st Stats, all ServerStats) bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	timeout := time.NewTimer(30 * time.Second)
	defer timeout.Stop()
	for !ok(d.store.Stats(), d.server.Stats()) {
		select {
		case <-tick.C:
		case <-timeout.C:
			t.Fatalf("%s: not so after 30 s: %+v, %+v", what, d.store.Stats(), d.server.Stats())
		}
	}
}

func unpinned(st Stats, _ ServerStats) bool {
	for _, g := range st.Generations {
		if len(g.Pins) > 0 {
			return false
		}
	}
	return true
}

// TestRemoteWhole: the pin lasts until the answer, and the daemon's counters say what was sent.
func TestRemoteWhole(t *testing.T) {
	m := manifestOf(t, 100, 0, 5000, 1)
	d := listenWeights(t, "tcp", ServerConfig{}, StoreConfig{})
	p := d.publishing(t, m)
	digest := d.publish(t, p, only(1))
	r := must(d.reader(t, wire.Hello{Client: "r"}))(t)
	a, sums := r.announcement()
	if a.Generation != 1 || a.Digest != digest || a.Base != 0 || a.Bytes != m.DataBytes() || r.accepted.Newest != 1 || Digest(m, sums) != digest {
		t.Errorf("announced %+v, newest %d", a, r.accepted.Newest)
	}
	flat := make([]byte, m.DataBytes())
	r.bytes(a, flat)
	if i := wrongContent(m, flat, 1); i >= 0 {
		t.Errorf("tensor %d is wrong", i)
	}
	st := d.store.Stats()
	if pins := st.Generations[0].Pins; len(pins) != 1 || pins[0].Who.Client != "r" || !pins[0].Who.Remote || pins[0].Who.Addr == "" {
		t.Errorf("pins %+v", pins)
	}
	r.say(answerShown)
	d.until(t, "unpinned", unpinned)
	all := d.server.Stats()
	if len(all.Remote) != 1 || all.Remote[0].Have != 1 || all.Sent.Generations != 1 || all.Sent.Bytes != uint64(m.DataBytes()) {
		t.Errorf("stats %+v", all)
	}
}

// TestRemoteDelta: only tensors that differ are sent, in ranges; also those whose sums collide.
func TestRemoteDelta(t *testing.T) {
	m := manifestOf(t, 512, 300, 0, 256, 5000, 700)
	d := listenWeights(t, "tcp", ServerConfig{}, StoreConfig{Generations: 4})
	p := d.publishing(t, m)
	d.publish(t, p, only(1))
	r := must(d.reader(t, wire.Hello{Delta: true}))(t)
	a, _ := r.announcement()
	flat := make([]byte, m.DataBytes())
	r.bytes(a, flat)
	r.say(answerShown)
	next := func(version func(i int) uint64, want ...Range) {
		t.Helper()
		d.publish(t, p, version)
		a, _ := r.announcement()
		sum := int64(0)
		for _, span := range want {
			sum += span[1]
		}
		if a.Base != a.Generation-1 || !slices.Equal(a.Ranges, want) || a.Bytes != sum {
			t.Errorf("announced %+v, want %v", a, want)
		}
		r.bytes(a, flat)
		r.say(answerShown)
		for i := range m.Len() {
			want := make([]byte, m.EncodedBytes(i))
			contentOf(want, version(i), i)
			if string(flat[m.Offset(i):][:len(want)]) != string(want) {
				t.Errorf("generation %d: tensor %d is wrong", a.Generation, i)
			}
		}
	}
	of := func(changed ...int) func(int) uint64 {
		return func(i int) uint64 {
			if slices.Contains(changed, i) {
				return 2
			}
			return 1
		}
	}
	next(only(1))
	next(of(0), Range{0, 512})
	next(of(0, 1, 3), Range{512, 768}) // neighbours: 2 is empty, and between there is nothing but a gap
	next(of(0, 1, 3))
	next(of(0, 1, 3, 5), Range{m.Offset(5), 700})
	next(of(0, 1, 3, 5, 2), []Range{}...) // an empty tensor has no bytes that could differ
	d.publish(t, p, only(3))
	if a, _ := r.announcement(); a.Base != 0 || a.Bytes != m.DataBytes() {
		t.Errorf("all differs, and %+v is announced", a)
	} else {
		r.bytes(a, flat)
		r.say(answerShown)
	}
	if st := d.server.Stats().Sent; st.Deltas != 6 {
		t.Errorf("sent %+v", st)
	}
}

// collide changes b, which must have 8 bytes or more, so that its CRC stays.
func collide(b []byte) {
	want := tensor.CRC(b)
	b[0] ^= 0xA5
	last := b[len(b)-4:]
	zero := tensor.CRC(b)
	var effect, combination [32]uint32 // what flipping some bits of the last word changes in the CRC
	for bit := range 32 {
		last[bit/8] ^= 1 << (bit % 8)
		effect[bit], combination[bit] = tensor.CRC(b)^zero, 1<<bit
		last[bit/8] ^= 1 << (bit % 8)
	}
	flip, left := uint32(0), want^zero
	for bit := range 32 { // Gauss
		k := bit
		for k < 32 && effect[k]>>bit&1 == 0 {
			k++
		}
		effect[bit], effect[k] = effect[k], effect[bit]
		combination[bit], combination[k] = combination[k], combination[bit]
		for j := range 32 {
			if j != bit && effect[j]>>bit&1 != 0 {
				effect[j] ^= effect[bit]
				combination[j] ^= combination[bit]
			}
		}
		if left>>bit&1 != 0 {
			left ^= effect[bit]
			flip ^= combination[bit]
		}
	}
	binary.LittleEndian.PutUint32(last, binary.LittleEndian.Uint32(last)^flip)
}

// TestRemoteDeltaCollision: a change that the sum does not show is sent all the same.
func TestRemoteDeltaCollision(t *testing.T) {
	m := manifestOf(t, 100, 10_000)
	d := listenWeights(t, "tcp", ServerConfig{}, StoreConfig{})
	p := d.publishing(t, m)
	d.publish(t, p, only(1))
	r := must(d.reader(t, wire.Hello{Delta: true}))(t)
	a, sums := r.announcement()
	flat := make([]byte, m.DataBytes())
	r.bytes(a, flat)
	r.say(answerShown)
	pl := must(p.Begin(t.Context(), 0))(t)
	copy(pl.Data(), flat)
	collide(pl.Data()[:100])
	for i := range m.Len() {
		pl.SetSum(i, tensor.CRC(pl.Data()[m.Offset(i):][:m.EncodedBytes(i)]))
	}
	want := string(pl.Data())
	must(pl.Commit())(t)
	a, again := r.announcement()
	if !slices.Equal(sums, again) {
		t.Fatalf("the sums are %x and %x: the test's bytes do not collide", sums, again)
	}
	r.bytes(a, flat)
	r.say(answerShown)
	if a.Base != 1 || string(flat) != want {
		t.Errorf("announced %+v; the bytes are right: %v", a, string(flat) == want)
	}
}

// TestRemoteDeltaWithoutBase: a base that is gone, or that has another digest, or is of another life, is none.
func TestRemoteDeltaWithoutBase(t *testing.T) {
	m := manifestOf(t, 100, 10_000)
	d := listenWeights(t, "tcp", ServerConfig{}, StoreConfig{Generations: 2})
	p := d.publishing(t, m)
	var digests []spec.Fingerprint
	for v := range uint64(4) {
		digests = append(digests, d.publish(t, p, func(i int) uint64 { return 1 + v*uint64(1-i) }))
	}
	for name, c := range map[string]struct {
		have   int64
		digest spec.Fingerprint
		base   uint64
	}{
		"there":        {3, digests[2], 3},
		"gone":         {1, digests[0], 0},
		"other digest": {3, digests[0], 0},
		"newest other": {4, digests[0], 0},
		"other life":   {9, digests[3], 0},
	} {
		r := must(d.reader(t, wire.Hello{Delta: true, Have: c.have, HaveDigest: c.digest}))(t)
		a, _ := r.announcement()
		if a.Generation != 4 || a.Base != c.base {
			t.Errorf("%s: announced %+v", name, a)
		}
		r.Close()
	}
	r := must(d.reader(t, wire.Hello{Delta: true, Have: 4, HaveDigest: digests[3]}))(t) // it has the newest
	d.publish(t, p, only(9))
	if a, _ := r.announcement(); a.Generation != 5 {
		t.Errorf("announced %+v", a)
	}
}

// TestRemoteResume: a transfer goes on where it broke off if the generation is still there, and else begins with the newest.
func TestRemoteResume(t *testing.T) {
	m := manifestOf(t, 100, 10_000)
	for _, sc := range []StoreConfig{{}, {Heap: true}} {
		d := listenWeights(t, "tcp", ServerConfig{}, sc)
		p := d.publishing(t, m)
		first := d.publish(t, p, only(1))
		d.publish(t, p, only(2))
		for name, c := range map[string]struct {
			hello      wire.Hello
			generation uint64
			from       int64
		}{
			"begun":        {wire.Hello{Resume: 1, ResumeDigest: first, ResumeOffset: 1000}, 1, 1000},
			"nothing yet":  {wire.Hello{Resume: 1, ResumeDigest: first}, 1, 0},
			"all":          {wire.Hello{Resume: 1, ResumeDigest: first, ResumeOffset: m.DataBytes()}, 1, m.DataBytes()},
			"more":         {wire.Hello{Resume: 1, ResumeDigest: first, ResumeOffset: m.DataBytes() + 1}, 2, 0},
			"other digest": {wire.Hello{Resume: 2, ResumeDigest: first, ResumeOffset: 1000}, 2, 0},
			"gone":         {wire.Hello{Resume: 7, ResumeDigest: first, ResumeOffset: 1000}, 2, 0},
		} {
			r := must(d.reader(t, c.hello))(t)
			a, _ := r.announcement()
			if a.Generation != c.generation || a.From != c.from || a.Base != 0 {
				t.Errorf("%s: announced %+v", name, a)
				continue
			}
			flat := flatContent(m, c.generation)
			clear(flat[a.From:])
			r.bytes(a, flat)
			if i := wrongContent(m, flat, c.generation); i >= 0 {
				t.Errorf("%s: tensor %d is wrong", name, i)
			}
			r.say(answerShown)
			if c.generation == 1 { // then the newest
				if a, _ := r.announcement(); a.Generation != 2 {
					t.Errorf("%s: then %+v", name, a)
				}
			}
			r.Close()
		}
	}
}

// TestRemoteGone: a reader that dies, stalls or does not answer in the middle of a transfer pins nothing for long.
func TestRemoteGone(t *testing.T) {
	m := manifestOf(t, 24<<20) // more than sockets hold
	short, silent := ServerConfig{StallTimeout: 50 * time.Millisecond}, ServerConfig{AnswerTimeout: 50 * time.Millisecond}
	for name, c := range map[string]struct {
		cfg     ServerConfig
		network string
		heap    bool
		run     func(r *rawReader)
	}{
		"dies":            {ServerConfig{}, "tcp", false, func(r *rawReader) { r.announcement(); r.Close() }},
		"dies, unix":      {ServerConfig{}, "unix", false, func(r *rawReader) { r.announcement(); r.Close() }},
		"dies, heap":      {ServerConfig{}, "tcp", true, func(r *rawReader) { r.announcement(); r.Close() }},
		"stalls":          {short, "tcp", false, func(r *rawReader) { r.announcement() }},
		"stalls, unix":    {short, "unix", false, func(r *rawReader) { r.announcement() }},
		"stalls, heap":    {short, "tcp", true, func(r *rawReader) { r.announcement() }},
		"does not answer": {silent, "tcp", false, func(r *rawReader) { a, _ := r.announcement(); r.bytes(a, make([]byte, m.DataBytes())) }},
		"dies unanswered": {ServerConfig{}, "tcp", false, func(r *rawReader) {
			a, _ := r.announcement()
			r.bytes(a, make([]byte, m.DataBytes()))
			r.Close()
		}},
		"answers early": {ServerConfig{}, "tcp", false, func(r *rawReader) { r.announcement(); r.say(answerShown); r.say(answerShown) }},
	} {
		t.Run(name, func(t *testing.T) {
			d := listenWeights(t, c.network, c.cfg, StoreConfig{Heap: c.heap})
			p := d.publishing(t, m)
			d.publish(t, p, only(1))
			r := must(d.reader(t, wire.Hello{}))(t)
			c.run(r)
			d.until(t, "unpinned, and counted", func(st Stats, all ServerStats) bool {
				return unpinned(st, all) && all.Sent.Broken == 1 && len(all.Remote) == 0 && len(st.Readers) == 0
			})
		})
	}
}

// TestRemoteBadAnswers: a generation that did not arrive as it was sent is sent again, whole; if it comes wrong twice, the next one is waited for.
func TestRemoteBadAnswers(t *testing.T) {
	m := manifestOf(t, 100, 10_000)
	d := listenWeights(t, "tcp", ServerConfig{}, StoreConfig{})
	p := d.publishing(t, m)
	d.publish(t, p, only(1))
	r := must(d.reader(t, wire.Hello{Delta: true}))(t)
	into := make([]byte, m.DataBytes())
	take := func(generation, base uint64, answer byte) {
		t.Helper()
		a, _ := r.announcement()
		if a.Generation != generation || a.Base != base {
			t.Fatalf("announced %+v, want generation %d on base %d", a, generation, base)
		}
		r.bytes(a, into)
		r.say(answer)
	}
	part := func(i int) uint64 { return 2 - uint64(i) }
	take(1, 0, answerShown)
	d.publish(t, p, part)
	take(2, 1, answerBad)
	take(2, 0, answerBad)
	d.until(t, "it was counted twice", func(_ Stats, all ServerStats) bool { return all.Sent.Bad == 2 && all.Remote[0].Generation == 0 })
	d.publish(t, p, only(1))
	take(3, 0, answerShown)
	d.publish(t, p, part)
	take(4, 3, answerShown)
	d.until(t, "it was shown", func(_ Stats, all ServerStats) bool { return all.Remote[0].Have == 4 })
	_, err := r.Write([]byte{answerShown})
	check(t, err)
	if n, err := readUntilNotice(r); err != nil || n.Code != wire.CodeBadPeer {
		t.Errorf("notice %v, error %v", n, err)
	}
}

// readUntilNotice reads whole generations until the daemon's notice.
func readUntilNotice(r *rawReader) (*wire.Notice, error) {
	for {
		length, _, err := wire.ReadMessageLength(r)
		if err != nil {
			return nil, err
		}
		if length == 0 {
			var mark [1]byte
			if _, err := io.ReadFull(r, mark[:]); err != nil {
				return nil, err
			}
			return wire.ReadNotice(r)
		}
		var a Announcement
		if err := wire.ReadMessageBody(r, length, AnnouncementBytesMax, &a); err != nil {
			return nil, err
		}
		if _, err := io.CopyN(io.Discard, r, int64(4*r.m.Len())+a.Bytes-a.From); err != nil {
			return nil, err
		}
	}
}

// TestRemoteEnds: readers are told when another manifest has replaced theirs, and when the daemon stops.
func TestRemoteEnds(t *testing.T) {
	m := manifestOf(t, 100)
	for name, c := range map[string]struct {
		end  func(t *testing.T, d *netDaemon)
		code wire.Code
	}{
		"replaced": {func(t *testing.T, d *netDaemon) { d.publish(t, d.publishing(t, manifestOf(t, 200)), only(1)) }, wire.CodeReplaced},
		"stopping": {func(t *testing.T, d *netDaemon) { check(t, d.store.Close()) }, wire.CodeShuttingDown},
	} {
		t.Run(name, func(t *testing.T) {
			d := listenWeights(t, "tcp", ServerConfig{}, StoreConfig{})
			p := d.publishing(t, m)
			d.publish(t, p, only(1))
			p.Close()
			r := must(d.reader(t, wire.Hello{}))(t)
			a, _ := r.announcement()
			r.bytes(a, make([]byte, m.DataBytes()))
			r.say(answerShown)
			d.until(t, "it was shown", func(_ Stats, all ServerStats) bool { return all.Sent.Generations == 1 })
			c.end(t, d)
			if n, err := readUntilNotice(r); err != nil || n.Code != c.code {
				t.Errorf("notice %v, error %v", n, err)
			}
			if name == "replaced" {
				r := must(d.reader(t, wire.Hello{}))(t)
				if a, _ := r.announcement(); a.Generation != 2 || r.m.Tensor(0).Shape[0] != 200 {
					t.Errorf("announced %+v", a)
				}
			}
		})
	}
}

// TestRemoteRefusals: a table in which nothing was published refuses, or lets wait; readers above the limit are refused and counted.
func TestRemoteRefusals(t *testing.T) {
	m := manifestOf(t, 100)
	d := listenWeights(t, "tcp", ServerConfig{RemoteReadersMax: 2}, StoreConfig{})
	var refusal *wire.Refusal
	if _, err := d.reader(t, wire.Hello{}); !errors.As(err, &refusal) || refusal.Code != wire.CodeNoGeneration {
		t.Fatalf("got %v", err)
	}
	d.until(t, "it has left", func(_ Stats, all ServerStats) bool { return len(all.Remote) == 0 })
	type result struct {
		r   *rawReader
		err error
	}
	results := make(chan result, 2)
	for range 2 {
		go func() {
			r, err := d.reader(t, wire.Hello{Wait: true})
			results <- result{r, err}
		}()
	}
	d.until(t, "both wait", func(_ Stats, all ServerStats) bool { return len(all.Remote) == 2 })
	if _, err := d.reader(t, wire.Hello{Wait: true}); !errors.As(err, &refusal) || refusal.Code != wire.CodeTooManyConnections {
		t.Fatalf("got %v", err)
	}
	p := d.publishing(t, m)
	d.publish(t, p, only(1))
	for range 2 {
		got := <-results
		check(t, got.err)
		if a, _ := got.r.announcement(); a.Generation != 1 {
			t.Errorf("announced %+v", a)
		}
		got.r.Close()
	}
	d.until(t, "all have left", func(_ Stats, all ServerStats) bool { return len(all.Remote) == 0 })
	if n := d.server.Stats().Sent.Refused; n != 1 {
		t.Errorf("%d were refused", n)
	}
}

// TestRemoteSkips: a reader that is slow gets the newest when it is ready, and none between.
func TestRemoteSkips(t *testing.T) {
	m := manifestOf(t, 10_000)
	d := listenWeights(t, "tcp", ServerConfig{}, StoreConfig{})
	p := d.publishing(t, m)
	d.publish(t, p, only(1))
	r := must(d.reader(t, wire.Hello{}))(t)
	a, _ := r.announcement()
	r.bytes(a, make([]byte, m.DataBytes()))
	for v := range uint64(10) {
		d.publish(t, p, only(2+v))
	}
	r.say(answerShown)
	if a, _ := r.announcement(); a.Generation != 11 {
		t.Errorf("announced %+v", a)
	} else {
		r.bytes(a, make([]byte, m.DataBytes()))
		r.say(answerShown)
	}
	d.until(t, "it was counted", func(_ Stats, all ServerStats) bool { return all.Sent.Generations == 2 })
	if st := d.server.Stats().Sent; st.Skipped != 9 {
		t.Errorf("sent %+v", st)
	}
}

// TestAnnouncementCheck: readers refuse what no daemon announces, on both sides of each limit.
func TestAnnouncementCheck(t *testing.T) {
	m := manifestOf(t, 512, 300, 0, 256) // at 0, 512, 1024, 1024; 1280 bytes
	good := func(ranges ...Range) *Announcement {
		a := &Announcement{Op: OpGeneration, Generation: 8, Base: 7, Ranges: ranges}
		for _, r := range ranges {
			a.Bytes += r[1]
		}
		return a
	}
	whole := &Announcement{Op: OpGeneration, Generation: 1, Ranges: []Range{{0, 1280}}, Bytes: 1280}
	part := *whole
	part.From = 1280
	for _, a := range []*Announcement{
		whole, &part, good(), good(Range{0, 512}), good(Range{0, 812}), good(Range{0, 1024}), good(Range{512, 300}, Range{1024, 256}),
		good(Range{512, 400}), good(Range{0, 1280}),
	} {
		if err := a.Check(m); err != nil {
			t.Errorf("%+v: %v", a, err)
		}
	}
	change := func(a *Announcement, f func(*Announcement)) *Announcement {
		b := *a
		f(&b)
		return &b
	}
	for i, a := range []*Announcement{
		change(whole, func(a *Announcement) { a.Op = "x" }),
		change(whole, func(a *Announcement) { a.Generation = 0 }),
		change(whole, func(a *Announcement) { a.Generation = GenerationMax + 1 }),
		change(whole, func(a *Announcement) { a.From = -1 }),
		change(whole, func(a *Announcement) { a.From = 1281 }),
		change(whole, func(a *Announcement) { a.Bytes = 1279 }),
		change(whole, func(a *Announcement) { a.Ranges = nil }),
		change(whole, func(a *Announcement) { a.Ranges = []Range{{0, 512}, {512, 768}} }),
		change(good(Range{0, 512}), func(a *Announcement) { a.From = 1 }),
		change(good(Range{0, 512}), func(a *Announcement) { a.Bytes++ }),
		good(Range{0, 511}), good(Range{0, 513}), good(Range{1, 511}), good(Range{256, 256}), good(Range{812, 212}), good(Range{1024, 255}), good(Range{1024, 257}),
		good(Range{512, 300}, Range{0, 512}), good(Range{0, 512}, Range{0, 512}), good(Range{0, 0}), good(Range{-512, 512}), good(Range{0, -1}), good(Range{1280, 1}),
		good(Range{1 << 62, 1 << 62}), good(Range{0, 1 << 62}, Range{512, 300}),
	} {
		if err := a.Check(m); !errors.Is(err, wire.ErrProtocol) {
			t.Errorf("%d: %+v: %v", i, a, err)
		}
	}
	empty := manifestOf(t, 0)
	for _, ranges := range [][]Range{nil, {{0, 0}}} {
		a := &Announcement{Op: OpGeneration, Generation: 1, Ranges: ranges}
		if err := a.Check(empty); err != nil {
			t.Errorf("%+v: %v", a, err)
		}
	}
}

// TestRemoteVanished: a reader whose machine is gone pins nothing for longer than StallTimeout, although its socket took all of the generation.
func TestRemoteVanished(t *testing.T) {
	d := listenWeights(t, "tcp", ServerConfig{StallTimeout: 300 * time.Millisecond, AnswerTimeout: time.Hour}, StoreConfig{})
	p := d.publishing(t, manifestOf(t, 1024))
	d.publish(t, p, only(1))
	r := must(d.reader(t, wire.Hello{}))(t)
	a, _ := r.announcement()
	r.bytes(a, make([]byte, 1024))
	r.say(answerShown)
	d.until(t, "shown", func(_ Stats, all ServerStats) bool { return all.Sent.Generations == 1 })
	drop := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K}
	raw := must(r.Conn.(*net.TCPConn).SyscallConn())(t)
	check(t, raw.Control(func(fd uintptr) {
		check(t, unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &drop}))
	}))
	d.publish(t, p, only(2))
	d.until(t, "unpinned, and counted", func(st Stats, all ServerStats) bool {
		return unpinned(st, all) && all.Sent.Broken == 1 && len(all.Remote) == 0 && len(st.Readers) == 0
	})
}

// TestRefusedThatStay: only so many are told why they are refused at a time, and all are counted.
func TestRefusedThatStay(t *testing.T) {
	const all, most = 90, 64
	d := listenWeights(t, "tcp", ServerConfig{WriteTimeout: time.Minute}, StoreConfig{})
	told := 0
	for range all {
		conn := must(net.Dial(d.network, d.address))(t)
		defer conn.Close()
		err := wire.Greet(conn, conn, &wire.Hello{Role: wire.RoleSubscribe, Table: "other"}, nil, new(wire.AcceptedSubscribe))
		if refusal := (*wire.Refusal)(nil); errors.As(err, &refusal) {
			told++
		} else {
			<-d.ends
		}
	}
	if st := d.server.Stats(); told != most || st.Refused[wire.CodeUnknownTable] != all {
		t.Errorf("%d of %d were told; %v", told, all, st.Refused)
	}
}
