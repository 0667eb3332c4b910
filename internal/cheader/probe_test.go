//go:build linux && !race

package cheader

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os/exec"
	"strconv"
	"strings"
	"testing"
)

// probe is a running program over the header.
type probe struct {
	t    *testing.T
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Reader
	said bytes.Buffer // standard error
	gone bool
}

// start runs a probe. At the end of the test it must end with 0: the sanitizers see to it that it does so only if all was well.
func start(t *testing.T, b built) *probe {
	t.Helper()
	p := &probe{t: t, cmd: exec.Command(b.program("probe"))}
	var err error
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.cmd.Stderr = &p.said
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.out = bufio.NewReaderSize(out, 1<<17)
	t.Cleanup(func() {
		if !p.gone {
			if err := p.wait(); err != nil {
				t.Errorf("the probe: %v\n%s", err, p.said.String())
			}
		}
	})
	return p
}

// wait ends the probe's input and waits for its end.
func (p *probe) wait() error {
	p.gone = true
	_ = p.in.Close()
	_, _ = io.Copy(io.Discard, p.out)
	return p.cmd.Wait()
}

// kill ends the probe by SIGKILL.
func (p *probe) kill() {
	p.gone = true
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

// send gives the probe a line; answer is read later.
func (p *probe) send(format string, args ...any) {
	p.t.Helper()
	if _, err := fmt.Fprintf(p.in, format+"\n", args...); err != nil {
		p.t.Fatalf("%v\n%s", err, p.said.String())
	}
}

func (p *probe) answer() string {
	p.t.Helper()
	line, err := p.out.ReadString('\n')
	if err != nil {
		p.t.Fatalf("the probe ended: %v, %v\n%s", err, p.wait(), p.said.String())
	}
	line = strings.TrimSuffix(line, "\n")
	if strings.HasPrefix(line, "broken") {
		p.t.Fatal(line)
	}
	return line
}

// do sends a line and returns the answer.
func (p *probe) do(format string, args ...any) string {
	p.t.Helper()
	p.send(format, args...)
	return p.answer()
}

// ok does what must succeed and returns the words after "ok".
func (p *probe) ok(format string, args ...any) string {
	p.t.Helper()
	p.send(format, args...)
	return p.isOK(fmt.Sprintf(format, args...))
}

// isOK reads an answer that must be a success.
func (p *probe) isOK(what string) string {
	p.t.Helper()
	line := p.answer()
	rest, ok := strings.CutPrefix(line, "ok")
	if !ok {
		p.t.Fatalf("%s: %s", what, line)
	}
	return strings.TrimSpace(rest)
}

// want does what must succeed with that answer.
func (p *probe) want(answer, format string, args ...any) {
	p.t.Helper()
	if got := p.ok(format, args...); got != answer {
		p.t.Fatalf("%s: %q, want %q", fmt.Sprintf(format, args...), got, answer)
	}
}

// fails does what must fail with that code and with these words in its error.
func (p *probe) fails(code, words, format string, args ...any) {
	p.t.Helper()
	p.send(format, args...)
	p.isError(code, words, fmt.Sprintf(format, args...))
}

// isError reads an answer that must be that error; words are separated by "|".
func (p *probe) isError(code, words, what string) {
	p.t.Helper()
	line := p.answer()
	if !strings.HasPrefix(line, "error "+code+"\t") {
		p.t.Fatalf("%s: %s, want the error %s", what, line, code)
	}
	for word := range strings.SplitSeq(words, "|") {
		if !strings.Contains(line, word) {
			p.t.Fatalf("%s: %s, want it to say %q", what, line, word)
		}
	}
}

// fds returns how many descriptors the probe has open.
func (p *probe) fds() int {
	p.t.Helper()
	n, err := strconv.Atoi(p.ok("fds"))
	if err != nil {
		p.t.Fatal(err)
	}
	return n
}

// encoded makes a word of a text: blanks, control characters, quotes and non-ASCII bytes as %xx, no text as two quotes.
func encoded(text string) string {
	if text == "" {
		return "''"
	}
	var out strings.Builder
	for _, c := range []byte(text) {
		if c <= ' ' || c >= 0x7f || c == '%' || c == '\'' || text == "-" {
			fmt.Fprintf(&out, "%%%02x", c)
		} else {
			out.WriteByte(c)
		}
	}
	return out.String()
}

// options of an attaching call; empty ones are NULL.
type options struct {
	path, table, group, session, client, spec, fingerprint string
	prefetch, deadline                                     int
}

func word(text string) string {
	if text == "" {
		return "-"
	}
	return encoded(text)
}

func (o options) attach() string { return o.line("attach", o.group) }

func (o options) open() string { return o.line("open", o.session) }

func (o options) line(verb, third string) string {
	if o.deadline == 0 {
		o.deadline = patience
	}
	return fmt.Sprintf("%s %s %s %s %d %s %s %s %d", verb, word(o.path), word(o.table), word(third), o.prefetch,
		word(o.client), word(o.spec), word(o.fingerprint), o.deadline)
}

// patience is what is waited for what must come, in milliseconds; what must not come is waited for shorter.
const patience = 60_000

func readAll(t *testing.T, r io.Reader) string {
	t.Helper()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Error(err)
	}
	return string(b)
}
