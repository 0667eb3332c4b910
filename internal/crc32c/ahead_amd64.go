package crc32c

// prefetch asks for so many lines of 64 bytes, which need not be in the cache yet. It reads nothing, so that any address will do.
//
//go:noescape
func prefetch(first *byte, lines int)
