//go:build linux && !race

package cheader

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ingestd/ingestd/internal/pollfd"
	"github.com/ingestd/ingestd/ring"
	"github.com/ingestd/ingestd/wire"
)

// specEnd is where the checked part of a segment ends.
func specEnd(mem []byte) int {
	return int(binary.LittleEndian.Uint64(mem[64:]) + binary.LittleEndian.Uint64(mem[72:]))
}

// seal stores the right checksum over what was changed.
func seal(mem []byte) {
	castagnoli := crc32.MakeTable(crc32.Castagnoli)
	end := min(uint64(len(mem)), max(512, binary.LittleEndian.Uint64(mem[64:])+binary.LittleEndian.Uint64(mem[72:])))
	binary.LittleEndian.PutUint32(mem[12:], crc32.Update(crc32.Update(0, castagnoli, mem[16:256]), castagnoli, mem[512:end]))
}

// TestEachByteOfTheHeader: no byte of what is fixed in a segment can change unnoticed.
func TestEachByteOfTheHeader(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		var at, flip atomic.Int64
		path := serveFake(t, func(f *fake) { f.segment.Bytes()[at.Load()] ^= byte(flip.Load()) }, nil)
		var mem []byte
		measured := serveFake(t, func(f *fake) { mem = bytes.Clone(f.segment.Bytes()[:4096]) }, nil)
		p := start(t, b)
		p.ok("%s", fakeOptions(measured).attach())
		p.ok("detach")
		before := p.fds()
		tried := 0
		for i := range specEnd(mem) {
			if i >= 256 && i < 512 {
				continue // the cursors, which change all the time
			}
			for _, bits := range []int64{0x01, 0x80, 0xff} {
				at.Store(int64(i))
				flip.Store(bits)
				p.send("%s", fakeOptions(path).attach())
				p.isError("bad_segment", "", fmt.Sprintf("byte %d ^ %#x", i, bits))
				tried++
			}
		}
		if tried < 3*(256+2*16+80) {
			t.Errorf("%d bytes were tried", tried/3)
		}
		for i := 256; i < 512; i++ { // and these stop nobody
			at.Store(int64(i))
			p.ok("%s", fakeOptions(path).attach())
			p.ok("detach")
		}
		if after := p.fds(); after != before {
			t.Errorf("%d descriptors are open, %d before", after, before)
		}
	})
}

// TestEachFieldOfTheHeader: with a checksum that is right, each field is still compared with what it can be.
func TestEachFieldOfTheHeader(t *testing.T) {
	values := []uint64{
		0, 1, 2, 3, 63, 64, 65, 127, 511, 513, 576, 640, 4095, 4097, 65536, 65537, 1 << 20, 1<<31 - 1, 1 << 32, 1<<46 + 64, 1 << 62, 1 << 63,
		^uint64(63), ^uint64(4095), ^uint64(0),
	}
	each(t, func(t *testing.T, b built) {
		var at, value, was atomic.Uint64
		path := serveFake(t, func(f *fake) {
			mem := f.segment.Bytes()
			was.Store(binary.LittleEndian.Uint64(mem[at.Load():]))
			binary.LittleEndian.PutUint64(mem[at.Load():], value.Load())
			seal(mem)
		}, nil)
		p := start(t, b)
		fields := []uint64{16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128, 200, 208, 216, 512, 520, 528, 536}
		for _, at8 := range fields {
			for _, v := range values {
				at.Store(at8)
				value.Store(v)
				answer := p.do("%s", fakeOptions(path).attach())
				legal := was.Load() == v || (at8 == 200 && v == 1) || // one session less leaves a gap, which may be
					(at8 == 72 && v < was.Load() && v >= was.Load()-uint64(len(blanks)))
				if ok := strings.HasPrefix(answer, "ok "); ok != legal {
					t.Errorf("the word at %d is %d instead of %d: %s", at8, v, was.Load(), answer)
				} else if ok {
					p.ok("detach")
				} else if !strings.HasPrefix(answer, "error bad_segment\t") {
					t.Errorf("the word at %d is %d instead of %d: %s", at8, v, was.Load(), answer)
				}
			}
		}
	})
}

// TestSpecs: the spec in a segment must be one, and that of its columns.
func TestSpecs(t *testing.T) {
	x, y := `{"name":"x","dtype":"F32","shape":[4]}`, `{"name":"y","dtype":"U8","shape":[]}`
	each(t, func(t *testing.T, b built) {
		var text atomic.Pointer[string]
		path := serveFake(t, func(f *fake) {
			mem := f.segment.Bytes()
			copy(mem[544:], *text.Load())
			binary.LittleEndian.PutUint64(mem[72:], uint64(len(*text.Load())))
			seal(mem)
		}, nil)
		p := start(t, b)
		// leaves is the spec of x and of what is given.
		leaves := func(y ...string) string { return `{"leaves":[` + strings.Join(append([]string{x}, y...), ",") + `]}` }
		with := func(from, to string) string { return leaves(strings.Replace(y, from, to, 1)) }
		const legal = "legal"
		for spec, words := range map[string]string{
			leaves(y): legal,
			" { \"leaves\" : [ " + x + " , " + y + " ] } ":                                        legal,
			`{"leaves":[{"shape":[2,2],"dtype":"\u0046\u0033\u0032","name":"\u0078"},` + y + `]}`: legal,
			with("[]", "[1,1,1,1,1,1,1,1]"):                                                       legal,
			with(`"y"`, `"`+strings.Repeat("y", 128)+`"`):                                         legal,
			with(`"y"`, `"`+strings.Repeat("y", 129)+`"`):                                         "too long",
			leaves():                              "fewer leaves",
			leaves(y, y):                          "more leaves",
			`{"leaves":[` + y + `,` + x + `]}`:    "not the size of its leaf",
			with("y", "x"):                        "same name",
			with("U8", "U9"):                      "dtype is not known",
			with("U8", "U8888888888888888"):       "too long",
			with(`"y"`, `""`):                     "lacks name",
			with(`"y"`, `"\u0000"`):               "control character",
			with("[]", "[0]"):                     "dimension is 0",
			with("[]", "[1,1,1,1,1,1,1,1,1]"):     "too many dimensions",
			with("[]", "[4294967297]"):            "larger than a sample",
			with("[]", "[4294967296,4294967296]"): "larger than a sample",
			with("[]", "[-1]"):                    "whole",
			with("[]", "1"):                       "no array",
			leaves(`{"name":"y","dtype":"U8"}`):   "lacks name, dtype or shape",
			leaves(`{"name":"y","name":"y","dtype":"U8","shape":[]}`): "there twice",
			leaves(`{"name":"y","dtype":"U8","shape":[],"more":1}`):   "unknown",
			leaves(`7`):     "no object",
			leaves(y) + "}": "something follows",
			`{"leaves":[` + x + `,` + y + `],"more":1}`: "does not end",
			`{"leaves":[` + x + `,` + y:                 "comma or its end",
			`{"leaves":7}`:                              "does not start",
			`{"Leaves":[` + x + `,` + y + `]}`:          "does not start",
			`[]`:                                        "does not start",
		} {
			text.Store(&spec)
			if line := fakeOptions(path).attach(); words == legal {
				p.ok("%s", line)
				p.ok("detach")
			} else {
				p.send("%s", line)
				p.isError("bad_segment", words, spec)
			}
		}
	})
}

func TestDamagedChannels(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		var spoil atomic.Pointer[func(mem []byte)]
		path := serveFake(t, func(f *fake) { (*spoil.Load())(f.channel.Bytes()) }, nil)
		p := start(t, b)
		try := func(what, words string, f func(mem []byte)) {
			t.Helper()
			spoil.Store(&f)
			for _, line := range []string{fakeOptions(path).attach(), fakeOptions(path).open()} {
				p.send("%s", line)
				p.isError("bad_segment", words, what)
			}
		}
		for i := range 40 {
			for _, bits := range []byte{0x01, 0x80, 0xff} {
				try(fmt.Sprintf("byte %d ^ %#x", i, bits), "channel", func(mem []byte) { mem[i] ^= bits })
			}
		}
		put := func(at int, v uint64) func([]byte) {
			return func(mem []byte) { binary.LittleEndian.PutUint64(mem[at:], v) }
		}
		capacity := func(v uint32) func([]byte) {
			return func(mem []byte) { binary.LittleEndian.PutUint32(mem[12:], v) }
		}
		for _, v := range []uint32{0, 1, 3, 5, 65537, 131072, 1 << 31} {
			try(fmt.Sprintf("capacity %d", v), "power of two", capacity(v))
		}
		for _, v := range []uint32{8, 65536} {
			try(fmt.Sprintf("capacity %d", v), "outside", capacity(v))
		}
		for _, v := range []uint64{0, 63, 65, 72, 448, 1 << 32, 1 << 63, ^uint64(63)} {
			try(fmt.Sprintf("deliver at %d", v), "deliver queue lies outside", put(16, v))
			try(fmt.Sprintf("giveback at %d", v), "giveback queue lies outside", put(24, v))
		}
		for _, v := range []uint64{64, 128, 320} {
			try(fmt.Sprintf("giveback at %d", v), "overlap", put(24, v))
		}
		spoiled := func(mem []byte) { clear(mem[40:64]) } // which may hold anything
		spoil.Store(&spoiled)
		p.ok("%s", fakeOptions(path).attach())
		p.ok("detach")
	})
}

func TestMalformedReplies(t *testing.T) {
	body := func(change map[string]any) func(*fake) {
		return func(f *fake) {
			text, err := json.Marshal(f.train)
			check(f.t, err)
			fields := map[string]any{}
			check(f.t, json.Unmarshal(text, &fields))
			for name, v := range change {
				if fields[name] = v; v == nil {
					delete(fields, name)
				}
			}
			f.body, err = json.Marshal(fields)
			check(f.t, err)
		}
	}
	raw := func(text string) func(*fake) { return func(f *fake) { f.raw = []byte(text) } }
	of := func(text string) func(*fake) { return func(f *fake) { f.body = []byte(text) } }
	refusal := func(text string) func(*fake) { return func(f *fake) { f.status, f.body, f.fds = 1, []byte(text), nil } }
	for what, test := range map[string]struct {
		change      func(*fake)
		code, words string
	}{
		"unchanged":              {body(nil), "ok", ""},
		"more fields":            {body(map[string]any{"new": map[string]any{"a": []any{1, "x", nil, true}}}), "ok", ""},
		"another protocol":       {raw("HTTP/1.1 400 Bad Request\r\n\r\n"), "bad_reply", "starts with other bytes"},
		"echo":                   {raw("ECHO\x01\x00\x00\x00\x00"), "bad_reply", "use the daemon's unix:// address"},
		"cut short":              {func(f *fake) { body(nil)(f); f.raw = frame(1, 0, f.body)[:40] }, "", ""},
		"a status of 2":          {func(f *fake) { f.status = 2; f.body = []byte("{}") }, "bad_reply", "neither accepts nor refuses"},
		"another version":        {func(f *fake) { f.version = 2; f.body = []byte("{}") }, "bad_reply", "version that was not offered"},
		"a body of 1 byte":       {of("{"), "bad_reply", "too long or too short"},
		"a body of 2 MiB":        {of(`{"pad":"` + strings.Repeat("x", wire.BodyBytesMax-10) + `"}`), "bad_reply", "lacks batch_size"},
		"a body above 2 MiB":     {func(f *fake) { f.raw = append([]byte(wire.Magic), 1, 0, 0, 0, 1, 0, 0x20, 0) }, "bad_reply", "too long or too short"},
		"a body of 4 GiB":        {func(f *fake) { f.raw = append([]byte(wire.Magic), 1, 0, 0, 0, 255, 255, 255, 255) }, "bad_reply", "too long or too short"},
		"no object":              {of("[]"), "bad_reply", "no object"},
		"no JSON":                {of("{]"), "bad_reply", "string is missing"},
		"something after it":     {of("{} {}"), "bad_reply", "something follows"},
		"nested deep":            {of(`{"a":` + strings.Repeat("[", 100000)), "bad_reply", "nested too deep"},
		"no batch_size":          {body(map[string]any{"batch_size": nil}), "bad_reply", "lacks batch_size"},
		"no prefetch":            {body(map[string]any{"prefetch": 0}), "bad_reply", "lacks batch_size"},
		"a large prefetch":       {body(map[string]any{"prefetch": 65537}), "bad_reply", "prefetch is more"},
		"a negative number":      {body(map[string]any{"batches": -4}), "bad_reply", "not a whole one"},
		"a fraction":             {body(map[string]any{"batches": 4.5}), "bad_reply", "not a whole one"},
		"a number as text":       {body(map[string]any{"batches": "4"}), "bad_reply", "not a whole one"},
		"a name as a number":     {body(map[string]any{"table": 4}), "bad_reply", "a string is missing"},
		"a long name":            {body(map[string]any{"table": strings.Repeat("x", 129)}), "bad_reply", "name is too long"},
		"a name of 128 bytes":    {body(map[string]any{"table": strings.Repeat("x", 128)}), "ok", ""},
		"a short fingerprint":    {body(map[string]any{"fingerprint": "abcd"}), "bad_reply", "64 hex digits"},
		"no fingerprint":         {body(map[string]any{"fingerprint": nil}), "bad_segment", "fingerprint is not the one announced"},
		"other batches":          {body(map[string]any{"batches": 5}), "bad_segment", "number of batches"},
		"another batch_size":     {body(map[string]any{"batch_size": 7}), "bad_segment", "batch_size"},
		"a longer segment":       {body(map[string]any{"segment_bytes": 1 << 40}), "bad_segment", "smaller than announced"},
		"a shorter segment":      {body(map[string]any{"segment_bytes": 4096}), "bad_segment", "length is not the one announced"},
		"a segment of 511 bytes": {body(map[string]any{"segment_bytes": 511}), "bad_segment", "shorter than its header"},
		"a segment of 2^63":      {body(map[string]any{"segment_bytes": uint64(1) << 63}), "bad_segment", "size cannot be"},
		"a longer channel":       {body(map[string]any{"channel_bytes": 4096}), "bad_segment", "length is not the one announced"},
		"a huge channel":         {body(map[string]any{"channel_bytes": 1 << 30}), "bad_segment", "channel is too long"},
		"a channel of 63 bytes":  {body(map[string]any{"channel_bytes": 63}), "bad_segment", "size cannot be"},
		"a refusal of nothing":   {refusal("{}"), "bad_reply", "no code"},
		"a refusal as array":     {refusal("[]"), "bad_reply", "no object"},
		"a refusal that lies":    {refusal(`{"code":"internal","reason":5}`), "bad_reply", "a string is missing"},
		"a refusal's bad diff":   {refusal(`{"code":"spec_mismatch","reason":"x","diff":7}`), "bad_reply", "diff is no array"},
		"a refusal's odd diff":   {refusal(`{"code":"spec_mismatch","reason":"x","diff":[7]}`), "bad_reply", "difference is no object"},
		"a refusal": {
			refusal(`{"diff":[{"leaf":"l\n","got":"","want":"U8","new":{}}],"code":"spec_mismatch","new":7,"reason":"r"}`),
			"refused", "text=the daemon refused: r: leaf l? is missing here and U8 in the table",
		},
		"a refusal's version": {func(f *fake) { refusal(`{"code":"bad_version","reason":"too old"}`)(f); f.version = 9 }, "refused", "daemon=bad_version|too old"},
		"a long diff": {refusal(`{"code":"spec_mismatch","reason":"r","diff":[` +
			strings.Repeat(`{"leaf":"`+strings.Repeat("l", 128)+`","got":"a","want":"b"},`, 500) + `{}]}`),
			"refused", "text=the daemon refused: r: leaf lll"},
		"a long reason": {refusal(`{"code":"internal","reason":"` + strings.Repeat("é", 8000) + `"}`), "refused", "éééé"},
	} {
		t.Run(what, func(t *testing.T) {
			each(t, func(t *testing.T, b built) {
				live := func(f *fake) { check(f.t, f.conn.CloseWrite()); _, _ = f.conn.Read(make([]byte, 1)) }
				p := start(t, b)
				before := p.fds()
				switch line := fakeOptions(serveFake(t, test.change, live)).attach(); test.code {
				case "ok":
					p.ok("%s", line)
					p.ok("detach")
				case "":
					p.fails("peer_closed", "before its reply was complete", "%s", line)
				default:
					p.fails(test.code, test.words, "%s", line)
				}
				if after := p.fds(); after != before {
					t.Errorf("%d descriptors are open, %d before", after, before)
				}
			})
		})
	}
}

// TestDescriptorsReceived: there must be four, and each what it is said to be.
func TestDescriptorsReceived(t *testing.T) {
	memfd := func(f *fake, size int64, seals int) int {
		fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
		check(f.t, err)
		check(f.t, unix.Ftruncate(fd, size))
		_, err = unix.Write(fd, f.segment.Bytes()[:min(size, int64(len(f.segment.Bytes())))])
		check(f.t, err)
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals)
		check(f.t, err)
		f.t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	file := func(f *fake, flags int) int {
		path := source(f.t, "segment", string(f.segment.Bytes()))
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		check(f.t, err)
		f.t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	const whole = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW
	for what, test := range map[string]struct {
		change      func(*fake)
		code, words string
	}{
		"none":                   {func(f *fake) { f.fds = nil }, "bad_segment", "4 descriptors must come"},
		"three":                  {func(f *fake) { f.fds = f.fds[:3] }, "bad_segment", "4 descriptors must come"},
		"five":                   {func(f *fake) { f.fds = append(f.fds, f.toUs) }, "bad_segment", "4 descriptors must come"},
		"eight":                  {func(f *fake) { f.fds = append(f.fds, f.fds...) }, "bad_segment", "4 descriptors must come"},
		"nine":                   {func(f *fake) { f.fds = append(append(f.fds, f.fds...), f.toUs) }, "system", "more than 8 descriptors"},
		"an eventfd for memory":  {func(f *fake) { f.fds[0] = f.toUs }, "bad_segment", "is no memory"},
		"a socket for a channel": {func(f *fake) { f.fds[1] = socketOf(f) }, "bad_segment", "is no memory"},
		"memory for an eventfd":  {func(f *fake) { f.fds[2] = f.fds[0] }, "bad_segment", "is no eventfd"},
		"a socket as eventfd":    {func(f *fake) { f.fds[3] = socketOf(f) }, "bad_segment", "is no eventfd"},
		"segment and channel":    {func(f *fake) { f.fds[0], f.fds[1] = f.fds[1], f.fds[0] }, "bad_segment", ""},
		"a sealed copy":          {func(f *fake) { f.fds[0] = memfd(f, f.ring.SegmentBytes(), whole) }, "ok", ""},
		"a smaller one":          {func(f *fake) { f.fds[0] = memfd(f, f.ring.SegmentBytes()-1, whole) }, "bad_segment", "smaller than announced"},
		"one that can shrink":    {func(f *fake) { f.fds[0] = memfd(f, f.ring.SegmentBytes(), unix.F_SEAL_GROW) }, "bad_segment", "not sealed against shrinking"},
		"one not sealed at all":  {func(f *fake) { f.fds[0] = memfd(f, f.ring.SegmentBytes(), 0) }, "bad_segment", "not sealed against shrinking"},
		"a file":                 {func(f *fake) { f.fds[0] = file(f, unix.O_RDONLY) }, "ok", ""},
		"a file to be written":   {func(f *fake) { f.fds[0] = file(f, unix.O_RDWR) }, "bad_segment", "not sealed against shrinking"},
	} {
		t.Run(what, func(t *testing.T) {
			each(t, func(t *testing.T, b built) {
				live := func(f *fake) { check(f.t, f.conn.CloseWrite()); _, _ = f.conn.Read(make([]byte, 1)) }
				p := start(t, b)
				before := p.fds()
				line := fakeOptions(serveFake(t, test.change, live)).attach()
				if test.code == "ok" {
					p.ok("%s", line)
					p.ok("detach")
				} else {
					p.fails(test.code, test.words, "%s", line)
				}
				if after := p.fds(); after != before {
					t.Errorf("%d descriptors are open, %d before", after, before)
				}
			})
		})
	}
}

func socketOf(f *fake) (fd int) {
	raw, err := f.conn.SyscallConn()
	check(f.t, err)
	check(f.t, raw.Control(func(s uintptr) { fd = int(s) }))
	return fd
}

// TestDamagedDeliveries: what a trainer is told is compared with the segment; the attachment ends, and says so again.
func TestDamagedDeliveries(t *testing.T) {
	word := func(mem []byte, at int, v uint64) { binary.LittleEndian.PutUint64(mem[at:], v) }
	for what, test := range map[string]struct {
		spoil func(f *fake, b ring.Batch) // after a first batch, which was good
		words string
	}{
		"another place":          {func(f *fake, b ring.Batch) { f.push(b.Number, uint64((b.Index+1)%fakeBatches)|8<<32) }, "not leased in its place"},
		"no such place":          {func(f *fake, b ring.Batch) { f.push(b.Number, fakeBatches|8<<32) }, "a batch that cannot be"},
		"the last place of all":  {func(f *fake, b ring.Batch) { f.push(b.Number, 0xffffffff|8<<32) }, "a batch that cannot be"},
		"another number":         {func(f *fake, b ring.Batch) { f.push(b.Number+1, uint64(b.Index)|8<<32) }, "not leased in its place"},
		"a number beyond":        {func(f *fake, b ring.Batch) { f.push(1<<61|b.Number, uint64(b.Index)|8<<32) }, "not leased in its place"},
		"too many rows":          {func(f *fake, b ring.Batch) { f.push(b.Number, uint64(b.Index)|9<<32) }, "a batch that cannot be"},
		"other rows":             {func(f *fake, b ring.Batch) { f.push(b.Number, uint64(b.Index)|7<<32) }, "another number of rows"},
		"nothing lost":           {func(f *fake, b ring.Batch) { f.push(0, 0) }, "a descriptor of no batch"},
		"the same again":         {func(f *fake, b ring.Batch) { f.push(0, 0|8<<32); f.push(0, 8<<32) }, ""},
		"a batch in its place":   {func(f *fake, b ring.Batch) { held(f, b) }, "in a place where one is held"},
		"produced goes back":     {func(f *fake, _ ring.Batch) { word(f.deliverQueue(), 0, 0); f.ringPeer() }, "count of descriptors that cannot be"},
		"produced runs ahead":    {func(f *fake, _ ring.Batch) { word(f.deliverQueue(), 0, 2+fakeCapacity); f.ringPeer() }, "count of descriptors that cannot be"},
		"produced is all ones":   {func(f *fake, _ ring.Batch) { word(f.deliverQueue(), 0, ^uint64(0)); f.ringPeer() }, "count of descriptors that cannot be"},
		"produced, with nothing": {func(f *fake, _ ring.Batch) { word(f.deliverQueue(), 0, 2); f.ringPeer() }, "a descriptor of no batch"},
	} {
		t.Run(what, func(t *testing.T) {
			each(t, func(t *testing.T, b built) {
				spoil := make(chan struct{})
				path := serveFake(t, nil, func(f *fake) {
					f.publish(fakeBatchSize)
					<-spoil
					test.spoil(f, f.lease(fakeBatchSize))
					f.awaitEnd()
				})
				p := start(t, b)
				p.ok("stale-ms 5")
				p.ok("%s", fakeOptions(path).attach())
				p.ok("next %d", patience)
				close(spoil)
				p.fails("bad_segment", test.words, "next %d", patience)
				p.fails("bad_segment", test.words, "next 0")
				p.fails("bad_segment", test.words, "release 0")
				p.ok("detach")
			})
		})
	}
}

// held makes the place of the first batch, which the trainer holds, one of another batch that was delivered.
func held(f *fake, b ring.Batch) {
	mem := f.segment.Bytes()
	states := binary.LittleEndian.Uint64(mem[80:])
	for index := range uint64(fakeBatches) {
		line := mem[states+64*index:]
		if uint64(b.Index) != index && binary.LittleEndian.Uint64(line) == 0<<3|4 {
			binary.LittleEndian.PutUint64(line, 5<<3|4)
			f.push(5, index|8<<32)
		}
	}
}

// TestDamagedGiveback: a daemon that says that it took what was not pushed, or takes nothing.
func TestDamagedGiveback(t *testing.T) {
	for what, test := range map[string]struct {
		consumed uint64
		words    string
	}{
		"runs ahead": {100, "count of descriptors taken that cannot be"},
		"takes none": {0, "giveback: full"},
	} {
		t.Run(what, func(t *testing.T) {
			each(t, func(t *testing.T, b built) {
				path := serveFake(t, nil, func(f *fake) {
					binary.LittleEndian.PutUint64(f.givebackQueue()[64:], test.consumed)
					for range fakeCapacity + 1 {
						b := f.publish(fakeBatchSize)
						for f.pushed() <= b.Number && f.alive() { // until it was given back
						}
						f.ring.Release(b)
					}
					f.awaitEnd()
				})
				p := start(t, b)
				p.ok("%s", fakeOptions(path).attach())
				for i := range fakeCapacity {
					p.ok("next %d", patience)
					p.ok("release %d", i)
				}
				p.ok("next %d", patience)
				p.fails("bad_segment", test.words, "release %d", fakeCapacity)
				p.ok("detach")
			})
		})
	}
}

// pushed is how many descriptors the peer has pushed.
func (f *fake) pushed() uint64 { return binary.LittleEndian.Uint64(f.givebackQueue()) }

// alive tells whether the peer's side of the socket is open.
func (f *fake) alive() bool {
	return pollfd.Now(uintptr(socketOf(f)), unix.POLLIN) == 0
}

// TestJunk: queues and state lines full of random bytes end an attachment or leave it waiting; the sanitizers see that nothing else happens.
func TestJunk(t *testing.T) {
	each(t, func(t *testing.T, b built) {
		var seed atomic.Uint64
		path := serveFake(t, func(f *fake) {
			r := rand.New(rand.NewPCG(seed.Load(), 0))
			states := binary.LittleEndian.Uint64(f.segment.Bytes()[80:])
			for _, mem := range [][]byte{f.channel.Bytes()[64:f.channelBytes()], f.segment.Bytes()[states : states+64*fakeBatches]} {
				for at := 0; at < len(mem); at += 8 {
					if r.IntN(2) == 0 { // zeros and small numbers get further than junk does
						binary.LittleEndian.PutUint64(mem[at:], r.Uint64()>>r.IntN(64))
					}
				}
			}
		}, nil)
		p := start(t, b)
		p.ok("stale-ms 1")
		for s := range uint64(150) {
			seed.Store(s)
			p.ok("%s", fakeOptions(path).attach())
			for range 6 {
				p.do("next-any 1")
			}
			p.ok("detach")
			p.ok("%s", fakeOptions(path).open())
			for _, verb := range []string{"reserve 3 1", "fill", "commit 1", "settle 1", "reserve 1 1", "held", "flush 1", "abandon"} {
				p.do("%s", verb)
			}
			p.ok("close")
		}
	})
}
