package daemon

import (
	"testing"
	"time"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/internal/devcert"
)

// TestRemoteTrainerEveryWay: over every transport a trainer's batches go straight from the segment to its socket where one is there, and copied where they are encrypted; and what it had not
// begun when it was closed is no dead trainer's.
func TestRemoteTrainerEveryWay(t *testing.T) {
	ca, err := devcert.NewAuthority("test", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := ca.NewServer([]string{"127.0.0.1"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cfg := testConfig(t)
	cfg.Listen = append(cfg.Listen, "tls://127.0.0.1:0", "quic://127.0.0.1:0")
	if cfg.TLS.Cert, cfg.TLS.Key, err = pair.Write(dir, "server"); err != nil {
		t.Fatal(err)
	}
	authorities, _, err := ca.Write(dir, "ca")
	if err != nil {
		t.Fatal(err)
	}
	const text, rows, large = "image:U8[40000],label:U8", 4, 4 * 40001 // the columns touch
	cfg.Tables = []Table{{Name: "a", Spec: text, BatchSize: rows, Batches: 8, Groups: []Group{{Name: "g", Policy: Policy{OnDeath: "drop"}}}}}
	r := start(t, cfg)
	p, err := client.Dial(t.Context(), r.addr.Unix, client.Config{Table: "a", Spec: mustSpec(t, text)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Abort)
	published := uint64(0)
	for _, way := range []struct {
		addr    string
		inPlace bool
	}{{r.addr.TCP, true}, {r.addr.Unix, true}, {r.addr.TLS, false}, {r.addr.QUIC, false}} {
		before, group := r.trainers.Stats(), r.Status().Tables[0].Groups[0]
		tr, err := client.Attach(t.Context(), way.addr, client.TrainerConfig{Table: "a", Group: "g", Prefetch: 3, Stream: true, TLS: client.TLS{Authorities: authorities}})
		if err != nil {
			t.Fatal(err)
		}
		n := 3 - uint64(group.Unread)
		if err := push(t.Context(), p, published*rows, n*rows); err != nil {
			t.Fatal(err)
		}
		published += n
		eventually(t, func() bool { st, _ := tr.RemoteStats(); return st.Batches == 3 })
		b, err := tr.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		b.Release()
		if err := tr.Close(); err != nil {
			t.Error(err)
		}
		eventually(t, func() bool { return len(r.trainers.Stats().Trainers) == 0 })
		after, g := r.trainers.Stats(), r.Status().Tables[0].Groups[0]
		if after.Detached != before.Detached+1 || after.Died != 0 || g.Dropped != 0 || g.Unread != 2 {
			t.Errorf("%s: %+v, then %+v; %+v", way.addr, before, after, g)
		}
		sent, inPlace := after.Sent-before.Sent, after.SentInPlace-before.SentInPlace
		if sent != 3*(large+rows*24) || inPlace != map[bool]uint64{true: 3 * large}[way.inPlace] {
			t.Errorf("%s: %d bytes were sent, %d of them without a copy", way.addr, sent, inPlace)
		}
	}
}
