package repocheck

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"sort"
	"strings"
	"testing"
)

const module = "github.com/ingestd/ingestd"

// file is one text file of the tree, with its syntax if it is Go.
type file struct {
	path   string // slash-separated, from the root of the tree
	text   string
	syntax *ast.File // nil unless Go
}

func (f *file) dir() string  { return path.Dir(f.path) }
func (f *file) isTest() bool { return strings.HasSuffix(f.path, "_test.go") }

// tree is what the rules look at.
type tree struct {
	fset  *token.FileSet
	files []*file         // text files in order of their paths
	names map[string]bool // every file and folder, binary ones too
}

// problem is one place that breaks a rule.
type problem struct {
	path string
	line int
	text string
}

func (p problem) String() string {
	if p.line == 0 {
		return p.path + ": " + p.text
	}
	return fmt.Sprintf("%s:%d: %s", p.path, p.line, p.text)
}

// at makes a problem at a position of a Go file.
func (t *tree) at(f *file, pos token.Pos, format string, args ...any) problem {
	return problem{f.path, t.fset.Position(pos).Line, fmt.Sprintf(format, args...)}
}

// skipped names folders that hold no source of ours: those the go command skips (but .ci), and what is built.
func skipped(name string) bool {
	switch {
	case name == "." || name == ".ci":
		return false
	case strings.HasPrefix(name, "."), strings.HasPrefix(name, "_"), strings.HasSuffix(name, ".egg-info"):
		return true
	}
	return name == "bin" || name == "build" || name == "dist"
}

var textName = regexp.MustCompile(`\.(go|md|py|pyi|toml|ya?ml|golden|h|sh|cfg|txt|json|editorconfig)$|^(Makefile|LICENSE|go\.mod|run|\.gitignore)$`)

// load reads the tree and parses its Go files.
func load(fsys fs.FS) (*tree, error) {
	t := &tree{fset: token.NewFileSet(), names: map[string]bool{}}
	err := fs.WalkDir(fsys, ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entry.IsDir() {
			if skipped(entry.Name()) {
				return fs.SkipDir
			}
			t.names[name] = true
			return nil
		}
		t.names[name] = true
		if !entry.Type().IsRegular() || !textName.MatchString(entry.Name()) {
			return nil
		}
		return t.read(fsys, name)
	})
	sort.Slice(t.files, func(i, j int) bool { return t.files[i].path < t.files[j].path })
	return t, err
}

func (t *tree) read(fsys fs.FS, name string) error {
	data, err := fs.ReadFile(fsys, name)
	if err != nil {
		return err
	}
	f := &file{path: name, text: string(data)}
	if strings.HasSuffix(name, ".go") {
		if f.syntax, err = parser.ParseFile(t.fset, name, data, parser.ParseComments|parser.SkipObjectResolution); err != nil {
			return err
		}
	}
	t.files = append(t.files, f)
	return nil
}

// golang returns the Go files.
func (t *tree) golang() []*file {
	var out []*file
	for _, f := range t.files {
		if f.syntax != nil {
			out = append(out, f)
		}
	}
	return out
}

// packages returns the Go files by folder, and the folders in order.
func (t *tree) packages() (map[string][]*file, []string) {
	by := map[string][]*file{}
	var dirs []string
	for _, f := range t.golang() {
		if by[f.dir()] == nil {
			dirs = append(dirs, f.dir())
		}
		by[f.dir()] = append(by[f.dir()], f)
	}
	sort.Strings(dirs)
	return by, dirs
}

// find returns the file of that path, or nil.
func (t *tree) find(name string) *file {
	for _, f := range t.files {
		if f.path == name {
			return f
		}
	}
	return nil
}

// root is the folder of go.mod above this package.
func root(t *testing.T) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		if dir == filepath.Dir(dir) {
			t.Fatal("no go.mod above the package: run the test inside the repository")
		}
		dir = filepath.Dir(dir)
	}
}
