package tensorfile

import (
	"archive/zip"
	"errors"
	"io"
	"os"
	"strings"

	"github.com/ingestd/ingestd/spec"
)

// numpyOnly is the name numpy gives to the first array without one.
const numpyOnly = "arr_0"

func openNPZ(f *os.File, size int64) ([]counted, error) {
	archive, err := zip.NewReader(f, size)
	if err != nil {
		return nil, formatErrorf("is not a whole .npz (zip) file: %v", err)
	}
	if len(archive.File) > spec.LeavesMax {
		return nil, formatErrorf("holds %d arrays; at most %d leaves are allowed", len(archive.File), spec.LeavesMax)
	}
	var all []counted
	for _, member := range archive.File {
		c, err := openMember(member)
		if err != nil {
			return nil, named(err, member.Name)
		}
		all = append(all, c)
	}
	if len(all) == 1 && all[0].leaf.Name == numpyOnly {
		all[0].bare = true
	}
	return all, nil
}

func openMember(member *zip.File) (counted, error) {
	name, ok := strings.CutSuffix(member.Name, ".npy")
	switch {
	case !ok:
		return counted{}, formatErrorf("is not an array: a .npz file holds .npy members only")
	case member.Flags&1 != 0:
		return counted{}, formatErrorf("is encrypted: save the file without a password")
	}
	r, a, header, err := openArray(member)
	if err != nil {
		return counted{}, err
	}
	_ = r.Close()
	n, err := a.size()
	if err != nil {
		return counted{}, err
	}
	// Sizes near 2^64 turn negative here and so cannot match.
	if have := int64(member.UncompressedSize64) - header; have != n {
		return counted{}, wrongLength(a, n, have)
	}
	return arrayColumn(name, a, func() (io.ReadCloser, error) {
		r, _, _, err := openArray(member)
		return r, err
	})
}

// openArray opens a member and reads up to the first byte of its data.
func openArray(member *zip.File) (io.ReadCloser, *array, int64, error) {
	r, err := member.Open()
	if errors.Is(err, zip.ErrAlgorithm) {
		return nil, nil, 0, formatErrorf("is compressed with zip method %d; numpy's own, stored and deflated, are read", member.Method)
	} else if err != nil {
		return nil, nil, 0, formatErrorf("is damaged: %v", err)
	}
	a, header, err := readNPYHeader(r)
	if err != nil {
		_ = r.Close()
		var known *FormatError
		if !errors.As(err, &known) {
			err = formatErrorf("is damaged: %v", err)
		}
		return nil, nil, 0, err
	}
	return r, a, header, nil
}
