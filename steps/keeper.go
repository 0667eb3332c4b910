package steps

import (
	"cmp"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
)

// Config says what a table of kind tensors is, beside its ring.
type Config struct {
	ChunkBytes int    // most data bytes of a chunk
	MaxLag     uint64 // how many steps a chunk may be behind the newest one begun; 0: any number
	Path       string // file in which manifests are kept; "" for none

	Log *slog.Logger // default: none
}

// Columns of the table's spec.
const (
	headerColumn = 0
	dataColumn   = 1
)

// Spec is the layout of a sample of a table whose chunks have so many bytes of data.
func Spec(chunkBytes int) (*spec.Spec, error) {
	if err := tensor.CheckChunkBytes(chunkBytes); err != nil {
		return nil, err
	}
	return spec.New([]spec.Leaf{
		{Name: "header", DType: spec.U8, Shape: []int64{tensor.HeaderBytes}},
		{Name: "data", DType: spec.U8, Shape: []int64{int64(chunkBytes)}},
	})
}

// Keeper knows the producers of one table.
type Keeper struct {
	cfg    Config
	ring   *ring.Ring
	herald *herald
	newest atomic.Uint64 // newest step begun by a producer since one was connected; several raise it
	counts counters

	saving sync.Mutex // of writing the file
	mu     sync.Mutex
	known  manifests
	here   map[string]*Producer // connected, by name
	away   []transaction        // what producers left unfinished, the latest at the end; at most awayMax
}

// What is remembered of producers that went away inside a step, in case they go on with it: the steps of so many, each of at most so many chunks (12 bytes each).
const (
	awayMax       = 64
	awayChunksMax = 1 << 16
)

// New returns the keeper of a table. found is what its ring was recovered from, nil if it was made anew: the producers that have unread chunks there are
// announced as gone until they come back. A file of manifests that cannot be read is logged and left out.
func New(r *ring.Ring, cfg Config, found *ring.Recovery) *Keeper {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	k := &Keeper{cfg: cfg, ring: r, herald: newHerald(r), here: map[string]*Producer{}}
	if cfg.Path != "" {
		if err := k.known.load(cfg.Path); err != nil {
			cfg.Log.Warn("the manifests of before are not known; producers give them again", "component", "steps", "err", err)
			k.known = manifests{}
		}
	}
	if found != nil {
		k.announceFound(found)
	}
	return k
}

// ChunkBytes returns the most data bytes of a chunk.
func (k *Keeper) ChunkBytes() int { return k.cfg.ChunkBytes }

// Manifest returns the text of a manifest that is known.
func (k *Keeper) Manifest(id uint64) (text []byte, ok bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if m := k.known.find(id); m != nil {
		return m.text, true
	}
	return nil, false
}

// Session returns the name of the producer that has a stream, or had it and was not forgotten.
func (k *Keeper) Session(stream uint64) (name string, ok bool) { return k.ring.SessionOf(stream) }

// MismatchError says that producers with another manifest are connected.
type MismatchError struct {
	Connected int               // how many
	Name      string            // one of them
	Got, Want uint64            // ids: of the manifest that was offered, and of theirs
	Diff      []spec.Difference // between the two
}

func (e *MismatchError) Error() string {
	who := fmt.Sprintf("producer %q is connected with manifest %016x", e.Name, e.Want)
	if e.Connected > 1 {
		who = fmt.Sprintf("%d producers, such as %q, are connected with manifest %016x", e.Connected, e.Name, e.Want)
	}
	return fmt.Sprintf("%s, and this one is %016x", who, e.Got)
}

// mismatch compares a manifest with those of the producers that are connected, but for the one of that name, whose place the caller takes. Under mu.
func (k *Keeper) mismatch(name string, m *tensor.Manifest) error {
	var e *MismatchError
	for _, p := range k.here {
		switch {
		case p.name == name || p.manifest.Equal(m):
		case e == nil:
			e = &MismatchError{Connected: 1, Name: p.name, Got: m.ID(), Want: p.manifest.ID(), Diff: tensor.DiffManifests(m, p.manifest)}
		default:
			e.Connected++
			e.Name = min(e.Name, p.name)
		}
	}
	if e == nil {
		return nil
	}
	return e
}

// Admit judges the manifest of a producer that wants to open a stream, and remembers it. The error is a *MismatchError.
func (k *Keeper) Admit(name string, m *tensor.Manifest) error {
	k.mu.Lock()
	err := k.mismatch(name, m)
	fresh := false
	if err == nil {
		_, fresh = k.known.use(m)
	}
	k.mu.Unlock()
	if fresh {
		k.save()
	}
	return err
}

// save writes the file of manifests.
func (k *Keeper) save() {
	if k.cfg.Path == "" {
		return
	}
	k.saving.Lock()
	defer k.saving.Unlock()
	k.mu.Lock()
	text, err := k.known.file()
	k.mu.Unlock()
	if err == nil {
		err = writeWhole(k.cfg.Path, text)
	}
	if err != nil {
		k.cfg.Log.Error("manifests are not kept: readers cannot ask the next daemon for them", "component", "steps", "err", err)
	}
}

// Open makes the checker of a stream that was opened for a producer that was admitted, and announces it. The producer of that name before was closed. The error
// is a *MismatchError: another one came first.
func (k *Keeper) Open(name string, stream uint64, m *tensor.Manifest) (*Producer, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.mismatch(name, m); err != nil {
		return nil, err
	}
	for _, other := range k.here { // of many that are alike, one is enough
		if other.manifest.Equal(m) {
			m = other.manifest
		}
	}
	entry, _ := k.known.use(m)
	entry.users++
	p := newProducer(k, name, stream, m, entry)
	if i := slices.IndexFunc(k.away, func(t transaction) bool { return t.stream == stream }); i >= 0 {
		if t := k.away[i]; t.manifest == m.ID() {
			p.at = t
			p.at.resumed = true
		}
		k.away = slices.Delete(k.away, i, i+1)
	}
	k.here[name] = p
	k.herald.say(announcement{stream: stream, producer: p.id, manifest: m.ID(), flag: tensor.FlagOpened})
	return p, nil
}

// close is Producer.Close.
func (k *Keeper) close(p *Producer) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.here[p.name] != p {
		return
	}
	delete(k.here, p.name)
	if len(k.here) == 0 {
		k.newest.Store(0) // who comes next may go on from an earlier step
	}
	if inside, came := p.leave(); inside {
		if came {
			k.counts.cutShort.Add(1)
		}
		if p.at.came.Chunks() <= awayChunksMax {
			if len(k.away) == awayMax {
				k.away = slices.Delete(k.away, 0, 1)
			}
			k.away = append(k.away, p.at)
		}
	}
	p.entry.users--
	k.known.trim()
	k.herald.say(announcement{stream: p.stream, producer: p.id, manifest: p.manifest.ID(), flag: tensor.FlagClosed})
}

// began notes that a producer has begun a step.
func (k *Keeper) began(step uint64) {
	for {
		newest := k.newest.Load()
		if step <= newest || k.newest.CompareAndSwap(newest, step) {
			return
		}
	}
}

// Stats is a snapshot of a Keeper.
type Stats struct {
	Newest    uint64 // newest step begun; 0 also while nobody is connected
	Completed uint64 // steps of which all bytes came
	Aborted   uint64 // steps that their producer gave up
	Refused   uint64 // steps refused because they were too old
	CutShort  uint64 // steps that were incomplete when their stream ended, or its next step began
	Chunks    uint64
	Late      uint64 // of those, chunks that were marked as refused
	BadChunks map[string]uint64
	Announced uint64 // chunks that the herald wrote
	Unsaid    int    // announcements that wait for a free slot
	Manifests int    // known
	Producers []ProducerStats
}

// Stats returns a snapshot; its parts may belong to slightly different moments.
func (k *Keeper) Stats() Stats {
	st := k.counts.snapshot()
	st.Newest = k.newest.Load()
	st.Announced, st.Unsaid = k.herald.stats()
	k.mu.Lock()
	defer k.mu.Unlock()
	st.Manifests = len(k.known.all)
	for _, p := range k.here {
		st.Producers = append(st.Producers, p.stats())
	}
	slices.SortFunc(st.Producers, func(a, b ProducerStats) int { return cmp.Compare(a.Name, b.Name) })
	return st
}
