package bench

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/ingestd/ingestd/internal/lossynet"
)

// stopGrace is how long a process has to end by itself before it is killed: on a busy machine the kernel needs 10 s to free a ring of 8 GiB.
const stopGrace = time.Minute

// process is a running child of the bench.
type process struct {
	name string
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Reader
	pipe *os.File // what out reads
	log  *lastLines
	done chan struct{} // closed when the process has ended, after err is set
	err  error
}

// startChild runs one of the bench's own subcommands and waits until it is ready.
func startChild(name, binary string, args ...string) (*process, *ready, error) {
	return startChildAt(nil, name, binary, args...)
}

// startChildAt is startChild on one side of a link.
func startChildAt(side *lossynet.Side, name, binary string, args ...string) (*process, *ready, error) {
	return launch{name: name, binary: binary, args: append([]string{"bench"}, args...), side: side}.child()
}

// launch is how a process is started.
type launch struct {
	name, binary string
	args         []string
	files        []*os.File     // its descriptors from 3 on
	env          []string       // beside ours
	side         *lossynet.Side // of the link that it is on; nil: none
}

// child starts a process that speaks the control protocol and waits until it is ready.
func (l launch) child() (*process, *ready, error) {
	p, err := l.start()
	if err != nil {
		return nil, nil, err
	}
	answer, err := p.receive()
	if err == nil && answer.Ready == nil {
		err = p.fail(errors.New("did not say that it is ready"))
	}
	if err != nil {
		p.kill()
		return nil, nil, err
	}
	return p, answer.Ready, nil
}

// start runs the binary. The child dies with the parent, whatever kills that.
func (l launch) start() (*process, error) {
	name := l.name
	p := &process{name: name, cmd: exec.Command(l.binary, l.args...), log: &lastLines{}, done: make(chan struct{})}
	p.cmd.ExtraFiles = l.files
	if len(l.env) > 0 {
		p.cmd.Env = append(os.Environ(), l.env...)
	}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	p.cmd.Stderr = p.log
	in, err := p.cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	// A pipe of our own: with StdoutPipe, Wait would close it under the reader.
	outRead, outWrite, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, errors.Join(err, in.Close()))
	}
	p.cmd.Stdout = outWrite
	p.in, p.out, p.pipe = in, bufio.NewReader(outRead), outRead
	err = l.begin(p)
	outWrite.Close()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, errors.Join(err, in.Close(), outRead.Close()))
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// begin starts a process where it belongs. It dies with the thread that started it, and threads that were on a side of a link end: so this one stays as long as the process.
func (l launch) begin(p *process) error {
	started := make(chan error, 2)
	start := func() error {
		err := p.cmd.Start()
		started <- err
		if err == nil {
			<-p.done
		}
		return err
	}
	go func() {
		if l.side != nil {
			started <- l.side.Do(start)
			return
		}
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		_ = start() // has said it
	}()
	return <-started
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// fail adds to err what the process logged last.
func (p *process) fail(err error) error {
	select {
	case <-p.done:
		err = errors.Join(err, fmt.Errorf("it has ended: %v", p.cmd.ProcessState))
	default:
	}
	if text := p.log.text(); text != "" {
		return fmt.Errorf("%s: %w; it wrote:\n%s", p.name, err, text)
	}
	return fmt.Errorf("%s: %w", p.name, err)
}

// answerTimeout is for a child that hangs; populating a large memory is the longest that one works.
const answerTimeout = 3 * time.Minute

// receive reads one reply.
func (p *process) receive() (reply, error) {
	watchdog := time.AfterFunc(answerTimeout, func() { _ = p.cmd.Process.Kill() })
	defer watchdog.Stop()
	line, err := p.out.ReadBytes('\n')
	if err != nil {
		p.waitFor(time.Second)
		return reply{}, p.fail(fmt.Errorf("no answer: %w", err))
	}
	var answer reply
	if err := json.Unmarshal(line, &answer); err != nil {
		return reply{}, p.fail(fmt.Errorf("answer %q: %w", line, err))
	}
	if answer.Error != "" {
		return reply{}, p.fail(errors.New(answer.Error))
	}
	return answer, nil
}

// ask sends a request and waits for its reply.
func (p *process) ask(r request) (reply, error) {
	line, err := json.Marshal(r)
	if err != nil {
		return reply{}, err
	}
	if _, err := p.in.Write(append(line, '\n')); err != nil {
		p.waitFor(time.Second)
		return reply{}, p.fail(fmt.Errorf("ask for %s: %w", r.Do, err))
	}
	return p.receive()
}

// values asks for one thing and returns the figures of the answer; the answer has those that are named.
func (p *process) values(r request, names ...string) (map[string]int64, error) {
	answer, err := p.ask(r)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if _, ok := answer.Values[name]; !ok {
			return nil, p.fail(fmt.Errorf("answered %s without %q", r.Do, name))
		}
	}
	return answer.Values, nil
}

func (p *process) snapshot(pids ...int) (*snapshot, error) {
	answer, err := p.ask(request{Do: doSnapshot, Pids: pids})
	if err != nil {
		return nil, err
	}
	if answer.Snapshot == nil {
		return nil, p.fail(errors.New("answered without a snapshot"))
	}
	return answer.Snapshot, nil
}

func (p *process) waitFor(d time.Duration) bool {
	select {
	case <-p.done:
		return true
	case <-time.After(d):
		return false
	}
}

// stop ends a child that speaks the control protocol.
func (p *process) stop() error {
	// Errors of the pipe say only that the process has ended already; finish says how.
	_, _ = p.in.Write([]byte(`{"do":"` + doStop + "\"}\n"))
	_ = p.in.Close()
	return p.finish()
}

// terminate ends a process by SIGTERM.
func (p *process) terminate() error {
	err := p.cmd.Process.Signal(syscall.SIGTERM)
	if errors.Is(err, os.ErrProcessDone) {
		err = nil
	}
	return errors.Join(err, p.finish())
}

func (p *process) finish() error {
	defer p.pipe.Close()
	if !p.waitFor(stopGrace) {
		err := p.cmd.Process.Kill()
		<-p.done
		return p.fail(errors.Join(fmt.Errorf("did not end within %v and was killed", stopGrace), err))
	}
	if p.err != nil {
		return p.fail(p.err)
	}
	return nil
}

// kill ends it at once; for clean-up after another error.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
	p.pipe.Close()
}

// logOutput puts what the process prints with what it logs; for one that does not speak the control protocol.
func (p *process) logOutput() {
	go func() { _, _ = io.Copy(p.log, p.out) }()
}

// lastLines keeps the last lines that a process wrote.
type lastLines struct {
	mu  sync.Mutex
	buf []byte
}

const lastLinesMax = 4096

func (t *lastLines) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, b...)
	if extra := len(t.buf) - lastLinesMax; extra > 0 {
		t.buf = append(t.buf[:0], t.buf[extra:]...)
	}
	return len(b), nil
}

func (t *lastLines) text() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.buf))
}
