package bench

// Targets of bench tensors.
const (
	gradientsRateMin = 0.8  // GB/s to the bare loop's
	reduceRateMin    = 0.7  // bytes of input per second to those of a plain loop in the same language
	publishCopyMax   = 1.15 // time until all readers have seen a generation, to one copy's
	viewMax          = 50.0 // us
	streamRateMin    = 0.9  // GB/s to the bare sendfile loop's
	crcRateMin       = 10.0 // GB/s
)

// tensorTargets compares what was measured with what must be reached. A figure whose baseline was not measured has no line.
func tensorTargets(cases []TensorResult) []Target {
	var all []Target
	for i := range cases {
		all = append(all, cases[i].kind().targets(&cases[i])...)
	}
	return all
}

func crcTargets(r *TensorResult) []Target {
	var all []Target
	for _, figure := range []string{figureCRCHot, figureCRCCold} {
		if v, ok := r.median(figure); ok {
			all = append(all, atLeast(r.Name, "GB/s of "+figure, v, crcRateMin))
		}
	}
	return all
}
