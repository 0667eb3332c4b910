package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// The parent's control protocol, as bench/control.go has it: a JSON line in, a JSON line out. These are the parts that this program needs.
type request struct {
	Do   string `json:"do"`
	Pids []int  `json:"pids"`
}

type reply struct {
	Error    string    `json:"error,omitempty"`
	Ready    *ready    `json:"ready,omitempty"`
	Snapshot *snapshot `json:"snapshot,omitempty"`
}

type ready struct {
	Address       string `json:"address,omitempty"`
	WindowSamples int64  `json:"window_samples,omitempty"` // samples that the shared memory holds
}

type snapshot struct {
	Mono    int64         `json:"mono"` // CLOCK_MONOTONIC, ns
	CPU     map[int]int64 `json:"cpu"`  // ns by pid
	Samples uint64        `json:"samples"`
}

// serveControl answers the parent until it says stop or goes away.
func serveControl(in io.Reader, out io.Writer, first *ready, p *peer) error {
	encoder := json.NewEncoder(out)
	if err := encoder.Encode(reply{Ready: first}); err != nil {
		return fmt.Errorf("tell the parent that this process is ready: %w", err)
	}
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		var ask request
		if err := json.Unmarshal(lines.Bytes(), &ask); err != nil {
			return fmt.Errorf("line %q from the parent: %w", lines.Text(), err)
		}
		var answer reply
		err := p.failure()
		switch {
		case ask.Do == "stop":
			return encoder.Encode(answer)
		case err != nil:
		case ask.Do == "snapshot":
			answer.Snapshot, err = p.snapshot(ask.Pids)
		default:
			err = errors.New("this process does not know what " + ask.Do + " means")
		}
		if err != nil {
			answer = reply{Error: err.Error()}
		}
		if err := encoder.Encode(answer); err != nil {
			return fmt.Errorf("answer %s: %w", ask.Do, err)
		}
	}
	return lines.Err()
}

// snapshot reads the clocks and the counter.
func (p *peer) snapshot(pids []int) (*snapshot, error) {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &t); err != nil {
		return nil, err
	}
	s := &snapshot{Mono: t.Nano(), CPU: map[int]int64{}}
	for _, pid := range pids {
		const schedulerClock = 2
		if err := unix.ClockGettime(int32(^pid<<3|schedulerClock), &t); err != nil {
			return nil, fmt.Errorf("CPU clock of process %d (did it end?): %w", pid, err)
		}
		s.CPU[pid] = t.Nano()
	}
	s.Samples = p.samples.Load()
	return s, nil
}
