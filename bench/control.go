package bench

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/pprof"

	"golang.org/x/sys/unix"
)

// request is a line from the parent to a child.
type request struct {
	Do   string  `json:"do"`
	Pids []int   `json:"pids,omitempty"` // snapshot: read the CPU clocks of these
	Rate float64 `json:"rate,omitempty"` // open: samples per second over all connections
	Upto uint64  `json:"upto,omitempty"` // fill: samples in all
	Path string  `json:"path,omitempty"` // profile: write a CPU profile here until the child ends
}

// What a parent can ask for.
const (
	doSnapshot   = "snapshot"
	doOpen       = "open"       // sender: from full speed to a fixed rate
	doRecord     = "record"     // receiver: note latencies from now on
	doHistograms = "histograms" // receiver: the latencies noted
	doProfile    = "profile"
	doFill       = "fill" // filler: go on until so many samples were committed
	doStop       = "stop"

	doCopy        = "copy"         // publisher: one copy() of a generation's size
	doPublish     = "publish"      // publisher: one generation
	doSeen        = "seen"         // subscriber: when generation Upto was seen
	doFetch       = "fetch"        // receiver of the sendfile loop: one transfer
	doFetchVerify = "fetch verify" // the same, and sum it
	doStep        = "step"         // reader of steps: wait for step Upto and sum it
	doLoop        = "loop"         // reader of steps: a plain loop over as many bytes
)

// reply is a line from a child to its parent.
type reply struct {
	Error      string      `json:"error,omitempty"`
	Ready      *ready      `json:"ready,omitempty"`
	Snapshot   *snapshot   `json:"snapshot,omitempty"`
	Histograms *histograms `json:"histograms,omitempty"`

	// Times in nanoseconds, and numbers, of what was asked for.
	Values map[string]int64 `json:"values,omitempty"`
}

// Names of values.
const (
	valueTook       = "took"
	valueBegan      = "began" // CLOCK_MONOTONIC
	valueGeneration = "generation"
	valueFirst      = "first"   // byte of the tensor that readers look at
	valueSeen       = "seen"    // CLOCK_MONOTONIC
	valueView       = "view"    // from being awake to the first byte of a tensor
	valueShown      = "shown"   // from the daemon's stamp of publication to being seen
	valueSpilled    = "spilled" // bytes of a step that did not stay in the ring
)

// ready is what a child says first.
type ready struct {
	Address       string `json:"address,omitempty"`
	WindowSamples int64  `json:"window_samples,omitempty"`
	WindowBytes   int64  `json:"window_bytes,omitempty"`
}

// snapshot is a child's counters and the CPU clocks of the processes of a measurement, read at one moment.
type snapshot struct {
	Mono    int64         `json:"mono"` // CLOCK_MONOTONIC, ns
	CPU     map[int]int64 `json:"cpu"`  // ns by pid
	Samples uint64        `json:"samples"`
	Batches uint64        `json:"batches"`
	Wrong   uint64        `json:"wrong"` // samples whose first bytes were not the sender's
	Streams []uint64      `json:"streams,omitempty"`
	Last    int64         `json:"last,omitempty"`    // CLOCK_MONOTONIC, ns: when the last batch, or the end that was waited for, came
	Stall   int64         `json:"stall,omitempty"`   // ns: the longest time in which a producer got no ack, since record
	Spilled uint64        `json:"spilled,omitempty"` // bytes that a reader of steps has copied out of the ring
	Lost    uint64        `json:"lost,omitempty"`    // samples that a producer says the daemon has lost
}

// takeSnapshot reads the clocks; the caller adds its counters.
func takeSnapshot(pids []int) (*snapshot, error) {
	s := &snapshot{Mono: monotonic(), CPU: make(map[int]int64, len(pids))}
	for _, pid := range pids {
		ns, err := processCPU(pid)
		if err != nil {
			return nil, err
		}
		s.CPU[pid] = ns
	}
	return s, nil
}

func monotonic() int64 {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &t); err != nil {
		panic(err) // the clock is always there
	}
	return t.Nano()
}

// processCPU returns the CPU time of all threads of a process, user and system, in nanoseconds. The clock id is what clock_getcpuclockid(3) returns; it is as
// exact as the scheduler, where /proc/PID/stat counts ticks of 10 ms.
func processCPU(pid int) (int64, error) {
	const schedulerClock = 2
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|schedulerClock), &t); err != nil {
		return 0, fmt.Errorf("CPU clock of process %d (did it end?): %w", pid, err)
	}
	return t.Nano(), nil
}

// serveControl answers the parent until it says stop or goes away. handle answers what is not common to all children.
func serveControl(in io.Reader, out io.Writer, first *ready, handle func(request) (reply, error)) error {
	encoder := json.NewEncoder(out)
	if err := encoder.Encode(reply{Ready: first}); err != nil {
		return fmt.Errorf("tell the parent that this process is ready: %w", err)
	}
	lines := bufio.NewScanner(in)
	profiling := false
	defer func() {
		if profiling {
			pprof.StopCPUProfile()
		}
	}()
	for lines.Scan() {
		var ask request
		if err := json.Unmarshal(lines.Bytes(), &ask); err != nil {
			return fmt.Errorf("line %q from the parent: %w", lines.Text(), err)
		}
		var answer reply
		var err error
		switch ask.Do {
		case doStop:
			return encoder.Encode(answer)
		case doProfile:
			err = startProfile(ask.Path)
			profiling = err == nil
		default:
			answer, err = handle(ask)
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

// startProfile profiles this process until it ends; the file is written by StopCPUProfile.
func startProfile(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		return errors.Join(err, f.Close())
	}
	return nil
}

func unknownRequest(ask request) error {
	return fmt.Errorf("this process does not know what %q means: parent and child are of different builds", ask.Do)
}
