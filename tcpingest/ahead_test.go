package tcpingest

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"testing"

	"github.com/ingestd/ingestd/spec"
)

// TestFit: samples with large leaves are received in place, and at most a record of them takes the detour over the buffer; others are read ahead as before.
func TestFit(t *testing.T) {
	for _, tc := range []struct {
		spec     string
		straight bool
	}{
		{"a:U8[32768]", true}, {"a:U8[32767]", false}, {"a:U8[65536]", true}, {"a:U8[4194304]", true},
		{"a:U8[40000],b:U8[25536]", true}, {"a:U8[40000],b:U8[25535]", false}, {"a:U8[65536],b:U64", true}, {"a:U8[131072],b:U64,c:U64,d:U64,e:U64", false},
	} {
		s, err := spec.ParseText(tc.spec)
		if err != nil {
			t.Fatal(err)
		}
		p, plain, a := newPlan(s), newPlan(s), newAhead(nil, nil)
		a.fit(p)
		most := aheadBytes
		if tc.straight {
			most = straightMin
		}
		if a.most != most || p.held != (plain.held || tc.straight) || p.held && p.way == staged {
			t.Errorf("%s: %d bytes are read ahead, held %v, way %d", tc.spec, a.most, p.held, p.way)
		}
	}
}

// parcels is a stream that gives whatever is asked for, and notes how much that was.
type parcels struct {
	net.Conn
	asked []int
}

func (p *parcels) Read(b []byte) (int, error) {
	p.asked = append(p.asked, len(b))
	for i := range b {
		b[i] = byte(len(p.asked))
	}
	return len(b), nil
}

func (p *parcels) CloseWrite() error { return nil }
func (p *parcels) Ready() bool       { return true }
func (p *parcels) HungUp() bool      { return false }
func (p *parcels) Offer([]byte) int  { return 0 }

// TestStraight: after what shows that a sample has begun, the rest of it goes from the stream to where it belongs.
func TestStraight(t *testing.T) {
	s, err := spec.ParseText("a:U8[65536]")
	if err != nil {
		t.Fatal(err)
	}
	from := &parcels{}
	a := newAhead(from, nil)
	a.fit(newPlan(s))
	if n, err := a.wait(); n != straightMin || err != nil {
		t.Fatalf("%d bytes at hand, error %v", n, err)
	}
	column := make([]byte, 65536)
	for done := 0; done < len(column); {
		var v vector
		v.add(column[done:])
		n, err := a.readWait(&v)
		if err != nil {
			t.Fatal(err)
		}
		done += n
	}
	if !a.more() {
		t.Error("nothing more is said to have come, so that acks go out sample by sample")
	}
	if a.err = io.EOF; a.more() {
		t.Error("more is said to have come after the end")
	}
	if got, want := fmt.Sprint(from.asked), fmt.Sprint([]int{straightMin, 65536 - straightMin}); got != want {
		t.Errorf("read in pieces of %s, want %s", got, want)
	}
	if want := append(bytes.Repeat([]byte{1}, straightMin), bytes.Repeat([]byte{2}, 65536-straightMin)...); !bytes.Equal(column, want) {
		t.Error("other bytes than came")
	}
}
