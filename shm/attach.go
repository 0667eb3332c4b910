//go:build linux

package shm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"time"

	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/spsc"
	"github.com/ingestd/ingestd/wire"
)

// PeerGoneError says that the daemon went away without an end of the stream: it died, or its machine took the socket down.
type PeerGoneError struct {
	Path  string
	Cause error // what the socket said
}

func (e *PeerGoneError) Error() string {
	return fmt.Sprintf("the daemon at %s is gone without having ended the stream (%v): start it again and attach anew; its log may say why", e.Path, e.Cause)
}

func (e *PeerGoneError) Unwrap() error { return e.Cause }

// FormatError says that what the daemon shared makes no sense to this program.
type FormatError struct {
	Path string
	Err  error
}

func (e *FormatError) Error() string {
	return fmt.Sprintf("the daemon at %s shared something this program cannot use: %v", e.Path, e.Err)
}

func (e *FormatError) Unwrap() error { return e.Err }

// say dials the daemon, says hello and reads the answer. The caller owns the connection and the descriptors of the reader.
func say(ctx context.Context, path string, hello *wire.Hello, into wire.Accepted) (*net.UnixConn, *descriptorReader, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		if ended := ctx.Err(); ended != nil {
			err = errors.Join(contextError(ctx), err)
		}
		return nil, nil, fmt.Errorf("attach to %s: %w (is the daemon running, and is this its socket?)", path, err)
	}
	r := &descriptorReader{conn: conn.(*net.UnixConn)}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	err = wire.Greet(conn, r, hello, nil, into)
	if !stop() && err == nil {
		err = contextError(ctx)
	} else if err != nil && ctx.Err() != nil {
		err = errors.Join(contextError(ctx), err)
	}
	if err != nil {
		_ = r.close()
		conn.Close()
		var refusal *wire.Refusal
		if errors.As(err, &refusal) {
			return nil, nil, fmt.Errorf("attach to table %q at %s: %w", hello.Table, path, refusal)
		}
		return nil, nil, fmt.Errorf("attach to table %q at %s: %w", hello.Table, path, err)
	}
	return r.conn, r, nil
}

// mapSegment maps the segment that came as the first descriptor and compares it with what the reply said.
func mapSegment(r *descriptorReader, s *spec.Spec, segmentBytes, batchSize, batches int64) (*Mapping, *ring.View, error) {
	m, err := MapReadOnly(r.fds[0], segmentBytes)
	if err != nil {
		return nil, nil, err
	}
	view, err := ring.OpenView(m.Bytes())
	if err == nil {
		l, fingerprint := view.Layout(), s.Fingerprint()
		if l.Fingerprint != fingerprint || int64(l.BatchSize) != batchSize || int64(l.Batches) != batches || !slices.Equal(l.Columns, s.LeafBytes()) {
			err = fmt.Errorf("the segment (%d batches of %d, columns of %d bytes, fingerprint %x) is not the one announced (%d of %d, %d, %x)",
				l.Batches, l.BatchSize, l.Columns, l.Fingerprint, batches, batchSize, s.LeafBytes(), fingerprint)
		}
	}
	if err != nil {
		return nil, nil, errors.Join(err, m.Close())
	}
	return m, view, nil
}

// Attach joins a table of the daemon whose socket is at path as a trainer. Role and versions of the hello may be left out. ctx
// bounds the attaching only.
//
// A *wire.Refusal in the error says why the daemon would not; *FormatError that it shared what makes no sense.
func Attach(ctx context.Context, path string, hello wire.Hello) (*Attachment, error) {
	fill(&hello, wire.RoleTrain)
	a := &Attachment{path: path}
	conn, r, err := say(ctx, path, &hello, &a.accepted)
	if err != nil {
		return nil, err
	}
	a.conn = conn
	if err := errors.Join(a.open(r), r.close()); err != nil {
		a.free()
		return nil, fmt.Errorf("attach to table %q at %s: %w", hello.Table, path, &FormatError{path, err})
	}
	a.watching.Add(1)
	go a.watch()
	return a, nil
}

func fill(hello *wire.Hello, role wire.Role) {
	hello.Role = role
	if hello.VersionMin == 0 {
		hello.VersionMin = wire.Version
	}
	if hello.VersionMax == 0 {
		hello.VersionMax = wire.Version
	}
}

// open maps what came with the reply.
func (a *Attachment) open(r *descriptorReader) (err error) {
	if len(r.fds) != 4 {
		return fmt.Errorf("%d descriptors came with the reply, want 4", len(r.fds))
	}
	c := &a.accepted
	a.held = make([]uint64, min(c.Batches, ring.BatchesMax))
	if a.segment, a.view, err = mapSegment(r, c.Spec, c.SegmentBytes, c.BatchSize, c.Batches); err != nil {
		return err
	}
	if c.ChannelBytes > channelBytesMax {
		return fmt.Errorf("a channel of %d bytes was announced, the largest has %d", c.ChannelBytes, channelBytesMax)
	}
	if a.channel, err = mapShared(r.fds[1], c.ChannelBytes); err != nil {
		return err
	}
	deliver, giveback, capacity, err := openChannel(a.channel.Bytes())
	if err != nil {
		return err
	}
	if a.deliver, err = spsc.NewConsumer(deliver, capacity); err != nil {
		return err
	}
	if a.giveback, err = spsc.NewProducer(giveback, capacity); err != nil {
		return err
	}
	if a.toUs, err = openBell(r.take(2)); err != nil {
		return err
	}
	a.toDaemon, err = openDaemonsBell(r.take(3))
	return err
}

// watch reads the socket: its end, or a notice, ends the attachment. It is the one goroutine of an Attachment and ends with Close.
func (a *Attachment) watch() {
	defer a.watching.Done()
	var mark [1]byte
	_, err := io.ReadFull(a.conn, mark[:])
	switch {
	case err == io.EOF: // which to our caller means the end of the stream, and this is not
		err = &PeerGoneError{a.path, io.ErrUnexpectedEOF}
	case err != nil:
		err = &PeerGoneError{a.path, err}
	case mark[0] != wire.NoticeMark:
		err = &FormatError{a.path, fmt.Errorf("byte %#02x on the socket, where only a closing notice may come", mark[0])}
	default:
		notice, failed := wire.ReadNotice(a.conn)
		if err = notice; failed != nil {
			err = &PeerGoneError{a.path, fmt.Errorf("its notice was cut short: %v", failed)}
		}
	}
	if a.closing.Load() {
		err = os.ErrClosed
	}
	a.gone.Store(&err)
	a.toUs.signal()
}

// Observation is a segment mapped for looking at.
type Observation struct {
	accepted wire.AcceptedObserve
	segment  *Mapping
	view     *ring.View
}

// Observe maps a table's segment without becoming its trainer: states and cursors can be read, and batches that nobody keeps from
// changing.
func Observe(ctx context.Context, path string, hello wire.Hello) (*Observation, error) {
	fill(&hello, wire.RoleObserve)
	o := &Observation{}
	conn, r, err := say(ctx, path, &hello, &o.accepted)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if len(r.fds) != 1 {
		err = fmt.Errorf("%d descriptors came with the reply, want 1", len(r.fds))
	} else {
		c := &o.accepted
		o.segment, o.view, err = mapSegment(r, c.Spec, c.SegmentBytes, c.BatchSize, c.Batches)
	}
	if err = errors.Join(err, r.close()); err != nil {
		return nil, fmt.Errorf("observe table %q at %s: %w", hello.Table, path, &FormatError{path, err})
	}
	return o, nil
}

// View returns the segment; it must not be used after Close.
func (o *Observation) View() *ring.View { return o.view }

// Bytes returns the whole segment, read-only, for copying; it must not be used after Close.
func (o *Observation) Bytes() []byte { return o.segment.Bytes() }

// Accepted returns what the daemon said of the table.
func (o *Observation) Accepted() wire.AcceptedObserve { return o.accepted }

// Close unmaps the segment.
func (o *Observation) Close() error { return o.segment.Close() }
