"""Producer against a fake daemon: bytes, acknowledgements, window, deadlines, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ingestd import (
    Difference,
    FormatError,
    PeerClosed,
    Producer,
    Refused,
    Spec,
    SpecError,
    Timeout,
)

from fakes import BIG, PATIENCE, SPEC, Listener, Peer, Steps, big, big_encoded, encoded, image, sample

SIZE = SPEC.sample_bytes


def test_handshake_and_one_sample(listener: Listener) -> None:
    seen: dict[str, Any] = {}

    def script(peer: Peer) -> None:
        seen.update(peer.accept(window_samples=32, window_bytes=1 << 20, held=3, ack="committed"))
        assert peer.exactly(SIZE) == encoded(5)
        peer.ack(1)
        assert peer.end() == b""

    listener.script(script)
    with Producer(
        listener.address, "t", SPEC, session="s", ack="committed", window_samples=64, window_bytes=99, client="me"
    ) as p:
        assert (p.table, p.stream, p.held, p.ack) == ("t", 7, 3, "committed")
        assert (p.window_samples, p.window_bytes) == (32, 1 << 20)
        p.push(sample(5))
        p.flush(deadline=PATIENCE)
        assert (p.pushed, p.acked, p.unacked) == (1, 1, 0)
    assert seen == {
        "role": "push", "table": "t", "byte_order": "little", "spec": SPEC.to_dict(), "fingerprint": SPEC.fingerprint,
        "session": "s", "ack": "committed", "window_samples": 64, "window_bytes": 99, "notes": True, "client": "me",
    }  # fmt: skip


def test_spec_as_text(listener: Listener) -> None:
    listener.script(lambda peer: (peer.accept(), peer.end())[0])
    with Producer(listener.address, "t", "image:F32[2,2],label:I16") as p:
        assert p.spec == SPEC


def test_small_samples_wait_for_acknowledgements_or_for_company(listener: Listener) -> None:
    steps = Steps()
    fill = (256 << 10) // SIZE + 1  # samples that make up 256 KiB

    def script(peer: Peer) -> None:
        peer.accept(window_samples=1 << 20)
        assert peer.exactly(SIZE) == encoded(0)
        steps.wait("pushed 3")
        peer.nothing()
        peer.ack(1)
        assert peer.exactly(2 * SIZE) == encoded(1) + encoded(2)  # sent when nothing was unacknowledged any more
        steps.done("got 3")
        peer.exactly(fill * SIZE)  # sent without an acknowledgement
        steps.done("got all")
        assert peer.end() == encoded(3)
        peer.ack(2 + fill + 1)

    listener.script(script)
    with Producer(listener.address, "t", SPEC) as p:
        for k in range(3):
            p.push(sample(k))
        steps.done("pushed 3")
        steps.wait("got 3")
        for k in range(fill):
            p.push(sample(k))
        steps.wait("got all")
        p.push(sample(3))
        assert p.unacked == 2 + fill + 1


def test_window_in_samples(listener: Listener) -> None:
    steps = Steps()

    def script(peer: Peer) -> None:
        peer.accept(window_samples=4)
        assert peer.exactly(4 * SIZE) == b"".join(map(encoded, range(4)))  # a full window goes out
        steps.wait("full")
        peer.nothing()
        peer.ack(1)
        assert peer.exactly(SIZE) == encoded(4)
        steps.wait("full again")
        peer.nothing()
        peer.ack(4)
        assert peer.end() == b""

    listener.script(script)
    with Producer(listener.address, "t", SPEC) as p:
        for k in range(4):
            p.push(sample(k), deadline=0)
        with pytest.raises(Timeout, match="4 samples fill the window"):
            p.push(sample(9), deadline=0)
        assert p.pushed == 4
        steps.done("full")
        p.push(sample(4), deadline=PATIENCE)
        with pytest.raises(TimeoutError):
            p.push(sample(9), deadline=0.001)
        steps.done("full again")


def test_window_in_bytes(listener: Listener) -> None:
    steps = Steps()

    def script(peer: Peer) -> None:
        peer.accept(window_bytes=2 * SIZE + 1)
        peer.exactly(2 * SIZE)
        steps.wait("full")
        peer.nothing()
        peer.ack(2)
        assert peer.end() == b""

    listener.script(script)
    with Producer(listener.address, "t", SPEC) as p:
        p.push(sample(0))
        p.push(sample(1))
        with pytest.raises(Timeout):
            p.push(sample(2), deadline=0)
        steps.done("full")


def test_a_window_smaller_than_a_sample_lets_one_go(listener: Listener) -> None:
    def script(peer: Peer) -> None:
        peer.accept(window_bytes=1)
        for k in range(3):
            assert peer.exactly(SIZE) == encoded(k)
            peer.nothing()
            peer.ack(1)
        peer.end()

    listener.script(script)
    with Producer(listener.address, "t", SPEC) as p:
        for k in range(3):
            p.push(sample(k), deadline=PATIENCE)


def test_large_samples(listener: Listener) -> None:
    def script(peer: Peer) -> None:
        peer.accept(window_bytes=64 << 20)
        for k in range(5):
            assert peer.exactly(BIG.sample_bytes) == big_encoded(k)
        peer.ack(5)
        assert peer.end() == b""

    listener.script(script)
    with Producer(listener.address, "t", BIG) as p:
        for k in range(5):
            tree = big(k)
            p.push(tree, deadline=PATIENCE)
            tree["a"][:] = 0xEE  # the caller may change its arrays when the call has returned
            tree["b"][:] = 0xEE


def test_a_large_sample_that_has_begun_is_never_torn(listener: Listener) -> None:
    steps = Steps()
    spec = Spec.parse("a:U8[67108864]")  # more than any socket buffers

    def script(peer: Peer) -> None:
        peer.accept(window_bytes=1 << 30)
        steps.wait("pushed")
        assert peer.exactly(1 << 26) == b"\1" * (1 << 26)
        assert peer.exactly(1 << 26) == b"\2" * (1 << 26)
        peer.ack(2)
        assert peer.end() == b""

    listener.script(script)
    with Producer(listener.address, "t", spec) as p:
        array = np.full(1 << 26, 1, np.uint8)
        p.push({"a": array}, deadline=0.01)  # begun, so taken: the rest is copied and follows
        array[:] = 9
        assert p.pushed == 1
        with pytest.raises(Timeout):
            p.push({"a": array}, deadline=0.01)  # not begun, so not taken
        assert p.pushed == 1
        steps.done("pushed")
        array[:] = 2
        p.push({"a": array}, deadline=PATIENCE)
        p.flush(deadline=PATIENCE)


@pytest.mark.parametrize(
    "text", ["image:F32[2,2],label:I16", "x:U8[3]", "s:BOOL,t:F64[5],u:BF16,v:I8[7,2]", "y:U8[70000]"]
)
def test_batches(listener: Listener, text: str) -> None:
    spec = Spec.parse(text)
    n = 3000 if spec.sample_bytes < 1000 else 40
    rng = np.random.default_rng(1)
    samples = rng.integers(0, 2, (n, spec.sample_bytes), np.uint8)
    offsets = np.cumsum([0, *(leaf.nbytes for leaf in spec.leaves)])
    batch = {
        leaf.name: np.ascontiguousarray(samples[:, a : a + leaf.nbytes]).view(leaf.numpy_dtype).reshape(n, *leaf.shape)
        for leaf, a in zip(spec.leaves, offsets)
    }

    def script(peer: Peer) -> None:
        peer.accept(window_samples=1 << 20, window_bytes=1 << 30)
        assert peer.exactly(samples.nbytes) == samples.tobytes()
        peer.ack(n)
        assert peer.end() == b""

    listener.script(script)
    with Producer(listener.address, "t", spec) as p:
        half = {k: v[: n // 2] for k, v in batch.items()}
        rest = {k: np.repeat(v[n // 2 :], 2, axis=0)[::2] for k, v in batch.items()}  # not contiguous
        assert p.push_batch(half, deadline=PATIENCE) == n // 2
        assert p.push_batch(rest, deadline=PATIENCE) == n - n // 2
        assert p.push_batch({k: v[:0] for k, v in batch.items()}) == 0
        assert p.pushed == n


def test_a_batch_keeps_to_the_window_and_says_what_was_taken(listener: Listener) -> None:
    steps = Steps()

    def script(peer: Peer) -> None:
        peer.accept(window_samples=10)
        assert peer.exactly(10 * SIZE) == b"".join(map(encoded, range(10)))
        steps.wait("timed out")
        peer.nothing()
        for k in range(10, 25):
            peer.ack(1)
            if k % 5 == 4:
                assert peer.exactly(5 * SIZE) == b"".join(map(encoded, range(k - 4, k + 1)))
        peer.ack(10)
        assert peer.end() == b""

    listener.script(script)
    batch = {"image": np.stack([image(k) for k in range(25)]), "label": np.arange(100, 125, dtype=np.int16)}
    with Producer(listener.address, "t", SPEC) as p:
        with pytest.raises(Timeout, match="10 of 25 samples") as timeout:
            p.push_batch(batch, deadline=0.01)
        assert timeout.value.taken == p.pushed == 10
        steps.done("timed out")
        assert p.push_batch({k: v[10:] for k, v in batch.items()}, deadline=PATIENCE) == 15


def test_a_batch_cut_by_its_deadline_goes_on_where_it_was_cut(listener: Listener) -> None:
    steps = Steps()
    n = 64

    def script(peer: Peer) -> None:
        peer.accept(window_bytes=1 << 30)
        steps.wait("cut")
        for k in range(n):
            assert peer.exactly(BIG.sample_bytes) == big_encoded(k)
        peer.ack(n)
        assert peer.end() == b""

    listener.script(script)
    batch = {"a": np.stack([big(k)["a"] for k in range(n)]), "b": np.stack([big(k)["b"] for k in range(n)])}
    with Producer(listener.address, "t", BIG) as p:
        with pytest.raises(Timeout) as timeout:
            p.push_batch(batch, deadline=0.01)
        taken = timeout.value.taken
        assert 0 < taken < n and p.pushed == taken
        steps.done("cut")
        assert p.push_batch({k: v[taken:] for k, v in batch.items()}, deadline=PATIENCE) == n - taken


def test_wrong_data_pushes_nothing(listener: Listener) -> None:
    listener.script(lambda peer: (peer.accept(), peer.nothing(), peer.end())[0])
    with Producer(listener.address, "t", SPEC) as p:
        with pytest.raises(SpecError, match="want I16"):
            p.push({"image": image(0), "label": np.int64(1)})
        with pytest.raises(SpecError, match=r"got shape \(2, 2\), want \(2, 2, 2\)"):
            p.push_batch(sample(0))
        with pytest.raises(ValueError, match="deadline=-1"):
            p.push(sample(0), deadline=-1)
        with pytest.raises(ValueError, match="deadline=nan"):
            p.push(sample(0), deadline=float("nan"))
        assert p.pushed == 0


def test_flush_waits_for_every_acknowledgement(listener: Listener) -> None:
    steps = Steps()

    def script(peer: Peer) -> None:
        peer.accept()
        peer.exactly(3 * SIZE)
        peer.ack(2)
        steps.wait("timed out")
        peer.ack(1)
        peer.end()

    listener.script(script)
    with Producer(listener.address, "t", SPEC) as p:
        p.flush(deadline=0)  # nothing to wait for
        for k in range(3):
            p.push(sample(k))
        with pytest.raises(Timeout, match="acknowledgements"):
            p.flush(deadline=0.01)
        steps.done("timed out")
        p.flush(deadline=PATIENCE)
        assert p.acked == 3


def refuse(peer: Peer) -> None:
    peer.hello()
    peer.reply(
        {
            "code": "spec_mismatch",
            "reason": "the spec differs",
            "diff": [{"leaf": "label", "got": "I16", "want": "I32"}],
            "spec": Spec.parse("label:I32").to_dict(),
        },
        status=1,
    )


def test_refusals(listener: Listener) -> None:
    listener.script(refuse)
    with pytest.raises(Refused, match="leaf 'label': got I16, want I32") as refused:
        Producer(listener.address, "t", SPEC)
    assert refused.value.code == "spec_mismatch"
    assert refused.value.diff == [Difference("label", "I16", "I32")]
    assert isinstance(refused.value, ConnectionError)


def test_answers_that_are_none(listener: Listener) -> None:
    def finish(script: Any, error: type[Exception], says: str, deadline: float = PATIENCE) -> None:
        listener.script(script).name = says
        with pytest.raises(error, match=says):
            Producer(listener.address, "t", SPEC, deadline=deadline)

    steps = Steps()
    finish(lambda peer: peer.hello(), PeerClosed, "closed the connection during the handshake")
    finish(lambda peer: peer.sock.sendall(b"HTTP/1.1 400 Bad"), FormatError, "is this the address")
    finish(lambda peer: (peer.hello(), peer.sock.sendall(b"INGESTD\n\1\0\0\0\x20\0\0\0{}")), PeerClosed, "middle")
    finish(lambda peer: (peer.hello(), peer.reply({})), FormatError, "window_samples = None")
    finish(lambda peer: (peer.hello(), peer.reply({"fingerprint": "00"})), FormatError, "another spec")
    finish(lambda peer: (peer.hello(), steps.wait("done")), Timeout, "answer to the handshake", deadline=0.01)
    steps.done("done")


def test_nobody_listens(socket_path: str) -> None:
    with pytest.raises(PeerClosed, match="is ingestd running there"):
        Producer(f"unix://{socket_path}", "t", SPEC)
    listener = Listener.tcp()
    listener.finish()
    with pytest.raises(PeerClosed, match="is ingestd running there"):
        Producer(listener.address, "t", SPEC)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "tcp://",
        "tcp://host",
        "tcp://:80",
        "tcp://h:0",
        "tcp://h:65536",
        "tcp://h:x",
        "unix://",
        "http://h:1",
        "/tmp/x",
    ],
)
def test_bad_addresses(address: str) -> None:
    with pytest.raises(ValueError, match=r"write tcp://host:port \(or tls, quic\) or unix:///path"):
        Producer(address, "t", SPEC)
