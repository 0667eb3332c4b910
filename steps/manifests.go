package steps

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/ingestd/ingestd/spec"
	"github.com/ingestd/ingestd/tensor"
)

// KeptManifests is how many manifests are kept that no open stream has.
const KeptManifests = 16

// manifestTextMax bounds what is read of one manifest in a file: that of the format, and what JSON may add around it.
const manifestTextMax = 2_000_000 + 1024

// known is one manifest as it is kept: its text only, so that many large ones cost little.
type known struct {
	id          uint64
	fingerprint spec.Fingerprint
	text        []byte
	users       int // streams that have it
}

// manifests are those that a table knows, the one used last at the end. Not safe for concurrent use.
type manifests struct {
	all []*known
}

func (ms *manifests) find(id uint64) *known {
	if i := slices.IndexFunc(ms.all, func(k *known) bool { return k.id == id }); i >= 0 {
		return ms.all[i]
	}
	return nil
}

// use makes m the one used last, and tells whether it is new.
func (ms *manifests) use(m *tensor.Manifest) (k *known, fresh bool) {
	i := slices.IndexFunc(ms.all, func(k *known) bool { return k.fingerprint == m.Fingerprint() })
	if i >= 0 {
		k = ms.all[i]
		ms.all = append(slices.Delete(ms.all, i, i+1), k)
		return k, false
	}
	k = &known{id: m.ID(), fingerprint: m.Fingerprint(), text: m.JSON()}
	ms.all = append(ms.all, k)
	ms.trim()
	return k, true
}

// trim forgets the oldest of those that nobody uses beyond KeptManifests.
func (ms *manifests) trim() {
	unused := 0
	for _, k := range ms.all {
		if k.users == 0 {
			unused++
		}
	}
	ms.all = slices.DeleteFunc(ms.all, func(k *known) bool {
		if k.users > 0 || unused <= KeptManifests {
			return false
		}
		unused--
		return true
	})
}

// manifestFile is the JSON of the file in which manifests are kept, the one used last at the end.
type manifestFile struct {
	Version   int               `json:"version"`
	Manifests []json.RawMessage `json:"manifests"`
}

const manifestFileVersion = 1

// load reads what an earlier process left; without a file there is nothing.
func (ms *manifests) load(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	// One for the streams that were open, which have the same.
	const most = (KeptManifests + 1) * manifestTextMax
	text, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return err
	}
	if len(text) > most {
		return fmt.Errorf("%s has more than %d bytes, which no such file has", path, most)
	}
	var file manifestFile
	if err := json.Unmarshal(text, &file); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if file.Version != manifestFileVersion {
		return fmt.Errorf("%s has version %d, this is version %d", path, file.Version, manifestFileVersion)
	}
	for i, raw := range file.Manifests {
		m, err := tensor.ParseManifest(raw)
		if err != nil {
			return fmt.Errorf("%s: manifest %d: %w", path, i, err)
		}
		ms.use(m)
	}
	return nil
}

// file returns what is to be written.
func (ms *manifests) file() ([]byte, error) {
	file := manifestFile{Version: manifestFileVersion, Manifests: []json.RawMessage{}}
	for _, k := range ms.all {
		file.Manifests = append(file.Manifests, k.text)
	}
	return json.Marshal(file)
}

// writeWhole puts a file in place whole or not at all.
func writeWhole(path string, text []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}
