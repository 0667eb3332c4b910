//go:build !linux

package weights

import "errors"

// newBacking needs Linux, as package shm does. A store on the heap works everywhere.
func newBacking(string, int64, bool) (backing, error) {
	return nil, errors.New("weights: memory that processes share is for Linux only")
}
