//go:build linux

package remote

import (
	"io"
	"os"
	"testing"
	"time"

	"github.com/ingestd/ingestd/wire"
)

// TestSameTrainerAgain: one that comes again, while nobody knows yet that its connection broke, gets first what that had, in order, and its whole share; others are none of its affair.
func TestSameTrainerAgain(t *testing.T) {
	for _, network := range []string{"tcp", "tls", "unix"} {
		t.Run(network, func(t *testing.T) {
			d := start(t, network, "a:U8[9]", false, Config{})
			other := d.attach(wire.Hello{Group: "other", Session: "other", Prefetch: 1, Stream: network == "unix"})
			hello := wire.Hello{Session: "s", Prefetch: 3, Stream: network == "unix"}
			var former []*peer
			share := int64(2)
			for n := range 4 {
				p := d.attach(hello)
				if p.accepted.Prefetch != share {
					t.Fatalf("connection %d is granted %d", n, p.accepted.Prefetch)
				}
				if n == 0 {
					d.push(3)
				}
				for number := range uint64(share) {
					if got, _ := p.take(); got != number {
						t.Fatalf("connection %d: batch %d, want %d", n, got, number)
					}
				}
				if n > 0 { // as it was said to have nothing any more before this one was served
					ended(t, former[n-1])
				}
				former = append(former, p)
			}
			former[3].answer(0, 1)
			if number, _ := former[3].take(); number != 2 {
				t.Errorf("then batch %d", number)
			}
			if number, _ := other.take(); number != 0 {
				t.Errorf("the other one got batch %d", number)
			}
			other.answer(0)
			if number, _ := other.take(); number != 1 {
				t.Errorf("the other one got batch %d", number)
			}
		})
	}
}

// ended waits for the end of a connection, whatever came before it.
func ended(t *testing.T, p *peer) {
	t.Helper()
	_ = p.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := io.Copy(io.Discard, p); os.IsTimeout(err) {
		t.Error("the former connection goes on")
	}
}

// TestSameSessionElsewhere: a session is one trainer's of one table, and without one there is nobody to be the same.
func TestSameSessionElsewhere(t *testing.T) {
	var i identities
	stay := func(table, session string) (gone <-chan struct{}, leave func()) {
		ctx, leave, err := i.enter(t.Context(), &wire.Hello{Table: table, Session: session})
		check(t, err)
		return ctx.Done(), leave
	}
	var all []func()
	for _, who := range [][2]string{{"t", "s"}, {"u", "s"}, {"t", "r"}, {"t", ""}, {"t", ""}} {
		gone, leave := stay(who[0], who[1])
		all = append(all, leave)
		select {
		case <-gone:
			t.Errorf("%q had to go", who)
		default:
		}
	}
	if len(i.served) != 3 {
		t.Errorf("%d are known", len(i.served))
	}
	for _, leave := range all {
		leave()
	}
	if len(i.served) != 0 {
		t.Errorf("%d are known after their end", len(i.served))
	}
}

// TestManyTimesAtOnce: connections of one trainer that come at the same time are served one after the other.
func TestManyTimesAtOnce(t *testing.T) {
	var i identities
	const many = 20
	left := make(chan int, many)
	inside := make(chan struct{}, 1)
	for range many {
		go func() {
			ctx, leave, err := i.enter(t.Context(), &wire.Hello{Table: "t", Session: "s"})
			if err != nil {
				t.Error(err)
			}
			select {
			case inside <- struct{}{}:
			default:
				t.Error("two at once")
			}
			left <- 1
			<-ctx.Done() // the next one has come, or the test is over
			<-inside
			leave()
		}()
	}
	for range many {
		<-left
	}
	i.mu.Lock()
	last := i.served[identity{"t", "s"}]
	i.mu.Unlock()
	last.leave(nil)
	<-last.gone
}
