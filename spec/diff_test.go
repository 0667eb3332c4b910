package spec

import (
	"errors"
	"reflect"
	"strings"
	"testing"
)

func parse(t *testing.T, text string) *Spec {
	t.Helper()
	s, err := ParseText(text)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestDiff(t *testing.T) {
	for name, c := range map[string]struct {
		got, want string
		diff      []Difference
		says      string
	}{
		"equal": {"a:U8", "a:U8", nil, ""},
		"dtype": {"a:F32[2],b:U8", "a:I32[2],b:U8", []Difference{{"a", "F32[2]", "I32[2]"}}, `leaf "a": got F32[2], want I32[2]`},
		"transposed": {"a:F32[3,4]", "a:F32[4,3]", []Difference{{"a", "F32[3,4]", "F32[4,3]"}},
			`leaf "a": got F32[3,4], want F32[4,3] (transposed?)`},
		"rank":    {"a:F32[12]", "a:F32[4,3]", []Difference{{"a", "F32[12]", "F32[4,3]"}}, `leaf "a": got F32[12], want F32[4,3]`},
		"missing": {"a:U8", "a:U8,b:I8[2]", []Difference{{"b", "", "I8[2]"}}, `leaf "b" is missing, want I8[2]`},
		"extra":   {"x:F64,a:U8", "a:U8", []Difference{{"x", "F64", ""}}, `leaf "x" is not wanted, got F64`},
		"renamed": {"img:F32[8,8],label:I32", "image:F32[8,8],label:I32", []Difference{{"image", "", "F32[8,8]"}, {"img", "F32[8,8]", ""}},
			`leaf "image" is missing, got "img" of its type F32[8,8] (renamed?)`},
		"order": {"b:I8,a:U8", "a:U8,b:I8", []Difference{{"a", "U8 at index 1", "U8 at index 0"}, {"b", "I8 at index 0", "I8 at index 1"}},
			`leaf "a": got U8 at index 1, want U8 at index 0; leaf "b": got I8 at index 0, want I8 at index 1`},
		"missing does not displace": {"b:U8,c:U8", "a:I8,b:U8,c:U8", []Difference{{"a", "", "I8"}}, `leaf "a" is missing, want I8`},
	} {
		t.Run(name, func(t *testing.T) {
			got, want := parse(t, c.got), parse(t, c.want)
			if diff := Diff(got, want); !reflect.DeepEqual(diff, c.diff) {
				t.Errorf("Diff = %q, want %q", diff, c.diff)
			}
			err := Check(got, want)
			if c.diff == nil {
				if err != nil {
					t.Errorf("Check of equal specs: %v", err)
				}
				return
			}
			var mismatch *MismatchError
			if !errors.As(err, &mismatch) || !reflect.DeepEqual(mismatch.Differences, c.diff) {
				t.Fatalf("Check = %v", err)
			}
			wantError(t, err, "spec differs in", c.says)
		})
	}
}

func TestFormatDiffIsCut(t *testing.T) {
	err := Check(must(t, many(20)...), must(t, Leaf{"0", U8, nil}))
	wantError(t, err, "spec differs in 19 leaves", `leaf "8" is not wanted, got U8; and 11 more`)
	if strings.Contains(err.Error(), `"9"`) {
		t.Errorf("not cut: %v", err)
	}
}
