//go:build linux

package shm

import (
	"context"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/internal/park"
	"github.com/ingestd/ingestd/wire"
)

// hearing says whether the socket's watcher waits for the next thing that the daemon says, so that everything before it is dealt with.
type hearing struct {
	mu      sync.Mutex
	idle    bool
	changed chan struct{} // closed at the next change; nil while nobody waits for it
}

func (h *hearing) set(idle bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.idle = idle
	if h.changed != nil {
		close(h.changed)
		h.changed = nil
	}
}

// Refused returns the last step that the daemon said it refuses, nil if it said so of none.
func (a *FillAttachment) Refused() *wire.Note { return a.refused.Load() }

// Heard returns when Note and Refused tell of everything that the daemon had said before it took the rows that Taken counts: it writes what it has to say of rows to the
// socket before it takes them. It returns the context's error when that ended first, and nil when the attachment has ended.
func (a *FillAttachment) Heard(ctx context.Context) error {
	h := &a.hearing
	for {
		h.mu.Lock()
		if h.changed == nil {
			h.changed = make(chan struct{})
		}
		changed := h.changed
		h.mu.Unlock()
		if a.gone.Load() != nil || a.closing.Load() {
			return nil
		}
		// What lies in the socket is looked at first: a watcher that has taken all of it and waits for more has dealt with it.
		if a.unread() == 0 {
			h.mu.Lock()
			idle := h.idle
			h.mu.Unlock()
			if idle {
				return nil
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return park.ContextError(ctx)
		}
	}
}

// unread is how many bytes lie in the socket, 0 when it is closed.
func (a *FillAttachment) unread() (n int) {
	raw, err := a.conn.SyscallConn()
	if err != nil {
		return 0
	}
	if err := raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.SIOCINQ) }); err != nil {
		return 0
	}
	return n
}
