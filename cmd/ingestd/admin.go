package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"

	"github.com/spf13/pflag"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/internal/daemon"
)

// adminAddress describes the flag.
const adminAddress = "admin address of the daemon: http://host:port, or unix:///path"

// adminTarget is the admin endpoint of a daemon.
type adminTarget struct {
	addr      string
	tokenFile string
}

// tokenFlag adds --token-file. A token goes to the endpoint as it is, over HTTP, and whoever listens there may ask for one: none is taken from the environment.
func (a *adminTarget) tokenFlag(f *pflag.FlagSet) {
	f.StringVar(&a.tokenFile, "token-file", "", "file whose one line is NAME:SECRET, for an admin address that asks for it: the secret is sent there in the clear; default: none is sent")
}

// answerBytesMax bounds the answer of whatever listens at the address: a status of 100,000 connections has 50 MB.
const answerBytesMax = 256 << 20

// ask sends a request and returns the answer's body. The token goes only where one is asked for.
func (a *adminTarget) ask(ctx context.Context, command, method, path string) ([]byte, error) {
	var token client.Token
	if a.tokenFile != "" {
		var err error
		if token, err = (&target{tokenFile: a.tokenFile}).token(); err != nil {
			return nil, err
		}
	}
	host := strings.TrimPrefix(a.addr, "http://")
	socket, local := strings.CutPrefix(a.addr, "unix://")
	if local {
		host = "localhost"
	} else if _, _, err := net.SplitHostPort(host); err != nil {
		return nil, usagef("%s: %q is no admin address, such as http://%s, or unix:///path", command, a.addr, daemon.DefaultAdmin)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+host+path, nil)
	if err != nil {
		return nil, usagef("%s: %w", command, err)
	}
	over := &http.Transport{DisableKeepAlives: true}
	if local {
		over.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}
	}
	text, code, err := a.exchange(over, req)
	if code == http.StatusUnauthorized && token.Name != "" {
		req.Header.Set("Authorization", "Bearer "+token.Name+":"+token.Secret.Reveal())
		text, code, err = a.exchange(over, req)
	}
	switch {
	case err != nil:
		return nil, err
	case code == http.StatusUnauthorized && token.Name == "":
		return nil, &codeError{exitRefused, errors.New("the admin endpoint asks for a token with the right admin: give one (--token-file)")}
	case code == http.StatusUnauthorized:
		return nil, &codeError{exitRefused, fmt.Errorf("the daemon takes token %q for none with the right admin", token.Name)}
	case code == http.StatusServiceUnavailable:
		return nil, &codeError{exitRefused, errors.New("the daemon is stopping")}
	case code == http.StatusBadRequest:
		return nil, &codeError{exitUsage, errors.New(strings.TrimSpace(string(text[:min(len(text), 1024)])))}
	case code != http.StatusOK:
		return nil, &codeError{exitUnreachable, fmt.Errorf("%s%s answers %d %s: is this the admin address of an ingestd?", a.url(), path, code, http.StatusText(code))}
	}
	return text, nil
}

// url is the address with its scheme.
func (a *adminTarget) url() string {
	if strings.Contains(a.addr, "://") {
		return a.addr
	}
	return "http://" + a.addr
}

// exchange makes one request.
func (a *adminTarget) exchange(over *http.Transport, req *http.Request) ([]byte, int, error) {
	ctx := req.Context()
	resp, err := over.RoundTrip(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, 0, context.Cause(ctx)
		}
		return nil, 0, &codeError{exitUnreachable, fmt.Errorf("no daemon answers at %s: is it running, with this --admin? It answers nobody whose address it has banned, either (%w)", a.url(), err)}
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, answerBytesMax+1))
	switch {
	case err != nil && ctx.Err() != nil:
		return nil, 0, context.Cause(ctx)
	case err != nil:
		return nil, 0, &codeError{exitUnreachable, fmt.Errorf("reading the answer of %s: %w", a.url(), err)}
	case len(text) > answerBytesMax:
		return nil, 0, &codeError{exitUnreachable, errors.New("the answer is too long: is this the admin address of an ingestd?")}
	}
	return text, resp.StatusCode, nil
}
