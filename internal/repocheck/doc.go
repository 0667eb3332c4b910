// Package repocheck tests the repository itself: the house rules that no compiler checks. It holds tests only; nobody imports it.
//
// The rules: every package says in doc.go what it is for; imports follow testdata/imports.golden; modules from elsewhere are listed in
// testdata/dependencies.golden, so that a new one is a diff a reader sees; package unsafe stays in *_unsafe.go with a Safety note; every release of
// a named memory-ordering edge has its acquire in the same package; files stay short; tests neither sleep nor skip without a reason; and what the
// docs name (commands, flags, files, tests) exists.
//
// Each rule is a function from a tree of files to a list of problems (checks_test.go lists them). TestRepository runs it on this repository.
// TestEachRuleFindsItsFaults runs it on a small clean tree in memory, where it must find nothing, and on that tree with one planted fault
// at a time, which it must find: a rule that cannot fail proves nothing.
//
// Write testdata/dependencies.golden anew, after reading the difference, with: go test ./internal/repocheck -run TestDependencies -update
package repocheck
