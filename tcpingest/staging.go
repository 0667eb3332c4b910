package tcpingest

// staging is a fixed number of buffers shared by all connections. One is taken after a sample's slots are reserved and given back when it is
// scattered, so nobody holds one while waiting, and a taker waits no longer than a scatter lasts.
type staging struct {
	buffers chan []byte
}

// newStaging returns a pool that makes at most n buffers of readBytes, each when it is first needed.
func newStaging(n int) *staging {
	s := &staging{buffers: make(chan []byte, n)}
	for range n {
		s.buffers <- nil
	}
	return s
}

func (s *staging) get() []byte {
	if b := <-s.buffers; b != nil {
		return b
	}
	return make([]byte, readBytes)
}

func (s *staging) put(b []byte) { s.buffers <- b }
