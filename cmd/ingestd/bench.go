package main

import (
	"github.com/spf13/cobra"

	"github.com/ingestd/ingestd/bench"
)

func benchCommands() []*cobra.Command { return []*cobra.Command{bench.Command()} }
