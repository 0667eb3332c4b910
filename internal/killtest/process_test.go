//go:build linux && !race

package killtest

import (
	"bufio"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ingestd/ingestd/internal/failpoint"
)

var (
	soakFor  = flag.Duration("soak", 0, "run TestSoak for so long; 0: not")
	seedFlag = flag.Uint64("seed", 0, "of the random choices; 0: a new one")
)

// The binaries, built by TestMain with the tag failpoints.
var ingestdPath, peerPath string

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "ingestd-kill-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		ingestdPath, peerPath = filepath.Join(dir, "ingestd"), filepath.Join(dir, "peer")
		const ours = "github.com/ingestd/ingestd/"
		cmd := exec.Command("go", "build", "-tags", "failpoints", "-o", dir+"/", ours+"cmd/ingestd", ours+"internal/killtest/peer")
		if out, err := cmd.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "%v: %v\n%s", cmd.Args, err, out)
			return 1
		}
		return m.Run()
	}())
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// patience is how long the harness waits for something before it says so instead of hanging.
const patience = 30 * time.Second

// process is a running daemon or peer.
type process struct {
	cmd    *exec.Cmd
	said   words
	done   chan struct{} // closed when it has ended and its output was read
	killed atomic.Bool   // by the harness
	point  string        // the failpoint it was started with
	lines  atomic.Uint64 // of its standard output
}

// words keeps the last part of what a process wrote to its standard error.
type words struct {
	mu  sync.Mutex
	buf []byte
}

const wordsMax = 32 << 10

func (w *words) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.buf = append(w.buf, b...); len(w.buf) > 2*wordsMax {
		w.buf = append(w.buf[:0], w.buf[len(w.buf)-wordsMax:]...)
	}
	return len(b), nil
}

func (w *words) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return string(bytes.TrimSpace(w.buf))
}

// spawn starts a process, that dies with the test. Each whole line of its standard output goes to line, on another goroutine; point may name a failpoint
// and the number of the hit at which it acts.
func spawn(path, point string, line func(string), args ...string) (*process, error) {
	p := &process{cmd: exec.Command(path, args...), done: make(chan struct{}), point: point}
	p.cmd.Stderr = &p.said
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p.cmd.Env = append(os.Environ(), failpoint.Variable+"="+point)
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		r := bufio.NewReaderSize(out, 64<<10)
		for {
			text, err := r.ReadString('\n')
			if err != nil {
				break // what has no newline was cut short by a kill
			}
			if line != nil {
				line(strings.TrimSuffix(text, "\n"))
			}
			p.lines.Add(1)
		}
		_ = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// signal sends a signal; a process that has just ended does not mind.
func (p *process) signal(sig syscall.Signal) { _ = p.cmd.Process.Signal(sig) }

// kill sends SIGKILL and waits for the end.
func (p *process) kill() {
	p.killed.Store(true)
	p.signal(syscall.SIGKILL)
	<-p.done
}

func (p *process) running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// struck tells whether the process, which is over, was ended by SIGKILL.
func (p *process) struck() bool { return p.endedBy(syscall.SIGKILL) }

func (p *process) endedBy(sig syscall.Signal) bool {
	if p.running() {
		return false
	}
	status, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && status.Signal() == sig
}

// ending describes the end of a process, with its last words.
func (p *process) ending() string {
	return fmt.Sprintf("%s %s: %v\n%s", filepath.Base(p.cmd.Path), strings.Join(p.cmd.Args[1:min(len(p.cmd.Args), 2)], " "), p.cmd.ProcessState, p.said.String())
}

// ends waits for the end of the process and returns an error unless the code is as wanted.
func (p *process) ends(code int) error {
	select {
	case <-p.done:
	case <-time.After(patience):
		p.signal(syscall.SIGQUIT) // for the stacks
		select {
		case <-p.done:
		case <-time.After(patience):
		}
		return fmt.Errorf("it did not end within %v: %s", patience, p.said.String())
	}
	if got := p.cmd.ProcessState.ExitCode(); got != code {
		return fmt.Errorf("exit code %d, want %d: %s", got, code, p.ending())
	}
	return nil
}

// memory returns a field of /proc/PID/status in bytes.
func (p *process) memory(field string) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.pid()))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, field+":"); ok {
			kib, err := strconv.ParseInt(strings.Fields(value)[0], 10, 64)
			return kib << 10, err
		}
	}
	return 0, errors.New("no " + field + " in /proc/PID/status")
}

// descriptors counts the open descriptors of the process.
func (p *process) descriptors() (int, error) {
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.pid()))
	return len(list), err
}

// within waits until cond holds and tells whether it did in time.
func within(limit time.Duration, cond func() bool) bool {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for until := time.Now().Add(limit); !cond(); {
		if (<-tick.C).After(until) {
			return false
		}
	}
	return true
}
