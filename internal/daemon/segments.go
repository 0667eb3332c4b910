package daemon

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/shm"
	"github.com/ingestd/ingestd/spec"
)

// segmentNameMax is the longest escaped table name in a file's name; a longer one is cut, and a hash of it tells it from others.
const segmentNameMax = 200

// segmentPath is where a table's segment is kept.
func segmentPath(dir, table string) string {
	name := url.PathEscape(table)
	if len(name) > segmentNameMax {
		sum := sha256.Sum256([]byte(table))
		name = name[:segmentNameMax-17] + "." + hex.EncodeToString(sum[:8])
	}
	return filepath.Join(dir, name+".segment")
}

// manifestsPath is where the manifests of a table of tensors are kept, beside its segment.
func manifestsPath(segment string) string {
	return strings.TrimSuffix(segment, ".segment") + ".manifests"
}

// checkSegmentDir says what is wrong with a folder for segments: whoever can write there can put another file in a segment's place.
func checkSegmentDir(dir string) error {
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("there is no folder %s: make one for this daemon alone, with mkdir -m 700", dir)
	case err != nil:
		return err
	case !info.IsDir():
		return fmt.Errorf("%s is no folder", dir)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("the folder %s belongs to user %d, this daemon is user %d: whoever owns it could replace the segments", dir, st.Uid, os.Geteuid())
	}
	if mode := info.Mode().Perm(); mode&0o022 != 0 {
		return fmt.Errorf(
			"others may write to the folder %s (mode %#o), and so replace the segments: chmod go-w it, or make one inside it with mkdir -m 700", dir, mode)
	}
	return nil
}

// SegmentError says that a kept segment cannot be taken up. It is left as it is.
type SegmentError struct {
	Table, Path string
	Err         error
}

func (e *SegmentError) Error() string {
	reason := e.Err.Error()
	var mismatch *ring.MismatchError
	if errors.As(e.Err, &mismatch) {
		reason = mismatchText(mismatch)
	}
	advice := "move it away (ingestd inspect and ingestd check say what it holds), or have it overwritten with --discard-segments, which loses what it holds"
	var used *shm.InUseError
	if errors.As(e.Err, &used) {
		advice = "stop the other daemon, or give this one another segment_dir"
	}
	return fmt.Sprintf("table %q: the segment %s cannot be taken up: %s: %s", e.Table, e.Path, reason, advice)
}

func (e *SegmentError) Unwrap() error { return e.Err }

// mismatchText says in what a segment differs from its table, leaf by leaf where that is it.
func mismatchText(e *ring.MismatchError) string {
	text := "it was made for another table: " + strings.Join(e.Differ, ", ")
	have, err := spec.ParseJSON(e.Have.Spec)
	if err != nil {
		return text
	}
	want, err := spec.ParseJSON(e.Want.Spec)
	if err != nil || have.Equal(want) {
		return text
	}
	return text + ": " + spec.FormatDiff(spec.Diff(have, want))
}

// openSegment finds the memory of a table whose segment is kept: what an earlier daemon left, with true, or a new file.
func openSegment(p *tablePlan, discard bool) (m *shm.Memory, found bool, err error) {
	cfg := shm.MemoryConfig{Name: "ingestd " + p.Name, Path: p.path, Keep: true, Fillable: p.fill}
	m, err = shm.OpenNamed(cfg)
	var foreign *shm.ForeignFileError
	var used *shm.InUseError
	switch {
	case errors.Is(err, fs.ErrNotExist):
		m, err = newSegment(p, cfg)
		return m, false, err
	case errors.As(err, &foreign) && (discard || isEmpty(p.path)):
		// Empty: the daemon was killed before it had sized the file.
		if err := removeOwn(p.path); err != nil {
			return nil, false, &SegmentError{p.Name, p.path, errors.Join(foreign, err)}
		}
		m, err = newSegment(p, cfg)
		return m, false, err
	case errors.As(err, &foreign), errors.As(err, &used):
		return nil, false, &SegmentError{p.Name, p.path, err}
	case err != nil:
		return nil, false, fmt.Errorf("table %q: %w", p.Name, err)
	case !neverUsed(m.Bytes()):
		return m, true, nil
	}
	m, err = replaceSegment(p, m)
	return m, false, err
}

func newSegment(p *tablePlan, cfg shm.MemoryConfig) (*shm.Memory, error) {
	cfg.Size = p.bytes
	return shm.NewMemory(cfg)
}

// replaceSegment makes a new file in the place of one that is open. Its lock is held until the new one is there under the name.
func replaceSegment(p *tablePlan, old *shm.Memory) (*shm.Memory, error) {
	if err := os.Remove(p.path); err != nil {
		return nil, errors.Join(err, old.Close())
	}
	m, err := newSegment(p, shm.MemoryConfig{Name: "ingestd " + p.Name, Path: p.path, Keep: true, Fillable: p.fill})
	return m, errors.Join(err, old.Close())
}

// neverUsed tells a file whose segment was not made yet when its daemon was killed: the header's magic is written last, and the cursors are all 0.
func neverUsed(mem []byte) bool {
	const cursors, end = 256, 512
	zero := make([]byte, end)
	return len(mem) < end || bytes.Equal(mem[:8], zero[:8]) && bytes.Equal(mem[cursors:end], zero[cursors:])
}

func isEmpty(path string) bool {
	info, err := os.Lstat(path)
	return err == nil && info.Mode().IsRegular() && info.Size() == 0
}

// removeOwn removes a file that is one of ours, and nothing else.
func removeOwn(path string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !info.Mode().IsRegular() || !ok || int(st.Uid) != os.Geteuid() || st.Nlink != 1 {
		return fmt.Errorf("%s is not removed: it is no regular file of this user with one name", path)
	}
	return os.Remove(path)
}

// bootID identifies this run of the machine's kernel; zero where it is not known.
func bootID() (id [16]byte) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return id
	}
	b, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(string(text)), "-", ""))
	if err == nil && len(b) == len(id) {
		copy(id[:], b)
	}
	return id
}

// refused tells whether an error of the engine is about the segment that it was to take up.
func refused(err error) bool {
	var format *ring.FormatError
	var mismatch *ring.MismatchError
	var unclean *ring.UncleanError
	var damaged *ring.DamagedError
	return errors.As(err, &format) || errors.As(err, &mismatch) || errors.As(err, &unclean) || errors.As(err, &damaged)
}
