package main

import (
	"fmt"
	"io"
	"os"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"
)

// progress shows how far a command is, where somebody looks.
type progress struct {
	bar *progressbar.ProgressBar
}

// progressModes are the values of --progress.
const progressModes = "auto, always or never"

// newProgress starts a bar over total bytes, or without an end if total is negative.
func newProgress(w io.Writer, mode, what string, total int64) (*progress, error) {
	show := mode == "always"
	switch mode {
	case "always", "never":
	case "auto":
		f, ok := w.(*os.File)
		show = ok && term.IsTerminal(int(f.Fd()))
	default:
		return nil, usagef("--progress is %q: must be %s", mode, progressModes)
	}
	if !show {
		return &progress{}, nil
	}
	return &progress{progressbar.NewOptions64(max(total, -1),
		progressbar.OptionSetWriter(w),
		progressbar.OptionSetDescription(what+" "),
		progressbar.OptionShowBytes(true),
		progressbar.OptionUseIECUnits(true),
		progressbar.OptionSetPredictTime(total >= 0),
		progressbar.OptionThrottle(100*time.Millisecond),
		progressbar.OptionSetWidth(30),
		progressbar.OptionSetSpinnerChangeInterval(0), // no goroutine of its own
	)}, nil
}

func (p *progress) add(bytes int64) {
	if p.bar != nil {
		_ = p.bar.Add64(bytes)
	}
}

// done leaves the last state on its line.
func (p *progress) done(w io.Writer) {
	if p.bar != nil {
		_ = p.bar.Exit()
		fmt.Fprintln(w)
	}
}
