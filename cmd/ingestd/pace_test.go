package main

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// TestPace runs on synctest's clock: what the rate allows is sent in that time, no more and no less.
func TestPace(t *testing.T) {
	for _, rate := range []float64{0.5, 3, 100, 12345, 5e6} {
		synctest.Test(t, func(t *testing.T) {
			p := newPace(rate)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			sent, calls := 0, 0
			for {
				n, err := p.due(ctx, 1<<20)
				if err != nil {
					if !errors.Is(err, context.DeadlineExceeded) {
						t.Errorf("rate %v: %v", rate, err)
					}
					break
				}
				p.took(n)
				sent += n
				calls++
			}
			if want := rate * 10; float64(sent) < want*0.99-1 || float64(sent) > want*1.001+1 {
				t.Errorf("rate %v: %d sent in 10 s, want %v", rate, sent, want)
			}
			if calls > 12*paceSteps {
				t.Errorf("rate %v: sent in %d steps", rate, calls)
			}
		})
	}
	if n, err := newPace(0).due(t.Context(), 77); n != 77 || err != nil {
		t.Errorf("without a rate: %d, %v", n, err)
	}
}
