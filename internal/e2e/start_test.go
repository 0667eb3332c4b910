//go:build linux && !race

package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// refuses runs a serve that must not start, and end with the code and these words, and without having begun anything.
func refuses(t *testing.T, code int, flags, words []string) {
	t.Helper()
	dir := t.TempDir()
	ready := filepath.Join(dir, "ready.json")
	said := run(t, code, append([]string{"serve", "--listen", "unix://" + filepath.Join(dir, "s"), "--admin", "127.0.0.1:0", "--ready-file", ready}, flags...)...)
	says(t, said, words...)
	if _, err := os.Stat(ready); !os.IsNotExist(err) {
		t.Errorf("it said that it is ready: %v", err)
	}
	if lines := strings.Count(said, "\n"); lines > 3 || strings.Contains(said, "goroutine ") {
		t.Errorf("not an error for people:\n%s", said)
	}
}

// TestAddressInUse: a second daemon on the same port or socket does not start and says what to do; the first one goes on.
func TestAddressInUse(t *testing.T) {
	t.Parallel()
	d := serve(t, []table{small})
	beside := d.pair(small.name, 2000)
	port := d.TCP[strings.LastIndexByte(d.TCP, ':')+1:]
	admin := strings.TrimPrefix(d.Admin, "http://")
	for name, tc := range map[string]struct{ flags, words []string }{
		"port":   {[]string{"--listen", d.TCP}, []string{d.TCP, "another program listens there", "choose another port", ":" + port}},
		"admin":  {[]string{"--admin", admin}, []string{admin, "another program listens there", "choose another port"}},
		"echo":   {[]string{"--listen", "echo" + strings.TrimPrefix(d.TCP, "tcp")}, []string{port, "another program listens there"}},
		"socket": {[]string{"--listen", d.Unix}, []string{d.Unix, "another ingestd serves there", "choose another path"}},
	} {
		t.Run(name, func(t *testing.T) {
			refuses(t, exitFailure, append(tc.flags, "--spec", small.spec), tc.words)
		})
	}
	run(t, exitOK, "push", "--addr", d.Unix, "--table", small.name, "--generate", "5") // the socket is still the first one's
	d.finish(map[string]uint64{small.name: 5}, beside)
}

// TestRingTooLarge: a ring that is larger than memory is refused before any of it is taken.
func TestRingTooLarge(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		code         int
		flags, words []string
	}{
		"than memory":     {exitFailure, []string{"--spec", "x:U8[67108864]", "--batch-size", "64", "--batches", "4096"}, []string{`table "default"`, "16 TiB", "are available", "make the table smaller"}},
		"as capacity":     {exitFailure, []string{"--spec", "x:U8[67108864]", "--batch-size", "64", "--capacity", "100TiB"}, []string{`table "default"`, "are available", "make the table smaller"}},
		"than can be":     {exitUsage, []string{"--spec", "x:U8[4294967296]", "--batch-size", "1000000000", "--batches", "65536"}, []string{`table "default"`, "batch"}},
		"too small a one": {exitUsage, []string{"--spec", "x:U8[67108864]", "--batch-size", "64", "--capacity", "1GiB"}, []string{"capacity", "holds no two batches", "raise capacity or lower batch_size"}},
	} {
		t.Run(name, func(t *testing.T) { refuses(t, tc.code, tc.flags, tc.words) })
	}
}

// TestBadSpecFile: a spec file that is none is refused by name, whoever is to read it.
func TestBadSpecFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	d := serve(t, []table{small})
	beside := d.pair(small.name, 2000)
	for name, tc := range map[string]struct {
		text  string
		words []string
	}{
		"cut short":    {`{"leaves":[{"name":"image","dtype":"F32","shape":[8,4]}`, []string{"JSON"}},
		"not JSON":     {"{image: F32[8,4]}", []string{"JSON"}},
		"another JSON": {`{"image":"F32[8,4]"}`, []string{"image"}},
		"a picture":    {"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", nil},
		"empty":        {"", nil},
		"too long":     {strings.Repeat(" ", 8<<20), []string{"at most"}},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(dir, strings.ReplaceAll(name, " ", "-"))
			check(t, os.WriteFile(file, []byte(tc.text), 0o600))
			words := append(tc.words, file)
			refuses(t, exitUsage, []string{"--spec", "@" + file}, append(words, "spec"))
			says(t, run(t, exitUsage, "push", "--addr", d.TCP, "--table", small.name, "--spec", "@"+file, "--generate", "1"), words...)
			says(t, run(t, exitUsage, "pull", "--addr", d.Unix, "--table", small.name, "--spec", "@"+file), words...)
		})
	}
	missing := filepath.Join(dir, "none")
	refuses(t, exitUsage, []string{"--spec", "@" + missing}, []string{missing, "no such file"})
	d.finish(nil, beside)
}
