package failpoint

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestParse: both sides of what the variable may say.
func TestParse(t *testing.T) {
	name := Names[0]
	for text, want := range map[string]point{name + ":1": {name, 1, false}, name + ":18446744073709551615": {name, 1<<64 - 1, false}, name + ":7:stop": {name, 7, true}} {
		if got, err := parse(text); err != nil || got != want {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
	for text, want := range map[string]string{
		"":                             "there is no failpoint \"\"",
		"nowhere:1":                    "there is no failpoint \"nowhere\"; there are " + name,
		name:                           "write NAME:COUNT",
		name + ":":                     "write NAME:COUNT",
		name + ":0":                    "COUNT at least 1",
		name + ":-1":                   "write NAME:COUNT",
		name + ":18446744073709551616": "write NAME:COUNT",
		name + ":1:go":                 "can only be stop",
		name + ":1:":                   "can only be stop",
	} {
		if got, err := parse(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %+v, %v; want %q", text, got, err, want)
		}
	}
}

// TestNamesAndSites: every name is hit somewhere in the package that it names, and every hit has its name in the list.
func TestNamesAndSites(t *testing.T) {
	if sorted := slices.Compact(slices.Sorted(slices.Values(Names))); len(sorted) != len(Names) {
		t.Error("a name stands twice in the list")
	}
	hit := map[string]bool{}
	root := filepath.Join("..", "..")
	check(t, filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() && len(entry.Name()) > 2 && strings.HasPrefix(entry.Name(), ".") {
			return fs.SkipDir
		}
		if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || !isHit(call.Fun) {
				return true
			}
			literal, ok := call.Args[0].(*ast.BasicLit)
			if !ok {
				t.Errorf("%s: the name of a failpoint must be written out, so that it can be found", path)
				return true
			}
			name, err := strconv.Unquote(literal.Value)
			check(t, err)
			dir, err := filepath.Rel(root, filepath.Dir(path))
			check(t, err)
			if !slices.Contains(Names, name) || !strings.HasPrefix(name, filepath.ToSlash(dir)+"/") {
				t.Errorf("%s hits %q, which is not in Names or names another package", path, name)
			}
			hit[name] = true
			return true
		})
		return nil
	}))
	for _, name := range Names {
		if !hit[name] {
			t.Errorf("nothing hits %q", name)
		}
	}
}

func isHit(fun ast.Expr) bool {
	sel, ok := fun.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	x, ok := sel.X.(*ast.Ident)
	return ok && x.Name == "failpoint" && sel.Sel.Name == "Hit"
}

// TestNothingIsLeft: the binary that users run has no trace of the points in its machine code; the one for the tests has.
func TestNothingIsLeft(t *testing.T) {
	for _, tag := range []string{"", "failpoints"} {
		binary := filepath.Join(t.TempDir(), "ingestd")
		output(t, "build", "-tags", tag, "-o", binary, "github.com/ingestd/ingestd/cmd/ingestd")
		symbols := output(t, "tool", "nm", binary)
		if !strings.Contains(symbols, "internal/daemon.New") {
			t.Fatalf("go tool nm shows no symbols of ours")
		}
		text, err := os.ReadFile(binary)
		check(t, err)
		code, names := strings.Contains(symbols, "internal/failpoint.Hit"), strings.Contains(string(text), Names[0]) || strings.Contains(string(text), Variable)
		if want := tag != ""; code != want || names != want {
			t.Errorf("tags %q: the function is there: %v, names are there: %v; want both %v", tag, code, names, want)
		}
	}
}

func output(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.Command("go", args...)
	cmd.Env = append(os.Environ(), "GOFLAGS=")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
	return string(out)
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// BenchmarkHit is beside an empty loop: without the tag they are the same.
func BenchmarkHit(b *testing.B) {
	b.Run("nothing", func(b *testing.B) {
		for range b.N {
		}
	})
	b.Run("hit", func(b *testing.B) {
		for range b.N {
			Hit("ring/commit/marked")
		}
	})
}
