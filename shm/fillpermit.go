//go:build linux

package shm

import (
	"fmt"
	"net"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/wire"
)

// credentials is who is at the other end of a socket, as the kernel says.
type credentials struct {
	known    bool
	pid      int
	uid, gid uint32
	groups   []uint32 // the others that it is in
}

func credentialsOf(conn *net.UnixConn) (c credentials) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return c
	}
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			c = credentials{known: true, pid: int(cred.Pid), uid: cred.Uid, gid: cred.Gid, groups: peerGroups(int(fd))}
		}
	})
	return c
}

func (c credentials) in(groups []uint32) bool {
	return slices.Contains(groups, c.gid) || slices.ContainsFunc(c.groups, func(g uint32) bool { return slices.Contains(groups, g) })
}

// permit tells whether the peer may map the table's memory writable: nil, or the refusal. The daemon's own user may; others, root among them, must be listed.
func (c FillConfig) permit(peer credentials, table Table) *wire.Refusal {
	own := uint32(os.Geteuid())
	if !peer.known {
		return wire.Refuse(wire.CodeNotPermitted,
			"the kernel does not say who is at the other end of this socket, so table %q cannot be filled in place through it; push to it instead", table.Name)
	}
	if peer.uid == own {
		return nil
	}
	if !slices.Contains(c.Users, peer.uid) && !peer.in(c.Groups) {
		return wire.Refuse(wire.CodeNotPermitted, "user %d (group %d) may not fill table %q in place: "+
			"whoever does has the table's memory mapped writable, and this daemon, of user %d, trusts %s with it; "+
			"list the user or one of its groups in the daemon's configuration, or push over this socket", peer.uid, peer.gid, table.Name, own, c.trusted())
	}
	if table.Memory.Path() != "" {
		return wire.Refuse(wire.CodeNotPermitted, "user %d may not fill table %q in place: "+
			"the table lies in the file %s, which cannot be sealed, so whoever maps it writable can also cut it short; "+
			"only the daemon's own user (%d) gets that; run the producer as that user, keep the table in memory only, or push over this socket",
			peer.uid, table.Name, table.Memory.Path(), own)
	}
	return nil
}

func (c FillConfig) trusted() string {
	if len(c.Users) == 0 && len(c.Groups) == 0 {
		return "nobody else"
	}
	return fmt.Sprintf("users %v and groups %v", c.Users, c.Groups)
}
