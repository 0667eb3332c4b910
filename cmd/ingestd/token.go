package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/ingestd/ingestd/auth"
)

func tokenCommand(std streams) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "token",
		Short: "Make tokens, with which clients and daemon prove themselves to each other",
		Args:  usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			_ = cmd.Help()
			return usagef("token: no command given")
		},
	}
	cmd.AddCommand(tokenNewCommand(std))
	return cmd
}

func tokenNewCommand(std streams) *cobra.Command {
	var rights, tables []string
	cmd := &cobra.Command{
		Use:   "new NAME",
		Short: "Make a token with a new secret, and print the lines that the daemon's file of tokens needs for it",
		Long: `The lines belong below "tokens:" in the daemon's file, which nobody else may read (chmod 600); the daemon takes up the change within a second. Clients take NAME:SECRET from the
environment variable INGESTD_TOKEN or from a file. To change the secret of a token, give it the new one as secret and the old one as previous: both are good until previous goes.

Rights are push (send samples), read (train, observe, subscribe), publish (weights) and admin (the admin endpoint). Tables are names, in which * stands for any
characters and ? for any one.`,
		Example: `  echo tokens: > tokens.yaml && chmod 600 tokens.yaml
  ingestd token new worker --tables grads >> tokens.yaml
  ingestd token new trainer --rights read,publish --tables 'digits,w*' >> tokens.yaml`,
		Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			_, lines, err := auth.NewEntry(args[0], rights, tables)
			if err != nil {
				return usagef("token new: %w", err)
			}
			_, err = fmt.Fprint(std.out, lines)
			return err
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&rights, "rights", []string{"push"}, "what the token may do: push, read, publish, admin")
	f.StringSliceVar(&tables, "tables", []string{"*"}, "for which tables")
	return cmd
}
