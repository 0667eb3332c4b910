package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"

	"github.com/ingestd/ingestd/internal/daemon"
)

// adminTarget is the admin endpoint of a daemon.
type adminTarget struct {
	addr      string
	tokenFile string
}

// answerBytesMax bounds the answer of whatever listens at the address: a status of 100,000 connections has 50 MB.
const answerBytesMax = 256 << 20

// ask sends a request and returns the answer's body. The token goes only where one is asked for.
func (a *adminTarget) ask(ctx context.Context, command, method, path string) ([]byte, error) {
	token, err := (&target{tokenFile: a.tokenFile}).token()
	if err != nil {
		return nil, err
	}
	addr := strings.TrimPrefix(a.addr, "http://")
	if _, _, err := net.SplitHostPort(addr); err != nil {
		return nil, usagef("%s: %q is no admin address, such as http://%s", command, a.addr, daemon.DefaultAdmin)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+addr+path, nil)
	if err != nil {
		return nil, usagef("%s: %w", command, err)
	}
	text, code, err := exchange(req)
	if code == http.StatusUnauthorized && token.Name != "" {
		req.Header.Set("Authorization", "Bearer "+token.Name+":"+token.Secret.Reveal())
		text, code, err = exchange(req)
	}
	switch {
	case err != nil:
		return nil, err
	case code == http.StatusUnauthorized && token.Name == "":
		return nil, &codeError{exitRefused, errors.New("the admin endpoint asks for a token with the right admin: give one (--token-file or INGESTD_TOKEN)")}
	case code == http.StatusUnauthorized:
		return nil, &codeError{exitRefused, fmt.Errorf("the daemon takes token %q for none with the right admin, or has banned this address", token.Name)}
	case code == http.StatusServiceUnavailable:
		return nil, &codeError{exitRefused, errors.New("the daemon is stopping")}
	case code == http.StatusBadRequest:
		return nil, &codeError{exitUsage, errors.New(strings.TrimSpace(string(text[:min(len(text), 1024)])))}
	case code != http.StatusOK:
		return nil, &codeError{exitUnreachable, fmt.Errorf("http://%s%s answers %d %s: is this the admin address of an ingestd?", addr, path, code, http.StatusText(code))}
	}
	return text, nil
}

// exchange makes one request.
func exchange(req *http.Request) ([]byte, int, error) {
	ctx := req.Context()
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, 0, context.Cause(ctx)
		}
		return nil, 0, &codeError{exitUnreachable, fmt.Errorf("no daemon answers at http://%s: is it running, with this --admin? (%w)", req.URL.Host, err)}
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, answerBytesMax+1))
	switch {
	case err != nil && ctx.Err() != nil:
		return nil, 0, context.Cause(ctx)
	case err != nil:
		return nil, 0, &codeError{exitUnreachable, fmt.Errorf("reading the answer of http://%s: %w", req.URL.Host, err)}
	case len(text) > answerBytesMax:
		return nil, 0, &codeError{exitUnreachable, errors.New("the answer is too long: is this the admin address of an ingestd?")}
	}
	return text, resp.StatusCode, nil
}
