package auth

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ingestd/ingestd/wire"
)

// pollEvery is how often Run looks whether the file has changed.
const pollEvery = time.Second

// entry is one token. The number of its secrets is always two, so that all tokens take the same time: a second one that is missing is a decoy.
type entry struct {
	name     string
	secrets  [2]wire.Secret // as it is, and as it was before
	rotating bool           // the second one is real
	rights   Rights
	tables   []string
	uses     *uses
}

// uses count how often each secret of a token was proved. They live on when the file is read again.
type uses struct {
	count [2]atomic.Uint64
	last  [2]atomic.Int64 // Unix nanoseconds
}

// set is what a file holds; it does not change.
type set struct {
	byName map[digest]*entry
	order  []*entry
}

// digest stands for a name, under a key of this process, so that no time depends on how much of a name is right.
type digest [sha256.Size]byte

// Tokens are the tokens that a daemon knows. All methods may be called from any goroutine.
type Tokens struct {
	path  string
	log   *slog.Logger
	key   []byte // of digests
	decoy *entry // in the place of tokens that there are not; its secrets are known to nobody
	now   atomic.Pointer[set]

	mu       sync.Mutex // one Reload at a time; what follows
	seen     stamp      // of the file when it was last read, whatever came of that
	loaded   time.Time
	reloads  uint64
	failures uint64
	broken   error // why the file's latest state is not the one in force; nil: it is
}

// Load reads a file of tokens. log may be nil.
//
// Errors: *PermissionError when others may read the file, *FormatError (wrapped) for what is in it, those of os.
func Load(path string, log *slog.Logger) (*Tokens, error) {
	t := newTokens(path, log)
	if err := t.Reload(); err != nil {
		return nil, err
	}
	return t, nil
}

// Parse reads tokens from the text of a file. They stay as they are: Reload and Run do nothing.
func Parse(text []byte) (*Tokens, error) {
	t := newTokens("", nil)
	entries, err := parse(text)
	if err != nil {
		return nil, fmt.Errorf("tokens: %w", err)
	}
	t.use(entries)
	t.loaded = time.Now()
	return t, nil
}

func newTokens(path string, log *slog.Logger) *Tokens {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	t := &Tokens{path: path, log: log, key: make([]byte, sha256.Size), decoy: &entry{uses: new(uses)}}
	_, _ = rand.Read(t.key) // never fails
	for i := range t.decoy.secrets {
		t.decoy.secrets[i] = NewSecret()
	}
	t.now.Store(&set{})
	return t
}

// NewSecret makes a secret of 256 bits at random.
func NewSecret() wire.Secret {
	var b [32]byte
	_, _ = rand.Read(b[:]) // never fails
	s, err := wire.NewSecret(base64.RawURLEncoding.EncodeToString(b[:]))
	if err != nil {
		panic(err)
	}
	return s
}

func (t *Tokens) digest(name string) digest {
	mac := hmac.New(sha256.New, t.key)
	mac.Write([]byte(name))
	return digest(mac.Sum(nil))
}

// use puts tokens in force. Counts of those that were there before go on.
func (t *Tokens) use(entries []*entry) {
	old := t.now.Load()
	next := &set{map[digest]*entry{}, entries}
	for _, e := range entries {
		if !e.rotating {
			e.secrets[1] = t.decoy.secrets[1]
		}
		d := t.digest(e.name)
		e.uses = new(uses)
		if before := old.byName[d]; before != nil {
			e.uses = before.carry(e)
		}
		next.byName[d] = e
	}
	t.now.Store(next)
}

// carry is what counts go on for next: those of each secret that is the same, in whichever place.
func (e *entry) carry(next *entry) *uses {
	u := new(uses)
	for i := range next.secrets {
		for j := range e.secrets {
			if real := (i == 0 || next.rotating) && (j == 0 || e.rotating); real && next.secrets[i].Reveal() == e.secrets[j].Reveal() {
				u.count[i].Store(e.uses.count[j].Load())
				u.last[i].Store(e.uses.last[j].Load())
			}
		}
	}
	return u
}

// Reload reads the file anew. With an error the tokens stay as they were.
func (t *Tokens) Reload() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.reload()
}

func (t *Tokens) reload() error {
	if t.path == "" {
		return nil
	}
	text, seen, err := readFile(t.path)
	t.seen = seen
	var entries []*entry
	if err == nil {
		entries, err = parse(text)
	}
	if err != nil {
		t.failures++
		t.broken = fmt.Errorf("file of tokens %s: %w", t.path, err)
		return t.broken
	}
	t.use(entries)
	t.broken, t.loaded = nil, time.Now()
	t.reloads++
	return nil
}

// Run reads the file again when it has changed, until ctx ends; it returns nil then. A new file that is broken is logged once, and the tokens stay as they were.
func (t *Tokens) Run(ctx context.Context) error {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			t.poll()
		}
	}
}

func (t *Tokens) poll() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.path == "" || stampOf(t.path) == t.seen {
		return
	}
	if err := t.reload(); err != nil {
		t.log.Error("the file of tokens has changed and cannot be used; the tokens stay as they were", "component", "auth", "err", err)
		return
	}
	t.log.Info("tokens read anew", "component", "auth", "file", t.path, "tokens", len(t.now.Load().order))
}

// find returns the token of a name, or the decoy, and whether it is a token. Both take the same time.
func (t *Tokens) find(name string) (*entry, bool) {
	e, ok := t.now.Load().byName[t.digest(name)]
	if !ok {
		e = t.decoy
	}
	return e, ok
}

// Bearer looks at the value of an Authorization header, Bearer NAME:SECRET. All that is wrong with one takes the same time and gives the same false.
func (t *Tokens) Bearer(header string) (*Identity, bool) {
	scheme, credentials, _ := strings.Cut(header, " ")
	name, secret, _ := strings.Cut(strings.TrimSpace(credentials), ":")
	e, known := t.find(name)
	got := sha256.Sum256([]byte(secret))
	which := -1
	for i := range e.secrets {
		want := sha256.Sum256([]byte(e.secrets[i].Reveal()))
		which = subtle.ConstantTimeSelect(subtle.ConstantTimeCompare(got[:], want[:]), i, which)
	}
	if !known || which < 0 || which > 0 && !e.rotating || !strings.EqualFold(scheme, "Bearer") {
		return nil, false
	}
	return e.proved(which), true
}

// proved counts a proof, and is who has given it.
func (e *entry) proved(which int) *Identity {
	e.uses.count[which].Add(1)
	e.uses.last[which].Store(time.Now().UnixNano())
	return &Identity{e.name, e.rights, e.tables}
}

// Len returns how many tokens there are.
func (t *Tokens) Len() int { return len(t.now.Load().order) }

// TokenStatus is what may be shown of a token.
type TokenStatus struct {
	Name         string    `json:"name"`
	Rights       []string  `json:"rights"`
	Tables       []string  `json:"tables"`
	Rotating     bool      `json:"rotating"` // it has a previous secret
	Used         uint64    `json:"used"`     // times the secret was proved
	LastUsed     time.Time `json:"last_used,omitzero"`
	PreviousUsed uint64    `json:"previous_used"` // times the previous one was
	PreviousLast time.Time `json:"previous_last_used,omitzero"`
}

// Stats is what Tokens have done so far.
type Stats struct {
	Loaded   time.Time     // when the tokens in force were read
	Reloads  uint64        // times the file was read and used, the first included
	Failures uint64        // times it was read and could not be used
	Broken   error         // why the file is not what is in force; nil: it is
	Tokens   []TokenStatus // in the file's order
}

// Stats returns counts and the tokens, without secrets.
func (t *Tokens) Stats() Stats {
	t.mu.Lock()
	s := Stats{Loaded: t.loaded, Reloads: t.reloads, Failures: t.failures, Broken: t.broken}
	t.mu.Unlock()
	for _, e := range t.now.Load().order {
		st := TokenStatus{Name: e.name, Rights: e.rights.Names(), Tables: e.tables, Rotating: e.rotating,
			Used: e.uses.count[0].Load(), PreviousUsed: e.uses.count[1].Load()}
		for i, at := range []*time.Time{&st.LastUsed, &st.PreviousLast} {
			if ns := e.uses.last[i].Load(); ns != 0 {
				*at = time.Unix(0, ns)
			}
		}
		s.Tokens = append(s.Tokens, st)
	}
	return s
}

func (t *Tokens) String() string { return fmt.Sprintf("%d tokens", t.Len()) }

// Format writes the same for all verbs.
func (t *Tokens) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, t.String()) }

// LogValue hides the secrets from slog.
func (t *Tokens) LogValue() slog.Value { return slog.StringValue(t.String()) }

// MarshalText hides them from encoders.
func (t *Tokens) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// stamp tells one state of the file from the next.
type stamp struct {
	mtime  time.Time
	size   int64
	mode   os.FileMode // a change of it alone changes no time that is looked at
	owner  uint32
	device uint64
	inode  uint64
}

// PermissionError says that others than the daemon's user may read or change the file of tokens.
type PermissionError struct {
	Path   string
	Mode   os.FileMode
	Reason string // what is wrong, and what to do
}

func (e *PermissionError) Error() string {
	return fmt.Sprintf("%s has mode %#o: %s", e.Path, e.Mode.Perm(), e.Reason)
}
