package tensorfile

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/ingestd/ingestd/spec"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func mustSpec(t testing.TB, text string) *spec.Spec {
	t.Helper()
	s, err := spec.ParseText(text)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// npy builds a .npy file of the given dict and data.
func npy(version string, dict string, data []byte) []byte {
	b := []byte(npyMagic + version)
	if version[0] == 1 {
		b = binary.LittleEndian.AppendUint16(b, uint16(len(dict)))
	} else {
		b = binary.LittleEndian.AppendUint32(b, uint32(len(dict)))
	}
	return append(append(b, dict...), data...)
}

func dict(descr, shape string) string {
	return fmt.Sprintf("{'descr': '%s', 'fortran_order': False, 'shape': %s, }   \n", descr, shape)
}

func count(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i)
	}
	return b
}

func write(t testing.TB, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// readSource returns all samples, leaves concatenated, reading at most most at once.
func readSource(s *Source, most int) ([]byte, error) {
	var all []byte
	var leaves [][]byte
	for {
		c, err := s.Next(most)
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return all, err
		}
		if c.Samples != nil {
			all = append(all, c.Samples...)
			continue
		}
		for i := range c.Count {
			leaves = c.Sample(leaves[:0], s.Spec(), i)
			for _, leaf := range leaves {
				all = append(all, leaf...)
			}
		}
	}
}

func TestNPY(t *testing.T) {
	for _, c := range []struct{ version, dict, spec, want string }{
		{"\x01\x00", dict("<f4", "(3, 2)"), ".:F32[2]", ""},
		{"\x02\x00", dict("<i8", "(3,)"), ".:I64", ""},
		{"\x03\x00", dict("|u1", "(3, 2, 2, 2)"), ".:U8[2,2,2]", ""},
		{"\x01\x00", dict("|b1", "(24,)"), ".:BOOL", ""},
		{"\x01\x00", dict("u1", "(24,)"), ".:U8", ""},
		{"\x01\x00", `{"shape":(3L,4L),"descr":"<u2","fortran_order":False}`, ".:U16[4]", ""},
		{"\x01\x00", `{'descr': '<f8', 'fortran_order': True, 'shape': (3,)}`, ".:F64", ""},
		{"\x01\x00", dict("<V2", "(3, 4)"), "w:BF16[4]", "w:BF16[4]"},
		{"\x01\x00", dict("|V1", "(3, 8)"), "w:F8_E5M2[8]", "w:F8_E5M2[8]"},
		{"\x01\x00", dict("<f4", "(3, 2)"), "obs/x:F32[2]", "obs/x:F32[2]"},
	} {
		var want *spec.Spec
		if c.want != "" {
			want = mustSpec(t, c.want)
		}
		s, err := Open(write(t, "a.npy", npy(c.version, c.dict, count(24))), want)
		if err != nil {
			t.Errorf("%s: %v", c.dict, err)
			continue
		}
		if got := s.Spec().Text(); got != c.spec {
			t.Errorf("%s: spec %s, want %s", c.dict, got, c.spec)
		}
		for range 2 {
			if got, err := readSource(s, 1); err != nil || string(got) != string(count(24)) {
				t.Errorf("%s: %v, % x", c.dict, err, got)
			}
			if err := s.Rewind(); err != nil {
				t.Error(err)
			}
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestBadNPY(t *testing.T) {
	good := npy("\x01\x00", dict("<f4", "(3, 2)"), count(24))
	v1 := func(dict string) []byte { return npy("\x01\x00", dict, count(24)) }
	long := []byte(npyMagic + "\x02\x00\xff\xff\xff\xff{")
	claims := []byte(npyMagic + "\x02\x00\x00\x00\x80\x00{")
	for name, c := range map[string]struct {
		file []byte
		want string
	}{
		"empty":              {nil, "empty or cut short"},
		"magic":              {[]byte("PK\x03\x04aaaaaaaaaa"), "magic"},
		"version":            {npy("\x04\x00", dict("<f4", "(3, 2)"), count(24)), "version 4.0"},
		"header cut":         {good[:30], "cut short"},
		"header too long":    {long, "at most"},
		"header claims much": {claims, "cut short"},
		"data cut":           {good[:len(good)-1], "cut short"},
		"data left over":     {append(good[:len(good):len(good)], 0), "more than one array"},
		"big-endian":         {v1(dict(">f4", "(3, 2)")), "big-endian"},
		"fortran":            {v1("{'descr': '<f4', 'fortran_order': True, 'shape': (3, 2)}"), "ascontiguousarray"},
		"object":             {v1(dict("|O", "(3,)")), "pickle"},
		"complex":            {v1(dict("<c8", "(3,)")), "complex"},
		"text":               {v1(dict("<U2", "(3,)")), "text"},
		"time":               {v1(dict("<M8[ns]", "(3,)")), "int64"},
		"void":               {v1(dict("|V8", "(3,)")), "raw bytes"},
		"untyped":            {v1(dict("|V2", "(12,)")), "--spec, such as .:BF16"},
		"unknown dtype":      {v1(dict("<f16", "(1,)")), "no counterpart"},
		"structured":         {v1("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (6,)}"), "np.savez"},
		"scalar":             {npy("\x01\x00", dict("<f4", "()"), count(4)), "first axis must count"},
		"no samples":         {npy("\x01\x00", dict("<f4", "(0, 2)"), nil), "no samples"},
		"empty samples":      {npy("\x01\x00", dict("<f4", "(3, 0)"), nil), "nothing in it"},
		"overflow":           {v1(dict("<f4", "(4611686018427387904, 4)")), "larger than any file"},
		"overflow sample":    {npy("\x01\x00", dict("<f4", "(0, 4611686018427387904, 4)"), nil), "larger than"},
		"number too large":   {v1(dict("<f4", "(99999999999999999999,)")), "number expected"},
		"negative":           {v1(dict("<f4", "(-1,)")), "number expected"},
		"too many axes":      {v1(dict("<f4", "("+strings.Repeat("1, ", 65)+")")), "more than 64"},
		"not a dict":         {v1("__import__('os').system('true')"), "expected"},
		"missing key":        {v1("{'descr': '<f4', 'shape': (3, 2)}"), "missing"},
		"key twice":          {v1("{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (3, 2)}"), "twice"},
		"unknown key":        {v1("{'descr': '<f4', 'x': 1}"), "unknown key"},
		"something follows":  {v1(dict("<f4", "(3, 2)") + "x"), "follows the dict"},
		"no comma":           {v1("{'descr': '<f4' 'fortran_order': False}"), "comma"},
		"open string":        {v1("{'descr"), "does not end"},
		"escape":             {v1(`{'descr': '\x3cf4', 'fortran_order': False, 'shape': (3, 2)}`), "escapes"},
	} {
		t.Run(name, func(t *testing.T) {
			path := write(t, "bad.npy", c.file)
			_, err := Open(path, nil)
			var typed *FormatError
			if !errors.As(err, &typed) || !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), path) {
				t.Errorf("got %v, want the path and %q", err, c.want)
			}
		})
	}
}
