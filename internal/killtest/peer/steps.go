//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/ingestd/ingestd/client"
	"github.com/ingestd/ingestd/internal/killtest"
)

// steps sends steps whose content proves itself, from the one that the options name on, until SIGTERM. With role place it writes them in place. It writes one line for each
// that is committed, and begins none that is not in the ledger: a file with the highest step that may be sent.
func (o *options) steps(ctx context.Context) error {
	m, err := killtest.StepsManifest()
	if err != nil {
		return err
	}
	addr := o.addr
	if o.role == "place" {
		addr = "shm://" + strings.TrimPrefix(addr, "unix://")
	}
	var p *client.StepProducer
	for p == nil {
		if ctx.Err() != nil {
			return nil
		}
		if p, err = client.DialSteps(ctx, addr, client.StepsConfig{Table: o.table, Name: o.name, Manifest: m}); err != nil {
			wait(ctx, again)
		}
	}
	defer p.Abort()
	for step := o.session; o.mayBegin(ctx, step); step++ {
		if err := o.sendStep(ctx, p, step); err != nil {
			if errors.Is(err, context.Canceled) {
				return nil
			}
			return err
		}
		fmt.Printf("%d\n", step)
		o.rest(ctx)
	}
	return nil
}

// mayBegin waits until a step may be sent, and returns false when the context has ended.
func (o *options) mayBegin(ctx context.Context, step uint64) bool {
	for ctx.Err() == nil {
		text, err := os.ReadFile(o.ledger)
		if most, bad := strconv.ParseUint(string(text), 10, 64); err == nil && bad == nil && step <= most {
			return true
		}
		wait(ctx, again)
	}
	return false
}

func (o *options) sendStep(ctx context.Context, p *client.StepProducer, step uint64) error {
	tx, err := p.Step(ctx, step)
	if err != nil {
		return err
	}
	defer tx.Abort()
	for _, i := range o.rnd.Perm(p.Manifest().Len()) {
		t := p.Manifest().Tensor(i)
		values := make([]float32, t.Elements())
		killtest.StepsContent(values, o.name, step, i)
		if err := tx.PutFloats(t.Name, values); err != nil {
			return err
		}
		o.rest(ctx)
	}
	return tx.Commit(ctx)
}
