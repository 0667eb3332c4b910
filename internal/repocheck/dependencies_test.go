package repocheck

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write testdata/dependencies.golden anew")

const dependenciesHeader = `# Modules from elsewhere that each of these brings along (go list -deps, GOOS=linux). A line that is new here is a decision: is the
# module worth it, who keeps it, what does it bring? Libraries that users embed stay lean; the command may have more.

`

// dependencyRoots are the packages users import, the command, and last what only tests and tools of the repository need.
var dependencyRoots = []struct {
	name string
	args []string
}{
	{"spec", []string{"./spec"}},
	{"wire", []string{"./wire"}},
	{"client", []string{"./client"}},
	{"engine", []string{"./engine"}},
	{"cmd/ingestd", []string{"./cmd/ingestd"}},
	{"tests only", []string{"-test", "./..."}},
}

// modules lists the modules of a package and all that it imports, ours left out.
func modules(t *testing.T, dir string, args []string) []string {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-deps", "-f", "{{with .Module}}{{.Path}}{{end}}"}, args...)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOOS=linux", "GOARCH=amd64", "GOFLAGS=")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list -deps %s: %v", strings.Join(args, " "), err)
	}
	list := strings.Fields(string(out))
	slices.Sort(list)
	list = slices.Compact(list)
	return slices.DeleteFunc(list, func(m string) bool { return m == module })
}

// compareGolden says line by line what is new and what is gone.
func compareGolden(got, want string) []string {
	gotLines, wantLines := strings.Split(got, "\n"), strings.Split(want, "\n")
	var out []string
	for _, line := range gotLines {
		if !slices.Contains(wantLines, line) {
			out = append(out, "new:  "+line)
		}
	}
	for _, line := range wantLines {
		if !slices.Contains(gotLines, line) {
			out = append(out, "gone: "+line)
		}
	}
	return out
}

func TestDependenciesAreTheListedOnes(t *testing.T) {
	var b strings.Builder
	b.WriteString(dependenciesHeader)
	listed := map[string]bool{}
	for _, r := range dependencyRoots {
		list := modules(t, root(t), r.args)
		if r.name == "tests only" {
			list = slices.DeleteFunc(list, func(m string) bool { return listed[m] })
		}
		if len(list) == 0 {
			list = []string{"(none)"}
		}
		for _, m := range list {
			fmt.Fprintf(&b, "%s: %s\n", r.name, m)
			listed[m] = true
		}
	}
	golden := filepath.Join("testdata", "dependencies.golden")
	if *update {
		if err := os.WriteFile(golden, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range compareGolden(b.String(), string(want)) {
		t.Errorf("%s", line)
	}
	if t.Failed() {
		t.Log("if the change is meant: go test ./internal/repocheck -run TestDependencies -update")
	}
}

func TestDependencyCheckFindsItsFaults(t *testing.T) {
	want := "wire: (none)\nengine: a.example/x\n"
	for got, problem := range map[string]string{
		"wire: b.example/new\nengine: a.example/x\n":                    "new:  wire: b.example/new",
		"wire: (none)\nengine: a.example/x\nengine: c.example/y\n":      "new:  engine: c.example/y",
		"wire: (none)\nengine: (none)\n":                                "gone: engine: a.example/x",
		"wire: (none)\nengine: a.example/x\ncmd/ingestd: a.example/x\n": "new:  cmd/ingestd: a.example/x",
	} {
		if !slices.Contains(compareGolden(got, want), problem) {
			t.Errorf("comparing %q with %q did not report %q", got, want, problem)
		}
	}
	if found := compareGolden(want, want); len(found) != 0 {
		t.Errorf("equal lists reported as different: %q", found)
	}
}
