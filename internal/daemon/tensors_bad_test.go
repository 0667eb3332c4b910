package daemon

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/ingestd/ingestd/internal/devcert"
	"github.com/ingestd/ingestd/internal/quicconn"
	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

// TestKindsAndRoles: every role that does not fit its table's kind is refused, with the tables that have it; so is a producer of tensors that leaves out who it
// is or what it sends.
func TestKindsAndRoles(t *testing.T) {
	r := start(t, tensorsConfig(t))
	m := testManifest(t)
	samples := mustSpec(t, testSpec)
	id := fmt.Sprintf("%016x", m.ID())
	for name, test := range map[string]struct {
		hello wire.Hello
		code  wire.Code
		words string
	}{
		"push to weights":       {wire.Hello{Role: wire.RolePush, Table: "model", Spec: samples}, wire.CodeWrongKind, "use one of kind samples: a, grads"},
		"train on weights":      {wire.Hello{Role: wire.RoleTrain, Table: "model"}, wire.CodeWrongKind, `does not have the role "train"`},
		"fill weights":          {wire.Hello{Role: wire.RoleFill, Table: "model"}, wire.CodeWrongKind, "of kind weights"},
		"observe weights":       {wire.Hello{Role: wire.RoleObserve, Table: "model"}, wire.CodeWrongKind, "of kind weights"},
		"publish samples":       {wire.Hello{Role: wire.RolePublish, Table: "a", Manifest: m.JSON()}, wire.CodeWrongKind, "use one of kind weights: model"},
		"publish tensors":       {wire.Hello{Role: wire.RolePublish, Table: "grads", Manifest: m.JSON()}, wire.CodeWrongKind, "use one of kind weights: model"},
		"subscribe to tensors":  {wire.Hello{Role: wire.RoleSubscribe, Table: "grads"}, wire.CodeWrongKind, "use one of kind weights: model"},
		"manifest of samples":   {wire.Hello{Role: wire.RoleManifest, Table: "a", ManifestID: id}, wire.CodeWrongKind, "use one of kind tensors: grads"},
		"manifest of weights":   {wire.Hello{Role: wire.RoleManifest, Table: "model", ManifestID: id}, wire.CodeWrongKind, "use one of kind tensors: grads"},
		"tensors to samples":    {wire.Hello{Role: wire.RolePush, Table: "a", Manifest: m.JSON(), Session: "w"}, wire.CodeWrongKind, "takes no manifest"},
		"tensors into samples":  {wire.Hello{Role: wire.RoleFill, Table: "a", Manifest: m.JSON(), Session: "w"}, wire.CodeWrongKind, "takes no manifest"},
		"no manifest":           {wire.Hello{Role: wire.RolePush, Table: "grads", Spec: samples, Session: "w"}, wire.CodeBadHandshake, `"manifest"`},
		"no manifest in place":  {wire.Hello{Role: wire.RoleFill, Table: "grads", Session: "w"}, wire.CodeBadHandshake, `"manifest"`},
		"no session":            {wire.Hello{Role: wire.RolePush, Table: "grads", Manifest: m.JSON()}, wire.CodeBadHandshake, `"session"`},
		"no session in place":   {wire.Hello{Role: wire.RoleFill, Table: "grads", Manifest: m.JSON()}, wire.CodeBadHandshake, `"session"`},
		"no such table":         {wire.Hello{Role: wire.RoleManifest, Table: "none", ManifestID: id}, wire.CodeUnknownTable, "model"},
		"unknown manifest":      {wire.Hello{Role: wire.RoleManifest, Table: "grads", ManifestID: id}, wire.CodeUnknownManifest, id},
		"unknown session":       {wire.Hello{Role: wire.RoleManifest, Table: "grads", SessionOf: 99}, wire.CodeUnknownSession, "stream 99"},
		"session of samples":    {wire.Hello{Role: wire.RoleManifest, Table: "a", SessionOf: 1}, wire.CodeWrongKind, "use one of kind tensors: grads"},
		"malformed manifest":    {wire.Hello{Role: wire.RolePush, Table: "grads", Session: "w", Manifest: []byte(`{"tensors":[]}`)}, wire.CodeBadOption, "manifest"},
		"malformed in place":    {wire.Hello{Role: wire.RoleFill, Table: "grads", Session: "w", Manifest: []byte(`{"tensors":7}`)}, wire.CodeBadOption, "manifest"},
		"spec of other samples": {wire.Hello{Role: wire.RolePush, Table: "grads", Session: "w", Manifest: m.JSON(), Spec: samples}, wire.CodeSpecMismatch, "spec"},
		"too large manifest": {wire.Hello{Role: wire.RolePush, Table: "grads", Session: "w", Manifest: []byte(
			`{"tensors":[{"name":"w","dtype":"U8","shape":[1099511627776]},{"name":"b","dtype":"U8","shape":[1]}]}`)}, wire.CodeBadOption, "manifest"},
		"too long manifest": {wire.Hello{Role: wire.RolePush, Table: "grads", Session: "w", Manifest: []byte(
			`{"tensors":[{"name":"w","dtype":"U8","shape":[]}],"metadata":{"x":"` + strings.Repeat("y", 2_000_000) + `"}}`)}, wire.CodeBadOption, "manifest"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, addr := range []string{r.addr.TCP, r.addr.Unix} {
				if role := test.hello.Role; addr == r.addr.TCP && (role == wire.RoleFill && test.code != wire.CodeWrongKind && test.code != wire.CodeBadHandshake) {
					continue // not over TCP
				}
				refusal := greet(t, r.dial(t, addr), &test.hello, new(wire.AcceptedObserve))
				if refusal == nil || refusal.Code != test.code || !strings.Contains(refusal.Reason, test.words) {
					t.Errorf("%s: %v, want %s with %q", addr, refusal, test.code, test.words)
				}
			}
		})
	}
}

// TestManifestMismatch: as long as producers with one manifest are connected, another is refused with the difference, pushed or in place.
func TestManifestMismatch(t *testing.T) {
	r := start(t, tensorsConfig(t))
	w := r.work(t, r.addr.TCP, "w0", testManifest(t))
	another, err := tensor.NewManifest([]tensor.Tensor{{Name: "w", DType: spec.BF16, Shape: []int64{8}}, {Name: "b", DType: spec.F32, Shape: []int64{16}}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, role := range []wire.Role{wire.RolePush, wire.RoleFill} {
		hello := wire.Hello{Role: role, Table: "grads", Session: "w1", Manifest: another.JSON()}
		refusal := greet(t, r.dial(t, r.addr.Unix), &hello, new(wire.AcceptedObserve))
		if refusal == nil || refusal.Code != wire.CodeManifestMismatch || !strings.Contains(refusal.Reason, `producer "w0"`) || len(refusal.Diff) != 1 || refusal.Diff[0].Leaf != "w" {
			t.Errorf("%s: %+v", role, refusal)
		}
	}
	// The producer itself may come back with another one, which ends its connection.
	again := r.work(t, r.addr.TCP, "w0", another)
	if end := w.hear(0); end.notice != wire.CodeSessionTaken {
		t.Errorf("the first connection ended with %+v", end)
	}
	again.leave()
	eventually(t, func() bool { // the daemon lets go of the stream once it is drained, after the producer has seen its end
		return greet(t, r.dial(t, r.addr.TCP), pushHello("w1", testManifest(t)), new(wire.AcceptedPush)) == nil
	})
}

// badChunks are the ways in which a producer's second chunk is wrong.
var badChunks = map[string]struct {
	spoil func(h *tensor.Header, raw []byte)
	words string
}{
	"magic":    {func(_ *tensor.Header, raw []byte) { raw[0]++ }, "magic"},
	"sum":      {func(_ *tensor.Header, raw []byte) { raw[60]++ }, "damaged"},
	"stream":   {func(h *tensor.Header, raw []byte) { h.Stream++; h.Put(raw) }, "stream"},
	"producer": {func(h *tensor.Header, raw []byte) { h.Producer++; h.Put(raw) }, "producer"},
	"manifest": {func(h *tensor.Header, raw []byte) { h.Manifest++; h.Put(raw) }, "manifest"},
	"place":    {func(h *tensor.Header, raw []byte) { h.Offset = 4 * testChunk; h.Put(raw) }, `tensor "w" at byte 262144`},
	"overlap":  {func(h *tensor.Header, raw []byte) { h.Offset = 256; h.Put(raw) }, `tensor "w" at byte 256`},
	"forged": {func(h *tensor.Header, raw []byte) {
		*h = tensor.Header{Flags: tensor.FlagOpened, Stream: h.Stream, Producer: h.Producer, Manifest: h.Manifest}
		h.Put(raw)
	}, "only the daemon"},
}

// TestBadChunksOverSockets: what came before a bad chunk is in the ring and acked, it and what follows is not, and its producer is told why.
func TestBadChunksOverSockets(t *testing.T) {
	for name, bad := range badChunks {
		t.Run(name, func(t *testing.T) {
			r := start(t, tensorsConfig(t))
			reader := r.reader(t)
			for _, addr := range []string{r.addr.TCP, r.addr.Unix} {
				w := r.work(t, addr, "w0", testManifest(t))
				all := w.step(1)
				h := w.header(1, 0, 0, testChunk, testChunk)
				bad.spoil(&h, all[1])
				w.send(all...)
				if end := w.hear(0); end.acks != 1 || end.notice != wire.CodeBadChunk || !strings.Contains(end.reason, bad.words) {
					t.Errorf("%s: %+v, want one ack and %q", addr, end, bad.words)
				}
				wantStory(t, reader.story(3, "w0"), "w0 opened", "w0 1@0", "w0 closed")
			}
			st := r.Status()
			if st.Producers.Ended["bad_chunk"] != 2 {
				t.Errorf("ended: %v", st.Producers.Ended)
			}
			total := uint64(0)
			for _, n := range tensorsOf(t, st).BadChunks {
				total += n
			}
			if total != 2 || tensorsOf(t, st).CutShort != 2 {
				t.Errorf("%+v", tensorsOf(t, st))
			}
		})
	}
}

func tensorsOf(t testing.TB, s Status) *TensorsStatus {
	t.Helper()
	for _, table := range s.Tables {
		if table.Name == "grads" {
			return table.Tensors
		}
	}
	t.Fatal("no table grads")
	return nil
}

// filling is a producer in place under test control.
type filling struct {
	*shm.FillAttachment
	worker
}

func (r *running) fill(t testing.TB, name string, m *tensor.Manifest) *filling {
	t.Helper()
	hello := wire.Hello{Table: "grads", Session: name, Manifest: m.JSON(), Notes: true, Prefetch: 4}
	a, err := shm.AttachFill(t.Context(), strings.TrimPrefix(r.addr.Unix, "unix://"), hello, func() {})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = errors.Join(a.Close(), a.Unmap()) })
	f := &filling{FillAttachment: a, worker: worker{t: t, name: name, m: m}}
	f.accepted.Stream = a.Accepted().Stream
	return f
}

// put writes a chunk into the next place and hands it over.
func (f *filling) put(chunk []byte) {
	f.t.Helper()
	if err := f.Wait(f.t.Context(), f.PlaceCame); err != nil {
		f.t.Fatal(err)
	}
	p, ok, err := f.TryPlace()
	if err != nil || !ok {
		f.t.Fatalf("no place: %v", err)
	}
	copy(f.Column(p.Place, 0), chunk[:tensor.HeaderBytes])
	copy(f.Column(p.Place, 1), chunk[tensor.HeaderBytes:])
	if err := f.Complete(p, 1); err != nil {
		f.t.Fatal(err)
	}
}

// TestBadChunksInPlace is TestBadChunksOverSockets for producers that write in place.
func TestBadChunksInPlace(t *testing.T) {
	for name, bad := range badChunks {
		t.Run(name, func(t *testing.T) {
			r := start(t, tensorsConfig(t))
			reader := r.reader(t)
			f := r.fill(t, "w0", testManifest(t))
			all := f.step(1)
			h := f.header(1, 0, 0, testChunk, testChunk)
			bad.spoil(&h, all[1])
			f.put(all[0])
			f.put(all[1])
			ended := func() bool { return f.Err() != nil }
			_ = f.Wait(t.Context(), ended)
			var notice *wire.Notice
			if err := f.Err(); !errors.As(err, &notice) || notice.Code != wire.CodeBadChunk || !strings.Contains(notice.Reason, bad.words) {
				t.Errorf("it ended with %v, want %q", err, bad.words)
			}
			wantStory(t, reader.story(3, "w0"), "w0 opened", "w0 1@0", "w0 closed")
		})
	}
}

// TestRefusedSteps: a producer that is too far behind is told so before the ack of the first chunk that is not used; the chunks are in the ring, marked.
func TestRefusedSteps(t *testing.T) {
	cfg := tensorsConfig(t)
	cfg.Tables[1].MaxLag = 3
	r := start(t, cfg)
	reader := r.reader(t)
	m := testManifest(t)
	ahead := r.work(t, r.addr.TCP, "ahead", m)
	ahead.send(ahead.step(10)[0])
	ahead.hear(1)
	reader.story(2, "ahead")
	for _, addr := range []string{r.addr.TCP, r.addr.Unix} {
		w := r.work(t, addr, "w0", m)
		w.send(w.step(7)...)
		if h := w.hear(3); len(h.notes) != 0 {
			t.Errorf("step 7: %v", h.notes)
		}
		w.send(append(w.step(6), w.step(8)...)...)
		if h := w.hear(6); len(h.notes) != 1 || h.notes[0] != "0: step_refused 6" {
			t.Errorf("step 6: %v", h.notes)
		}
		w.leave()
		wantStory(t, reader.story(11, "w0"), "w0 opened", "w0 7@0", "w0 7@65536", "w0 7@0", "w0 6@0 refused", "w0 6@65536 refused", "w0 6@0 refused", "w0 8@0",
			"w0 8@65536", "w0 8@0", "w0 closed")
	}
	f := r.fill(t, "w1", m)
	for _, c := range append(f.step(6), f.step(9)...) {
		f.put(c)
		taken := func() bool { _, all, err := f.Taken(); return all || err != nil }
		if err := f.Wait(t.Context(), taken); err != nil {
			t.Fatal(err)
		}
		if err := f.Heard(t.Context()); err != nil {
			t.Fatal(err)
		}
		if note := f.Refused(); note == nil || note.Code != wire.NoteStepRefused || note.Step != 6 {
			t.Errorf("the ack came before the note: %+v", note)
		}
	}
	wantStory(t, reader.story(7, "w1"), "w1 opened", "w1 6@0 refused", "w1 6@65536 refused", "w1 6@0 refused", "w1 9@0", "w1 9@65536", "w1 9@0")
	st := tensorsOf(t, r.Status())
	if st.Refused != 3 || st.Late != 9 || st.Completed != 5 || st.Newest != 10 || st.MaxLag != 3 {
		t.Errorf("%+v", st)
	}
	if len(st.Producers) != 2 || st.Producers[0].Name != "ahead" || st.Producers[0].State != "incomplete" || st.Producers[0].Bytes != testChunk ||
		st.Producers[1].State != "complete" || st.Producers[1].Of != 2*testChunk+64 {
		t.Errorf("%+v", st.Producers)
	}
}

// TestReconnect: a session that another connection takes goes on: what the first one sent lies before the announcements, and a step across both is complete.
func TestReconnect(t *testing.T) {
	r := start(t, tensorsConfig(t))
	reader := r.reader(t)
	m := testManifest(t)
	w := r.work(t, r.addr.TCP, "w0", m)
	all := w.step(3)
	w.send(all[:2]...)
	w.hear(2)
	again := r.work(t, r.addr.Unix, "w0", m)
	if end := w.hear(0); end.notice != wire.CodeSessionTaken {
		t.Errorf("%+v", end)
	}
	if again.accepted.Held != 2 || again.accepted.Stream != w.accepted.Stream {
		t.Errorf("%+v", again.accepted)
	}
	again.send(all[2])
	again.leave()
	wantStory(t, reader.story(7, "w0"), "w0 opened", "w0 3@0", "w0 3@65536", "w0 closed", "w0 opened", "w0 3@0", "w0 closed")
	if st := tensorsOf(t, r.Status()); st.Completed != 1 || st.CutShort != 1 {
		t.Errorf("%+v", st)
	}
}

// TestKeptTensors: the next daemon knows the manifests, says of the producers that do not come back that they are gone, and of one that does that it is there.
func TestKeptTensors(t *testing.T) {
	cfg := tensorsConfig(t)
	cfg.SegmentDir = t.TempDir()
	if err := os.Chmod(cfg.SegmentDir, 0o700); err != nil {
		t.Fatal(err)
	}
	m := testManifest(t)
	r := start(t, cfg)
	for _, name := range []string{"w0", "w1"} {
		w := r.work(t, r.addr.TCP, name, m)
		w.send(w.step(5)[:2]...)
		w.hear(2)
	}
	r.StopNow() // nobody is told, and nothing is drained
	_ = r.wait()
	r = start(t, cfg)
	var known wire.AcceptedManifest
	if refusal := greet(t, r.dial(t, r.addr.TCP), &wire.Hello{Role: wire.RoleManifest, Table: "grads", ManifestID: fmt.Sprintf("%016x", m.ID())}, &known); refusal != nil {
		t.Fatal(refusal)
	}
	last := map[string]string{}
	reader := r.reader(t)
	for len(last) < 2 || last["w0"] != "w0 closed" || last["w1"] != "w1 closed" {
		line := reader.story(1, "w0", "w1")[0]
		last[strings.Fields(line)[0]] = line
	}
	w := r.work(t, r.addr.TCP, "w0", m)
	if w.accepted.Held != 2 {
		t.Errorf("%d chunks are held", w.accepted.Held)
	}
	wantStory(t, reader.story(1, "w0"), "w0 opened")
}

// TestStopWithStepsThatReadersKeep: a reader that holds the chunks of a step that will never be complete does not keep the daemon from stopping, and nothing of
// it is called lost.
func TestStopWithStepsThatReadersKeep(t *testing.T) {
	r := start(t, tensorsConfig(t)) // whose drain timeout is a minute
	a, err := shm.Attach(t.Context(), strings.TrimPrefix(r.addr.Unix, "unix://"), wire.Hello{Table: "grads", Prefetch: 1 << 15})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if got := a.Accepted().Prefetch; got != 16 { // half of 32 places
		t.Errorf("a reader may hold %d chunks", got)
	}
	w := r.work(t, r.addr.TCP, "w0", testManifest(t))
	w.send(w.step(1)[:2]...)
	w.hear(2)
	for range 3 {
		if _, err := a.Next(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	r.stop()
	if end := w.hear(0); end.notice != wire.CodeShuttingDown {
		t.Errorf("%+v", end)
	}
	b, err := a.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if h, err := tensor.ParseHeader(b.Column(0)); err != nil || h.Flags != tensor.FlagClosed {
		t.Errorf("the last chunk is %+v, %v", h, err)
	}
	if err := r.wait(); err != nil {
		t.Errorf("stopped with %v", err)
	}
}

// TestUnreadChunksAreSaid: chunks with data that nobody was given are lost, announcements are not.
func TestUnreadChunksAreSaid(t *testing.T) {
	for _, chunks := range []int{0, 2} {
		r := start(t, tensorsConfig(t))
		w := r.work(t, r.addr.TCP, "w0", testManifest(t))
		w.send(w.step(1)[:chunks]...)
		w.leave()
		r.stop()
		var unread *UnreadError
		if err := r.wait(); chunks == 0 && err != nil || chunks > 0 && (!errors.As(err, &unread) || unread.Samples["grads"] != uint64(chunks)) {
			t.Errorf("%d chunks: %v", chunks, err)
		}
	}
}

// TestWeightsOverSockets: a publisher and a reader reach the store by TCP and by the unix socket.
func TestWeightsOverSockets(t *testing.T) {
	r := start(t, tensorsConfig(t))
	for _, addr := range []string{r.addr.TCP, r.addr.Unix} {
		var accepted wire.AcceptedPublish
		c := r.dial(t, addr)
		if refusal := greet(t, c, &wire.Hello{Role: wire.RolePublish, Table: "model", Manifest: testManifest(t).JSON(), Client: "test"}, &accepted); refusal != nil {
			t.Fatalf("%s: %v", addr, refusal)
		}
		if st := r.Status().Weights; len(st) != 1 || st[0].Name != "model" || st[0].Publisher == nil || !strings.Contains(st[0].Publisher.Who, "test") {
			t.Errorf("%+v", st)
		}
		second := &wire.Hello{Role: wire.RolePublish, Table: "model", Manifest: testManifest(t).JSON()}
		if refusal := greet(t, r.dial(t, addr), second, &accepted); refusal == nil || refusal.Code != wire.CodePublisherActive {
			t.Errorf("a second publisher: %v", refusal)
		}
		if refusal := greet(t, r.dial(t, addr), &wire.Hello{Role: wire.RoleSubscribe, Table: "model"}, new(wire.AcceptedSubscribe)); refusal == nil ||
			refusal.Code != wire.CodeNoGeneration {
			t.Errorf("a reader: %v", refusal)
		}
		end(t, c)
	}
}

// end closes a connection and waits until the daemon has.
func end(t testing.TB, c net.Conn) {
	t.Helper()
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	for b := make([]byte, 512); ; {
		if _, err := c.Read(b); err != nil {
			return
		}
	}
}

// TestNobodyPublishesInPlace where the configuration says so, which arrives over QUIC, too.
func TestNobodyPublishesInPlace(t *testing.T) {
	no := false
	for name, change := range map[string]func(*Config){
		"at all":        func(c *Config) { c.LocalProducers.Enabled = false },
		"to this table": func(c *Config) { c.Tables[2].LocalProducers = &no },
	} {
		cfg := tensorsConfig(t)
		change(&cfg)
		authority := listenQUIC(t, &cfg)
		r := start(t, cfg)
		hello := &wire.Hello{Role: wire.RolePublish, Table: "model", Manifest: testManifest(t).JSON(), InPlace: true}
		if refusal := greet(t, r.dial(t, r.addr.Unix), hello, new(wire.AcceptedPublish)); refusal == nil || refusal.Code != wire.CodeNotPermitted {
			t.Errorf("%s: %v", name, refusal)
		}
		for range 10 { // what is written and the end of the stream may race
			if refusal := greet(t, r.dialQUIC(t, authority), hello, new(wire.AcceptedPublish)); refusal == nil || refusal.Code != wire.CodeNotPermitted {
				t.Errorf("%s, over QUIC: %v", name, refusal)
			}
		}
	}
}

// listenQUIC adds a listener of QUIC, and returns the authority of its certificate.
func listenQUIC(t *testing.T, cfg *Config) *devcert.Authority {
	t.Helper()
	authority, err := devcert.NewAuthority("test", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := authority.NewServer([]string{"127.0.0.1"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if cfg.TLS.Cert, cfg.TLS.Key, err = pair.Write(t.TempDir(), "d"); err != nil {
		t.Fatal(err)
	}
	cfg.Listen = append(cfg.Listen, "quic://127.0.0.1:0")
	return authority
}

// dialQUIC opens a connection of QUIC and one stream of it.
func (r *running) dialQUIC(t *testing.T, authority *devcert.Authority) net.Conn {
	t.Helper()
	c, err := quic.DialAddr(t.Context(), strings.TrimPrefix(r.addr.QUIC, "quic://"), &tls.Config{
		RootCAs: authority.Pool(), ServerName: "127.0.0.1", NextProtos: []string{wire.ALPN}, MinVersion: tls.VersionTLS13,
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.CloseWithError(quicconn.CodeDone, "") })
	stream, err := c.OpenStreamSync(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return quicconn.New(c, stream)
}
