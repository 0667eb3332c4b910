package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cloudwego/shmipc-go"
	"golang.org/x/sys/unix"
)

// options are the flags of either process.
type options struct {
	socket      string // the reader listens here
	counter     string // file of the word that counts what the reader released
	sampleBytes int
	samples     int // that the shared memory holds
	batch       int // samples between two looks at the clock, and two stores of the counter
}

const memoryMax = 1<<32 - 1<<12 // the library counts bytes in 32 bits

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "shmipc-peer:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 0 || args[0] != "reader" && args[0] != "writer" {
		return errors.New("say reader or writer; `ingestd bench shm --shmipc` does")
	}
	var opt options
	f := flag.NewFlagSet(args[0], flag.ContinueOnError)
	f.StringVar(&opt.socket, "socket", "", "where the reader listens")
	f.StringVar(&opt.counter, "counter", "", "file of the word that counts what the reader released")
	f.IntVar(&opt.sampleBytes, "sample-bytes", 0, "bytes of a sample")
	f.IntVar(&opt.samples, "samples", 0, "samples that the shared memory holds; fewer where the library's 4 GiB do not hold so many")
	f.IntVar(&opt.batch, "batch", 16, "samples that are released together")
	if err := f.Parse(args[1:]); err != nil {
		return err
	}
	if opt.socket == "" || opt.counter == "" || opt.sampleBytes < 1 || opt.samples < 4 || opt.batch < 1 {
		return errors.New("--socket, --counter, --sample-bytes, --samples (at least 4) and --batch must be given")
	}
	shmipc.SetLogLevel(logNothing) // it logs to standard output, which belongs to the control protocol
	if args[0] == "reader" {
		return runReader(opt)
	}
	return runWriter(opt)
}

const logNothing = 5

// config gives the library one list of buffers, each of which holds one sample.
func (o options) config() (cfg *shmipc.Config, samples int) {
	// The library adds 20 bytes to a buffer, 36 to a list and 8 to the memory; pages are for the rounding.
	const perBuffer, overhead = 20, 1 << 12
	size := (o.sampleBytes + 63) / 64 * 64
	samples = min(o.samples, (memoryMax-overhead)/(size+perBuffer))
	cfg = shmipc.DefaultConfig()
	cfg.ShareMemoryBufferCap = uint32(max(samples*(size+perBuffer)+overhead, 1<<20))
	cfg.BufferSliceSizes = []*shmipc.SizePercentPair{{Size: uint32(size), Percent: 100}}
	cfg.QueueCap = 1 << 16
	cfg.MemMapType = shmipc.MemMapTypeMemFd
	cfg.InitializeTimeout = 30 * time.Second
	cfg.LogOutput = os.Stderr
	cfg.ShareMemoryPathPrefix = o.socket + ".memory"
	return cfg, samples - 1 // it never gives out the last one
}

// peer is what both sides have: a counter of samples, and the first failure.
type peer struct {
	samples atomic.Uint64
	stopped atomic.Bool

	mu  sync.Mutex
	err error
}

// fail notes why the loop has ended, unless that was asked for.
func (p *peer) fail(err error) {
	if err == nil || p.stopped.Load() {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.err = err
}

func (p *peer) failure() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// mapCounter maps the word that the reader counts in. Either side makes the file.
func mapCounter(path string) (*atomic.Uint64, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	size := os.Getpagesize()
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		return nil, fmt.Errorf("size %s: %w", path, err)
	}
	mem, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", path, err)
	}
	return word(mem), nil
}

// pause waits a little: for another goroutine first, then for another process.
func pause(round int) {
	if round%64 == 63 {
		_, _, _ = unix.Syscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
		return
	}
	runtime.Gosched()
}
