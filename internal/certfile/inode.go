package certfile

import (
	"io/fs"
	"syscall"
)

// inode tells a file from one that replaced it within the resolution of time stamps.
func inode(info fs.FileInfo) uint64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Ino
	}
	return 0
}
