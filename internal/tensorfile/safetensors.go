package tensorfile

import (
	"errors"
	"os"

	"github.com/ingestd/ingestd/internal/strictjson"
	"github.com/ingestd/ingestd/safetensors"
	"github.com/ingestd/ingestd/spec"
)

// openSafetensors keeps the order of the header, which is the order of the leaves.
func openSafetensors(f *os.File, size int64) ([]counted, error) {
	h, err := safetensors.ReadHeader(f, size)
	var format *safetensors.FormatError
	switch {
	case errors.As(err, &format):
		return nil, formatErrorf("%s", format.Reason)
	case err != nil:
		return nil, err
	case len(h.Entries) > spec.LeavesMax:
		return nil, formatErrorf("holds %d tensors; at most %d leaves are allowed", len(h.Entries), spec.LeavesMax)
	}
	var all []counted
	for _, e := range h.Entries {
		a := &array{element: element{dtype: e.DType, bytes: e.DType.Bytes()}, shape: e.Shape}
		c, err := arrayColumn(e.Name, a, section(f, h.DataOffset+e.Begin, e.End-e.Begin))
		if err != nil {
			return nil, named(err, strictjson.Quote(e.Name))
		}
		all = append(all, c)
	}
	return all, nil
}
