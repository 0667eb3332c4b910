package fuzz

import "github.com/ingestd/ingestd/ring"

// model is the plain reference for a ring in the hands of one goroutine: what docs/segment-format.md says of batches, with slices.
type model struct {
	size, places int
	reserved     int // position
	batches      []*modelBatch
	leased       int   // batches leased, or skipped because they were empty
	free         []int // places, the one freed last at the end
	lastIn       []int // per place, number of the batch that had it last, or -1
}

type modelBatch struct {
	bound    bool // has a place
	place    int
	leased   bool
	released bool
	slots    []modelSlot
}

type modelSlot struct {
	state   slotState
	stream  uint64
	number  uint64
	arrival uint64
}

type slotState byte

const (
	slotFree slotState = iota
	slotTaken
	slotDone
	slotVoid
)

func newModel(size, places int) *model {
	m := &model{size: size, places: places}
	for place := range places {
		m.free = append(m.free, places-1-place)
		m.lastIn = append(m.lastIn, -1)
	}
	return m
}

func (m *model) batch(number int) *modelBatch {
	for len(m.batches) <= number {
		m.batches = append(m.batches, &modelBatch{slots: make([]modelSlot, m.size)})
	}
	return m.batches[number]
}

// reserve returns the position and the length of the run that the ring must give, or false.
func (m *model) reserve(n int) (at, got int, ok bool) {
	number, row := m.reserved/m.size, m.reserved%m.size
	b := m.batch(number)
	if !b.bound {
		last := len(m.free) - 1
		if last < 0 {
			return 0, 0, false
		}
		b.bound, b.place = true, m.free[last]
		m.free, m.lastIn[b.place] = m.free[:last], number
	}
	at, got = m.reserved, min(n, m.size-row)
	for i := range got {
		b.slots[row+i].state = slotTaken
	}
	m.reserved += got
	return at, got, true
}

// rows are the slots of a run.
func (m *model) rows(run ring.Run) []modelSlot {
	at := int(run.Position)
	return m.batch(at / m.size).slots[at%m.size : at%m.size+int(run.N)]
}

func (m *model) commit(run ring.Run, stream, first, arrival uint64) {
	for i := range m.rows(run) {
		m.rows(run)[i] = modelSlot{slotDone, stream, first + uint64(i), arrival}
	}
}

func (m *model) abandon(run ring.Run) {
	state := slotVoid
	if m.reserved == int(run.Position)+int(run.N) {
		m.reserved = int(run.Position)
		state = slotFree
	}
	for i := range m.rows(run) {
		m.rows(run)[i].state = state
	}
}

func (m *model) flush() bool {
	row := m.reserved % m.size
	if row == 0 {
		return false
	}
	b := m.batch(m.reserved / m.size)
	for i := row; i < m.size; i++ {
		b.slots[i].state = slotVoid
	}
	m.reserved += m.size - row
	return true
}

// published counts the batches from the first on whose slots are all done or void.
func (m *model) published() int {
	n := 0
	for _, b := range m.batches {
		for _, s := range b.slots {
			if s.state == slotFree || s.state == slotTaken {
				return n
			}
		}
		n++
	}
	return n
}

// lease returns the number and the rows of the batch that the ring must give, or false.
func (m *model) lease() (number int, rows []modelSlot, ok bool) {
	for m.leased < m.published() {
		b := m.batches[m.leased]
		m.leased++
		for _, s := range b.slots {
			if s.state == slotDone {
				rows = append(rows, s)
			}
		}
		b.leased = true
		if len(rows) > 0 {
			return m.leased - 1, rows, true
		}
		m.release(m.leased - 1)
	}
	return 0, nil, false
}

func (m *model) release(number int) {
	b := m.batches[number]
	b.released = true
	m.free = append(m.free, b.place)
}

// line is what the state line of a place must say.
func (m *model) line(place int) ring.BatchState {
	number := m.lastIn[place]
	if number < 0 {
		return ring.BatchState{}
	}
	b := m.batches[number]
	line := ring.BatchState{Number: uint64(number), State: ring.Open}
	for _, s := range b.slots {
		switch s.state {
		case slotVoid:
			line.Void++
			line.Committed++
		case slotDone:
			line.Committed++
		}
	}
	if number >= m.published() {
		return line
	}
	line.Count, line.Pending = m.size-line.Void, ring.AllGroups
	switch {
	case b.released:
		line.State = ring.Free
	case b.leased:
		line.State = ring.Leased
	default:
		line.State = ring.Published
	}
	return line
}
