//go:build linux && !race

package cheader

import (
	"encoding/binary"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/wire"
)

func fakeOptions(path string) options { return options{path: path, table: testTable} }

// TestLostBatches: a loss is told once, with name and number, and the stream goes on.
func TestLostBatches(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		path := serveFake(t, nil, func(f *fake) {
			f.publish(fakeBatchSize)
			f.push(1, 17)
			f.publish(3)
			for want := range uint64(2) {
				if d, ok := f.take(); !ok || d.A != want || d.B>>32 != 0 {
					f.t.Errorf("given back: %v, %v", d, ok)
				}
			}
			f.deliver.Close()
			f.ringPeer()
			f.awaitEnd()
		})
		p := start(t, b)
		p.ok("%s", fakeOptions(path).attach())
		if got := p.ok("next %d", patience); !strings.HasPrefix(got, "0 ") || !strings.HasSuffix(got, " 8") {
			t.Errorf("batch %s", got)
		}
		p.fails("lost", "lost=1+17|lost 17 batches, from number 1 on", "next %d", patience)
		if got := p.ok("next %d", patience); !strings.HasPrefix(got, "1 ") || !strings.HasSuffix(got, " 3") {
			t.Errorf("batch %s", got)
		}
		p.ok("release 0")
		p.ok("release 1")
		p.fails("end", "", "next %d", patience)
		p.fails("end", "", "next 0")
		p.ok("detach")
	})
}

func TestNotices(t *testing.T) {
	notice := func(code wire.Code, reason string) []byte {
		return wire.AppendNotice(nil, &wire.Notice{Code: code, Reason: reason})
	}
	long := notice(wire.CodeInternal, "x")
	binary.LittleEndian.PutUint32(long[1:], wire.NoticeBytesMax+1)
	for what, test := range map[string]struct {
		say         []byte
		code, words string
	}{
		"stopping":               {notice(wire.CodeShuttingDown, "come back later"), "shutting_down", "daemon=shutting_down|come back later"},
		"a bad peer":             {notice(wire.CodeBadPeer, "you gave back what you did not have"), "cut_off", "daemon=bad_peer|you gave back what you did not have"},
		"a reason with escapes":  {notice(wire.CodeInternal, "a\"b\\c\x1b[31m\u2028é😀"), "cut_off", "a\"b\\c?[31m\u2028é😀"},
		"a reason of 8 KiB":      {notice(wire.CodeInternal, strings.Repeat("é", 4096)), "cut_off", strings.Repeat("é", 2000)},
		"nothing at all":         {nil, "peer_closed", "gone without having ended the stream: start it again"},
		"half a notice":          {notice(wire.CodeInternal, "x")[:9], "peer_closed", "its notice was cut short"},
		"the mark alone":         {[]byte{wire.NoticeMark}, "peer_closed", "its notice was cut short"},
		"a notice that is none":  {[]byte("\x00\x02\x00\x00\x00[]"), "bad_reply", "no object"},
		"a notice without code":  {[]byte("\x00\x02\x00\x00\x00{}"), "bad_reply", "no code"},
		"a notice of one byte":   {[]byte("\x00\x01\x00\x00\x00{"), "bad_reply", "too long or too short"},
		"a notice that is long":  {long, "bad_reply", "too long or too short"},
		"a note":                 {wire.AppendNote(nil, &wire.Note{Code: wire.NoteRingFull, Reason: "x"}), "bad_reply", "where only a notice may come"},
		"an ack":                 {[]byte{wire.Ack}, "bad_reply", "where only a notice may come"},
		"a notice with a number": {[]byte("\x00\x0c\x00\x00\x00{\"code\":1234}"), "bad_reply", "a string is missing"},
	} {
		t.Run(what, func(t *testing.T) {
			each(t, func(t *testing.T, b built) {
				delivered := make(chan struct{})
				path := serveFake(t, nil, func(f *fake) {
					f.publish(fakeBatchSize)
					<-delivered
					f.say(test.say)
					check(f.t, f.conn.CloseWrite())
					f.awaitEnd()
				})
				p := start(t, b)
				before := p.fds()
				p.ok("%s", fakeOptions(path).attach())
				p.ok("next %d", patience)
				close(delivered)
				p.fails(test.code, test.words, "next %d", patience)
				p.fails(test.code, test.words, "next 0")
				p.fails(test.code, test.words, "release 0") // it was taken back before
				p.ok("detach")
				if after := p.fds(); after != before {
					t.Errorf("%d descriptors are open after detaching, %d before attaching", after, before)
				}
			})
		})
	}
}

// TestNoticeInPieces: bytes that come one by one are put together.
func TestNoticeInPieces(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		path := serveFake(t, nil, func(f *fake) {
			for _, c := range wire.AppendNotice(nil, &wire.Notice{Code: wire.CodeSessionTaken, Reason: "piece by piece"}) {
				f.say([]byte{c})
			}
			f.awaitEnd()
		})
		p := start(t, b)
		p.ok("%s", fakeOptions(path).attach())
		p.fails("cut_off", "daemon=session_taken|piece by piece", "next %d", patience)
		p.ok("detach")
	})
}

// TestEndBeforeNotice: what was delivered before the end of the stream is still given out when the daemon says goodbye after it.
func TestEndBeforeNotice(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		path := serveFake(t, nil, func(f *fake) {
			f.deliver.Close()
			f.ringPeer()
			f.say(wire.AppendNotice(nil, &wire.Notice{Code: wire.CodeShuttingDown, Reason: "x"}))
			check(f.t, f.conn.CloseWrite())
			f.awaitEnd()
		})
		p := start(t, b)
		p.ok("%s", fakeOptions(path).attach())
		p.fails("end", "", "next %d", patience)
		p.ok("detach")
	})
}

// TestAttachDeadlines: a daemon that accepts and says nothing, says half, or does not even accept.
func TestAttachDeadlines(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		p := start(t, b)
		before := p.fds()
		for _, raw := range [][]byte{{}, []byte("INGES"), []byte("INGESTD\n\x01\x00\x00\x00"), frame(1, 0, []byte(`{"table":"`))[:20]} {
			path := serveFake(t, func(f *fake) { f.raw = raw }, nil)
			o := fakeOptions(path)
			for _, o.deadline = range []int{1, 30} {
				p.fails("timeout", "no reply in time", "%s", o.attach())
				p.fails("timeout", "no reply in time", "%s", o.open())
			}
		}
		path := filepath.Join(t.TempDir(), "full.sock")
		l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		check(t, err)
		defer unix.Close(l)
		check(t, unix.Bind(l, &unix.SockaddrUnix{Name: path}))
		check(t, unix.Listen(l, 0))
		conn, err := net.Dial("unix", path) // takes the one place there is
		check(t, err)
		defer conn.Close()
		o := fakeOptions(path)
		o.deadline = 30
		p.fails("timeout", "did not take the connection in time", "%s", o.attach())
		if after := p.fds(); after != before {
			t.Errorf("%d descriptors are open, %d before", after, before)
		}
	})
}

// TestStoppingDaemonRefuses: a refusal for the reason that the daemon is stopping is that error, so that a client knows to come back.
func TestStoppingDaemonRefuses(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		path := serveFake(t, func(f *fake) {
			f.fds, f.raw = nil, wire.AppendRefusal(nil, wire.Refuse(wire.CodeShuttingDown, "the daemon is stopping"))
		}, nil)
		p := start(t, b)
		p.fails("shutting_down", "daemon=shutting_down|the daemon refused: the daemon is stopping", "%s", fakeOptions(path).attach())
	})
}
