package main

import (
	"context"
	"math"
	"time"
)

// pace holds a sender to a rate: sample n goes out no earlier than n/rate after the start. A sender that was held up catches up.
type pace struct {
	rate  float64 // samples per second; 0 is as fast as possible
	start time.Time
	sent  int64
	timer *time.Timer
}

// paceSteps is how many times a second a paced sender sends, at most.
const paceSteps = 100

func newPace(rate float64) *pace {
	return &pace{rate: rate, start: time.Now(), timer: time.NewTimer(0)}
}

// due waits until samples are due and returns how many, at most most.
func (p *pace) due(ctx context.Context, most int) (int, error) {
	if p.rate == 0 {
		return most, ctx.Err()
	}
	for {
		n := int64(time.Since(p.start).Seconds()*p.rate) + 1 - p.sent
		if n > 0 {
			return int(min(n, int64(most))), ctx.Err()
		}
		// To the next sample, or where many are due in a step, to the next step.
		next := float64(p.sent) + math.Max(0, math.Floor(p.rate/paceSteps)-1)
		at := p.start.Add(time.Duration(next / p.rate * float64(time.Second)))
		p.timer.Reset(max(time.Until(at), time.Microsecond)) // rounding may put it a hair too early
		select {
		case <-p.timer.C:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}

func (p *pace) took(n int) { p.sent += int64(n) }
