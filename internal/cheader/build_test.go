//go:build linux && !race

// The race detector does not see mapped memory (it misses races there and flags correct code), so what attaches runs without it.

package cheader

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const (
	headerFolder   = "../../include"
	examplesFolder = "../../examples/c"
)

// language is one of the two that the header is for.
type language struct {
	name      string
	compilers []string
	flags     []string
}

var languages = []language{
	{"C11", []string{"gcc", "clang", "cc"}, []string{"-x", "c", "-std=c11"}},
	{"C++17", []string{"g++", "clang++", "c++"}, []string{"-x", "c++", "-std=c++17"}},
}

// strict is what the header promises to stand.
var strict = []string{"-Wall", "-Wextra", "-Werror", "-pedantic", "-I", headerFolder}

// built is what was compiled of one language: the probe and the examples.
type built struct {
	language
	compiler string
	folder   string
}

// sources are the programs, by their names in the folder.
var sources = map[string]string{
	"probe":    "testdata/probe.c",
	"trainer":  filepath.Join(examplesFolder, "trainer.c"),
	"producer": filepath.Join(examplesFolder, "producer.c"),
}

func (b built) program(name string) string { return filepath.Join(b.folder, name) }

var (
	probes  []built
	skipped string // why there are none
)

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "ingestd-cheader-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		if err := buildProbes(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

func buildProbes(dir string) error {
	var missing []string
	for _, l := range languages {
		compiler := l.find()
		if compiler == "" {
			missing = append(missing, fmt.Sprintf("no %s compiler (%s)", l.name, strings.Join(l.compilers, ", ")))
			continue
		}
		b := built{language: l, compiler: compiler, folder: filepath.Join(dir, filepath.Base(compiler))}
		if err := os.Mkdir(b.folder, 0o700); err != nil {
			return err
		}
		flags := []string{"-g"}
		if l.sanitizes(compiler, dir) {
			flags = append(flags, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
		} else {
			missing = append(missing, compiler+" has no sanitizers here")
		}
		for name, source := range sources {
			if out, err := l.compile(compiler, b.program(name), append(flags, source)...); err != nil {
				return fmt.Errorf("%s: %w\n%s", l.name, err, out)
			}
		}
		probes = append(probes, b)
	}
	skipped = strings.Join(missing, "; ")
	return nil
}

func (l language) find() string {
	for _, name := range l.compilers {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	return ""
}

// compile makes a program out of sources and flags, under strict.
func (l language) compile(compiler, to string, args ...string) (string, error) {
	all := append(append(append([]string{}, strict...), "-o", to), l.flags...)
	out, err := exec.Command(compiler, append(all, args...)...).CombinedOutput()
	return string(out), err
}

// sanitizes tells whether the compiler comes with the sanitizers' libraries, and they run on this kernel.
func (l language) sanitizes(compiler, dir string) bool {
	source, to := filepath.Join(dir, "empty.c"), filepath.Join(dir, "empty")
	if os.WriteFile(source, []byte("int main() { return 0; }\n"), 0o600) != nil {
		return false
	}
	if exec.Command(compiler, append(l.flags, "-fsanitize=address,undefined", "-o", to, source)...).Run() != nil {
		return false
	}
	return exec.Command(to).Run() == nil
}

// each runs a test with every probe there is.
func each(t *testing.T, run func(t *testing.T, b built)) {
	t.Helper()
	if len(probes) == 0 {
		t.Skip("the header is not tested: " + skipped)
	}
	if skipped != "" {
		t.Log("not all of it is tested: " + skipped)
	}
	for _, b := range probes {
		t.Run(b.name, func(t *testing.T) { run(t, b) })
	}
}

// source writes a file of that text and returns its path.
func source(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestCompiles(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		declared := "#include \"ingestd.h\"\n#include \"ingestd.h\"\nint main(void) { return ingestd_code_name(0)[0] != 'o'; }\n"
		implemented := "#define INGESTD_IMPLEMENTATION\n#include \"ingestd.h\"\n#include \"ingestd.h\"\n"
		const warn = "-fsyntax-only" // warnings that need no optimiser
		for what, args := range map[string][]string{
			"optimised":               {"-O2", "testdata/probe.c"},
			"with more warnings":      {warn, "-Wshadow", "-Wcast-qual", "-Wwrite-strings", "-Wpointer-arith", "testdata/probe.c"},
			"code only":               {warn, source(t, "i.c", implemented)},
			"declarations only":       {warn, source(t, "d.c", declared)},
			"declarations come first": {warn, "-D_DEFAULT_SOURCE", source(t, "i.c", "#include \"ingestd.h\"\n"+implemented)},
		} {
			if out, err := b.compile(b.compiler, filepath.Join(t.TempDir(), "out"), args...); err != nil {
				t.Errorf("%s: %v\n%s", what, err, out)
			}
		}
		to := filepath.Join(t.TempDir(), "out")
		if out, err := b.compile(b.compiler, to, source(t, "i.c", implemented), source(t, "d.c", declared)); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if err := exec.Command(to).Run(); err != nil {
			t.Errorf("a program of two files: %v", err)
		}
	})
}

// TestLateInclude: under -std=c11 the implementation cannot get what it needs from system headers that were read before it, and says so.
func TestLateInclude(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		if b.name != languages[0].name {
			return // C++ compilers always define _GNU_SOURCE
		}
		late := source(t, "late.c", "#include <time.h>\n#define INGESTD_IMPLEMENTATION\n#include \"ingestd.h\"\nint main(void) { return 0; }\n")
		out, err := b.compile(b.compiler, filepath.Join(t.TempDir(), "out"), late)
		if err == nil || !strings.Contains(out, "before all other includes") {
			t.Errorf("%v\n%s", err, out)
		}
	})
}

// example is a run of one of the examples.
func example(t *testing.T, b built, name string, args ...string) *exec.Cmd {
	t.Helper()
	return exec.CommandContext(t.Context(), b.program(name), args...)
}

func TestTrainerExample(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		d := startDaemon(t)
		d.push(t, 1000)
		cmd := example(t, b, "trainer", d.socket, testTable)
		var said strings.Builder
		cmd.Stderr = &said
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		d.eventually(t, "the example has attached", func() bool { return len(d.Status().Trainers) == 1 })
		d.end()
		text := readAll(t, out)
		if err := cmd.Wait(); err != nil {
			t.Fatalf("%v\n%s%s", err, text, said.String())
		}
		if !strings.Contains(text, "1000 samples") || !strings.Contains(text, "the stream has ended") {
			t.Errorf("it said:\n%s%s", text, said.String())
		}
	})
}

func TestExamplesSayWhatIsWrong(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		for _, name := range []string{"trainer", "producer"} {
			out, err := example(t, b, name, "/nowhere/ingestd.sock", testTable, "1").CombinedOutput()
			if err == nil || !strings.Contains(string(out), "is the daemon running") {
				t.Errorf("%s: %v\n%s", name, err, out)
			}
			if out, err = example(t, b, name).CombinedOutput(); err == nil || !strings.Contains(string(out), "usage:") {
				t.Errorf("%s: %v\n%s", name, err, out)
			}
		}
	})
}
