package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/ingestd/ingestd/spec"
)

func TestHelloOfTensorsRoundTrip(t *testing.T) {
	manifest := []byte(`{"tensors":[{"name":"w","dtype":"F32","shape":[2,3]}]}`)
	digest := spec.Fingerprint{7}
	for _, h := range []*Hello{
		{VersionMin: 1, VersionMax: 1, Role: RolePush, Table: "grads", Session: "w1", Manifest: manifest, Ack: AckCommitted, Notes: true},
		{VersionMin: 1, VersionMax: 1, Role: RoleFill, Table: "grads", Session: "w1", Manifest: manifest},
		{VersionMin: 1, VersionMax: 1, Role: RolePublish, Table: "weights", Manifest: manifest, InPlace: true},
		{VersionMin: 1, VersionMax: 1, Role: RoleManifest, Table: "grads", ManifestID: "0123456789abcdef"},
		{VersionMin: 1, VersionMax: 1, Role: RoleManifest, Table: "grads", SessionOf: 1<<63 - 1},
		{VersionMin: 1, VersionMax: 1, Role: RoleSubscribe, Table: "weights"},
		{VersionMin: 1, VersionMax: 1, Role: RoleSubscribe, Table: "weights", Wait: true, Stream: true, Delta: true, Have: 8, HaveDigest: digest, Resume: 9,
			ResumeDigest: digest, ResumeOffset: 1 << 40, Client: "c"},
	} {
		b, err := AppendHello(nil, h)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := ReadHello(bytes.NewReader(b)); err != nil || !reflect.DeepEqual(got, h) {
			t.Errorf("read back %+v, %v; want %+v", got, err, h)
		}
	}
}

func TestHelloOfTensorsRefused(t *testing.T) {
	digest := strings.Repeat("11", 32)
	body := func(role, fields string) string {
		return `{"role":"` + role + `","table":"t","byte_order":"little"` + fields + "}"
	}
	for text, c := range map[string]struct {
		code Code
		says string
	}{
		body("publish", ""):                                                     {CodeBadHandshake, "a publisher must give the manifest"},
		body("publish", `,"manifest":null`):                                     {CodeBadHandshake, "must be an object, not null"},
		body("publish", `,"manifest":[1]`):                                      {CodeBadHandshake, "must be an object, not [1]"},
		body("publish", `,"manifest":{},"wait":true`):                           {CodeBadOption, `"wait" is not for the role publish`},
		body("push", `,"manifest":{},"in_place":true`):                          {CodeBadOption, `"in_place" is not for the role push`},
		body("train", `,"manifest":{}`):                                         {CodeBadOption, `"manifest" is not for the role train`},
		body("manifest", ""):                                                    {CodeBadOption, "16 hex digits"},
		body("manifest", `,"manifest_id":"0123456789ABCDEF"`):                   {CodeBadOption, "16 hex digits"},
		body("manifest", `,"manifest_id":"0123456789abcde"`):                    {CodeBadOption, "16 hex digits"},
		body("manifest", `,"session_of":0`):                                     {CodeBadOption, "16 hex digits"},
		body("manifest", `,"session_of":-1`):                                    {CodeBadOption, `"session_of" is -1`},
		body("manifest", `,"session_of":9223372036854775808`):                   {CodeBadHandshake, `"session_of" must be a whole number`},
		body("manifest", `,"session_of":1,"manifest_id":"0123456789abcdef"`):    {CodeBadHandshake, "do not go together"},
		body("train", `,"session_of":1`):                                        {CodeBadOption, `"session_of" is not for the role train`},
		body("subscribe", `,"have":1`):                                          {CodeBadHandshake, `"have" and "have_digest" go together`},
		body("subscribe", `,"have_digest":"`+digest+`"`):                        {CodeBadHandshake, `"have" and "have_digest" go together`},
		body("subscribe", `,"have":-1,"have_digest":"`+digest+`"`):              {CodeBadOption, `"have" is -1`},
		body("subscribe", `,"resume":1`):                                        {CodeBadHandshake, `"resume" and "resume_digest" go together`},
		body("subscribe", `,"resume_offset":1`):                                 {CodeBadHandshake, `needs "resume"`},
		body("subscribe", `,"stream":1`):                                        {CodeBadHandshake, `"stream" must be true or false`},
		body("subscribe", `,"resume":1,"resume_digest":"ab","resume_offset":1`): {CodeBadOption, `"resume_digest"`},
	} {
		_, err := ReadHello(bytes.NewReader(frame(text)))
		wantRefusal(t, err, c.code, c.says)
	}
}

func TestAcceptedOfTensors(t *testing.T) {
	for _, want := range []Accepted{
		&AcceptedPush{Table: "g", Fingerprint: spec.Fingerprint{1}, Ack: AckCommitted, WindowSamples: 1, WindowBytes: 1, ChunkBytes: 1 << 20},
		&AcceptedPublish{Table: "w", Publisher: 3, Newest: 8, ChunkBytes: 1 << 20, SegmentBytes: 1 << 30},
		&AcceptedSubscribe{Table: "w", Reader: 3, Newest: 8, SegmentBytes: 1 << 30},
		&AcceptedSubscribe{Table: "w", Reader: 3, Newest: 8, Manifest: []byte(`{"tensors":[]}`)},
		&AcceptedManifest{Table: "g", Manifest: []byte(`{}`)},
		&AcceptedManifest{Table: "g", Session: strings.Repeat("w", NameBytesMax)},
	} {
		b, err := AppendAccepted(nil, want)
		if err != nil {
			t.Fatal(err)
		}
		got := reflect.New(reflect.TypeOf(want).Elem()).Interface().(Accepted)
		if err := ReadReply(bytes.NewReader(b), got); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("read back %+v, %v; want %+v", got, err, want)
		}
	}
	for _, bad := range []Accepted{
		&AcceptedPublish{}, &AcceptedPublish{ChunkBytes: 1, SegmentBytes: -1}, &AcceptedSubscribe{}, &AcceptedManifest{}, &AcceptedManifest{Manifest: []byte("1")},
		&AcceptedManifest{Manifest: []byte("{}"), Session: "w"}, &AcceptedManifest{Session: strings.Repeat("w", NameBytesMax+1)}, &AcceptedManifest{Session: "a\nb"},
		&AcceptedSubscribe{SegmentBytes: 1, Manifest: []byte("{}")}, &AcceptedSubscribe{SegmentBytes: -1, Manifest: []byte("{}")},
	} {
		if b, err := AppendAccepted(nil, bad); err == nil || len(b) > 0 {
			t.Errorf("%+v was encoded", bad)
		}
	}
}

func TestMessages(t *testing.T) {
	type op struct {
		Op         string
		Generation uint64
	}
	b, err := AppendMessage([]byte("before"), op{"commit", 8}, 100)
	if err != nil {
		t.Fatal(err)
	}
	b = b[len("before"):]
	var got op
	if err := ReadMessage(iotest.OneByteReader(bytes.NewReader(b)), 100, &got); err != nil || got != (op{"commit", 8}) {
		t.Errorf("%+v, %v", got, err)
	}
	body := len(b) - 4
	if err := ReadMessage(bytes.NewReader(b), body, &got); err != nil {
		t.Errorf("at the limit: %v", err)
	}
	if err := ReadMessage(bytes.NewReader(b), body-1, &got); !errors.Is(err, ErrProtocol) {
		t.Errorf("beyond the limit: %v", err)
	}
	if out, err := AppendMessage(nil, op{"commit", 8}, body-1); err == nil || len(out) > 0 {
		t.Error("a message beyond the limit was encoded")
	}
	if err := ReadMessage(bytes.NewReader(nil), 100, &got); err != io.EOF {
		t.Errorf("nothing: %v", err)
	}
	for n := 1; n < len(b); n++ {
		if err := ReadMessage(bytes.NewReader(b[:n]), 100, &got); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("cut at %d: %v", n, err)
		}
	}
	for _, bad := range [][]byte{
		binary.LittleEndian.AppendUint32(nil, 1), binary.LittleEndian.AppendUint32(nil, ChunkMark|2), append(binary.LittleEndian.AppendUint32(nil, 2), "[]"...),
		append(binary.LittleEndian.AppendUint32(nil, 2), "{x"...),
	} {
		if err := ReadMessage(bytes.NewReader(bad), 100, &got); !errors.Is(err, ErrProtocol) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if length, chunk, err := ReadMessageLength(bytes.NewReader(binary.LittleEndian.AppendUint32(nil, ChunkMark|1088))); length != 1088 || !chunk || err != nil {
		t.Errorf("a chunk: %d, %v, %v", length, chunk, err)
	}
}
