//go:build linux

package shm

import (
	"context"
	"net"

	"github.com/ingestd/ingestd/wire"
)

// What package weights shares with this one: the exchange of a hello and descriptors, and who may have memory writable.

// Permit tells whether the process at the other end of a socket may map a table's sealed memory writable: nil, or the refusal.
func (c FillConfig) Permit(conn *net.UnixConn, table string) *wire.Refusal {
	return c.permit(credentialsOf(conn), Table{Name: table, Memory: &Memory{}})
}

// PeerOf returns who is at the other end of a socket, as the kernel says; zeros when it does not.
func PeerOf(conn *net.UnixConn) (pid, uid int) { return peerOf(conn) }

// SendDescriptors writes b, with the descriptors on its first byte. They stay the caller's.
func SendDescriptors(conn *net.UnixConn, b []byte, fds ...int) error {
	return sendWithDescriptors(conn, b, fds...)
}

// Received are descriptors that came with a reply.
type Received struct{ reader *descriptorReader }

// Len returns how many there are.
func (r *Received) Len() int { return len(r.reader.fds) }

// Descriptor returns one of them. It stays the Received's own.
func (r *Received) Descriptor(i int) int { return r.reader.fds[i] }

// Close closes them. What was mapped through them stays mapped.
func (r *Received) Close() error { return r.reader.close() }

// Call dials the daemon whose socket is at path, says hello and reads the answer into into, with the descriptors that come along. Versions of the hello may be
// left out. The caller closes both. A *wire.Refusal in the error says why the daemon would not.
func Call(ctx context.Context, path string, hello wire.Hello, into wire.Accepted) (*net.UnixConn, *Received, error) {
	fill(&hello, hello.Role)
	conn, r, err := say(ctx, path, &hello, into)
	if err != nil {
		return nil, nil, err
	}
	return conn, &Received{r}, nil
}

// MapShared is MapReadOnly for memory that both sides write.
func MapShared(fd int, size int64) (*Mapping, error) { return mapShared(fd, size) }

// Populate makes every page of a mapping present that the process may write, so that its first use costs nothing. Content stays.
func (m *Mapping) Populate() error { return populate(m.whole) }
