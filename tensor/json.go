package tensor

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/ingestd/ingestd/internal/strictjson"
	"github.com/ingestd/ingestd/spec"
)

// ParseManifest reads the JSON form. Unknown, repeated and missing fields are refused, and so is anything that follows.
func ParseManifest(text []byte) (*Manifest, error) {
	tensors, metadata, err := parse(text)
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	return NewManifest(tensors, metadata)
}

func parse(text []byte) (tensors []Tensor, metadata map[string]string, err error) {
	if len(text) > TextBytesMax {
		return nil, nil, fmt.Errorf("the JSON has %d bytes; at most %d are allowed", len(text), TextBytesMax)
	}
	r := strictjson.New(text)
	err = r.Fields([]string{"tensors"}, []string{"metadata"}, func(field string) error {
		if field == "metadata" {
			metadata = map[string]string{}
			return readMetadata(r, metadata)
		}
		return r.Array(func() error {
			if len(tensors) == TensorsMax {
				return fmt.Errorf("more than %d tensors", TensorsMax)
			}
			t, err := readTensor(r)
			if err != nil {
				return fmt.Errorf("tensor %d: %w", len(tensors), err)
			}
			tensors = append(tensors, t)
			return nil
		})
	})
	return tensors, metadata, errors.Join(err, endIf(err == nil, r))
}

func endIf(ok bool, r *strictjson.Reader) error {
	if !ok {
		return nil
	}
	return r.End()
}

func readMetadata(r *strictjson.Reader, into map[string]string) error {
	return r.Map(func(key string) error {
		if _, again := into[key]; again {
			return fmt.Errorf("the entry %s is there twice", strictjson.Quote(key))
		}
		if len(into) == MetadataMax {
			return fmt.Errorf("more than %d entries", MetadataMax)
		}
		value, err := r.String()
		into[key] = value
		return err
	})
}

var tensorFields, tensorOptions = []string{"name", "dtype", "shape"}, []string{"encoding"}

func readTensor(r *strictjson.Reader) (t Tensor, err error) {
	err = r.Fields(tensorFields, tensorOptions, func(field string) error {
		if field == "shape" {
			return r.Array(func() error {
				if len(t.Shape) == DimsMax {
					return fmt.Errorf("more than %d dimensions; merge some", DimsMax)
				}
				d, err := r.Int()
				t.Shape = append(t.Shape, d)
				return err
			})
		}
		text, err := r.String()
		if err != nil {
			return err
		}
		switch field {
		case "name":
			t.Name = text
		case "dtype":
			t.DType, err = spec.ParseDType(text)
		case "encoding":
			if text == "" {
				return errors.New("it is empty; leave it out where there is none")
			}
			t.Encoding, err = ParseEncoding(text)
		}
		return err
	})
	return t, err
}

// JSON returns the compact JSON form, always the same bytes for equal tensors and metadata.
func (m *Manifest) JSON() []byte {
	b := make([]byte, 0, 64+64*len(m.tensors))
	b = append(b, `{"tensors":[`...)
	for i := range m.tensors {
		t := &m.tensors[i]
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, `{"name":`...)
		b = strictjson.AppendString(b, t.Name)
		b = append(b, `,"dtype":"`...)
		b = append(b, t.DType.String()...)
		b = append(b, `","shape":`...)
		b = appendShape(b, t.Shape)
		if t.Encoding.Kind != Raw {
			b = append(b, `,"encoding":"`...)
			b = append(b, t.Encoding.String()...)
			b = append(b, '"')
		}
		b = append(b, '}')
	}
	b = append(b, ']')
	if len(m.metadata) > 0 {
		b = append(b, `,"metadata":{`...)
		for i, key := range slices.Sorted(maps.Keys(m.metadata)) {
			if i > 0 {
				b = append(b, ',')
			}
			b = append(strictjson.AppendString(b, key), ':')
			b = strictjson.AppendString(b, m.metadata[key])
		}
		b = append(b, '}')
	}
	return append(b, '}')
}

// MarshalJSON is JSON.
func (m *Manifest) MarshalJSON() ([]byte, error) {
	if len(m.tensors) == 0 {
		return nil, errors.New("manifest: this Manifest was not made by NewManifest or ParseManifest and has no tensors")
	}
	return m.JSON(), nil
}

// UnmarshalJSON is ParseManifest into m.
func (m *Manifest) UnmarshalJSON(text []byte) error {
	parsed, err := ParseManifest(text)
	if err != nil {
		return err
	}
	*m = *parsed
	return nil
}
