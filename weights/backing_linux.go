package weights

import "github.com/ingestd/ingestd/shm"

// newBacking makes a segment that publishers in place may write and readers may not.
func newBacking(name string, size int64, huge bool) (backing, error) {
	m, err := shm.NewMemory(shm.MemoryConfig{Name: name, Size: size, HugePages: huge, Fillable: true})
	if err != nil {
		return nil, err
	}
	return m, nil
}
