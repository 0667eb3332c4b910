package bench

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestSmokeAccess(t *testing.T) {
	opt := AccessOptions{Common: Common{Smoke: true, Binary: buildBinary(t), JSON: filepath.Join(t.TempDir(), "record.json")}, Clients: 3, Connects: 500}
	var out, log bytes.Buffer
	if err := runAccess(t.Context(), opt, &out, &log); err != nil {
		t.Fatalf("%v\n%s", err, log.String())
	}
	text, err := os.ReadFile(opt.JSON)
	if err != nil {
		t.Fatal(err)
	}
	var record AccessRecord
	if err := json.Unmarshal(text, &record); err != nil {
		t.Fatal(err)
	}
	for _, name := range accessFigures {
		if f := record.Figures[name]; f == nil || len(f.Runs) != 1 || f.Median <= 0 {
			t.Errorf("%s: %+v", name, f)
		}
		if !strings.Contains(out.String(), name) {
			t.Errorf("the table lacks %q:\n%s", name, out.String())
		}
	}
	if len(record.Targets) != 2 {
		t.Errorf("targets: %+v", record.Targets)
	}
}

func TestAccessOptionsRefused(t *testing.T) {
	for _, opt := range []AccessOptions{
		{Common: Common{Smoke: true, Binary: "x"}}, {Common: Common{Smoke: true, Binary: "x"}, Clients: 1, Connects: -1},
		{Common: Common{Smoke: true, Binary: "x", Case: "nonsense"}, Clients: 1},
	} {
		if err := runAccess(t.Context(), opt, new(bytes.Buffer), new(bytes.Buffer)); err == nil {
			t.Errorf("%+v is accepted", opt)
		}
	}
}
