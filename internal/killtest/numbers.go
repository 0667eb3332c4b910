package killtest

import "slices"

// stretch is the numbers from first up to end, exclusive.
type stretch struct{ first, end uint64 }

// numberSet is a set of numbers that mostly lie together: stretches in order, that do not touch.
type numberSet []stretch

// add puts n numbers in and returns how many of them were there already.
func (s *numberSet) add(first, n uint64) (again uint64) {
	if n == 0 {
		return 0
	}
	joined := stretch{first, first + n}
	from, _ := slices.BinarySearchFunc(*s, first, func(e stretch, at uint64) int {
		if e.end < at {
			return -1
		}
		return 1
	})
	to := from
	for ; to < len(*s) && (*s)[to].first <= joined.end; to++ {
		e := (*s)[to]
		if low, high := max(e.first, first), min(e.end, first+n); low < high {
			again += high - low
		}
		joined.first, joined.end = min(joined.first, e.first), max(joined.end, e.end)
	}
	*s = slices.Replace(*s, from, to, joined)
	return again
}

// prefix is how many numbers from 0 on are there without a gap.
func (s numberSet) prefix() uint64 {
	if len(s) == 0 || s[0].first != 0 {
		return 0
	}
	return s[0].end
}

// end is the highest number plus one.
func (s numberSet) end() uint64 {
	if len(s) == 0 {
		return 0
	}
	return s[len(s)-1].end
}

// size counts the numbers.
func (s numberSet) size() (n uint64) {
	for _, e := range s {
		n += e.end - e.first
	}
	return n
}
