package auth

import (
	"errors"
	"fmt"

	"go.yaml.in/yaml/v3"

	"github.com/ingestd/ingestd/wire"
)

// NewEntry makes a token with a new secret, and the lines that a file of tokens needs for it, below `tokens:`. These show the secret.
func NewEntry(name string, rights, tables []string) (token wire.Token, lines string, err error) {
	type fields struct {
		Name   string   `yaml:"name"`
		Secret string   `yaml:"secret"`
		Rights []string `yaml:"rights,flow"`
		Tables []string `yaml:"tables,flow,omitempty"`
	}
	token = wire.Token{Name: name, Secret: NewSecret()}
	list := []fields{{name, token.Secret.Reveal(), rights, tables}}
	text, err := yaml.Marshal(list)
	if err != nil {
		return wire.Token{}, "", err
	}
	file, err := yaml.Marshal(map[string]any{"tokens": list})
	if err != nil {
		return wire.Token{}, "", err
	}
	if _, err := parse(file); err != nil { // what the daemon would say of it
		var bad *FormatError
		if errors.As(err, &bad) {
			err = errors.New(bad.Text)
		}
		return wire.Token{}, "", fmt.Errorf("auth: new token: %w", err)
	}
	return token, string(text), nil
}
