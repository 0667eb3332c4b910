package bench

import (
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Machine says on what the figures were measured.
type Machine struct {
	CPU         string            `json:"cpu"`
	Cores       int               `json:"cores"`      // that this process may use
	GOMAXPROCS  int               `json:"gomaxprocs"` // of every process of the bench
	Caches      map[string]string `json:"caches"`     // of core 0, such as "L2": "1024K", "L3": "32768K"
	MemoryBytes int64             `json:"memory_bytes"`
	Hypervisor  bool              `json:"hypervisor"`
	Kernel      string            `json:"kernel"`
	Go          string            `json:"go"`
	Platform    string            `json:"platform"`
	Revision    string            `json:"revision,omitempty"` // of this program's source
	Load        string            `json:"load"`               // /proc/loadavg before the first case
}

// readMachine reads what /proc and /sys tell; what they do not stays empty.
func readMachine() Machine {
	m := Machine{
		Cores: runtime.NumCPU(), GOMAXPROCS: runtime.GOMAXPROCS(0), Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH,
		Caches: map[string]string{}, Load: readLine("/proc/loadavg"),
	}
	for line := range strings.Lines(readText("/proc/cpuinfo")) {
		name, value, _ := strings.Cut(line, ":")
		switch name, value = strings.TrimSpace(name), strings.TrimSpace(value); {
		case name == "model name" && m.CPU == "":
			m.CPU = value
		case name == "flags":
			m.Hypervisor = m.Hypervisor || strings.Contains(value+" ", " hypervisor ")
		}
	}
	for line := range strings.Lines(readText("/proc/meminfo")) {
		if fields := strings.Fields(line); len(fields) == 3 && fields[0] == "MemTotal:" {
			n, _ := strconv.ParseInt(fields[1], 10, 64)
			m.MemoryBytes = n * kib
		}
	}
	caches, _ := filepath.Glob("/sys/devices/system/cpu/cpu0/cache/index*")
	for _, folder := range caches {
		if readLine(folder+"/type") != "Instruction" {
			m.Caches["L"+readLine(folder+"/level")] = readLine(folder + "/size")
		}
	}
	var name unix.Utsname
	if unix.Uname(&name) == nil {
		m.Kernel = unix.ByteSliceToString(name.Sysname[:]) + " " + unix.ByteSliceToString(name.Release[:])
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			switch {
			case s.Key == "vcs.revision":
				m.Revision = s.Value + m.Revision
			case s.Key == "vcs.modified" && s.Value == "true":
				m.Revision += " (modified)"
			}
		}
	}
	return m
}

func readText(path string) string {
	text, _ := os.ReadFile(path)
	return string(text)
}

func readLine(path string) string {
	line, _, _ := strings.Cut(readText(path), "\n")
	return line
}
