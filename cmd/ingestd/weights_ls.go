package main

import (
	"github.com/spf13/cobra"
)

func weightsListCommand(std streams) *cobra.Command { return &cobra.Command{} }
