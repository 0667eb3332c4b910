package bench

import (
	"os"

	"github.com/ingestd/ingestd/shm"
)

// newMemory makes the memory that a baseline writes into, as the daemon makes its ring's: huge pages if there are any, every page present.
func newMemory(bytes int64) (*shm.Memory, error) {
	return shm.NewMemory(shm.MemoryConfig{Name: "ingestd bench", Size: bytes, HugePages: true})
}

var selfPid = os.Getpid()
