//go:build linux && !race

package weights

import (
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/wire"
)

const otherUser = 65_534

// dialAs connects as another user: to the kernel that is the user of the thread which connects.
func dialAs(t *testing.T, uid int, path string) net.Conn {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	set := func(uid int) {
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0)); errno != 0 {
			t.Fatalf("setresuid %d: %v", uid, errno)
		}
	}
	set(uid)
	defer set(0)
	return must(net.Dial("unix", path))(t)
}

// TestOnlyThoseWhoMayFillPublishInPlace: another user is refused unless it is listed, and may read and stream all the same.
func TestOnlyThoseWhoMayFillPublishInPlace(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can connect as another user")
	}
	m := manifestOf(t, 10)
	for _, c := range []struct {
		name  string
		users []uint32
		uid   int
		role  wire.Role
		place bool
		code  wire.Code // "": accepted
	}{
		{"the daemon's own", nil, 0, wire.RolePublish, true, ""},
		{"another one", nil, otherUser, wire.RolePublish, true, wire.CodeNotPermitted},
		{"another one, others are listed", []uint32{otherUser - 1}, otherUser, wire.RolePublish, true, wire.CodeNotPermitted},
		{"another one that is listed", []uint32{otherUser}, otherUser, wire.RolePublish, true, ""},
		{"another one, streamed", nil, otherUser, wire.RolePublish, false, ""},
		{"another one that reads", nil, otherUser, wire.RoleSubscribe, false, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := serve(t, StoreConfig{}, ServerConfig{Fill: shm.FillConfig{Users: c.users}})
			for dir := s.path; strings.HasPrefix(dir, os.TempDir()) && dir != os.TempDir(); dir = filepath.Dir(dir) {
				check(t, os.Chmod(dir, 0o777))
			}
			hello, accepted := wire.Hello{Role: c.role, Table: "w"}, wire.Accepted(new(wire.AcceptedPublish))
			if c.role == wire.RolePublish {
				hello.Manifest, hello.InPlace = m.JSON(), c.place
			} else {
				p := s.publisher(m)
				defer p.Close()
				publishOne(t, p)
				accepted = new(wire.AcceptedSubscribe)
			}
			conn := dialAs(t, c.uid, s.path)
			defer conn.Close()
			check(t, wire.WriteHello(conn, &hello))
			err := wire.ReadReply(conn, accepted)
			if c.code == "" {
				check(t, err)
				return
			}
			if refusal := as[*wire.Refusal](t, err); refusal.Code != c.code || !strings.Contains(refusal.Reason, "user 65534") {
				t.Errorf("%v", refusal)
			}
		})
	}
}
