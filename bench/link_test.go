package bench

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ingestd/ingestd/internal/lossynet"
)

// needLinks skips where the machine does not let this process make links.
func needLinks(t *testing.T) {
	t.Helper()
	l, err := lossynet.Start(lossynet.Conditions{})
	if errors.Is(err, lossynet.ErrUnavailable) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestSmokeLink(t *testing.T) {
	needLinks(t)
	opt := defaultLinkOptions()
	opt.Smoke, opt.Binary, opt.JSON = true, buildBinary(t), filepath.Join(t.TempDir(), "record.json")
	var out, log bytes.Buffer
	if err := runLink(t.Context(), opt, "reno", &out, &log); err != nil {
		t.Fatalf("%v\n%s", err, log.String())
	}
	text, err := os.ReadFile(opt.JSON)
	if err != nil {
		t.Fatal(err)
	}
	var record LinkRecord
	if err := json.Unmarshal(text, &record); err != nil {
		t.Fatal(err)
	}
	if len(record.Results) != len(smokeLinkCases())*len(linkTransports) || record.Congestion != "reno" {
		t.Fatalf("%d results, with congestion control %q:\n%s", len(record.Results), record.Congestion, out.String())
	}
	for i := range record.Results {
		one := &record.Results[i]
		checkCase(t, &one.CaseResult, contenderFull, contenderBare)
		if one.Link == "all" && (one.ToDaemon.Packets == 0 || one.FromDaemon.Packets == 0) {
			t.Errorf("%s: %+v and %+v", one.Name, one.ToDaemon, one.FromDaemon)
		}
		if !strings.Contains(out.String(), one.Link) || !strings.Contains(out.String(), one.Transport) {
			t.Errorf("the table lacks %q:\n%s", one.Name, out.String())
		}
	}
}

// TestLinkCheck: figures of a link that did not do what it is for are refused.
func TestLinkCheck(t *testing.T) {
	good := lossynet.Stats{Packets: 1000, Lost: 10, Overtaken: 50}
	lossy := lossynet.Conditions{Loss: 0.01, Late: 0.1, LateBy: 1}
	for _, tc := range []struct {
		what  string
		link  linkCase
		stats lossynet.Stats
		fine  bool
	}{
		{"as asked for", linkCase{conditions: lossy}, good, true},
		{"nothing lost", linkCase{conditions: lossy}, lossynet.Stats{Packets: 1000, Overtaken: 50}, false},
		{"nothing overtaken", linkCase{conditions: lossy}, lossynet.Stats{Packets: 1000, Lost: 10}, false},
		{"lost and not asked for", linkCase{}, good, false},
		{"not used", linkCase{}, lossynet.Stats{}, false},
		{"rightly not used", linkCase{alone: true}, lossynet.Stats{}, true},
		{"wrongly used", linkCase{alone: true}, lossynet.Stats{Packets: 1}, false},
	} {
		r := &LinkResult{Conditions: tc.link.conditions, FromDaemon: tc.stats}
		if err := r.check(tc.link); (err == nil) != tc.fine {
			t.Errorf("%s: %v", tc.what, err)
		}
	}
}

func TestLinkOptionsRefused(t *testing.T) {
	opt := defaultLinkOptions()
	opt.Case, opt.Binary = "loss,no such link", "x"
	if err := runLink(t.Context(), opt, "", new(bytes.Buffer), new(bytes.Buffer)); err == nil || !strings.Contains(err.Error(), "reorder") {
		t.Errorf("a link that there is not: %v", err)
	}
	needLinks(t)
	opt.Case = "clean"
	if err := runLink(t.Context(), opt, "no such control", new(bytes.Buffer), new(bytes.Buffer)); err == nil || !strings.Contains(err.Error(), "--congestion") {
		t.Errorf("a congestion control that there is not: %v", err)
	}
}
