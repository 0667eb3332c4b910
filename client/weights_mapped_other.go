//go:build !linux

package client

import (
	"context"
	"errors"
)

var errNotMapped = errors.New("client: memory that processes share is for Linux only: set Stream")

func openMapped(context.Context, string, SubscribeConfig) (source, error) { return nil, errNotMapped }

func openMappedSink(context.Context, string, PublisherConfig) (sink, error) { return nil, errNotMapped }
