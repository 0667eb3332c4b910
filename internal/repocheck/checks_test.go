package repocheck

import (
	"maps"
	"os"
	"strings"
	"testing"
	"testing/fstest"
)

// check is one rule, and the faults that prove it can fail.
type check struct {
	name   string
	run    func(*tree) []problem
	faults []fault
}

// fault is a set of files laid over the clean tree, and what the rule must then say; an empty text removes the file.
type fault struct {
	files map[string]string
	want  string
}

func one(path, text, want string) fault { return fault{map[string]string{path: text}, want} }

// clean is a small repository that keeps every rule.
var clean = map[string]string{
	"go.mod":                 "module " + module + "\n",
	"Makefile":               "test: build\n\tgo test ./...\ndemo:\n",
	"README.md":              "Run `make demo` and `make test`; see [the format](docs/format.md).\n\n```sh\nFOO=1 make test && ingestd serve --batch-size 4\ngo test ./ring\n```\n",
	"docs/ARCHITECTURE.md":   "`spec`, `ring`, `wire/` and `cmd/ingestd`.\n",
	"docs/format.md":         "`ring/doc.go` and `ring_test.go`; `TestRing` proves it. A path of yours: `/etc/ingestd/a.yaml`.\n",
	"spec/doc.go":            "// Package spec says what a sample is.\npackage spec\n",
	"ring/doc.go":            "// Package ring holds batches. Proof: TestRing in ring_test.go.\npackage ring\n",
	"ring/ring.go":           "package ring\n\n// edge(publish): release - done.\n// edge(publish): acquire - ours.\n\nvar header int\n",
	"ring/word_unsafe.go":    "package ring\n\nimport \"unsafe\"\n\n// word points.\n//\n// Safety: aligned.\nfunc word(p *int) unsafe.Pointer { return unsafe.Pointer(p) }\n\nconst size = unsafe.Sizeof(0)\n",
	"ring/ring_test.go":      "package ring\n\nimport (\n\t\"testing\"\n\t\"" + module + "/spec\"\n)\n\nfunc TestRing(t *testing.T) { t.Skip(\"no memfd here\") }\n",
	"wire/doc.go":            "// Package wire shakes hands.\npackage wire\n\nimport _ \"" + module + "/spec\"\n",
	"cmd/ingestd/doc.go":     "// Command ingestd runs it all.\npackage main\n",
	"cmd/ingestd/main.go":    "package main\n\nvar c = command{Use: \"serve [flags]\"}\n\nvar n = flag(\"batch-size\")\n",
	"python/tests/test_a.py": "def test_a():\n    pytest.skip(\"no ml_dtypes\")\n",
}

var checks = []check{
	{"package docs", checkPackageDocs, []fault{
		one("drainer/drainer.go", "package drainer\n", "drainer: package without doc.go"),
		one("spec/doc.go", "package spec\n", "must open with \"Package spec"),
		one("cmd/ingestd/doc.go", "// Runs it all.\npackage main\n", "must open with \"Command ingestd"),
	}},
	{"architecture", checkArchitecture, []fault{
		one("docs/ARCHITECTURE.md", "`spec`, `ring` and `cmd/ingestd`; wire.\n", "does not name package `wire`"),
		one("docs/ARCHITECTURE.md", "", "docs/ARCHITECTURE.md: missing"),
	}},
	{"package names", checkPackageNames, []fault{
		one("internal/util/doc.go", "// Package util does things.\npackage util\n", "internal/util: package name util says nothing"),
	}},
	{"file length", checkFileLength, []fault{
		one("spec/long.go", "package spec\n"+strings.Repeat("\n", 700), "spec/long.go:701: more than 700 lines"),
		one("python/ingestd/long.py", strings.Repeat("\n", 701), "python/ingestd/long.py:701"),
	}},
	{"unsafe", checkUnsafe, []fault{
		one("ring/ring.go", "package ring\n\nimport \"unsafe\"\n\nvar _ unsafe.Pointer\n", "ring/ring.go:1: imports unsafe"),
		one("ring/ring_test.go", "package ring\n\nimport \"unsafe\"\n\nvar _ unsafe.Pointer\n", "ring/ring_test.go:1: imports unsafe"),
		one("ring/word_unsafe.go", "package ring\n\nimport \"unsafe\"\n\n// word points.\nfunc word(p *int) unsafe.Pointer { return unsafe.Pointer(p) }\n", "ring/word_unsafe.go:6: uses unsafe without"),
		one("ring/word_unsafe.go", "package ring\n\nimport \"unsafe\"\n\n// Safety: a note of f's.\nfunc f() {}\n\nvar p = unsafe.Pointer(nil)\n", "ring/word_unsafe.go:8: uses unsafe without"),
	}},
	{"edges", checkEdges, []fault{
		one("ring/ring.go", "package ring\n\n// edge(publish): release - done.\n", "edge publish has no acquire in package ring"),
		one("ring/ring.go", "package ring\n\n// edge(lease): acquire - ours.\n", "edge lease has no release in package ring"),
		one("ring/ring.go", "package ring\n\n// edge(publish) release\n", "ring/ring.go:3: write an edge as"),
		{map[string]string{
			"ring/ring.go": "package ring\n\n// edge(publish): release - done.\n",
			"spec/spec.go": "package spec\n\n// edge(publish): acquire - ours.\n",
		}, "edge publish has no acquire in package ring"},
	}},
	{"vocabulary", checkVocabulary, []fault{
		one("ring/ring.go", "package ring\n\nvar head int\n", "ring/ring.go:3: head: never head or tail"),
		one("ring/ring.go", "package ring\n\nvar readTail int\n", "readTail"),
		one("spsc/doc.go", "// Package spsc queues.\npackage spsc\n\ntype q struct{ tailSeen int }\n", "tailSeen"),
	}},
	{"imports", checkImports, []fault{
		one("spec/spec.go", "package spec\n\nimport _ \""+module+"/ring\"\n", "spec must not import ring"),
		one("ring/ring.go", "package ring\n\nimport _ \""+module+"/spec\"\n", "ring must not import spec"),
		one("spec/spec_test.go", "package spec\n\nimport _ \""+module+"/fuzz\"\n", "imports fuzz: nobody may"),
		one("internal/daemon/doc.go", "// Package daemon serves.\npackage daemon\n\nimport _ \""+module+"/fuzz\"\n", "imports fuzz: nobody may"),
		one("novel/doc.go", "// Package novel is new.\npackage novel\n", "novel: no row in"),
	}},
	{"words", checkWords, []fault{
		one("spec/spec.go", "package spec\n\n// TO"+"DO: finish\n", "spec/spec.go:3: TO"+"DO: unfinished"),
		one("wire/w.go", "package wire\n\nvar e = \"not impl"+"emented\"\n", "wire/w.go:3"),
		one("README.md", "make demo, make test\ncd /ho"+"me/me/src\n", "README.md:2: /ho"+"me/m: the path of one machine"),
		one("python/pyproject.toml", "index = \"https://py"+"pi.org/simple\"\n", "names a package host"),
		one("Makefile", "include ../sh"+"ared/x.mk\n", "Makefile:1: ../sh"+"ared/: a path outside"),
	}},
	{"test habits", checkTestHabits, []fault{
		one("ring/ring_test.go", "package ring\n\nfunc f() { time.Sleep(1) }\n", "ring/ring_test.go:3: sleeps"),
		one("ring/ring_test.go", "package ring\n\nfunc f(t T) { t.SkipNow() }\n", "ring/ring_test.go:3: skips"),
		one("ring/ring_test.go", "package ring\n\nfunc f(t T) { t.Skip() }\n", "ring/ring_test.go:3: skips"),
		one("python/tests/test_a.py", "def test_a():\n    time.sle"+"ep(1)\n", "test_a.py:2: sleeps"),
		one("python/tests/test_a.py", "@pytest.mark.sk"+"ip\ndef test_a(): ...\n", "test_a.py:1: skips"),
	}},
	{"commands", checkCommands, []fault{
		one("README.md", "make demo, make test, `make fly`\n", "README.md:1: make fly: no such target"),
		one("README.md", "make demo, make test\n```sh\ncd x && make fly\n```\n", "README.md:3: make fly: no such target"),
		one("README.md", "make demo, make test\n```sh\n./bin/ingestd swerve\n```\n", "ingestd swerve: no such subcommand"),
		one("README.md", "make demo, make test\n```sh\ningestd serve \\\n  --bach-size=4\n```\n", "README.md:4: ingestd serve: no flag --bach-size"),
		one("docs/format.md", "Run `ingestd serve --fast`.\n", "docs/format.md:1: ingestd serve: no flag --fast"),
		one("README.md", "make demo, make test\n```bash\ngo test -run X ./rings/...\n```\n", "./rings/...: no such package folder"),
		one("README.md", "make demo, make test\n```bash\npython3 examples/none.py\n```\n", "examples/none.py: no such file"),
		one("README.md", "make test\n", "README.md: does not name make demo"),
		one("README.md", "", "README.md: does not name make test"),
	}},
	{"mentions", checkMentions, []fault{
		one("docs/format.md", "`ring/golden_test.go`\n", "docs/format.md:1: names ring/golden_test.go"),
		one("docs/format.md", "`TestNone`\n", "names TestNone, which no test is called"),
		one("README.md", "make demo, make test, [x](docs/none.md)\n", "README.md:1: links to docs/none.md"),
		one("ring/doc.go", "// Package ring holds batches. Proof: model_test.go.\npackage ring\n", "ring/doc.go:1: names model_test.go"),
		one("ring/doc.go", "// Package ring holds batches. Proof: FuzzNone.\npackage ring\n", "ring/doc.go:1: names FuzzNone"),
		one("ring/ring.go", "package ring\n\n// See spec/none.go.\nvar x int\n", "ring/ring.go:3: names spec/none.go"),
	}},
}

func planted(t *testing.T, over map[string]string) *tree {
	t.Helper()
	texts := maps.Clone(clean)
	maps.Copy(texts, over)
	fsys := fstest.MapFS{}
	for name, text := range texts {
		if text != "" {
			fsys[name] = &fstest.MapFile{Data: []byte(text)}
		}
	}
	tr, err := load(fsys)
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

func TestRepository(t *testing.T) {
	tr, err := load(os.DirFS(root(t)))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range checks {
		t.Run(c.name, func(t *testing.T) {
			for _, p := range c.run(tr) {
				t.Error(p)
			}
		})
	}
}

func TestEachRuleFindsItsFaults(t *testing.T) {
	for _, c := range checks {
		t.Run(c.name, func(t *testing.T) {
			for _, p := range c.run(planted(t, nil)) {
				t.Errorf("the clean tree has no fault, and the rule reports: %s", p)
			}
			if len(c.faults) == 0 {
				t.Error("no planted fault proves that this rule can fail")
			}
			for _, f := range c.faults {
				var said []string
				for _, p := range c.run(planted(t, f.files)) {
					said = append(said, p.String())
				}
				if !strings.Contains(strings.Join(said, "\n"), f.want) {
					t.Errorf("planted %q: want a problem with %q, the rule said %q", f.files, f.want, said)
				}
			}
		})
	}
}

// TestLoadSkipsWhatIsBuilt: what make builds is no source of ours, and .ci is.
func TestLoadSkipsWhatIsBuilt(t *testing.T) {
	tr := planted(t, map[string]string{
		".venv/lib/a.py": "x\n", "bin/a.md": "x\n", "build/a.go": "not go", "python/ingestd.egg-info/a.txt": "x\n", ".ci/run": "x\n", "a.gz": "x\n",
	})
	for _, f := range tr.files {
		if strings.HasPrefix(f.path, ".venv") || strings.HasPrefix(f.path, "bin/") || strings.Contains(f.path, "egg-info") || f.path == "a.gz" {
			t.Errorf("loaded %s", f.path)
		}
	}
	if tr.find(".ci/run") == nil || !tr.names["a.gz"] {
		t.Error("left out .ci/run or the name of a binary file")
	}
}

// TestImportRulesReadDownwards: a row of the golden list names only rows above it, so the list has no cycle and reads from the leaves up.
func TestImportRulesReadDownwards(t *testing.T) {
	seen := map[string]bool{"anything": true}
	for line := range strings.Lines(importsGolden) {
		for name, targets := range importRules(line) {
			for _, target := range targets {
				if !seen[target] {
					t.Errorf("%s names %s, which has no row above it", name, target)
				}
			}
			if seen[name] {
				t.Errorf("%s has two rows", name)
			}
			seen[name] = true
		}
	}
}
