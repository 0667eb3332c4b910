package bench

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/ingestd/ingestd/client"
)

// weightsOptions are the flags of the publisher's and the readers' processes.
type weightsOptions struct {
	address string
	table   string
	bytes   int64
	tensors int
}

func (o *weightsOptions) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&o.address, "address", "", "where to attach: unix:///path, or tcp://host:port")
	f.StringVar(&o.table, "table", tableName, "table of weights")
	f.Int64Var(&o.bytes, "bytes", mib, "bytes of a generation")
	f.IntVar(&o.tensors, "tensors", 1, "tensors of a generation")
}

// weightsPublisher publishes when it is told, in place, and copies as much memory as a baseline.
type weightsPublisher struct {
	publisher *client.Publisher
	source    []byte
	parts     [][]byte // of the source, by tensor
	target    []byte   // of the plain copy: a mapping like the daemon's
}

func publisherCommand() *cobra.Command {
	var opt weightsOptions
	cmd := &cobra.Command{
		Use:    "_publisher",
		Short:  "The publisher of bench tensors; the bench starts it",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE:   func(cmd *cobra.Command, _ []string) error { return runPublisher(cmd.Context(), opt) },
	}
	opt.flags(cmd)
	return cmd
}

func runPublisher(ctx context.Context, opt weightsOptions) error {
	m, err := benchManifest(opt.bytes, opt.tensors)
	if err != nil {
		return err
	}
	memory, err := newMemory(m.DataBytes())
	if err != nil {
		return err
	}
	defer memory.Close()
	p := &weightsPublisher{target: memory.Bytes()[:m.DataBytes()], source: make([]byte, m.DataBytes())}
	for i := range p.source {
		p.source[i] = byte(i >> 3)
	}
	for i := range m.Len() {
		p.parts = append(p.parts, p.source[m.Offset(i):m.Offset(i)+m.EncodedBytes(i)])
	}
	p.publisher, err = client.OpenPublisher(ctx, opt.address, client.PublisherConfig{Table: opt.table, Manifest: m, Client: "ingestd-bench"})
	if err != nil {
		return err
	}
	defer p.publisher.Close()
	return serveControl(os.Stdin, os.Stdout, &ready{}, func(ask request) (reply, error) { return p.handle(ctx, ask) })
}

func (p *weightsPublisher) handle(ctx context.Context, ask request) (reply, error) {
	switch ask.Do {
	case doPublish:
		return p.publish(ctx)
	case doCopy:
		begin := time.Now()
		copy(p.target, p.source)
		return reply{Values: map[string]int64{valueTook: int64(time.Since(begin))}}, nil
	default:
		return reply{}, unknownRequest(ask)
	}
}

// publish makes a generation whose first bytes are unlike those of the one before, so that a reader's look at it shows which it has.
func (p *weightsPublisher) publish(ctx context.Context) (reply, error) {
	for _, part := range p.parts {
		part[0]++
	}
	began := monotonic()
	published, err := p.publisher.Publish(ctx, func(i int) []byte { return p.parts[i] })
	if err != nil {
		return reply{}, fmt.Errorf("publish: %w", err)
	}
	return reply{Values: map[string]int64{valueBegan: began, valueGeneration: int64(published.Generation), valueFirst: int64(p.parts[len(p.parts)-1][0])}}, nil
}
