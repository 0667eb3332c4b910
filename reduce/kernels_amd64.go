package reduce

import "golang.org/x/sys/cpu"

// blockElements are done at a time by the kernels; what is left over is done in Go.
const blockElements = 32

// accelerated says whether the processor has what the kernels use, and the system keeps the registers (cpu.X86.HasAVX2 is false where it does not).
var accelerated = cpu.X86.HasAVX2 && cpu.X86.HasF16C

//go:noescape
func setF16(dst *float32, src *byte, blocks int)

//go:noescape
func setBF16(dst *float32, src *byte, blocks int)

//go:noescape
func setF8E4M3(dst *float32, src *byte, blocks int, scale float32)

//go:noescape
func setF8E5M2(dst *float32, src *byte, blocks int, scale float32)

//go:noescape
func addF16(dst *float32, src *byte, blocks int)

//go:noescape
func addBF16(dst *float32, src *byte, blocks int)

//go:noescape
func addF8E4M3(dst *float32, src *byte, blocks int, scale float32)

//go:noescape
func addF8E5M2(dst *float32, src *byte, blocks int, scale float32)

// sumF32 adds count sources, at least one, in order; with keep, to what is in dst.
//
//go:noescape
func sumF32(dst *float32, srcs **byte, count, blocks int, keep bool)

//go:noescape
func divideF32(dst *float32, blocks int, by float32)

// setBlocks does the whole blocks of Set and returns how many elements those are; the other functions here do the same for theirs.
func setBlocks(dst []float32, src []byte, kind Kind, scale float32) int {
	blocks := len(dst) / blockElements
	if !accelerated || blocks == 0 {
		return 0
	}
	switch kind {
	case F32:
		sources := [1]*byte{&src[0]}
		sumF32(&dst[0], &sources[0], 1, blocks, false)
	case F16:
		setF16(&dst[0], &src[0], blocks)
	case BF16:
		setBF16(&dst[0], &src[0], blocks)
	case F8E4M3:
		setF8E4M3(&dst[0], &src[0], blocks, scale)
	case F8E5M2:
		setF8E5M2(&dst[0], &src[0], blocks, scale)
	}
	return blocks * blockElements
}

func addBlocks(dst []float32, src []byte, kind Kind, scale float32) int {
	blocks := len(dst) / blockElements
	if !accelerated || blocks == 0 {
		return 0
	}
	switch kind {
	case F32:
		sources := [1]*byte{&src[0]}
		sumF32(&dst[0], &sources[0], 1, blocks, true)
	case F16:
		addF16(&dst[0], &src[0], blocks)
	case BF16:
		addBF16(&dst[0], &src[0], blocks)
	case F8E4M3:
		addF8E4M3(&dst[0], &src[0], blocks, scale)
	case F8E5M2:
		addF8E5M2(&dst[0], &src[0], blocks, scale)
	}
	return blocks * blockElements
}

func sumBlocks(dst []float32, srcs [][]byte, keep bool) int {
	checkAll(dst, srcs)
	blocks := len(dst) / blockElements
	if !accelerated || blocks == 0 || len(srcs) == 0 {
		return 0
	}
	var sources [SumMax]*byte
	for i, src := range srcs {
		sources[i] = &src[0]
	}
	sumF32(&dst[0], &sources[0], len(srcs), blocks, keep)
	return blocks * blockElements
}

func divideBlocks(dst []float32, by float32) int {
	blocks := len(dst) / blockElements
	if !accelerated || blocks == 0 {
		return 0
	}
	divideF32(&dst[0], blocks, by)
	return blocks * blockElements
}
