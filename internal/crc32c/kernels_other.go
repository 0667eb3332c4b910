//go:build !amd64

package crc32c

// There are no kernels for this machine: everything is done by hash/crc32 and copy.

var accelerated = false

func sumBlocks(sum uint32, _ []byte) (uint32, int) { return sum, 0 }

func copyBlocks(sum uint32, _, _ []byte) (uint32, int) { return sum, 0 }

func streamBlocks(sum uint32, _, _ []byte) (uint32, int) { return sum, 0 }
