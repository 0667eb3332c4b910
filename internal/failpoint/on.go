//go:build failpoints && linux

package failpoint

import (
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
)

// armed is set before main and never again.
var (
	armed point
	hits  atomic.Uint64
)

func init() {
	text, ok := os.LookupEnv(Variable)
	if !ok || text == "" {
		return
	}
	p, err := parse(text)
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", Variable, err)
		os.Exit(2)
	}
	armed = p
}

// Hit ends or stops the process if this is the hit that INGESTD_FAILPOINT asked for.
func Hit(name string) {
	if name != armed.name || hits.Add(1) != armed.count {
		return
	}
	sig := syscall.SIGKILL
	if armed.stop {
		sig = syscall.SIGSTOP
	}
	// To this very thread: a signal to the process may be taken by another one, while this one runs on for a moment.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	_, _, errno := syscall.RawSyscall(syscall.SYS_TGKILL, uintptr(syscall.Getpid()), uintptr(syscall.Gettid()), uintptr(sig))
	if errno != 0 {
		panic("failpoint: cannot signal this process: " + errno.Error())
	}
}
