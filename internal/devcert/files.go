package devcert

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// The files of an authority in its folder.
const (
	AuthorityCertificate = "ca.pem"
	AuthorityKey         = "ca.key"
)

// ExistsError says that a file is there already; nothing was written.
type ExistsError struct{ Path string }

func (e *ExistsError) Error() string {
	return fmt.Sprintf("%s is there already and is not overwritten; remove it, or choose another folder or --name", e.Path)
}

// Unwrap makes it fs.ErrExist.
func (e *ExistsError) Unwrap() error { return fs.ErrExist }

// Write writes DIR/NAME.pem and DIR/NAME.key, both with mode 0600, and returns their paths. It overwrites nothing, and leaves no half of a pair.
func (p *Pair) Write(dir, name string) (certificate, key string, err error) {
	if name == "" || name != filepath.Base(name) || name == "." || name == ".." {
		return "", "", fmt.Errorf("devcert: %q is no name of a file", name)
	}
	certificate, key = filepath.Join(dir, name+".pem"), filepath.Join(dir, name+".key")
	secret, err := p.KeyPEM()
	if err != nil {
		return "", "", err
	}
	if err := create(key, secret); err != nil {
		return "", "", err
	}
	if err := create(certificate, p.CertificatePEM()); err != nil {
		return "", "", errors.Join(err, os.Remove(key))
	}
	return certificate, key, nil
}

// create writes a file that is not there yet, whole or not at all.
func create(path string, content []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return &ExistsError{path}
	}
	if err != nil {
		return fmt.Errorf("devcert: %w", err)
	}
	_, err = f.Write(content)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(fmt.Errorf("devcert: %w", err), os.Remove(path))
	}
	return nil
}

// ReadAuthority reads the authority that Write put into a folder under the name "ca".
func ReadAuthority(dir string) (*Authority, error) {
	certificate, err := os.ReadFile(filepath.Join(dir, AuthorityCertificate))
	if err != nil {
		return nil, fmt.Errorf("devcert: there is no authority: %w; make one with: ingestd cert ca --dir %s", err, dir)
	}
	key, err := os.ReadFile(filepath.Join(dir, AuthorityKey))
	if err != nil {
		return nil, fmt.Errorf("devcert: %w", err)
	}
	return ParseAuthority(certificate, key)
}
