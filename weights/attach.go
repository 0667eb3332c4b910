//go:build linux

package weights

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/wire"
)

// Attachment is a reader's side of a table in another process: its segment, mapped read-only, and its pins. All methods may be called from any goroutine.
type Attachment struct {
	path     string
	conn     *net.UnixConn
	accepted wire.AcceptedSubscribe
	mapping  *shm.Mapping
	page     *shm.Mapping
	segment  *Segment
	watching sync.WaitGroup

	mu      sync.Mutex
	pins    *Pins
	uses    int           // Pin minus Unpin
	changed chan struct{} // closed, and made anew, when there is news or err is set
	err     error         // why it has ended
	closed  bool
}

// Attach becomes a reader of a table of the daemon whose socket is at path. Role and versions of the hello may be left out. ctx bounds the attaching only,
// which with hello.Wait lasts until something was published.
//
// A *wire.Refusal in the error says why the daemon would not; *shm.FormatError that it shared what makes no sense.
func Attach(ctx context.Context, path string, hello wire.Hello) (*Attachment, error) {
	hello.Role = wire.RoleSubscribe
	a := &Attachment{path: path, changed: make(chan struct{})}
	conn, received, err := shm.Call(ctx, path, hello, &a.accepted)
	if err != nil {
		return nil, err
	}
	a.conn = conn
	if err := errors.Join(a.open(received), received.Close()); err != nil {
		_ = conn.Close()
		_ = a.unmap()
		return nil, fmt.Errorf("attach to table %q at %s: %w", hello.Table, path, &shm.FormatError{Path: path, Err: err})
	}
	a.watching.Add(1)
	go a.watch()
	return a, nil
}

// open maps what came with the reply.
func (a *Attachment) open(r *shm.Received) (err error) {
	if r.Len() != 2 {
		return fmt.Errorf("%d descriptors came with the reply, want 2", r.Len())
	}
	if a.mapping, err = shm.MapReadOnly(r.Descriptor(0), a.accepted.SegmentBytes); err != nil {
		return err
	}
	if a.segment, err = OpenSegment(a.mapping.Bytes()); err != nil {
		return err
	}
	if a.page, err = shm.MapShared(r.Descriptor(1), PinsBytes); err != nil {
		return err
	}
	a.pins, err = NewPins(a.page.Bytes())
	return err
}

// watch reads the socket: a mark says that there is a newer generation; its end, or a notice, ends the attachment. It is the one goroutine of an Attachment and
// ends with Close.
func (a *Attachment) watch() {
	defer a.watching.Done()
	var mark [1]byte
	for {
		n, err := a.conn.Read(mark[:])
		if n == 1 && mark[0] == newsMark {
			a.change(nil)
			continue
		}
		switch {
		case n == 0 && err == io.EOF:
			err = &shm.PeerGoneError{Path: a.path, Cause: io.ErrUnexpectedEOF}
		case n == 0:
			err = &shm.PeerGoneError{Path: a.path, Cause: err}
		case mark[0] != wire.NoticeMark:
			err = &shm.FormatError{Path: a.path, Err: fmt.Errorf("byte %#02x on the socket, where only news and a closing notice may come", mark[0])}
		default:
			notice, failed := wire.ReadNotice(a.conn)
			if err = notice; failed != nil {
				err = &shm.PeerGoneError{Path: a.path, Cause: fmt.Errorf("its notice was cut short: %w", failed)}
			}
		}
		a.change(err)
		return
	}
}

// change wakes everybody who waits; err, if there is one, is why the attachment has ended.
func (a *Attachment) change(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil && a.err == nil {
		a.err = err
	}
	close(a.changed)
	a.changed = make(chan struct{})
}

// Segment returns the segment. It must not be used after Close, but for what is pinned.
func (a *Attachment) Segment() *Segment { return a.segment }

// Accepted returns what the daemon said.
func (a *Attachment) Accepted() wire.AcceptedSubscribe { return a.accepted }

// Changed returns a channel that is closed when the daemon next says that there is a newer generation, or when the attachment ends. To wait for either, take
// it first and then look.
func (a *Attachment) Changed() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.changed
}

// Err returns why the attachment has ended, or nil: a *wire.Notice, with code replaced if the table has another segment now; an *shm.PeerGoneError;
// os.ErrClosed. What is pinned may still be read after a notice of that code, and after the daemon's death: nobody writes it.
func (a *Attachment) Err() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.err
}

// Pin pins the newest generation, if it is above newerThan; false: there is none, or the attachment was closed. It costs no system call and no round trip.
// Unpin must follow.
func (a *Attachment) Pin(newerThan uint64) (generation uint64, place int, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return 0, 0, false
	}
	generation, place, ok = a.pins.Pin(a.segment, newerThan)
	if ok {
		a.uses++
	}
	return generation, place, ok
}

// Unpin lets go of a place once.
func (a *Attachment) Unpin(place int) {
	a.mu.Lock()
	a.pins.Unpin(place)
	a.uses--
	last := a.closed && a.uses == 0
	a.mu.Unlock()
	if last {
		_ = a.free()
	}
}

// Close ends the attachment: nothing more can be pinned. What is pinned stays so, with the connection and the memory, until the last Unpin. Closing twice is
// no error.
func (a *Attachment) Close() error {
	a.change(fmt.Errorf("weights: %w", os.ErrClosed))
	a.mu.Lock()
	last := !a.closed && a.uses == 0
	a.closed = true
	a.mu.Unlock()
	if last {
		return a.free()
	}
	return nil
}

// free closes the socket and unmaps. Nobody uses the memory any more, and nobody will.
func (a *Attachment) free() error {
	err := a.conn.Close()
	a.watching.Wait()
	return errors.Join(err, a.unmap())
}

func (a *Attachment) unmap() error {
	var errs []error
	for _, m := range [...]*shm.Mapping{a.mapping, a.page} {
		if m != nil {
			errs = append(errs, m.Close())
		}
	}
	return errors.Join(errs...)
}
