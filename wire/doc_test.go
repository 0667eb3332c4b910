package wire

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"flag"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/ingestd/ingestd/spec"
)

const docFile = "../docs/wire-protocol.md"

var update = flag.Bool("update", false, "write the examples in "+docFile+" anew")

var fence = regexp.MustCompile("(?s)```hex ([a-z]+)\n(.*?)```")

// docExamples returns the bytes of every hex block of the docs by its name.
func docExamples(t *testing.T) map[string][]byte {
	text, err := os.ReadFile(docFile)
	if err != nil {
		t.Fatal(err)
	}
	examples := map[string][]byte{}
	for _, block := range fence.FindAllStringSubmatch(string(text), -1) {
		var digits strings.Builder
		for line := range strings.Lines(block[2]) {
			_, line, _ = strings.Cut(line, "  ") // the offset
			line, _, _ = strings.Cut(line, "|")  // the characters
			digits.WriteString(strings.Join(strings.Fields(line), ""))
		}
		if examples[block[1]], err = hex.DecodeString(digits.String()); err != nil {
			t.Fatalf("%s, block %q: %v", docFile, block[1], err)
		}
	}
	return examples
}

func dump(b []byte) string {
	var out strings.Builder
	for line := range strings.Lines(hex.Dump(b)) {
		out.WriteString(line[4:]) // four digits of offset are enough
	}
	return out.String()
}

// example is what the docs show, made by the code.
type example struct {
	hello    Hello
	accepted AcceptedPush
	notice   Notice
	refusal  *Refusal

	batch      BatchHeader
	token      Hello // of who names a token
	secret     Secret
	challenge  Challenge
	transcript Transcript
}

// count is 32 bytes that count on from first.
func count(first byte) (n Nonce) {
	for i := range n {
		n[i] = first + byte(i)
	}
	return n
}

// authenticate makes the example of "Authentication".
func (e *example) authenticate(t *testing.T, encoded map[string][]byte) {
	var err error
	if e.secret, err = NewSecret("example-secret-of-32-characters!"); err != nil {
		t.Fatal(err)
	}
	e.token = Hello{VersionMin: 1, VersionMax: 1, Role: RoleTrain, Table: "digits", Token: "worker", Nonce: count(0)}
	if encoded["tokenhello"], err = AppendHello(nil, &e.token); err != nil {
		t.Fatal(err)
	}
	e.challenge.Nonce = count(0x80)
	e.transcript = NewTranscript(encoded["tokenhello"], e.challenge.Nonce, nil)
	e.challenge.Proofs = []Proof{e.transcript.DaemonProof(e.secret)}
	encoded["challenge"] = AppendChallenge(nil, &e.challenge)
	encoded["transcript"] = e.transcript[:]
	encoded["proof"] = AppendProof(nil, e.transcript.ClientProof(e.secret))
}

func makeExample(t *testing.T) (e example, encoded map[string][]byte) {
	s := parse(t, "image:F32[8,8],label:I32")
	e.hello = Hello{VersionMin: 1, VersionMax: 1, Role: RolePush, Table: "digits", Spec: s, Session: "worker-1", Ack: AckQueued,
		WindowBytes: 1 << 20, Client: "example/1.0"}
	e.accepted = AcceptedPush{Table: "digits", Fingerprint: s.Fingerprint(), Stream: 1, Ack: AckQueued, WindowSamples: 4032, WindowBytes: 1 << 20}
	e.notice = Notice{CodeShuttingDown, "the daemon is stopping; connect again later"}
	wrong := e.hello
	wrong.Spec = parse(t, "image:F32[8,8],label:I64")
	e.refusal = wrong.CheckSpec(s)
	hello, err := AppendHello(nil, &e.hello)
	if err != nil {
		t.Fatal(err)
	}
	accepted, err := AppendAccepted(nil, &e.accepted)
	if err != nil {
		t.Fatal(err)
	}
	f := s.Fingerprint()
	encoded = map[string][]byte{
		"fingerprint": f[:], "hello": hello, "accepted": accepted,
		"notice": AppendNotice([]byte{Ack, Ack, Ack}, &e.notice), "refusal": AppendRefusal(nil, e.refusal),
	}
	e.batch = BatchHeader{Count: 2, Number: 7, LostFirst: 6, LostCount: 1, PayloadBytes: 52, Columns: 4}
	batch := AppendBatchHeader(nil, &e.batch)
	for _, w := range []uint64{1, 1, 0, 1, 256, 257} {
		batch = binary.LittleEndian.AppendUint64(batch, w)
	}
	encoded["batch"] = append(batch, 1, 0, 2, 0)
	encoded["answer"] = binary.LittleEndian.AppendUint64(nil, e.batch.Number)
	e.authenticate(t, encoded)
	return e, encoded
}

func TestDocsWrite(t *testing.T) {
	_, encoded := makeExample(t)
	if *update {
		text, err := os.ReadFile(docFile)
		if err != nil {
			t.Fatal(err)
		}
		text = fence.ReplaceAllFunc(text, func(block []byte) []byte {
			name := string(fence.FindSubmatch(block)[1])
			return []byte("```hex " + name + "\n" + dump(encoded[name]) + "```")
		})
		if err := os.WriteFile(docFile, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	examples := docExamples(t)
	for name, want := range encoded {
		if !bytes.Equal(examples[name], want) {
			t.Errorf("%s, block %q is not what the code writes; if the change is meant, run: go test ./wire -run TestDocsWrite -update\ncode:\n%s",
				docFile, name, dump(want))
		}
	}
	for name := range examples {
		if encoded[name] == nil {
			t.Errorf("%s, block %q is checked by nothing", docFile, name)
		}
	}
}

func TestDocsRead(t *testing.T) {
	want, _ := makeExample(t)
	examples := docExamples(t)
	hello, err := ReadHello(bytes.NewReader(examples["hello"]))
	if err != nil || !reflect.DeepEqual(*hello, want.hello) {
		t.Errorf("hello: %+v, %v", hello, err)
	} else if f := hello.Spec.Fingerprint(); !bytes.Equal(f[:], examples["fingerprint"]) {
		t.Errorf("fingerprint: %v", f)
	}
	var accepted AcceptedPush
	if err := ReadReply(bytes.NewReader(examples["accepted"]), &accepted); err != nil || accepted != want.accepted {
		t.Errorf("accepted: %+v, %v", accepted, err)
	}
	var refusal *Refusal
	if err := ReadReply(bytes.NewReader(examples["refusal"]), &accepted); !errors.As(err, &refusal) || !reflect.DeepEqual(refusal, want.refusal) {
		t.Errorf("refusal: %v", err)
	}
	acks, rest, ok := bytes.Cut(examples["notice"], []byte{NoticeMark})
	notice, err := ReadNotice(bytes.NewReader(rest))
	if !ok || err != nil || *notice != want.notice || !bytes.Equal(acks, []byte{Ack, Ack, Ack}) {
		t.Errorf("notice: % x, %v, %v", acks, notice, err)
	}
}

// TestDocsBatch reads the example of "Remote trainers".
func TestDocsBatch(t *testing.T) {
	want, _ := makeExample(t)
	examples := docExamples(t)
	s := parse(t, "x:U16")
	r := bytes.NewReader(examples["batch"])
	var got BatchHeader
	err := (&BatchReader{R: r, Shape: BatchShape{BatchSize: 2, SampleBytes: s.SampleBytes(), Leaves: s.NumLeaves()}}).Next(&got)
	if err != nil || got != want.batch || uint64(r.Len()) != got.PayloadBytes {
		t.Errorf("%+v, %v, and %d bytes", got, err, r.Len())
	}
	if answer := examples["answer"]; len(answer) != AnswerBytes || binary.LittleEndian.Uint64(answer) != got.Number {
		t.Errorf("the answer is % x", answer)
	}
}

// TestDocsAuthentication reads the example of "Authentication", and computes it without the code that is under test.
func TestDocsAuthentication(t *testing.T) {
	want, _ := makeExample(t)
	examples := docExamples(t)
	hello, raw, err := ReadHelloFrame(bytes.NewReader(examples["tokenhello"]))
	if err != nil || !reflect.DeepEqual(*hello, want.token) || !bytes.Equal(raw, examples["tokenhello"]) {
		t.Fatalf("hello: %+v, %v", hello, err)
	}
	var challenge *Challenge
	if err := ReadReply(bytes.NewReader(examples["challenge"]), new(AcceptedTrain)); !errors.As(err, &challenge) || !reflect.DeepEqual(*challenge, want.challenge) {
		t.Fatalf("challenge: %v", err)
	}
	var all []byte
	all = append(all, "ingestd-auth-1\n"...)
	all = append(all, byte(len(raw)), 0, 0, 0)
	all = append(all, raw...)
	all = append(all, challenge.Nonce[:]...)
	all = append(all, make([]byte, 32)...)
	transcript := sha256.Sum256(all)
	if !bytes.Equal(transcript[:], examples["transcript"]) {
		t.Errorf("the transcript is %x", transcript)
	}
	sign := func(who string) Proof {
		mac := hmac.New(sha256.New, []byte("example-secret-of-32-characters!"))
		mac.Write(append([]byte(who+"\n"), transcript[:]...))
		return Proof(mac.Sum(nil))
	}
	if challenge.Proofs[0] != sign("daemon") {
		t.Error("the daemon's proof is another")
	}
	if proof, err := ReadProof(bytes.NewReader(examples["proof"])); err != nil || proof != sign("client") {
		t.Errorf("the client's proof: %v, %v", proof, err)
	}
}

// TestDocsCodes checks that the table of codes and the code list the same ones in the same order.
func TestDocsCodes(t *testing.T) {
	text, err := os.ReadFile(docFile)
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "\n## Codes\n")
	section, _, _ = strings.Cut(section, "\n## ")
	var listed []Code
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z_]+)` ").FindAllStringSubmatch(section, -1) {
		listed = append(listed, Code(row[1]))
	}
	if !reflect.DeepEqual(listed, Codes()) {
		t.Errorf("%s lists the codes %v, the code has %v", docFile, listed, Codes())
	}
}

// TestDocsSpec checks that the spec in the docs is read and written as it stands there.
func TestDocsSpec(t *testing.T) {
	text, err := os.ReadFile(docFile)
	if err != nil {
		t.Fatal(err)
	}
	block := regexp.MustCompile("(?s)```json\n(.*?)\n```").FindSubmatch(text)
	if block == nil {
		t.Fatalf("%s shows no JSON spec", docFile)
	}
	s, err := spec.ParseJSON(block[1])
	if err != nil || !bytes.Equal(s.JSON(), block[1]) {
		t.Errorf("%s: %v", block[1], err)
	}
}
