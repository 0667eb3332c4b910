package bench

import (
	"bytes"
	"encoding/json"
	"net"
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
	for _, name := range accessFigures() {
		if f := record.Figures[name]; f == nil || len(f.Runs) != 1 || f.Median <= 0 {
			t.Errorf("%s: %+v", name, f)
		}
		if !strings.Contains(out.String(), name) {
			t.Errorf("the table lacks %q:\n%s", name, out.String())
		}
	}
	if len(record.Targets) != 7 || len(record.Floods) != 6 {
		t.Errorf("targets: %+v, floods: %+v", record.Targets, record.Floods)
	}
	for _, f := range record.Floods {
		if f.Failed != 0 || f.Arrived == 0 || f.Transport != transportQUIC && (f.NoAnswer == 0 || f.NoAnswer+f.Closed+f.Open != f.Begun) {
			t.Errorf("%+v", f)
		}
	}
}

// TestSmokeAnswered: without the kernel, the daemon turns away what the same floods send.
func TestSmokeAnswered(t *testing.T) {
	opt := AccessOptions{Common: Common{
		Smoke: true, Quiet: true, Binary: buildBinary(t), JSON: filepath.Join(t.TempDir(), "record.json"), Case: "strangers-tls,strangers-quic", ServeArgs: []string{"--bans-kernel=false"},
	}, Clients: 1, Connects: 500}
	if err := runAccess(t.Context(), opt, new(bytes.Buffer), new(bytes.Buffer)); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(opt.JSON)
	if err != nil {
		t.Fatal(err)
	}
	var record AccessRecord
	if err := json.Unmarshal(text, &record); err != nil {
		t.Fatal(err)
	}
	for _, f := range record.Floods {
		answered, open := f.Against == "daemon", f.Transport != transportQUIC // which says nothing to who sends
		if open && ((f.Closed > 0) != answered || (f.NoAnswer > 0) == answered) || f.Arrived == 0 {
			t.Errorf("%+v", f)
		}
	}
}

// TestFlood: attempts are counted as what they come to.
func TestFlood(t *testing.T) {
	const attempts = connectsMin + 3 // some sockets are used again
	for _, c := range []struct {
		name string
		do   func(net.Conn)
		want Flood
	}{
		{"closed", func(c net.Conn) { _ = c.Close() }, Flood{Begun: attempts, Closed: attempts}},
		{"held", func(net.Conn) {}, Flood{Begun: attempts, Open: attempts}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			f, err := startFlood(transportTCP, stranger, l.Addr().(*net.TCPAddr).AddrPort(), 1)
			if err != nil {
				t.Fatal(err)
			}
			for range attempts {
				f.next()
				s, err := l.Accept()
				if err != nil {
					t.Fatal(err)
				}
				defer s.Close()
				_ = s.(*net.TCPConn).SetLinger(0)
				c.do(s)
			}
			if got := f.end(); got != c.want {
				t.Errorf("%+v, want %+v", got, c.want)
			}
		})
	}
	for _, transport := range []string{transportTCP, transportQUIC} {
		d, err := startDropping(t.Context(), transport)
		if err != nil {
			t.Fatal(err)
		}
		f, err := startFlood(transport, stranger, d.address, 1)
		if err != nil {
			t.Fatal(err)
		}
		for range attempts {
			f.next()
		}
		want := Flood{Begun: attempts}
		if transport == transportTCP {
			want.NoAnswer = attempts
		}
		if got := f.end(); got != want {
			t.Errorf("%s, dropped: %+v, want %+v", transport, got, want)
		}
		if n, err := d.arrived(); n != attempts || err != nil {
			t.Errorf("%s: %d arrived, %v", transport, n, err)
		}
		if err := d.stop(); err != nil {
			t.Error(err)
		}
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
