package repocheck

import (
	"fmt"
	"go/ast"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// command is one command line that a document shows.
type command struct {
	words []string
	line  int
}

var (
	fence      = regexp.MustCompile("^\\s*```\\s*([A-Za-z]*)")
	inlineCode = regexp.MustCompile("`([^`]+)`")
	shellWord  = regexp.MustCompile(`"[^"]*"|'[^']*'|\S+`)
	assignment = regexp.MustCompile(`^[A-Z_][A-Z0-9_]*=`)
)

// commands returns the command lines of a Markdown file: those in shell blocks, and inline code that begins with make or ingestd.
func commands(text string) []command {
	var out []command
	language, inside, joined := "", false, ""
	for i, line := range strings.Split(text, "\n") {
		if m := fence.FindStringSubmatch(line); m != nil {
			inside, language = !inside, m[1]
			continue
		}
		if !inside {
			for _, m := range inlineCode.FindAllStringSubmatch(line, -1) {
				if words := shellWord.FindAllString(m[1], -1); len(words) > 1 && (words[0] == "make" || words[0] == "ingestd") {
					out = append(out, command{words, i + 1})
				}
			}
			continue
		}
		if !slices.Contains([]string{"sh", "bash", "shell", "console"}, language) {
			continue
		}
		line = strings.TrimPrefix(strings.TrimSpace(line), "$ ")
		if part, ok := strings.CutSuffix(line, "\\"); ok {
			joined += part + " "
			continue
		}
		out = append(out, split(joined+line, i+1)...)
		joined = ""
	}
	return out
}

// split cuts a shell line at its separators into single commands, without comments and variable assignments.
func split(line string, number int) []command {
	var out []command
	var words []string
	flush := func() {
		for len(words) > 0 && (assignment.MatchString(words[0]) || words[0] == "sudo" || words[0] == "time") {
			words = words[1:]
		}
		if len(words) > 0 {
			out = append(out, command{words, number})
		}
		words = nil
	}
	for _, word := range shellWord.FindAllString(line, -1) {
		if strings.HasPrefix(word, "#") {
			break
		}
		if word == "&&" || word == "||" || word == "|" || word == "&" || word == ";" {
			flush()
			continue
		}
		if bare, ok := strings.CutSuffix(word, ";"); ok {
			words = append(words, bare)
			flush()
			continue
		}
		words = append(words, word)
	}
	flush()
	return out
}

// vocabulary is what documents may name: make targets, subcommands, flags, tests.
type vocabulary struct {
	targets, subcommands, flags, tests map[string]bool
}

var (
	makeTarget = regexp.MustCompile(`(?m)^([a-z][a-z0-9-]*):`)
	testName   = regexp.MustCompile(`^(Test|Fuzz|Benchmark)[A-Z0-9]\w*$`)
)

// hasTest reports whether a name is a test's, or the beginning of one, as -run takes it.
func (v vocabulary) hasTest(name string) bool {
	for have := range v.tests {
		if strings.HasPrefix(have, name) {
			return true
		}
	}
	return false
}

func words(t *tree) vocabulary {
	v := vocabulary{
		targets:     map[string]bool{},
		subcommands: map[string]bool{"help": true, "completion": true}, // cobra's own, as are the flags
		flags:       map[string]bool{"help": true, "version": true},
		tests:       map[string]bool{},
	}
	if f := t.find("Makefile"); f != nil {
		for _, m := range makeTarget.FindAllStringSubmatch(f.text, -1) {
			v.targets[m[1]] = true
		}
	}
	for _, f := range t.golang() {
		cli := !f.isTest() && (strings.HasPrefix(f.path, "cmd/") || strings.HasPrefix(f.path, "internal/daemon/") || strings.HasPrefix(f.path, "bench/"))
		ast.Inspect(f.syntax, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				if testName.MatchString(n.Name.Name) {
					v.tests[n.Name.Name] = true
				}
			case *ast.KeyValueExpr: // cobra: Use: "serve [flags]"
				if key, ok := n.Key.(*ast.Ident); ok && key.Name == "Use" && cli {
					if use := strings.Fields(literal(n.Value)); len(use) > 0 {
						v.subcommands[use[0]] = true
					}
				}
			case *ast.BasicLit:
				if cli {
					v.flags[literal(n)] = true
				}
			}
			return true
		})
	}
	return v
}

func literal(e ast.Expr) string {
	if lit, ok := e.(*ast.BasicLit); ok {
		if s, err := strconv.Unquote(lit.Value); err == nil {
			return s
		}
	}
	return ""
}

// checkCommands: every command in a Markdown file exists: make targets, ingestd subcommands and flags, scripts and packages.
func checkCommands(t *tree) []problem {
	var out []problem
	v := words(t)
	for _, f := range t.files {
		if !strings.HasSuffix(f.path, ".md") {
			continue
		}
		for _, c := range commands(f.text) {
			if reason := missing(t, v, c.words); reason != "" {
				out = append(out, problem{f.path, c.line, reason})
			}
		}
	}
	readme := t.find("README.md")
	for _, want := range []string{"make demo", "make test"} {
		if readme == nil || !strings.Contains(readme.text, want) {
			out = append(out, problem{"README.md", 0, "does not name " + want})
		}
	}
	return out
}

// missing says what a command names that does not exist.
func missing(t *tree, v vocabulary, args []string) string {
	switch name := path.Base(args[0]); {
	case name == "make":
		for _, target := range args[1:] {
			if !strings.HasPrefix(target, "-") && !assignment.MatchString(target) && !v.targets[target] {
				return "make " + target + ": no such target in the Makefile"
			}
		}
	case name == "ingestd":
		return missingFlag(v, args)
	case name == "go" && len(args) > 2:
		for _, arg := range args[2:] {
			if dir, ok := strings.CutPrefix(strings.TrimSuffix(arg, "/..."), "./"); ok && !t.names[dir] && dir != "..." {
				return arg + ": no such package folder"
			}
		}
	case strings.HasPrefix(name, "python"):
		for _, arg := range args[1:] {
			if strings.HasSuffix(arg, ".py") && strings.Contains(arg, "/") && !t.names[strings.TrimPrefix(arg, "./")] {
				return arg + ": no such file"
			}
		}
	}
	return ""
}

func missingFlag(v vocabulary, args []string) string {
	for i, arg := range args[1:] {
		if i == 0 && !strings.HasPrefix(arg, "-") && regexp.MustCompile(`^[a-z]+$`).MatchString(arg) && !v.subcommands[arg] {
			return "ingestd " + arg + ": no such subcommand"
		}
		flag, ok := strings.CutPrefix(arg, "--")
		flag, _, _ = strings.Cut(flag, "=")
		if ok && flag != "" && !v.flags[flag] {
			return fmt.Sprintf("ingestd %s: no flag --%s", args[1], flag)
		}
	}
	return ""
}

var (
	pathMention = regexp.MustCompile(`^\.?[\w.-]*(/[\w.-]+)*\.(go|md|py|pyi|h|toml|ya?ml|golden|gz|sh|seg)$`)
	goMention   = regexp.MustCompile(`(?:^|[^\w*./-])([\w./-]*\w\.(?:go|md|py))\b`) // not *_unsafe.go
	testMention = regexp.MustCompile(`\b(?:Test|Fuzz|Benchmark)[A-Z]\w+\b`)
	link        = regexp.MustCompile(`\]\(([^)\s#]+)[^)]*\)`)
)

// checkMentions: files and tests that a Markdown file or a Go comment names exist.
func checkMentions(t *tree) []problem {
	var out []problem
	v := words(t)
	for _, f := range t.files {
		switch {
		case strings.HasSuffix(f.path, ".md"):
			out = append(out, markdownMentions(t, v, f)...)
		case f.syntax != nil:
			for _, group := range f.syntax.Comments {
				for _, m := range goMention.FindAllStringSubmatch(group.Text(), -1) {
					if !exists(t, f, m[1]) {
						out = append(out, t.at(f, group.Pos(), "names %s, which does not exist", m[1]))
					}
				}
				for _, name := range testMention.FindAllString(group.Text(), -1) {
					if path.Base(f.path) == "doc.go" && !v.hasTest(name) {
						out = append(out, t.at(f, group.Pos(), "names %s, which no test is called", name))
					}
				}
			}
		}
	}
	return out
}

func markdownMentions(t *tree, v vocabulary, f *file) []problem {
	var out []problem
	for i, line := range strings.Split(f.text, "\n") {
		for _, m := range inlineCode.FindAllStringSubmatch(line, -1) {
			if pathMention.MatchString(m[1]) && strings.Contains(m[1], "/") && !exists(t, f, m[1]) {
				out = append(out, problem{f.path, i + 1, "names " + m[1] + ", which does not exist"})
			}
			if testName.MatchString(m[1]) && !v.hasTest(m[1]) {
				out = append(out, problem{f.path, i + 1, "names " + m[1] + ", which no test is called"})
			}
		}
		for _, m := range link.FindAllStringSubmatch(line, -1) {
			if !strings.Contains(m[1], ":") && !exists(t, f, m[1]) {
				out = append(out, problem{f.path, i + 1, "links to " + m[1] + ", which does not exist"})
			}
		}
	}
	return out
}

// exists reports whether a name that a file mentions is there: from the root, from the file's folder, or, without a slash, anywhere.
func exists(t *tree, f *file, name string) bool {
	if strings.HasPrefix(name, "/") || strings.HasPrefix(name, "~") {
		return true // a path of the reader's machine
	}
	if t.names[path.Clean(name)] || t.names[path.Join(f.dir(), name)] {
		return true
	}
	if strings.Contains(name, "/") {
		return strings.HasSuffix(name, "/") && t.names[path.Clean(name)]
	}
	for have := range t.names {
		if path.Base(have) == name {
			return true
		}
	}
	return false
}
