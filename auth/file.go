package auth

import (
	"fmt"
	"io"
	"os"
	"syscall"
)

// readFile reads a file of tokens that nobody else may read. The stamp is that of what was read, as far as it came.
func readFile(path string) ([]byte, stamp, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe would wait for its writer
	if err != nil {
		return nil, stampOf(path), err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, stamp{}, err
	}
	seen := stampFrom(info)
	if !info.Mode().IsRegular() {
		return nil, seen, fmt.Errorf("it is no regular file")
	}
	if err := checkMode(path, info); err != nil {
		return nil, seen, err
	}
	text, err := io.ReadAll(io.LimitReader(f, FileBytesMax+1))
	if err == nil && len(text) > FileBytesMax {
		err = &FormatError{Text: fmt.Sprintf("it has more than %d bytes", FileBytesMax)}
	}
	return text, seen, err
}

// checkMode refuses what others may read, or anyone else change. A group may read it: that is how services get theirs.
func checkMode(path string, info os.FileInfo) error {
	mode := info.Mode()
	switch {
	case mode&0o007 != 0:
		return &PermissionError{path, mode, "everybody on this machine may use it; run: chmod 600 " + path + ", and make new secrets if it was so for long"}
	case mode&0o020 != 0:
		return &PermissionError{path, mode, "its group may change it; run: chmod g-w " + path}
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return &PermissionError{path, mode, fmt.Sprintf("it belongs to user %d, who is neither root nor the user of this process, %d; run: chown %d %s", st.Uid, os.Geteuid(), os.Geteuid(), path)}
	}
	return nil
}

func stampFrom(info os.FileInfo) stamp {
	s := stamp{mtime: info.ModTime(), size: info.Size(), mode: info.Mode()}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		s.owner, s.device, s.inode = st.Uid, st.Dev, st.Ino
	}
	return s
}

// stampOf is zero where there is no file.
func stampOf(path string) stamp {
	info, err := os.Stat(path)
	if err != nil {
		return stamp{}
	}
	return stampFrom(info)
}
