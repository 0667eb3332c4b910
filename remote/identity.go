//go:build linux

package remote

import (
	"context"
	"sync"

	"github.com/ingestd/ingestd/wire"
)

// identities are the trainers that said in their hello who they are, so that one that comes again is not served beside what is left of it: a connection that broke on its side, and of which
// nobody has heard here yet. What that holds is then offered again before the trainer is sent anything newer.
type identities struct {
	mu     sync.Mutex
	served map[identity]*served
}

// identity is one trainer of a table.
type identity struct{ table, session string }

// served is a connection of a trainer.
type served struct {
	leave context.CancelCauseFunc
	gone  chan struct{} // closed when all that it held was given back
}

// enter ends the connection that this trainer had before, and returns when that holds nothing any more. The context is for the new one; leave is to be called at its end.
func (i *identities) enter(ctx context.Context, hello *wire.Hello) (_ context.Context, leave func(), err error) {
	if hello.Session == "" {
		return ctx, func() {}, nil
	}
	ctx, cancel := context.WithCancelCause(ctx)
	who, me := identity{hello.Table, hello.Session}, &served{cancel, make(chan struct{})}
	for {
		i.mu.Lock()
		before := i.served[who]
		if before == nil {
			if i.served == nil {
				i.served = map[identity]*served{}
			}
			i.served[who] = me
			i.mu.Unlock()
			return ctx, func() { i.leave(who, me) }, nil
		}
		i.mu.Unlock()
		before.leave(errLeft)
		select {
		case <-before.gone:
		case <-ctx.Done():
			cancel(nil)
			return nil, nil, wire.Refuse(wire.CodeShuttingDown, "the daemon is stopping")
		}
	}
}

func (i *identities) leave(who identity, me *served) {
	i.mu.Lock()
	delete(i.served, who)
	i.mu.Unlock()
	me.leave(nil)
	close(me.gone)
}
