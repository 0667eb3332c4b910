package ring

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ingestd/ingestd/internal/failpoint"
)

// Offsets in an entry of the session table and of the group table.
const (
	entryState  = 0
	entryStream = 8
	entrySeen   = 16
	entryLength = 24
	entryHeld   = 64
	entryName   = 128
)

// tables is what the process knows of both tables beyond the segment. Entries come and go under mu; samples and batches do not touch it.
type tables struct {
	mu   sync.Mutex
	open []bool // sessions that somebody has
}

// entry is one entry of either table.
type entry struct{ mem []byte }

func (v *View) session(i int) entry {
	at := v.geo.sessionTable + entryBytes*int64(i)
	return entry{v.mem[at : at+entryBytes : at+entryBytes]}
}

func (v *View) group(i int) entry {
	at := v.geo.groupTable + entryBytes*int64(i)
	return entry{v.mem[at : at+entryBytes : at+entryBytes]}
}

func (e entry) word(off int64) *atomic.Uint64 { return word(e.mem, off) }

func (e entry) used() bool { return e.word(entryState).Load() == 1 }

// name returns what the entry is for; a length that cannot be is cut.
func (e entry) name() string {
	n := min(e.word(entryLength).Load(), NameBytesMax)
	return string(e.mem[entryName : entryName+n])
}

func (e entry) seen() time.Time { return time.Unix(0, int64(e.word(entrySeen).Load())) }

// take writes a free entry. The state comes last, so that a half-written entry is a free one.
func (e entry) take(name string, stream uint64, now time.Time) {
	e.word(entryStream).Store(stream)
	e.word(entrySeen).Store(uint64(now.UnixNano()))
	e.word(entryHeld).Store(0)
	e.word(entryLength).Store(uint64(len(name)))
	clear(e.mem[entryName:])
	copy(e.mem[entryName:], name)
	failpoint.Hit("ring/entry/written")
	e.word(entryState).Store(1)
}

func checkName(what, name string) error {
	if len(name) < 1 || len(name) > NameBytesMax {
		return fmt.Errorf("%s name of %d bytes, must have 1 to %d", what, len(name), NameBytesMax)
	}
	return nil
}

// SessionsFullError says that there is no entry left for a new session.
type SessionsFullError struct{ Sessions int }

func (e *SessionsFullError) Error() string {
	return fmt.Sprintf("the table knows %d sessions, which is all it has room for, and none has been away for long enough to be forgotten", e.Sessions)
}

// Session is a producer's sequence of samples, known by its name in the segment. Its methods may be called from any goroutine; one stream at a time commits for it.
type Session struct {
	ring  *Ring
	index int
	entry entry
}

// NextStream returns a stream number that the segment has not seen.
func (r *Ring) NextStream() uint64 { return word(r.mem, offStreams).Add(1) }

// OpenSession finds the session of that name, or makes it. When the table is full, the one that was closed longest ago is forgotten if that is at least ttl ago;
// else the error is a *SessionsFullError. A session that is open already panics: who has it must Close it first.
func (r *Ring) OpenSession(name string, now time.Time, ttl time.Duration) (*Session, error) {
	if err := checkName("session", name); err != nil {
		return nil, err
	}
	r.tables.mu.Lock()
	defer r.tables.mu.Unlock()
	unused, oldest := -1, -1
	for i := range r.layout.Sessions {
		e := r.session(i)
		switch {
		case !e.used():
			if unused < 0 {
				unused = i
			}
		case e.name() == name:
			if r.tables.open[i] {
				panic(fmt.Sprintf("ring: session %q is open already", name))
			}
			return r.reopen(i, e, now), nil
		case !r.tables.open[i] && (oldest < 0 || e.seen().Before(r.session(oldest).seen())):
			oldest = i
		}
	}
	if unused < 0 && oldest >= 0 && now.Sub(r.session(oldest).seen()) >= ttl {
		r.session(oldest).word(entryState).Store(0)
		unused = oldest
	}
	if unused < 0 {
		return nil, &SessionsFullError{r.layout.Sessions}
	}
	e := r.session(unused)
	e.take(name, r.NextStream(), now)
	return r.reopen(unused, e, now), nil
}

func (r *Ring) reopen(i int, e entry, now time.Time) *Session {
	r.tables.open[i] = true
	e.word(entrySeen).Store(uint64(now.UnixNano()))
	return &Session{ring: r, index: i, entry: e}
}

// Stream returns the number of the session's stream.
func (s *Session) Stream() uint64 { return s.entry.word(entryStream).Load() }

// Name returns the session's name.
func (s *Session) Name() string { return s.entry.name() }

// Held returns how many samples of the session are in the ring, or were.
func (s *Session) Held() uint64 { return s.entry.word(entryHeld).Load() }

// Mark is the mark for the commit after which the session holds that many samples.
func (s *Session) Mark(held uint64) Mark { return Mark{s.entry.word(entryHeld), held} }

// Close says that nothing more is committed for the session until it is opened again.
func (s *Session) Close(now time.Time) {
	s.ring.tables.mu.Lock()
	defer s.ring.tables.mu.Unlock()
	s.entry.word(entrySeen).Store(uint64(now.UnixNano()))
	s.ring.tables.open[s.index] = false
}

// SessionInfo is an entry of the session table.
type SessionInfo struct {
	Name   string
	Stream uint64
	Held   uint64
	Seen   time.Time // when a connection of it last began or ended
}

// Sessions returns what the session table holds.
func (v *View) Sessions() []SessionInfo {
	var all []SessionInfo
	for i := range v.layout.Sessions {
		if e := v.session(i); e.used() {
			all = append(all, SessionInfo{e.name(), e.word(entryStream).Load(), e.word(entryHeld).Load(), e.seen()})
		}
	}
	return all
}

// SessionOf returns the name of the session that has a stream, or false.
func (v *View) SessionOf(stream uint64) (name string, ok bool) {
	for i := range v.layout.Sessions {
		if e := v.session(i); e.used() && e.word(entryStream).Load() == stream {
			name = e.name()
			return name, e.used() && e.word(entryStream).Load() == stream // it may have been forgotten meanwhile, and others have come
		}
	}
	return "", false
}

// AllGroups as a mask of groups means every group there is or will be.
const AllGroups = ^uint64(0)

// GroupsFullError says that there is no entry left for a new group.
type GroupsFullError struct{}

func (e *GroupsFullError) Error() string {
	return fmt.Sprintf("the table has %d groups of trainers, which is all it can have", GroupsMax)
}

// GroupInfo is an entry of the group table.
type GroupInfo struct {
	Index int
	Name  string
	Seen  time.Time // when a trainer of it last came or went
}

// Groups returns what the group table holds.
func (v *View) Groups() []GroupInfo {
	var all []GroupInfo
	for i := range GroupsMax {
		if e := v.group(i); e.used() {
			all = append(all, GroupInfo{i, e.name(), e.seen()})
		}
	}
	return all
}

// AddGroup returns the entry of the group of that name, which it makes if there is none. Batches published from now on are pending for it. The
// error is a *GroupsFullError.
func (r *Ring) AddGroup(name string, now time.Time) (int, error) {
	if err := checkName("group", name); err != nil {
		return 0, err
	}
	r.tables.mu.Lock()
	defer r.tables.mu.Unlock()
	unused := -1
	for i := range GroupsMax {
		e := r.group(i)
		if e.used() && e.name() == name {
			e.word(entrySeen).Store(uint64(now.UnixNano()))
			return i, nil
		}
		if unused < 0 && !e.used() {
			unused = i
		}
	}
	if unused < 0 {
		return 0, &GroupsFullError{}
	}
	r.group(unused).take(name, 0, now)
	r.groups.Or(1 << unused)
	return unused, nil
}

// RemoveGroup forgets a group. Batches that wait for nobody else must be released by the caller.
func (r *Ring) RemoveGroup(index int) {
	r.tables.mu.Lock()
	defer r.tables.mu.Unlock()
	r.groups.And(^(uint64(1) << index))
	r.group(index).word(entryState).Store(0)
}

// SeenGroup notes that a trainer of the group came or went.
func (r *Ring) SeenGroup(index int, now time.Time) {
	r.group(index).word(entrySeen).Store(uint64(now.UnixNano()))
}

// SetPending notes which groups have not released a batch that the caller has leased from the ring.
func (r *Ring) SetPending(b Batch, mask uint64) { r.pending(b.Index).Store(mask) }

// Pending returns the groups that have not released the batch in a place.
func (v *View) Pending(index uint32) uint64 { return word(v.mem, v.line(index)+linePending).Load() }
