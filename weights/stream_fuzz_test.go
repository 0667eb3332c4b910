//go:build linux

package weights

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/tensor"
	"github.com/ingestd/ingestd/wire"
)

// socketPair returns two ends of a unix stream socket.
func socketPair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds := must(unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0))(t)
	for i, to := range [...]**net.UnixConn{&a, &b} {
		f := os.NewFile(uintptr(fds[i]), "pair")
		*to = must(net.FileConn(f))(t).(*net.UnixConn)
		check(t, f.Close())
	}
	return a, b
}

// sentModel is what a generation should hold: the plain way.
type sentModel struct {
	m      *tensor.Manifest
	begun  uint64
	flat   []byte
	chunks []tensor.Header // taken, by flat offset and length
	newest uint64
	shown  []byte
}

// take says whether the daemon takes a chunk, and takes it.
func (o *sentModel) take(h tensor.Header, data []byte) bool {
	if o.begun == 0 || h.Step != o.begun || h.Check(o.m, 64<<10) != nil || h.DataCRC != tensor.CRC(data) || h.Flags != 0 {
		return false
	}
	from, to := h.Flat(o.m), h.Flat(o.m)+int64(h.Length)
	same := false
	for _, c := range o.chunks {
		end := c.Flat(o.m) + int64(c.Length)
		if c.Flat(o.m) == from && end == to && c.DataCRC == h.DataCRC {
			same = true
		} else if c.Flat(o.m) < to && from < (end+255)/256*256 {
			return false
		}
	}
	for i, at := 0, from; at < to; at++ {
		for i < o.m.Len() && endOf(o.m, i) <= at {
			i++
		}
		if inside := i < o.m.Len() && o.m.Offset(i) <= at; !inside && data[at-from] != 0 {
			return false
		}
	}
	copy(o.flat[from:], data)
	if !same {
		o.chunks = append(o.chunks, h)
	}
	return true
}

func (o *sentModel) whole() bool {
	for i := range o.m.Len() {
		for at := o.m.Offset(i); at < endOf(o.m, i); at++ {
			covered := false
			for _, c := range o.chunks {
				covered = covered || c.Flat(o.m) <= at && at < c.Flat(o.m)+int64(c.Length)
			}
			if !covered {
				return false
			}
		}
	}
	return true
}

// FuzzPublisher lives a whole life of a streamed publisher: what it publishes is what it sent, and it is ended where it breaks the rules, as a plain model
// says.
func FuzzPublisher(f *testing.F) {
	whole := []byte{0, 3, 0, 3, 3, 1, 3, 6, 1, 1}
	f.Add(whole)
	f.Add(append(append([]byte{}, whole...), 0, 3, 0, 7, 1, 3, 2, 0, 1, 2))
	f.Add([]byte{0, 3, 0, 1, 3, 1, 1, 3, 0, 1, 3, 0, 2})
	f.Add([]byte{0, 4, 0, 1, 60, 9, 1})
	f.Add([]byte{0, 0})
	f.Add([]byte{1})
	f.Add([]byte{5, 8, 1, 2, 3, 4, 5, 6, 7, 8})
	f.Add([]byte{0, 5, 70, 64, 0, 0, 128, 'I', 'C', 'H', 'K', 1, 0, 0, 0})
	f.Fuzz(func(t *testing.T, ops []byte) {
		m := manifestOf(t, 300, 0, 512, 700)
		s := must(NewStore(StoreConfig{Heap: true, Generations: 2}))(t)
		p := must(s.OpenPublisher(m, Who{}))(t)
		ours, theirs := socketPair(t)
		served := make(chan error, 1)
		go func() {
			x := newSession(theirs, p, true, limits{chunkBytes: 64 << 10, stall: time.Minute, write: time.Minute, linger: time.Minute}, slog.New(slog.DiscardHandler))
			served <- x.run(context.Background())
			p.Close()
			theirs.Close()
		}()
		check(t, ours.SetDeadline(time.Now().Add(10*time.Second)))
		o := &sentModel{m: m, flat: make([]byte, m.DataBytes())}
		live(t, ops, o, &rawPublisher{t: t, Conn: ours, m: m, accepted: wire.AcceptedPublish{Publisher: p.number}})
		ours.Close()
		<-served
		if s.Newest() != o.newest {
			t.Fatalf("newest is %d, the model says %d", s.Newest(), o.newest)
		}
		if o.newest > 0 {
			r := must(s.OpenReader(Who{}))(t)
			held, _ := r.Latest(0)
			for i, sum := range held.Sums() {
				got, want := held.Data()[m.Offset(i):endOf(m, i)], o.shown[m.Offset(i):endOf(m, i)]
				if string(got) != string(want) || sum != tensor.CRC(want) {
					t.Fatalf("tensor %d is not what was sent", i)
				}
			}
			held.Release()
			check(t, r.Close())
		}
		check(t, s.Close())
	})
}

// live says what ops say, and compares the answers with the model.
func live(t *testing.T, ops []byte, o *sentModel, p *rawPublisher) {
	next := func() byte {
		if len(ops) == 0 {
			return 0
		}
		b := ops[0]
		ops = ops[1:]
		return b
	}
	for n := 0; len(ops) > 0 && n < 100; n++ {
		switch op := next() % 6; op {
		case 0: // begin
			b := must(wire.AppendMessage(nil, &Ask{Op: OpBegin}, wire.MessageBytesMax))(t)
			_, _ = p.Write(b)
			if o.begun != 0 {
				cutOff(t, p)
				return
			}
			if a := p.answer(); a.Op != OpPlace || a.Generation != o.newest+1 {
				t.Fatalf("answer %+v", a)
			}
			o.begun, o.chunks = o.newest+1, nil
		case 1: // commit
			b := must(wire.AppendMessage(nil, &Ask{Op: OpCommit, Generation: o.begun}, wire.MessageBytesMax))(t)
			_, _ = p.Write(b)
			if o.begun == 0 {
				cutOff(t, p)
				return
			}
			want := OpFailed
			if o.whole() {
				want = OpPublished
				o.newest, o.shown = o.begun, append([]byte{}, o.flat...)
			}
			if a := p.answer(); a.Op != want {
				t.Fatalf("answer %+v, the model says %s", a, want)
			}
			o.begun = 0
		case 2: // abort
			if a := p.ask(&Ask{Op: OpAbort}); a.Op != OpAborted {
				t.Fatalf("answer %+v", a)
			}
			o.begun = 0
		case 3, 4: // a chunk; some blocks from some block on, perhaps damaged
			flat, blocks := int64(next())%8*256, int64(next())%8+1
			damage := byte(0)
			if op == 4 {
				damage = next()
			}
			if !o.chunk(p, flat, blocks*256, damage) {
				cutOff(t, p)
				return
			}
		case 5: // anything
			b := ops[:min(int(next()), len(ops))]
			ops = ops[len(b):]
			if len(b) == 0 {
				continue
			}
			_, _ = p.Write(b)
			_ = p.Conn.(*net.UnixConn).CloseWrite()
			// Whatever that was, it cannot have been a whole conversation: a begin at most.
			for {
				if _, err := p.Read(make([]byte, 512)); errors.Is(err, os.ErrDeadlineExceeded) {
					t.Fatal(err)
				} else if err != nil {
					return
				}
			}
		}
	}
}

// chunk sends a chunk and says whether the daemon takes it.
func (o *sentModel) chunk(p *rawPublisher, flat, n int64, damage byte) bool {
	i := min(o.m.At(flat), o.m.Len()-1)
	n = min(n, max(o.m.DataBytes()-flat, 256))
	if last := endOf(o.m, o.m.Len()-1); flat < last && flat+n > last {
		n = last - flat
	}
	data := make([]byte, n)
	for k := range data {
		at := flat + int64(k)
		if t := o.m.At(at); t < o.m.Len() && o.m.Offset(t) <= at {
			data[k] = byte(at) ^ byte(o.begun) ^ byte(at>>8)
		}
	}
	h := p.header(o.begun, i, flat-o.m.Offset(i), data)
	text := chunkText(h, data)
	if damage != 0 {
		at := 4 + int(damage)*7%(len(text)-4)
		text[at] ^= 1 + damage%255
	}
	_, _ = p.Write(text)
	if damage != 0 {
		return false
	}
	return o.take(h, data)
}

// cutOff reads the notice that must come.
func cutOff(t *testing.T, p *rawPublisher) {
	t.Helper()
	n, err := readNotice(p)
	if err != nil || n.Code != wire.CodeBadChunk && n.Code != wire.CodeBadPeer {
		t.Fatalf("notice %v, error %v", n, err)
	}
}
