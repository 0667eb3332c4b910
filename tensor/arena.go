package tensor

// arena is memory for headers, small pieces and lists of pieces that live as long as a transaction. After a transaction as large as the largest it allocates nothing.
type arena struct {
	blockBytes int
	blocks     [][]byte
	block      int // in use
	used       int // of that
	list       [][]byte
	first      int // of the list that is being made
	open       int // where its last piece starts in the block, if that may grow; else -1
}

func (a *arena) reset() {
	clear(a.list)
	a.block, a.used, a.list, a.first, a.open = 0, 0, a.list[:0], 0, -1
}

// take returns n bytes, which lie in one block.
func (a *arena) take(n int) []byte {
	if a.block < len(a.blocks) && a.used+n > len(a.blocks[a.block]) {
		a.block, a.used = a.block+1, 0
	}
	if a.block == len(a.blocks) {
		a.blocks = append(a.blocks, nil)
	}
	if len(a.blocks[a.block]) < n {
		a.blocks[a.block] = make([]byte, max(a.blockBytes, n))
	}
	a.open, a.used = -1, a.used+n
	return a.blocks[a.block][a.used-n : a.used : a.used]
}

// join appends a piece to the list that is being made: itself if it is large, else a copy, which grows with the next small ones.
func (a *arena) join(b []byte) {
	switch n := len(b); {
	case n == 0:
	case n >= smallBytes:
		a.list, a.open = append(a.list, b), -1
	case a.open >= 0 && a.used+n <= len(a.blocks[a.block]):
		a.used += copy(a.blocks[a.block][a.used:], b)
		a.list[len(a.list)-1] = a.blocks[a.block][a.open:a.used:a.used]
	default:
		own := a.take(n)
		copy(own, b)
		a.list, a.open = append(a.list, own), a.used-n
	}
}

// pieces ends the list that was made and begins the next.
func (a *arena) pieces() [][]byte {
	made := a.list[a.first:len(a.list):len(a.list)]
	a.first, a.open = len(a.list), -1
	return made
}
