//go:build !linux

package client

import (
	"context"
	"fmt"
)

func fillSteps(_ context.Context, addr string, _ StepsConfig) (stepWay, int, error) {
	return nil, 0, fmt.Errorf("client: address %q: producers in place need Linux; use tcp:// or unix:// without InPlace", addr)
}
