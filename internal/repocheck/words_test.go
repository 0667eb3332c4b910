package repocheck

import (
	"go/ast"
	"regexp"
	"strings"
)

// forbidden is text that no file may hold. The patterns are cut in two where they would match themselves.
var forbidden = []struct {
	pattern *regexp.Regexp
	reason  string
}{
	{regexp.MustCompile(`\b(TO` + `DO|FIX` + `ME|XX` + `X|HA` + `CK)\b`), "unfinished: finish it, or open an issue"},
	{regexp.MustCompile(`(?i)\b(not (yet )?impl` + `emented|unimpl` + `emented)\b`), "unfinished: finish it, or refuse with a reason that says what to do"},
	{regexp.MustCompile(`(^|[\s"'` + "`" + `(=:])/(home|root|work|farm|Users|mnt|media)/\w`), "the path of one machine: take it from a flag, the environment or a temporary folder"},
	{regexp.MustCompile(`(?i)\b(py` + `pi\.org|pythonho` + `sted\.org|proxy\.go` + `lang\.org|sum\.go` + `lang\.org)\b`), "names a package host: which one serves a machine is that machine's own setting"},
	{regexp.MustCompile(`(^|[\s"'(` + "`" + `])(\.\./)+shared/`), "a path outside the repository"},
}

// checkWords: no leftovers, no paths of one machine.
func checkWords(t *tree) []problem {
	var out []problem
	for _, f := range t.files {
		if f.path == "LICENSE" {
			continue
		}
		for i, line := range strings.Split(f.text, "\n") {
			for _, rule := range forbidden {
				if m := rule.pattern.FindString(line); m != "" {
					out = append(out, problem{f.path, i + 1, strings.TrimSpace(m) + ": " + rule.reason})
				}
			}
		}
	}
	return out
}

var pythonTest = regexp.MustCompile(`(^|/)(test_\w+|conftest)\.py$`)

// checkTestHabits: tests wait for events instead of sleeping (unless the clock is synctest's), and never skip in silence.
func checkTestHabits(t *tree) []problem {
	var out []problem
	for _, f := range t.files {
		switch {
		case f.syntax != nil && f.isTest():
			out = append(out, goHabits(t, f)...)
		case pythonTest.MatchString(f.path):
			out = append(out, pythonHabits(f)...)
		}
	}
	return out
}

func goHabits(t *tree, f *file) []problem {
	var out []problem
	bubble := imports(f, "testing/synctest")
	ast.Inspect(f.syntax, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		sel, ok := call.Fun.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		x, _ := sel.X.(*ast.Ident)
		switch {
		case sel.Sel.Name == "Sleep" && x != nil && x.Name == "time" && !bubble:
			out = append(out, t.at(f, n.Pos(), "sleeps: wait for the event, or run in a synctest bubble"))
		case sel.Sel.Name == "SkipNow", sel.Sel.Name == "Skip" && len(call.Args) == 0:
			out = append(out, t.at(f, n.Pos(), "skips without a reason: print why"))
		}
		return true
	})
	return out
}

var bareSkip = regexp.MustCompile(`pytest\.skip\(\)|mark\.skip\b(\s*$|\(\s*\))`)

func pythonHabits(f *file) []problem {
	var out []problem
	for i, line := range strings.Split(f.text, "\n") {
		if strings.Contains(line, "time.sle"+"ep(") {
			out = append(out, problem{f.path, i + 1, "sleeps: wait for the event"})
		}
		if bareSkip.MatchString(line) {
			out = append(out, problem{f.path, i + 1, "skips without a reason: print why"})
		}
	}
	return out
}
