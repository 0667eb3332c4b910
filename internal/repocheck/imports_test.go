package repocheck

import (
	_ "embed"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
)

//go:embed testdata/imports.golden
var importsGolden string

// importRules reads the golden list: "package: the packages of ours that it may import", "anything" for no limit. An entry "x/test" may be
// imported by tests only.
func importRules(text string) map[string][]string {
	rules := map[string][]string{}
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if name, list, ok := strings.Cut(line, ":"); ok && !strings.HasPrefix(line, "#") {
			rules[name] = strings.Fields(list)
		}
	}
	return rules
}

// checkImports: packages import each other only as the golden list allows. Tests are free, but for what nobody may import.
func checkImports(t *tree) []problem {
	rules := importRules(importsGolden)
	var out []problem
	_, dirs := t.packages()
	for _, dir := range dirs {
		if _, ok := rules[dir]; !ok {
			out = append(out, problem{dir, 0, "no row in internal/repocheck/testdata/imports.golden: decide what the package may import, and add it"})
		}
	}
	for _, f := range t.golang() {
		for _, spec := range f.syntax.Imports {
			name, err := strconv.Unquote(spec.Path.Value)
			target, ours := strings.CutPrefix(name, module+"/")
			if err != nil || !ours {
				continue
			}
			if reason := mayImport(rules, f, target); reason != "" {
				out = append(out, t.at(f, spec.Pos(), "%s", reason))
			}
		}
	}
	return out
}

func mayImport(rules map[string][]string, f *file, target string) string {
	rule := rules[f.dir()]
	if slices.Contains(rule, target) || f.dir() == target {
		return ""
	}
	switch path.Base(target) {
	case "repocheck", "fuzz":
		return fmt.Sprintf("imports %s: nobody may", target)
	}
	if f.isTest() || slices.Contains(rule, "anything") {
		return ""
	}
	return fmt.Sprintf("%s must not import %s (internal/repocheck/testdata/imports.golden)", f.dir(), target)
}
