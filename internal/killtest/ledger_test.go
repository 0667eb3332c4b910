package killtest

import (
	"path/filepath"
	"sync"
	"testing"
)

// TestLedger: what was written is read, by another who has the file open, at any moment: never more acked than sent.
func TestLedger(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger")
	w, err := OpenLedger(path)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	r, err := OpenLedger(path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if sent, acked, err := r.Read(); sent != 0 || acked != 0 || err != nil {
		t.Errorf("a new ledger: %d, %d, %v", sent, acked, err)
	}
	const last = 20000
	var writer sync.WaitGroup
	writer.Go(func() {
		for n := uint64(1); n <= last; n++ {
			if err := w.SetSent(n); err != nil {
				t.Error(err)
				return
			}
			if err := w.SetAcked(n); err != nil {
				t.Error(err)
				return
			}
		}
	})
	defer writer.Wait()
	for acked := uint64(0); acked < last && !t.Failed(); {
		var sent uint64
		if sent, acked, err = r.Read(); err != nil || acked > sent {
			t.Fatalf("%d sent, %d acked, %v", sent, acked, err)
		}
	}
}
