//go:build linux && !race

package e2e

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/wire"
)

// TestRefusedTrainers: who attaches to a table that is not there, or wants another spec, is told what there is.
func TestRefusedTrainers(t *testing.T) {
	t.Parallel()
	d := serve(t, []table{small})
	beside := d.pair(small.name, 2000)
	for name, tc := range map[string]struct {
		args  []string
		code  wire.Code
		words []string
	}{
		"missing table": {[]string{"--table", "smal"}, wire.CodeUnknownTable, []string{"smal", "this daemon has small"}},
		"wrong spec":    {[]string{"--table", small.name, "--spec", "image:F32[4,8],label:I32"}, wire.CodeSpecMismatch, []string{"image", "F32[4,8]", "F32[8,4]", small.spec}},
	} {
		t.Run(name, func(t *testing.T) {
			says(t, run(t, exitRefused, append([]string{"pull", "--addr", d.Unix}, tc.args...)...), append(tc.words, string(tc.code))...)
			if n := d.in(t).metric(fmt.Sprintf("ingestd_refused_total{reason=%q,transport=\"shm\"}", tc.code)); n != 1 {
				t.Errorf("counted %v times", n)
			}
		})
	}
	d.finish(nil, beside)
}

// TestTrainerKilled: a trainer dies by kill -9 with batches in its hands; another one gets them, every sample once.
func TestTrainerKilled(t *testing.T) {
	t.Parallel()
	d := serve(t, []table{small})
	victim := d.pull(small.name, "--prefetch", "4")
	d.await("it has attached", func(s *status) bool { return attached(s, victim) != nil })
	victim.stop() // so that it certainly reads and gives back nothing
	r := d.reader(small.name)
	push := d.push(small.name, endless, 5000)
	d.await("it holds all it may", func(s *status) bool { tr := attached(s, victim); return len(tr.Held) == tr.Prefetch })
	d.moves(small.name, 3*uint64(small.batches)) // round the ring, past what it holds
	victim.signal(syscall.SIGKILL)
	<-victim.done
	d.awaitMetric(`ingestd_trainers_ended_total{reason="died"}`, 1)
	if n := d.metric(`ingestd_table_batches_returned_total{table="small"}`); n != 4 {
		t.Errorf("%v batches came back, want 4", n)
	}
	d.logs("trainer died holding batches; they are offered to another")
	d.moves(small.name, uint64(small.batches))
	d.signal(syscall.SIGTERM)
	d.ends(exitOK)
	r.account(push)
}

// TestTrainerStopped: a trainer that is stopped keeps the batches it holds, and nothing else; /status names it; when it goes on, it has lost nothing.
func TestTrainerStopped(t *testing.T) {
	t.Parallel()
	d := serve(t, []table{small})
	sleeper := d.pull(small.name, "--prefetch", "4")
	d.await("it has attached", func(s *status) bool { return attached(s, sleeper) != nil })
	sleeper.stop()
	awake, push := d.pull(small.name), d.push(small.name, endless, 5000)
	d.await("/status says who waits for it", func(s *status) bool {
		for _, w := range s.Waits {
			if strings.Contains(w.For, fmt.Sprintf("pid %d", sleeper.pid())) && strings.Contains(w.For, "holds all it may") {
				return true
			}
		}
		return false
	})
	d.moves(small.name, 3*uint64(small.batches))
	sleeper.signal(syscall.SIGCONT)
	d.await("it reads on", func(s *status) bool { return attached(s, sleeper).GivenBack > 4 })
	d.signal(syscall.SIGTERM)
	d.ends(exitOK)
	push.ends(exitRefused)
	in, read := result[pushed](push), uint64(0)
	for _, p := range []*process{sleeper, awake} {
		p.ends(exitOK)
		out := result[pulled](p)
		read += out.Samples
		if !out.Ended || out.Wrong+out.Disorder > 0 {
			t.Errorf("%+v", out)
		}
	}
	if read < in.Acked || read > in.Sent {
		t.Errorf("sent %d, acked %d, read %d", in.Sent, in.Acked, read)
	}
}

// intruder is a trainer written from docs/segment-format.md, that does to its channel what it likes.
type intruder struct {
	t    *testing.T
	conn *net.UnixConn
	wire.AcceptedTrain
	channel []byte
	bell    int // the eventfd that wakes the daemon
}

func (d *server) intrude(name string) *intruder {
	d.t.Helper()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: strings.TrimPrefix(d.Unix, "unix://")})
	check(d.t, err)
	in := &intruder{t: d.t, conn: conn}
	d.t.Cleanup(func() { _ = conn.Close() })
	check(d.t, conn.SetDeadline(time.Now().Add(patience)))
	check(d.t, wire.WriteHello(conn, &wire.Hello{Role: wire.RoleTrain, Table: name, Prefetch: 4, Client: "intruder"}))
	var first [1]byte
	oob := make([]byte, unix.CmsgSpace(4*4))
	_, n, _, _, err := conn.ReadMsgUnix(first[:], oob)
	check(d.t, err)
	check(d.t, wire.ReadReply(io.MultiReader(strings.NewReader(string(first[:])), conn), &in.AcceptedTrain))
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	check(d.t, err)
	fds, err := unix.ParseUnixRights(&messages[0])
	check(d.t, err)
	in.channel, err = unix.Mmap(fds[1], 0, int(in.ChannelBytes), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	check(d.t, err)
	in.bell = fds[3]
	d.t.Cleanup(func() {
		_ = unix.Munmap(in.channel)
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	})
	return in
}

// put stores a word of the channel.
func (in *intruder) put(at, v uint64) { binary.LittleEndian.PutUint64(in.channel[at:], v) }

func (in *intruder) word(at uint64) uint64 { return binary.LittleEndian.Uint64(in.channel[at:]) }

// The channel's words: docs/segment-format.md, "Channel".
func (in *intruder) deliver() uint64  { return in.word(16) }
func (in *intruder) giveback() uint64 { return in.word(24) }

// ring wakes the daemon.
func (in *intruder) ring() {
	in.t.Helper()
	_, err := unix.Write(in.bell, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	check(in.t, err)
}

// give puts a descriptor into the giveback queue.
func (in *intruder) give(a, b uint64) {
	in.t.Helper()
	q := in.giveback()
	in.put(q+256, a)
	in.put(q+264, b)
	in.put(q, 1)
	in.ring()
}

// TestJunkDescriptors: a trainer that breaks the rules of its channel is told which, and cut off; what it held goes to another, whole.
func TestJunkDescriptors(t *testing.T) {
	t.Parallel()
	d := serve(t, []table{small})
	r := d.reader(small.name)
	push := d.push(small.name, endless, 5000)
	d.moves(small.name, 2) // so that nobody holds batch 0 any more, which a queue of zeros would name
	cut := float64(0)
	for name, tc := range map[string]struct {
		junk func(*intruder)
		says string
	}{
		"a batch that never was":  {func(in *intruder) { in.give(1<<40, 0) }, "no batch that this trainer holds"},
		"a place far off":         {func(in *intruder) { in.give(in.word(in.deliver()+256), 1<<31) }, "no batch that this trainer holds"},
		"produced far ahead":      {func(in *intruder) { in.put(in.giveback(), 1<<60); in.ring() }, "giveback queue"},
		"a word on the socket":    {func(in *intruder) { _, _ = in.conn.Write([]byte("hello?")) }, "sends nothing after its hello"},
		"a random word, at first": {func(in *intruder) { in.put(in.giveback(), rand.Uint64()|1<<63); in.ring() }, "giveback queue"},
	} {
		t.Run(name, func(t *testing.T) {
			in := d.in(t).intrude(small.name)
			d.in(t).await("it was lent batches", func(s *status) bool {
				for _, tr := range s.Trainers {
					if tr.ID == in.Trainer {
						return len(tr.Held) == tr.Prefetch
					}
				}
				return false
			})
			tc.junk(in)
			var mark [1]byte
			_, err := io.ReadFull(in.conn, mark[:])
			check(t, err)
			notice, err := wire.ReadNotice(in.conn)
			check(t, err)
			if mark[0] != wire.NoticeMark || notice.Code != wire.CodeBadPeer {
				t.Errorf("got byte %#x and %v", mark[0], notice)
			}
			says(t, notice.Reason, tc.says)
			cut++
			d.in(t).awaitMetric(`ingestd_trainers_ended_total{reason="bad_peer"}`, cut)
		})
	}
	t.Run("scribbles over all of it, and dies", func(t *testing.T) {
		seed := rand.Uint64()
		defer func() {
			if t.Failed() {
				t.Logf("seed %d", seed)
			}
		}()
		rnd := rand.New(rand.NewPCG(seed, 0))
		for range 20 {
			in := d.in(t).intrude(small.name)
			for range 200 {
				in.put(uint64(rnd.IntN(len(in.channel)/8))*8, rnd.Uint64()>>rnd.IntN(64))
				in.ring()
			}
			check(t, in.conn.Close())
		}
		d.in(t).await("all are gone", func(s *status) bool { return len(s.Trainers) == 1 })
	})
	d.moves(small.name, uint64(small.batches))
	d.signal(syscall.SIGTERM)
	d.ends(exitOK)
	r.account(push)
}

// TestTrainerGroups: every group gets every sample. In one of them a trainer is killed; in the other nobody notices.
func TestTrainerGroups(t *testing.T) {
	t.Parallel()
	const samples = 20000
	d := serve(t, []table{small})
	calm := d.pull(small.name, "--group", "calm", "--gapless")
	d.await("it has attached", func(s *status) bool { return attached(s, calm) != nil })
	victim := d.pull(small.name, "--prefetch", "4")
	heir := start(t, "pull", "--addr", d.Unix, "--table", small.name, "--json") // not --verify: what the victim held comes out of order
	d.await("they have attached", func(s *status) bool { return attached(s, victim) != nil && attached(s, heir) != nil })
	victim.stop()
	push := d.push(small.name, samples, 0)
	d.await("it holds all it may", func(s *status) bool { tr := attached(s, victim); return len(tr.Held) == tr.Prefetch })
	victim.signal(syscall.SIGKILL)
	<-victim.done
	d.awaitMetric(`ingestd_trainers_ended_total{reason="died"}`, 1)
	push.ends(exitOK)
	d.signal(syscall.SIGTERM)
	d.ends(exitOK)
	for _, p := range []*process{calm, heir} {
		p.ends(exitOK)
		if out := result[pulled](p); out.Samples != samples || out.Wrong > 0 || !out.Ended {
			t.Errorf("%v: %+v", p.args, out)
		}
	}
}
