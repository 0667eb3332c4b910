package repocheck

import (
	"go/ast"
	"path"
	"regexp"
	"strings"
)

// checkPackageDocs: every package has doc.go, and it opens with what the package is.
func checkPackageDocs(t *tree) []problem {
	var out []problem
	by, dirs := t.packages()
	for _, dir := range dirs {
		doc := t.find(path.Join(dir, "doc.go"))
		if doc == nil {
			out = append(out, problem{dir, 0, "package without doc.go: say what it is for, who owns the bytes, what may fail and where the proof is"})
			continue
		}
		name := by[dir][0].syntax.Name.Name
		want := "Package " + name + " "
		if name == "main" {
			want = "Command " + path.Base(dir) + " "
		}
		if text := doc.syntax.Doc.Text(); !strings.HasPrefix(text, want) {
			out = append(out, problem{doc.path, 1, "the package comment must open with \"" + want + "...\""})
		}
	}
	return out
}

// checkArchitecture: docs/ARCHITECTURE.md, which newcomers read first, names every package.
func checkArchitecture(t *tree) []problem {
	const name = "docs/ARCHITECTURE.md"
	page := t.find(name)
	if page == nil {
		return []problem{{name, 0, "missing"}}
	}
	var out []problem
	_, dirs := t.packages()
	for _, dir := range dirs {
		if !strings.Contains(page.text, "`"+dir+"`") && !strings.Contains(page.text, "`"+dir+"/`") {
			out = append(out, problem{name, 0, "does not name package `" + dir + "`: give it a row"})
		}
	}
	return out
}

// checkPackageNames: no package is named after having no job.
func checkPackageNames(t *tree) []problem {
	var out []problem
	_, dirs := t.packages()
	for _, dir := range dirs {
		switch name := path.Base(dir); name {
		case "util", "utils", "common", "helpers", "types", "misc", "shared", "base":
			out = append(out, problem{dir, 0, "package name " + name + " says nothing: name it after its job"})
		}
	}
	return out
}

const linesMax = 700

// checkFileLength: no source file is longer than one sitting.
func checkFileLength(t *tree) []problem {
	var out []problem
	for _, f := range t.files {
		if f.syntax == nil && !strings.HasSuffix(f.path, ".py") {
			continue
		}
		if n := strings.Count(f.text, "\n"); n > linesMax {
			out = append(out, problem{f.path, linesMax + 1, "more than 700 lines: split the file by its nouns"})
		}
	}
	return out
}

var unsafeFile = regexp.MustCompile(`_unsafe(_[a-z0-9]+)?(_test)?\.go$`)

// checkUnsafe: package unsafe is imported in *_unsafe.go only, and each declaration that uses it has a Safety note.
func checkUnsafe(t *tree) []problem {
	var out []problem
	for _, f := range t.golang() {
		if !imports(f, "unsafe") {
			continue
		}
		if !unsafeFile.MatchString(f.path) {
			out = append(out, problem{f.path, 1, "imports unsafe: move the cast into a file named *_unsafe.go"})
			continue
		}
		for _, decl := range f.syntax.Decls {
			if !usesUnsafe(decl) || hasSafetyNote(f, decl) {
				continue
			}
			out = append(out, t.at(f, decl.Pos(), "uses unsafe without a \"// Safety:\" note: say why it is aligned, in bounds, alive, and aliased how"))
		}
	}
	return out
}

func imports(f *file, name string) bool {
	for _, spec := range f.syntax.Imports {
		if spec.Path.Value == `"`+name+`"` {
			return true
		}
	}
	return false
}

// usesUnsafe reports whether a declaration converts with unsafe. Sizeof, Alignof and Offsetof are constants and need no note.
func usesUnsafe(decl ast.Decl) bool {
	found := false
	ast.Inspect(decl, func(n ast.Node) bool {
		if sel, ok := n.(*ast.SelectorExpr); ok {
			if x, ok := sel.X.(*ast.Ident); ok && x.Name == "unsafe" {
				switch sel.Sel.Name {
				case "Sizeof", "Alignof", "Offsetof":
				default:
					found = true
				}
			}
		}
		return !found
	})
	return found
}

func hasSafetyNote(f *file, decl ast.Decl) bool {
	from := decl.Pos()
	switch d := decl.(type) {
	case *ast.FuncDecl:
		if d.Doc != nil {
			from = d.Doc.Pos()
		}
	case *ast.GenDecl:
		if d.Doc != nil {
			from = d.Doc.Pos()
		}
	}
	for _, group := range f.syntax.Comments {
		if group.Pos() >= from && group.Pos() < decl.End() && strings.Contains(group.Text(), "Safety:") {
			return true
		}
	}
	return false
}

var (
	edgeMention = regexp.MustCompile(`\bedge\(([^)]*)\)`)
	edgeForm    = regexp.MustCompile(`\bedge\(([a-z0-9-]+)\): (release|acquire) - .`)
)

// checkEdges: a memory-ordering edge has both ends, named in one form, in one package.
func checkEdges(t *tree) []problem {
	var out []problem
	by, dirs := t.packages()
	for _, dir := range dirs {
		ends := map[string]map[string]problem{} // edge, then release or acquire: one place of it
		for _, f := range by[dir] {
			for _, group := range f.syntax.Comments {
				for _, c := range group.List {
					if edgeMention.MatchString(c.Text) && !edgeForm.MatchString(c.Text) {
						out = append(out, t.at(f, c.Pos(), "write an edge as \"edge(name): release - why\" or \"edge(name): acquire - what it entitles to\""))
					}
					for _, m := range edgeForm.FindAllStringSubmatch(c.Text, -1) {
						if ends[m[1]] == nil {
							ends[m[1]] = map[string]problem{}
						}
						ends[m[1]][m[2]] = t.at(f, c.Pos(), "edge %s has no %s in package %s", m[1], map[string]string{"release": "acquire", "acquire": "release"}[m[2]], dir)
					}
				}
			}
		}
		for _, have := range ends {
			if len(have) == 2 {
				continue
			}
			for _, lonely := range have {
				out = append(out, lonely)
			}
		}
	}
	return out
}

var (
	ambiguousEnd  = regexp.MustCompile(`^(head|tail)([A-Z].*)?$|(Head|Tail)([A-Z].*)?$`)
	queuePackages = map[string]bool{"ring": true, "spsc": true, "drainer": true, "sampler": true, "shm": true, "engine": true}
)

// checkVocabulary: queues have cursors named after what they count; systems disagree on which end is the head.
func checkVocabulary(t *tree) []problem {
	var out []problem
	for _, f := range t.golang() {
		if !queuePackages[f.dir()] {
			continue
		}
		ast.Inspect(f.syntax, func(n ast.Node) bool {
			if id, ok := n.(*ast.Ident); ok && ambiguousEnd.MatchString(id.Name) {
				out = append(out, t.at(f, id.Pos(), "%s: never head or tail; say produced, consumed, published, leased", id.Name))
			}
			return true
		})
	}
	return out
}
