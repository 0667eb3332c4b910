package compress

import (
	"io"

	"github.com/ingestd/ingestd/spec"
)

// PieceBytes is how much of a leaf is shuffled at a time: a multiple of every element's size, and small enough to stay in the cache and to bound memory.
const PieceBytes = 64 << 10

// leafShape is what the shuffle knows of a leaf.
type leafShape struct {
	bytes   int64
	element int // bytes of one element
}

func shapesOf(s *spec.Spec) []leafShape {
	shapes := make([]leafShape, s.NumLeaves())
	for i := range shapes {
		l := s.Leaf(i)
		shapes[i] = leafShape{l.Bytes(), int(l.DType.Bytes())}
	}
	return shapes
}

// pieces walks through the pieces of one sample after another.
type pieces struct {
	leaves []leafShape
	leaf   int
	off    int64 // of the piece in its leaf
}

// size is the bytes of the piece that is due, and of its elements.
func (p *pieces) size() (bytes, element int) {
	l := p.leaves[p.leaf]
	return int(min(PieceBytes, l.bytes-p.off)), l.element
}

// next goes on to the piece after that.
func (p *pieces) next() {
	p.off += PieceBytes
	if p.off >= p.leaves[p.leaf].bytes {
		p.off = 0
		if p.leaf++; p.leaf == len(p.leaves) {
			p.leaf = 0
		}
	}
}

// between tells whether a sample begins with the piece that is due.
func (p *pieces) between() bool { return p.leaf == 0 && p.off == 0 }

// shuffle puts byte 0 of all elements of src first, then byte 1, and so on. dst has the length of src.
func shuffle(dst, src []byte, element int) {
	n := len(src) / element
	switch element {
	case 1:
		copy(dst, src)
	case 2:
		a, b := dst[:n], dst[n:2*n]
		for i := range n {
			e := src[2*i : 2*i+2 : 2*i+2]
			a[i], b[i] = e[0], e[1]
		}
	case 4:
		a, b, c, d := dst[:n], dst[n:2*n], dst[2*n:3*n], dst[3*n:4*n]
		for i := range n {
			e := src[4*i : 4*i+4 : 4*i+4]
			a[i], b[i], c[i], d[i] = e[0], e[1], e[2], e[3]
		}
	default:
		for j := range element {
			plane := dst[j*n : (j+1)*n]
			for i := range plane {
				plane[i] = src[i*element+j]
			}
		}
	}
}

// unshuffle undoes shuffle.
func unshuffle(dst, src []byte, element int) {
	n := len(src) / element
	switch element {
	case 1:
		copy(dst, src)
	case 2:
		a, b := src[:n], src[n:2*n]
		for i := range n {
			e := dst[2*i : 2*i+2 : 2*i+2]
			e[0], e[1] = a[i], b[i]
		}
	case 4:
		a, b, c, d := src[:n], src[n:2*n], src[2*n:3*n], src[3*n:4*n]
		for i := range n {
			e := dst[4*i : 4*i+4 : 4*i+4]
			e[0], e[1], e[2], e[3] = a[i], b[i], c[i], d[i]
		}
	default:
		for j := range element {
			plane := src[j*n : (j+1)*n]
			for i, b := range plane {
				dst[i*element+j] = b
			}
		}
	}
}

// shuffler shuffles what is written to it. It holds back the first part of a piece until the rest has come.
type shuffler struct {
	to   io.Writer
	at   pieces
	part []byte // of the piece that is due
	out  []byte // shuffled and not written
}

func newShuffler(to io.Writer, s *spec.Spec) *shuffler {
	return &shuffler{to: to, at: pieces{leaves: shapesOf(s)}, part: make([]byte, 0, PieceBytes), out: make([]byte, 0, PieceBytes)}
}

func (s *shuffler) Write(b []byte) (int, error) {
	n := len(b)
	for len(b) > 0 {
		size, element := s.at.size()
		piece := b[:min(size-len(s.part), len(b))]
		b = b[len(piece):]
		if len(s.part) > 0 || len(piece) < size {
			s.part = append(s.part, piece...)
			if piece = s.part; len(piece) < size {
				break
			}
			s.part = s.part[:0]
		}
		if len(s.out)+size > cap(s.out) {
			if err := s.flush(); err != nil {
				return 0, err
			}
		}
		s.out = s.out[:len(s.out)+size]
		shuffle(s.out[len(s.out)-size:], piece, element)
		s.at.next()
	}
	return n, s.flush()
}

func (s *shuffler) flush() error {
	_, err := s.to.Write(s.out)
	s.out = s.out[:0]
	return err
}

// unshuffler undoes a shuffler. At the end of what it reads it tells whether a piece was cut.
type unshuffler struct {
	from io.Reader
	at   pieces
	in   []byte // read, and not a whole piece yet
	out  []byte // ready
	room []byte // of out
}

func newUnshuffler(from io.Reader, s *spec.Spec) *unshuffler {
	return &unshuffler{from: from, at: pieces{leaves: shapesOf(s)}}
}

func (u *unshuffler) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	for len(u.out) == 0 {
		if err := u.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(b, u.out)
	u.out = u.out[n:]
	return n, nil
}

// fill reads once and makes all pieces ready that are whole then.
func (u *unshuffler) fill() error {
	if u.room == nil {
		u.in, u.room = make([]byte, 0, PieceBytes), make([]byte, PieceBytes)
	}
	n, err := u.from.Read(u.in[len(u.in):cap(u.in)])
	u.in = u.in[:len(u.in)+n]
	ready, done := u.room[:0], 0
	for {
		size, element := u.at.size()
		if done+size > len(u.in) {
			break
		}
		ready = ready[:done+size]
		unshuffle(ready[done:], u.in[done:done+size], element)
		done += size
		u.at.next()
	}
	u.out, u.in = ready, u.in[:copy(u.in, u.in[done:])]
	switch {
	case len(ready) > 0:
		return nil // the error comes again
	case err == io.EOF && (len(u.in) > 0 || !u.at.between()):
		return io.ErrUnexpectedEOF
	}
	return err
}
