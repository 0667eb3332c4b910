//go:build linux

package weights

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/wire"
)

// PublisherAttachment is an in-place publisher's side of a table in another process: its segment, mapped writable. What is said over its connection is left
// to the caller. One goroutine at a time uses it.
type PublisherAttachment struct {
	conn     *net.UnixConn
	accepted wire.AcceptedPublish
	mapping  *shm.Mapping
	segment  *Segment
}

// AttachPublisher becomes the publisher of a table of the daemon whose socket is at path. The hello must have the manifest; role, versions and in_place may
// be left out. ctx bounds the attaching only: the daemon makes the segment meanwhile, if it has to, and then all of it is made present in this process too
// (0.1 to 0.3 s per GiB), so that the first generations cost no more than the later ones.
//
// A *wire.Refusal in the error says why the daemon would not; *shm.FormatError that it shared what makes no sense.
func AttachPublisher(ctx context.Context, path string, hello wire.Hello) (*PublisherAttachment, error) {
	hello.Role, hello.InPlace = wire.RolePublish, true
	a := &PublisherAttachment{}
	conn, received, err := shm.Call(ctx, path, hello, &a.accepted)
	if err != nil {
		return nil, err
	}
	a.conn = conn
	if err := errors.Join(a.open(received, hello.Manifest), received.Close()); err != nil {
		_ = a.Close()
		return nil, fmt.Errorf("attach to table %q at %s: %w", hello.Table, path, &shm.FormatError{Path: path, Err: err})
	}
	return a, nil
}

// open maps what came with the reply.
func (a *PublisherAttachment) open(r *shm.Received, manifest []byte) (err error) {
	if r.Len() != 1 {
		return fmt.Errorf("%d descriptors came with the reply, want 1", r.Len())
	}
	if a.mapping, err = shm.MapShared(r.Descriptor(0), a.accepted.SegmentBytes); err != nil {
		return err
	}
	if a.segment, err = OpenSegment(a.mapping.Bytes()); err != nil {
		return err
	}
	if text := a.segment.manifest.JSON(); string(text) != string(manifest) {
		return fmt.Errorf("the segment is of another manifest, %s, than was asked for", a.segment.manifest.Fingerprint())
	}
	return a.mapping.Populate()
}

// Conn returns the connection, on which nothing was said since the reply. It stays the attachment's own.
func (a *PublisherAttachment) Conn() net.Conn { return a.conn }

// Accepted returns what the daemon said.
func (a *PublisherAttachment) Accepted() wire.AcceptedPublish { return a.accepted }

// Segment returns the segment. Only Data and SumBytes of a place that the daemon gave may be written, until the commit is said. It must not be used after
// Close.
func (a *PublisherAttachment) Segment() *Segment { return a.segment }

// Close ends the publisher: what it has begun and not committed is not there. Closing twice is no error.
func (a *PublisherAttachment) Close() error {
	var errs []error
	if a.conn != nil {
		errs = append(errs, a.conn.Close())
		a.conn = nil
	}
	if a.mapping != nil {
		errs = append(errs, a.mapping.Close())
		a.mapping = nil
	}
	return errors.Join(errs...)
}
