//go:build linux && !race

package shm

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/spsc"
	"github.com/ingestd/ingestd/wire"
)

func TestReadToTheEnd(t *testing.T) {
	watchLeaks(t)
	d := startDaemon(t, 4, ServerConfig{})
	a := d.attach(0)
	if got := a.Accepted(); got.Table != testTable || got.Spec.Text() != testSpec || got.BatchSize != testBatchSize || got.Batches != 4 || got.Prefetch != 2 {
		t.Errorf("accepted: %+v", got)
	}
	const batches = 50
	published := make(chan error)
	go func() {
		err := d.publish(t.Context(), batches)
		d.ring.Close()
		published <- err
	}()
	for i := range uint64(batches) {
		a.Release(take(t, a, i))
	}
	for range 2 {
		if _, err := a.Next(t.Context()); err != io.EOF {
			t.Fatalf("after the last batch: %v, want io.EOF", err)
		}
	}
	check(t, <-published)
	check(t, a.Close())
	if err := <-d.served; err != nil {
		t.Errorf("Serve: %v, want nil", err)
	}
	if st := d.server.Stats(); st.Delivered != batches || st.GivenBack != batches || st.Returned != 0 || st.Detached != 1 || st.Attached != 1 {
		t.Errorf("stats: %+v", st)
	}
	if _, err := a.Next(t.Context()); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Next after Close: %v", err)
	}
}

func TestDeadlineAndCancel(t *testing.T) {
	watchLeaks(t)
	d := startDaemon(t, 4, ServerConfig{})
	a := d.attach(1)
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := a.Next(ctx); !errors.Is(err, os.ErrDeadlineExceeded) || !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("past the deadline: %v", err)
	}
	if _, err := a.Next(ctx); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("with a deadline that was past before: %v", err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	got := make(chan error)
	go func() { _, err := a.Next(ctx); got <- err }()
	d.eventually("the trainer sleeps", func(s Stats) bool { return s.Trainers[0].Sleeping })
	cancel()
	if err := <-got; !errors.Is(err, context.Canceled) {
		t.Fatalf("cancelled: %v", err)
	}
	check(t, d.publish(t.Context(), 1)) // and the attachment is as good as before
	a.Release(take(t, a, 0))
	go func() { _, err := a.Next(t.Context()); got <- err }()
	d.eventually("the trainer sleeps", func(s Stats) bool { return s.Trainers[0].Sleeping })
	check(t, a.Close())
	if err := <-got; !errors.Is(err, os.ErrClosed) {
		t.Fatalf("closed meanwhile: %v", err)
	}
}

func TestRefusals(t *testing.T) {
	watchLeaks(t)
	d := startDaemon(t, 3, ServerConfig{TrainersMax: 2})
	other, err := spec.ParseText("x:F64[8,8],y:I32")
	check(t, err)
	attach := func(h wire.Hello) error {
		a, err := Attach(t.Context(), d.path, h)
		if err == nil {
			t.Cleanup(func() { a.Close() })
		}
		return err
	}
	for _, test := range []struct {
		what  string
		hello wire.Hello
		code  wire.Code
		says  string
	}{
		{"no such table", wire.Hello{Table: "nobody's"}, wire.CodeUnknownTable, "this daemon has numbers, private"},
		{"a table that cannot be mapped", wire.Hello{Table: "private"}, wire.CodeWrongRole, "cannot be mapped"},
		{"another spec", wire.Hello{Table: testTable, Spec: other}, wire.CodeSpecMismatch, "x"},
		{"the right spec", wire.Hello{Table: testTable, Spec: d.spec}, "", ""},
		{"the right fingerprint", wire.Hello{Table: testTable, Fingerprint: d.spec.Fingerprint()}, "", ""},
		{"one too many", wire.Hello{Table: testTable}, wire.CodeTooManyConnections, "this daemon's limit"},
	} {
		err := attach(test.hello)
		var refusal *wire.Refusal
		if test.code == "" {
			check(t, err)
		} else if !errors.As(err, &refusal) || refusal.Code != test.code || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: %v, want %s with %q", test.what, err, test.code, test.says)
		}
		if test.code == wire.CodeSpecMismatch && (len(refusal.Diff) != 1 || refusal.Diff[0].Leaf != "x" || refusal.Spec == nil) {
			t.Errorf("the difference: %+v", refusal)
		}
	}
	if got := d.server.Stats().Refused; got[wire.CodeUnknownTable] != 1 || got[wire.CodeTooManyConnections] != 1 || len(got) != 4 {
		t.Errorf("refusals counted: %v", got)
	}
	if _, err := Attach(t.Context(), d.path+"?", wire.Hello{Table: testTable}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no socket: %v", err)
	}
	if err := attach(wire.Hello{Table: ""}); err == nil {
		t.Error("a hello without a table was sent")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Attach(ctx, d.path, wire.Hello{Table: testTable}); !errors.Is(err, context.Canceled) {
		t.Errorf("with an ended context: %v", err)
	}
}

// The trainers of a table together leave one place to be filled, whatever they ask for.
func TestPrefetchIsShared(t *testing.T) {
	d := startDaemon(t, 8, ServerConfig{Prefetch: 3})
	var got []int64
	for _, want := range []int64{1000, 0, 1} {
		got = append(got, d.attach(want).Accepted().Prefetch)
	}
	if want := []int64{4, 2, 1}; !reflect.DeepEqual(got, want) {
		t.Errorf("granted %v, want %v", got, want)
	}
	_, err := Attach(t.Context(), d.path, wire.Hello{Table: testTable})
	var refusal *wire.Refusal
	if !errors.As(err, &refusal) || refusal.Code != wire.CodeTooManyConnections || !strings.Contains(refusal.Reason, "give the table more batches") {
		t.Errorf("one more: %v", err)
	}
	// Nobody releases anything, and writers still have a place.
	check(t, d.publish(t.Context(), 7))
	d.eventually("all are at their limit", func(s Stats) bool { return s.Delivered == 7 })
	if run, ok := d.ring.TryReserve(1); !ok {
		t.Error("the trainers hold every place of the ring")
	} else {
		d.ring.Abandon(run)
	}
	for _, s := range d.server.Stats().Trainers {
		if len(s.Held) != s.Prefetch || s.Client == "" && s.Prefetch != 4 || s.PID != os.Getpid() || s.Held[0].Since.IsZero() {
			t.Errorf("trainer: %+v", s)
		}
	}
	d.eventually("all say so", func(s Stats) bool {
		return s.Trainers[0].State == StateAtLimit && s.Trainers[1].State == StateAtLimit && s.Trainers[2].State == StateAtLimit
	})
}

func TestDeathGivesBatchesToAnother(t *testing.T) {
	watchLeaks(t)
	d := startDaemon(t, 8, ServerConfig{})
	first := d.attach(3)
	check(t, d.publish(t.Context(), 4))
	held, read := take(t, first, 0), take(t, first, 1)
	first.Release(read)
	d.eventually("0, 2 and 3 are out", func(s Stats) bool { return s.Delivered == 4 && s.GivenBack == 1 })
	check(t, first.conn.CloseWrite()) // to the daemon that is its end
	if err := <-d.served; err != nil {
		t.Fatal(err)
	}
	if st := d.server.Stats(); st.Died != 1 || st.Returned != 3 {
		t.Errorf("stats: %+v", st)
	}
	second := d.attach(3)
	for _, want := range []uint64{0, 2, 3} {
		second.Release(take(t, second, want))
	}
	check(t, first.Close())
	if len(held.Column(0)) == 0 {
		t.Error("the memory of a held batch is gone before its release")
	}
	first.Release(held)
}

// What was given back before the end is not offered again, even if the daemon had not looked yet.
func TestReleaseBeforeDeathCounts(t *testing.T) {
	d := startDaemon(t, 4, ServerConfig{})
	check(t, d.publish(t.Context(), 1))
	a := d.attach(1)
	b := take(t, a, 0)
	if n, err := a.giveback.TryPush([]spsc.Desc{{A: b.Number, B: uint64(b.Index)}}); n != 1 || err != nil { // no bell
		t.Fatal(n, err)
	}
	check(t, a.conn.CloseWrite())
	check(t, <-d.served)
	if st := d.server.Stats(); st.GivenBack != 1 || st.Returned != 0 || st.Detached != 1 {
		t.Errorf("stats: %+v", st)
	}
}

func TestShutdownCutsOff(t *testing.T) {
	watchLeaks(t)
	d := startDaemon(t, 4, ServerConfig{})
	a := d.attach(2)
	check(t, d.publish(t.Context(), 1))
	a.Release(take(t, a, 0))
	d.stop()
	_, err := a.Next(t.Context())
	var notice *wire.Notice
	if !errors.As(err, &notice) || notice.Code != wire.CodeShuttingDown {
		t.Fatalf("cut off: %v", err)
	}
	if err := a.Err(); !errors.As(err, &notice) {
		t.Errorf("Err: %v", err)
	}
	if err := <-d.served; !errors.As(err, &notice) || d.server.Stats().CutOff != 1 {
		t.Errorf("Serve: %v, stats %+v", err, d.server.Stats())
	}
}

func TestDaemonDies(t *testing.T) {
	watchLeaks(t)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: t.TempDir() + "/socket"})
	check(t, err)
	defer l.Close()
	var serving sync.WaitGroup
	defer serving.Wait()
	answer := func(f func(*net.UnixConn)) {
		serving.Go(func() {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			defer conn.Close()
			if _, err := wire.ReadHello(conn); err == nil {
				f(conn)
			}
		})
	}
	s, err := spec.ParseText(testSpec)
	check(t, err)
	accepted, err := wire.AppendAccepted(nil, &wire.AcceptedTrain{
		Table: testTable, Spec: s, Fingerprint: s.Fingerprint(), Trainer: 1, BatchSize: 4, Batches: 2, SegmentBytes: 4096, ChannelBytes: 704, Prefetch: 1,
	})
	check(t, err)
	sealed := newMemory(t, MemoryConfig{Size: 8192})
	for what, test := range map[string]struct {
		do   func(*net.UnixConn)
		want string
	}{
		"hangs up":               {func(*net.UnixConn) {}, "attach to table"},
		"half a reply":           {func(c *net.UnixConn) { _, _ = c.Write(accepted[:30]) }, "attach to table"},
		"no descriptors":         {func(c *net.UnixConn) { _, _ = c.Write(accepted) }, "0 descriptors came with the reply, want 4"},
		"too few":                {func(c *net.UnixConn) { _ = sendWithDescriptors(c, accepted, 1, 2) }, "2 descriptors came"},
		"far too many":           {func(c *net.UnixConn) { _ = sendWithDescriptors(c, accepted, make([]int, 40)...) }, "descriptors"},
		"a segment that is none": {func(c *net.UnixConn) { _ = sendWithDescriptors(c, accepted, sealed.fd, sealed.fd, 1, 2) }, "not with the magic"},
	} {
		answer(test.do)
		_, err := Attach(t.Context(), l.Addr().String(), wire.Hello{Table: testTable})
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", what, err, test.want)
		}
	}

	d := startDaemon(t, 4, ServerConfig{})
	a := d.attach(1)
	d.server.mu.Lock()
	conn := d.server.trainers[1].(*trainer).conn
	d.server.mu.Unlock()
	check(t, conn.CloseWrite()) // what the trainer sees when the process is gone
	_, err = a.Next(t.Context())
	var gone *PeerGoneError
	if !errors.As(err, &gone) || errors.Is(err, io.EOF) || !strings.Contains(err.Error(), "attach anew") {
		t.Errorf("a dead daemon: %v, want a *PeerGoneError that is not io.EOF", err)
	}
}

func TestObserve(t *testing.T) {
	watchLeaks(t)
	d := startDaemon(t, 4, ServerConfig{})
	check(t, d.publish(t.Context(), 2))
	o, err := Observe(t.Context(), d.path, wire.Hello{Table: testTable})
	check(t, err)
	if v := o.View(); v.Published() != 2 || v.Leased() != 0 || o.Accepted().Batches != 4 {
		t.Errorf("observed %d published, %d leased", v.Published(), v.Leased())
	}
	check(t, o.Close())
	check(t, <-d.served)
	if _, err := Observe(t.Context(), d.path, wire.Hello{Table: "?"}); err == nil {
		t.Error("a table that is not there was observed")
	}
	if d.server.Stats().Observed != 1 {
		t.Error("the observer was not counted")
	}
}

func TestReleasePanicsOnMisuse(t *testing.T) {
	d := startDaemon(t, 4, ServerConfig{})
	check(t, d.publish(t.Context(), 2))
	a := d.attach(2)
	b := take(t, a, 0)
	a.Release(b)
	for what, b := range map[string]ring.Batch{"twice": b, "never held": {Number: 1}, "no such place": {Index: 99}} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("releasing a batch %s did not panic", what)
				}
			}()
			a.Release(b)
		}()
	}
}

func TestNoAllocationPerBatch(t *testing.T) {
	d := startDaemon(t, 4, ServerConfig{})
	a := d.attach(2)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if n := testing.AllocsPerRun(500, func() { // counts the daemon's side too: it is in this process
		if run, ok := d.ring.TryReserve(testBatchSize); ok {
			d.ring.Commit(run, 1, 0, 1, ring.Mark{})
		}
		b, err := a.Next(ctx)
		check(t, err)
		a.Release(b)
	}); n != 0 {
		t.Errorf("%v allocations per batch, want 0", n)
	}
}

func TestServerConfig(t *testing.T) {
	d := &daemon{}
	for what, cfg := range map[string]ServerConfig{
		"no tables":            {},
		"prefetch too large":   {Tables: d, Prefetch: 65},
		"prefetch negative":    {Tables: d, Prefetch: -1},
		"prefetch max":         {Tables: d, PrefetchMax: prefetchLimit + 1},
		"trainers negative":    {Tables: d, TrainersMax: -1},
		"write timeout":        {Tables: d, WriteTimeout: -1},
		"prefetch above limit": {Tables: d, Prefetch: 4, PrefetchMax: 3},
		"prefetch max too low": {Tables: d, PrefetchMax: -3},
	} {
		if _, err := NewServer(cfg); err == nil {
			t.Errorf("%s: was taken", what)
		}
	}
	got := reflect.ValueOf(ServerConfig{Tables: d}.withDefaults())
	for i := range got.NumField() {
		if name := got.Type().Field(i).Name; name != "Prefetch" && got.Field(i).IsZero() { // that of Prefetch depends on the table
			t.Errorf("%s has no default", got.Type().Field(i).Name)
		}
	}
	full := ServerConfig{Tables: d, Prefetch: 9, PrefetchMax: 10, TrainersMax: 11, WriteTimeout: 12, Fill: FillConfig{Prefetch: 1, FillersMax: 2, SettleAfter: 3}, Log: got.Interface().(ServerConfig).Log}
	if again := full.withDefaults(); !reflect.DeepEqual(again, full) {
		t.Errorf("defaulting changed what was set: %+v", again)
	}
}

// TestRefusedThatStay: only so many are told why they are refused at a time; the others are closed without a word, and counted like them.
func TestRefusedThatStay(t *testing.T) {
	const all, most = 90, 64
	d := startDaemon(t, 4, ServerConfig{WriteTimeout: time.Hour})
	told := 0
	for range all {
		conn, err := net.Dial("unix", d.path)
		check(t, err)
		defer conn.Close()
		err = wire.Greet(conn, conn, &wire.Hello{Role: wire.RoleTrain, Table: "no such"}, nil, new(wire.AcceptedTrain))
		if refusal := (*wire.Refusal)(nil); errors.As(err, &refusal) && refusal.Code == wire.CodeUnknownTable {
			told++
		} else {
			<-d.served // it is gone
		}
	}
	if st := d.server.Stats(); told != most || st.Refused[wire.CodeUnknownTable] != all {
		t.Errorf("%d of %d were told; %v", told, all, st.Refused)
	}
}
