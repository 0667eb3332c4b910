package bench

import (
	"fmt"
	"io"
)

// printTensors prints the tables of bench tensors.
func printTensors(out io.Writer, r *TensorRecord) {
	printMachine(out, &r.Machine)
	fmt.Fprintf(out, "Medians of %d runs, contenders interleaved. ratio: to the figure that is named beside it.\n\n", r.Options.Runs)
	for i := range r.Cases {
		printTensorCase(out, &r.Cases[i])
	}
	printTargets(out, r.Targets)
}

func printTensorCase(out io.Writer, c *TensorResult) {
	kind := c.kind()
	t := newRows(out, kind.title, c.Name, "figure", "unit", "median", "least", "most", "ratio", "to")
	for _, row := range kind.rows {
		figure := c.Figures[row.figure]
		if figure == nil {
			continue
		}
		least, most := figure.Runs[0], figure.Runs[0]
		for _, v := range figure.Runs {
			least, most = min(least, v), max(most, v)
		}
		ratio, to := "", ""
		if value, ok := c.ratio(row.figure, row.to); ok {
			ratio, to = fmt.Sprintf("%.3f", value), row.to
		}
		t.add("", row.words, figure.Unit, digits(figure.Median), digits(least), digits(most), ratio, to)
	}
	t.end()
	for _, note := range c.Notes {
		fmt.Fprintf(out, "%s\n\n", note)
	}
}

// digits shows small and large figures with as many digits as mean something.
func digits(v float64) string {
	switch {
	case v >= 1000:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	default:
		return fmt.Sprintf("%.3f", v)
	}
}
