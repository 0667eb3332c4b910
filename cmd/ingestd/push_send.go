package main

import (
	"context"
	"errors"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/internal/tensorfile"
)

// errEnough ends a push that has sent its --count.
var errEnough = errors.New("enough")

// sender hands chunks to the producer, at its pace.
type sender struct {
	p      *client.Producer
	pace   *pace
	bar    *progress
	left   int64 // -1: no limit
	skip   uint64
	leaves [][]byte
}

// all sends the input, repeat times or for ever. What the daemon holds of the session already is left out.
func (s *sender) all(ctx context.Context, in input, repeat int64) error {
	s.skip = s.p.Held()
	for round := int64(0); repeat == 0 || round < repeat; round++ {
		if round > 0 {
			if again, ok := in.(interface{ rewind() error }); ok {
				if err := again.rewind(); err != nil {
					return usagef("--repeat: %w", err)
				}
			}
		}
		if err := in.each(s.p.Accepted().Stream, func(c *tensorfile.Chunk) error { return s.chunk(ctx, c) }); err != nil {
			return err
		}
	}
	return nil
}

func (s *sender) chunk(ctx context.Context, c *tensorfile.Chunk) error {
	from := int(min(s.skip, uint64(c.Count)))
	s.skip -= uint64(from)
	for from < c.Count {
		most := c.Count - from
		if s.left >= 0 {
			most = int(min(int64(most), s.left))
		}
		if most == 0 {
			return errEnough
		}
		n, err := s.pace.due(ctx, most)
		if err == nil {
			n, err = s.some(ctx, c, from, n)
			s.took(n)
			from += n
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *sender) took(n int) {
	s.pace.took(n)
	s.bar.add(int64(n) * s.p.Spec().SampleBytes())
	if s.left >= 0 {
		s.left -= int64(n)
	}
}

// some sends n samples of a chunk and returns how many were taken.
func (s *sender) some(ctx context.Context, c *tensorfile.Chunk, from, n int) (int, error) {
	size := int(s.p.Spec().SampleBytes())
	if c.Samples != nil {
		return s.p.PushMany(ctx, n, c.Samples[from*size:(from+n)*size])
	}
	for i := range n {
		s.leaves = c.Sample(s.leaves[:0], s.p.Spec(), from+i)
		if err := s.p.Push(ctx, s.leaves...); err != nil {
			return i, err
		}
	}
	return n, nil
}
