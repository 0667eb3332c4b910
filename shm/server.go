//go:build linux

package shm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/drainer"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/sampler"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/wire"
)

// Table is what the server needs of a table.
type Table struct {
	Name   string
	Spec   *spec.Spec
	View   *ring.View
	Memory *Memory       // nil when the table lies in memory that cannot be shared
	Source *sampler.FIFO // where its batches come from and go back to: called twice per batch

	// Prefetch is the batches a trainer that names no number may hold; 0 takes the server's.
	Prefetch int

	// PrefetchMax is the most batches one of its trainers may hold; 0 takes the server's.
	PrefetchMax int

	// Fill opens a stream for a producer that fills places in place; taken is called once, from any goroutine, when another connection opens the same session:
	// the Lender is to end soon. Nil: that is not offered. A *wire.Refusal in the error is what the producer is told.
	Fill func(ctx context.Context, hello *wire.Hello, taken func()) (*drainer.Lender, error)

	// Holder tells whom a full ring waits for; false if nobody holds a batch. Nil: producers are not told.
	Holder func() (wire.Note, bool)

	// Linger is the table's: rows that a slow producer has complete wait no longer than that. 0: it has none.
	Linger time.Duration
}

// Tables finds tables.
type Tables interface {
	Table(name string) (Table, bool)
	Names() []string
}

// ServerConfig configures a Server. All but Tables may be left zero.
type ServerConfig struct {
	Tables Tables

	// Prefetch is the batches a trainer that names no number may hold. Default 0: as many as prefetchBytes are, but at least
	// prefetchLeast.
	Prefetch int

	// PrefetchMax is the most batches any trainer may hold. Default 64.
	PrefetchMax int

	// TrainersMax is the most trainers attached at once, over all tables. Default 256. The trainers of one table of n batches together
	// never hold more than n-1, so there is always one place to fill, and the number that one may hold is settled when it attaches.
	TrainersMax int

	// WriteTimeout is how long a peer may take to accept a reply or a notice. Default 5 s.
	WriteTimeout time.Duration

	// Fill is about producers that fill places in place.
	Fill FillConfig

	// Log is told of attachments and their ends. Default: nothing is logged.
	Log *slog.Logger
}

func (c ServerConfig) withDefaults() ServerConfig {
	if c.PrefetchMax == 0 {
		c.PrefetchMax = 64
	}
	if c.TrainersMax == 0 {
		c.TrainersMax = 256
	}
	if c.WriteTimeout == 0 {
		c.WriteTimeout = 5 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	c.Fill = c.Fill.withDefaults()
	return c
}

// A trainer with work for a few milliseconds at hand is not stopped by every wait for a processor: at 256 KiB a batch, 32 batches
// moved a third more bytes than 4 did, with 64 busy producers on 2 cores.
const (
	prefetchBytes = 8 << 20
	prefetchLeast = 4
)

// prefetchLimit is the most that PrefetchMax can be: every batch a trainer holds has a place in both queues of its channel, and a second
// one for the batches that its group lost before it.
const prefetchLimit = 1 << 15

func (c ServerConfig) check() error {
	switch {
	case c.Tables == nil:
		return errors.New("shm: ServerConfig.Tables is nil")
	case c.PrefetchMax < 1 || c.PrefetchMax > prefetchLimit:
		return fmt.Errorf("shm: PrefetchMax is %d, must be from 1 to %d", c.PrefetchMax, prefetchLimit)
	case c.Prefetch < 0 || c.Prefetch > c.PrefetchMax:
		return fmt.Errorf("shm: Prefetch is %d, must be from 0 to PrefetchMax (%d)", c.Prefetch, c.PrefetchMax)
	case c.TrainersMax < 1:
		return fmt.Errorf("shm: TrainersMax is %d, must be at least 1", c.TrainersMax)
	case c.WriteTimeout < 0:
		return fmt.Errorf("shm: WriteTimeout is %v, must be positive", c.WriteTimeout)
	}
	return c.Fill.check(c.PrefetchMax)
}

// Server attaches trainers and observers of other processes to tables.
type Server struct {
	cfg ServerConfig

	mu       sync.Mutex // attachments come and go under it; batches do not touch it
	trainers map[uint64]attendee
	granted  map[string]int // per table, the batches that its trainers may hold together
	lastID   uint64
	total    Stats // of attachments that have ended; Trainers is nil
	refusing int   // peers that are being told why they are refused
	filling  filling
}

// NewServer returns a server, or an error for a configuration that cannot be.
func NewServer(cfg ServerConfig) (*Server, error) {
	cfg = cfg.withDefaults()
	if err := cfg.check(); err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, trainers: map[uint64]attendee{}, granted: map[string]int{}}
	s.total.Refused = map[wire.Code]uint64{}
	s.filling.fillers, s.filling.granted = map[uint64]*filler{}, map[string]int{}
	return s, nil
}

// Serve answers a hello of role train or observe and stays for the attachment's life. It owns conn and closes it. When it returns,
// the peer holds nothing any more.
//
// It returns nil when the attachment ended by the trainer's will or death, a *wire.Refusal when the peer was refused and a
// *wire.Notice when it was cut off (both have been sent): bad_peer when it broke the rules of its channel, shutting_down when ctx
// ended first. Any other error is the daemon's own trouble; the peer was told internal.
func (s *Server) Serve(ctx context.Context, conn *net.UnixConn, hello *wire.Hello) error {
	defer conn.Close()
	_ = conn.SetDeadline(noDeadline) // that of the handshake is over
	log := s.cfg.Log.With("component", "shm", "table", hello.Table, "client", hello.Client)
	err := s.serve(ctx, conn, hello, log)
	var refusal *wire.Refusal
	if errors.As(err, &refusal) {
		log.Info("refused", "role", hello.Role, "code", refusal.Code, "reason", refusal.Reason)
		if told := s.Refused(refusal.Code); told != nil {
			defer told()
			s.refuse(conn, refusal)
		}
		return refusal
	}
	return err
}

// refusingMax is how many peers are told at a time why they are refused.
const refusingMax = 64

// Refused counts a peer that is refused here, or that the caller refuses in this server's place. Refused peers are under no other limit, so only so many at a time are told why:
// where it is nil the connection is closed without a word; else the caller tells the peer, and calls it when that is done.
func (s *Server) Refused(code wire.Code) (told func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.total.Refused[code]++
	if s.refusing >= refusingMax {
		return nil
	}
	s.refusing++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.refusing--
	}
}

func (s *Server) serve(ctx context.Context, conn *net.UnixConn, hello *wire.Hello, log *slog.Logger) error {
	table, err := s.lookUp(hello)
	if err != nil {
		return err
	}
	switch hello.Role {
	case wire.RoleObserve:
		return s.observe(conn, table)
	case wire.RoleTrain:
		return s.train(ctx, conn, hello, table, log)
	case wire.RoleFill:
		return s.fill(ctx, conn, hello, table, log)
	default:
		return wire.Refuse(wire.CodeWrongRole, "role %q is not served here: this side serves %q, %q and %q",
			hello.Role, wire.RoleTrain, wire.RoleFill, wire.RoleObserve)
	}
}

// refuse sends the refusal, then reads and drops what the peer may still have sent: closing over unread bytes would reset the
// connection, and the reason would be lost.
func (s *Server) refuse(conn *net.UnixConn, refusal *wire.Refusal) {
	_ = conn.SetDeadline(time.Now().Add(s.cfg.WriteTimeout))
	if wire.WriteRefusal(conn, refusal) != nil || conn.CloseWrite() != nil {
		return
	}
	for drop := make([]byte, 4096); ; {
		if _, err := conn.Read(drop); err != nil {
			return
		}
	}
}

// lookUp finds the table of who maps it.
func (s *Server) lookUp(hello *wire.Hello) (Table, error) {
	table, err := s.find(hello)
	if err == nil && table.Memory == nil {
		return table, wire.Refuse(wire.CodeWrongRole, "table %q lies in the memory of its daemon's own process and cannot be mapped", hello.Table)
	}
	return table, err
}

// find finds the table that a hello names, and compares specs.
func (s *Server) find(hello *wire.Hello) (Table, error) {
	table, ok := s.cfg.Tables.Table(hello.Table)
	if !ok {
		names := s.cfg.Tables.Names()
		slices.Sort(names)
		if len(names) == 0 {
			return table, wire.Refuse(wire.CodeUnknownTable, "there is no table %q: this daemon has none", hello.Table)
		}
		return table, wire.Refuse(wire.CodeUnknownTable, "there is no table %q: this daemon has %s", hello.Table, strings.Join(names, ", "))
	}
	if refusal := hello.CheckSpec(table.Spec); refusal != nil {
		return table, refusal
	}
	return table, nil
}

func (s *Server) observe(conn *net.UnixConn, table Table) error {
	layout := table.View.Layout()
	reply, err := wire.AppendAccepted(nil, &wire.AcceptedObserve{
		Table: table.Name, Spec: table.Spec, Fingerprint: table.Spec.Fingerprint(),
		BatchSize: int64(layout.BatchSize), Batches: int64(layout.Batches), SegmentBytes: table.View.SegmentBytes(),
	})
	if err != nil {
		return fmt.Errorf("table %q: making the reply: %w", table.Name, err)
	}
	_ = conn.SetWriteDeadline(time.Now().Add(s.cfg.WriteTimeout))
	if err := sendWithDescriptors(conn, reply, table.Memory.Descriptor()); err != nil {
		return fmt.Errorf("table %q: observer: %w", table.Name, err)
	}
	s.mu.Lock()
	s.total.Observed++
	s.mu.Unlock()
	return nil
}

func (s *Server) train(ctx context.Context, conn *net.UnixConn, hello *wire.Hello, table Table, log *slog.Logger) error {
	if err := ctx.Err(); err != nil {
		return wire.Refuse(wire.CodeShuttingDown, "the daemon is stopping")
	}
	t, err := s.add(conn, hello, table, log)
	if err != nil {
		return err
	}
	defer s.remove(t.id, t.table.Name, t.prefetch)
	if err := t.join(hello); err != nil {
		return err
	}
	defer t.member.Leave()
	defer t.close()
	if err := t.open(); err != nil {
		t.log.Error("cannot attach a trainer", "err", err)
		return wire.Refuse(wire.CodeInternal, "the daemon could not make the channel: %v; free or raise what it has too little of (for open files: ulimit -n) and attach again", err)
	}
	_ = conn.SetWriteDeadline(time.Now().Add(s.cfg.WriteTimeout))
	if err := t.reply(); err != nil {
		return fmt.Errorf("table %q: trainer %d: %w", table.Name, t.id, err)
	}
	return t.run(ctx)
}

// prefetch returns how many batches the trainer may hold: what it asks for, at most the limit, and at most half of what the table's
// other trainers have left, so that a few more can still come. 0 means that nothing is left. Called under mu.
func (s *Server) prefetch(hello *wire.Hello, table Table) (int, error) {
	want := hello.Prefetch
	switch {
	case want < 0:
		return 0, wire.Refuse(wire.CodeBadOption, "prefetch is %d: must be at least 1, or 0 for the daemon's default", want)
	case want == 0 && table.Prefetch > 0:
		want = int64(table.Prefetch)
	case want == 0 && s.cfg.Prefetch > 0:
		want = int64(s.cfg.Prefetch)
	case want == 0:
		want = max(prefetchLeast, prefetchBytes/(table.View.SampleBytes()*int64(table.View.BatchSize())))
	}
	most := s.cfg.PrefetchMax
	if table.PrefetchMax > 0 {
		most = min(table.PrefetchMax, prefetchLimit)
	}
	left := table.View.Batches() - 1 - s.granted[table.Name]
	return int(min(want, int64(most), int64(left+1)/2)), nil
}

// add gives the trainer a number and its share of the table's batches.
func (s *Server) add(conn *net.UnixConn, hello *wire.Hello, table Table, log *slog.Logger) (t *trainer, err error) {
	pid, uid := peerOf(conn)
	err = s.admit(hello, table, func(id uint64, prefetch int) attendee {
		t = newTrainer(s, id, conn, hello, table, prefetch, log.With("trainer", id, "pid", pid))
		t.pid, t.uid = pid, uid
		return t
	})
	return t, err
}

// admit gives a trainer a number and its share of the table's batches, or refuses it.
func (s *Server) admit(hello *wire.Hello, table Table, make func(id uint64, prefetch int) attendee) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(s.trainers); n >= s.cfg.TrainersMax {
		return wire.Refuse(wire.CodeTooManyConnections, "%d trainers are attached, which is this daemon's limit: end one or raise the limit", n)
	}
	prefetch, err := s.prefetch(hello, table)
	if err != nil {
		return err
	}
	if prefetch == 0 {
		return wire.Refuse(wire.CodeTooManyConnections,
			"the trainers of table %q may already hold all of its %d batches but the one being filled: end one, let them prefetch less, or give the table more batches",
			table.Name, table.View.Batches())
	}
	s.lastID++
	s.trainers[s.lastID] = make(s.lastID, prefetch)
	s.granted[table.Name] += prefetch
	return nil
}

// remove adds what a trainer did to the totals. It holds nothing by now.
func (s *Server) remove(id uint64, table string, prefetch int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.trainers[id].addTo(&s.total)
	s.drop(id, table, prefetch)
}

// dismiss forgets a trainer that was admitted and then refused.
func (s *Server) dismiss(id uint64, table string, prefetch int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drop(id, table, prefetch)
}

func (s *Server) drop(id uint64, table string, prefetch int) {
	delete(s.trainers, id)
	if s.granted[table] -= prefetch; s.granted[table] == 0 {
		delete(s.granted, table)
	}
}

// peerOf asks the kernel who is at the other end; zeros when it does not say.
func peerOf(conn *net.UnixConn) (pid, uid int) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, 0
	}
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid, uid = int(cred.Pid), int(cred.Uid)
		}
	})
	return pid, uid
}

// Stats returns what has happened so far, and who holds and waits for what now.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.total
	all.Refused = maps.Clone(s.total.Refused)
	for _, t := range s.trainers {
		t.addTo(&all)
		all.Trainers = append(all.Trainers, t.stats())
	}
	all.Fill = s.fillStats()
	slices.SortFunc(all.Trainers, func(a, b TrainerStats) int { return int(a.ID) - int(b.ID) })
	return all
}
