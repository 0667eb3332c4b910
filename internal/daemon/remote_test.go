package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/ingestd/ingestd/client"
)

// TestRemoteTrainer: a trainer over TCP, and one whose batches are sent over the unix socket, share a group; they are given everything, are told of the end, and
// the status says where they come from. A stopping daemon waits for them.
func TestRemoteTrainer(t *testing.T) {
	r := start(t, testConfig(t))
	seen := make(chan uint64)
	ended := make(chan error, 2)
	for _, addr := range []string{r.addr.TCP, r.addr.Unix} {
		tr, err := client.Attach(t.Context(), addr, client.TrainerConfig{Table: "a", Stream: true})
		if err != nil {
			t.Fatal(err)
		}
		defer tr.Close()
		go func() {
			for {
				b, err := tr.Next(context.Background())
				if err != nil {
					if err == io.EOF {
						err = nil
					}
					ended <- errors.Join(err, tr.Close())
					return
				}
				for _, number := range b.Numbers() {
					seen <- number
				}
				b.Release()
			}
		}()
	}
	var s Status
	resp, err := http.Get(r.addr.Admin + "/status")
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(json.NewDecoder(resp.Body).Decode(&s), resp.Body.Close())
	if err != nil || len(s.Trainers) != 2 || s.Trainers[0].Peer == "" || s.Trainers[1].Peer != "unix" {
		t.Fatalf("%v, %+v", err, s.Trainers)
	}
	const n = 1000
	p := r.producer(t, r.addr.TCP)
	go func() {
		if err := push(t.Context(), p, 0, n); err != nil {
			t.Error(err)
		}
		if err := p.Close(t.Context()); err != nil {
			t.Error(err)
		}
		r.stop()
	}()
	got := map[uint64]bool{}
	for range n {
		select {
		case number := <-seen:
			if got[number] {
				t.Errorf("sample %d came twice", number)
			}
			got[number] = true
		case <-time.After(time.Minute):
			t.Fatalf("%d of %d samples came", len(got), n)
		}
	}
	for range 2 {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	if err := r.wait(); err != nil {
		t.Error(err)
	}
}
