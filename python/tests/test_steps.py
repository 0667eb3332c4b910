"""StepProducer against a fake daemon: chunks, acknowledgements, reconnects, refusals; pushed, and in place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from ingestd import (
    Closed,
    Difference,
    Error,
    FormatError,
    Manifest,
    PeerClosed,
    Refused,
    SessionTaken,
    SpecError,
    StepIncomplete,
    StepOrder,
    StepProducer,
    StepRefused,
    StepTx,
    TensorMismatch,
    Timeout,
)
from tensors import ABORT, BEGIN, CHUNKS, END, NO_CRC, C, accept, flat_of, parse, receive

from fakes import PATIENCE, FillDaemon, Filling, Listener, Peer, Steps

BIG = 3 * C // 4  # elements: three chunks


def gradients(k: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(k)
    return {
        "w": rng.standard_normal((BIG,)).astype(np.float32), "b": rng.standard_normal(10).astype(np.float32),
        "e": np.zeros((0, 3), np.float32), "n": np.int64(k),
    }  # fmt: skip


MANIFEST = Manifest.from_arrays(gradients())


def producer(listener: Listener, **options: Any) -> StepProducer:
    return StepProducer(listener.address, "t", "w", MANIFEST, deadline=PATIENCE, **options)


def whole(chunks: list[Any], manifest: Manifest = MANIFEST) -> bytes:
    """The flat bytes of a step that was sent in order."""
    out = bytearray(manifest.data_bytes)
    for n, chunk in enumerate(chunks):
        assert bool(chunk.flags & BEGIN) == (n == 0)
        at = manifest.offsets[chunk.tensor] + chunk.offset
        out[at : at + chunk.length] = chunk.data
    return bytes(out)


def test_handshake_and_one_step(listener: Listener) -> None:
    seen: dict[str, Any] = {}
    steps = Steps()

    def script(peer: Peer) -> None:
        seen.update(accept(peer))
        chunks = [receive(peer) for _ in range(4)]
        assert whole(chunks) == flat_of(MANIFEST, gradients())
        assert {(c.step, c.manifest) for c in chunks} == {(1234, MANIFEST.id)}
        assert [c.length for c in chunks[:3]] == [C] * 3
        peer.nothing()
        steps.done("received")
        steps.wait("committing")
        peer.ack(4)
        assert peer.end() == b""

    listener.script(script)
    with producer(listener, window_bytes=1 << 20, client="me") as p:
        assert (p.table, p.name, p.stream, p.chunk_bytes, p.committed) == ("t", "w", 7, C, 0)
        arrays = gradients()
        with p.step(1234, deadline=PATIENCE) as tx:
            for name in MANIFEST.names:
                tx.put(name, arrays[name])
            assert p.committed == 0
            steps.done("committing")
        assert p.committed == 1
        steps.wait("received")
    assert seen == {
        "role": "push", "table": "t", "byte_order": "little", "session": "w", "ack": "committed", "notes": True,
        "window_bytes": 1 << 20, "manifest": MANIFEST.to_dict(), "client": "me",
    }  # fmt: skip


def test_slices_and_dicts_and_other_orders(listener: Listener) -> None:
    def script(peer: Peer) -> None:
        accept(peer)
        for _ in range(2):
            chunks = [receive(peer) for _ in range(4)]
            assert whole(chunks) == flat_of(MANIFEST, gradients(1))
            peer.ack(4)
        reverse = [receive(peer) for _ in range(5)]
        assert [c.tensor for c in reverse] == [3, 1, 0, 0, 0]
        assert whole(reverse) == flat_of(MANIFEST, gradients(1))
        peer.ack(5)
        peer.end()

    listener.script(script)
    arrays = gradients(1)
    with producer(listener) as p:
        with p.step(0, deadline=PATIENCE) as tx:
            at = 0
            for n in (1, 100, 7, C // 4, BIG - C // 4 - 108):
                tx.put_slice("w", arrays["w"][at : at + n], at)
                at += n
            tx.put_slice("b", arrays["b"].reshape(2, 5), 0)
            tx.put("n", arrays["n"])
        p.send(1, dict(reversed(arrays.items())), deadline=PATIENCE)
        with p.step(2, deadline=PATIENCE) as tx:
            for name in ("n", "b", "w"):
                tx.put(name, arrays[name])


def test_arrays_are_borrowed_and_may_be_of_any_kind(listener: Listener) -> None:
    strided = np.arange(20, dtype=np.float32)[::2]
    manifest = Manifest.from_arrays({"x": strided, "h": np.zeros(3, np.float16)})

    def script(peer: Peer) -> None:
        accept(peer)
        for _ in range(2):
            chunk = receive(peer)
            assert chunk.data[:40] == strided.tobytes() and chunk.data[256:262] == bytes(6)
            peer.ack(1)
        peer.end()

    class Jax:
        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            return strided

    listener.script(script)
    with StepProducer(listener.address, "t", "w", manifest) as p:
        p.send(1, {"x": strided, "h": np.zeros(3, np.float16)}, deadline=PATIENCE)
        p.send(2, {"x": Jax(), "h": np.zeros(3, np.float16)}, deadline=PATIENCE)


def test_torch_tensors(listener: Listener) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    arrays = {"b": torch.arange(5, dtype=torch.bfloat16), "f": torch.nn.Parameter(torch.ones(3))}

    def script(peer: Peer) -> None:
        accept(peer)
        chunk = receive(peer)
        assert chunk.data[:10] == arrays["b"].view(torch.int16).numpy().tobytes()
        peer.ack(1)
        peer.end()

    listener.script(script)
    with StepProducer(listener.address, "t", "w", arrays) as p:
        p.send(1, arrays, deadline=PATIENCE)


def test_subsets_and_steps_without_bytes(listener: Listener) -> None:
    def script(peer: Peer) -> None:
        accept(peer)
        chunk, end = receive(peer), receive(peer)
        assert (chunk.flags, chunk.tensor, chunk.length) == (BEGIN, 1, 40)
        assert (end.flags, end.data) == (END, np.array([1, 2], "<u4").tobytes())
        peer.ack(2)
        nothing = receive(peer)
        assert (nothing.flags, nothing.length) == (BEGIN | END, 0)
        peer.ack(1)
        peer.end()

    listener.script(script)
    with producer(listener) as p:
        with p.step(1, subset=["e", "b"], deadline=PATIENCE) as tx:
            tx.put("b", gradients()["b"])
        with p.step(2, subset=[], deadline=PATIENCE):
            pass
        with pytest.raises(KeyError, match="no tensor 'x'"):
            p.step(3, subset=["x"])
        with p.step(3) as tx:
            tx.abort()


def test_encodings_and_chunks_without_sums(listener: Listener) -> None:
    arrays = {"h": np.array([1.0, 3.14159, -np.inf], np.float32), "k": np.array([1, -5, 3, 5], np.float32)}

    def script(peer: Peer) -> None:
        accept(peer)
        for entries in ([(1, -5), (3, 5)], [(1, -5), (2, 6)]):
            chunk = receive(peer)
            assert chunk.flags == BEGIN | NO_CRC
            assert chunk.data[:6] == np.array([0x3F80, 0x4049, 0xFF80], "<u2").tobytes()
            assert chunk.data[256:] == np.array(entries, [("i", "<u4"), ("v", "<f4")]).tobytes()
            peer.ack(1)
        peer.end()

    listener.script(script)
    with StepProducer(listener.address, "t", "w", arrays, encodings={"h": "bf16", "k": "topk:2"}, crc=False) as p:
        p.send(1, arrays, deadline=PATIENCE)
        assert p.feedback.residual("k").tolist() == [1, 0, 3, 0]  # type: ignore[union-attr]
        with pytest.raises(ZeroDivisionError), p.step(2) as tx:
            tx.put("k", arrays["k"])  # is in no chunk yet
            raise ZeroDivisionError
        assert p.feedback.residual("k").tolist() == [1, 0, 3, 0]  # type: ignore[union-attr]
        with p.step(2, deadline=PATIENCE) as tx:
            with pytest.raises(SpecError, match="put it whole"):
                tx.put_slice("k", arrays["k"], 0)
            tx.put_all(arrays)
        assert p.feedback.residual("k").tolist() == [2, 0, 0, 5]  # type: ignore[union-attr]


def test_arrays_that_do_not_fit(listener: Listener) -> None:
    listener.script(lambda peer: (accept(peer), peer.end())[0])
    with producer(listener) as p:
        tx = p.step(1)
        for name, array, got, want in [
            ("b", np.zeros(10), "F64", "F32"), ("b", np.zeros(11, np.float32), r"shape \[11\]", r"shape \[10\]"),
            ("n", np.int32(1), "I32", "I64"), ("b", np.zeros(10, ">f4"), "big-endian", "F32"),
            ("n", np.zeros(1, np.int64), r"shape \[1\]", r"shape \[\]"),
        ]:  # fmt: skip
            with pytest.raises(TensorMismatch, match=f"tensor '{name}': got .*{got}.*, want {want}") as caught:
                tx.put(name, array)
            assert caught.value.tensor == name
        with pytest.raises(KeyError, match="no tensor 'x'"):
            tx.put("x", np.zeros(1))
        with pytest.raises(SpecError, match="is a str"):
            tx.put("b", "text")
        for offset in (-1, 8):
            with pytest.raises(TensorMismatch, match="elements below 10"):
                tx.put_slice("b", np.zeros(3, np.float32), offset)
        tx.put_slice("b", np.zeros(3, np.float32), 4)
        with pytest.raises(SpecError, match="tensor 'b' at byte 24: it was put in this step before"):
            tx.put_slice("b", np.zeros(3, np.float32), 6)
        with pytest.raises(StepIncomplete, match=r"step 1 lacks 'w' .*'b' \(28 bytes\), 'n' \(8 bytes\)") as lacks:
            tx.commit()
        assert lacks.value.missing == {"w": 4 * BIG, "b": 28, "n": 8}
        tx.put("n", np.int64(3))
        with pytest.raises(SpecError, match="'n' was put in this step before"):
            tx.put("n", np.int64(3))
        tx.abort()
        tx.abort()
        with pytest.raises(Closed, match="step 1 is over"):
            tx.put("n", np.int64(3))


def test_steps_only_grow(listener: Listener) -> None:
    def script(peer: Peer) -> None:
        accept(peer)
        for step in (5, 5):
            assert receive(peer).step == step
            peer.ack(1)
        peer.end()

    listener.script(script)
    manifest = Manifest.from_arrays({"n": np.int64(0)})
    with StepProducer(listener.address, "t", "w", manifest) as p:
        p.send(5, {"n": np.int64(1)}, deadline=PATIENCE)
        with pytest.raises(StepOrder, match="step 4 comes after step 5"):
            p.step(4)
        p.send(5, {"n": np.int64(1)}, deadline=PATIENCE)  # again: readers ignore it
        tx = p.step(6)
        with pytest.raises(StepOrder, match="step 6 is not finished"):
            p.step(7)
        tx.abort()
        for bad in (-1, 1 << 64):
            with pytest.raises(ValueError, match="0 to 2"):
                p.step(bad)
    with pytest.raises(Closed):
        p.step(8)


def test_an_exception_aborts_and_the_step_may_be_tried_again(listener: Listener) -> None:
    def script(peer: Peer) -> None:
        accept(peer)
        for n in range(3):
            assert receive(peer).flags == (BEGIN if n == 0 else 0)
        abort = receive(peer)
        assert (abort.flags, abort.step, abort.length, abort.tensor, abort.offset) == (ABORT, 1, 0, 0, 0)
        peer.ack(4)
        assert whole([receive(peer) for _ in range(4)]) == flat_of(MANIFEST, gradients(2))
        peer.ack(4)
        peer.end()

    listener.script(script)
    with producer(listener) as p:
        with pytest.raises(ZeroDivisionError), p.step(1, deadline=PATIENCE) as tx:
            tx.put("w", gradients()["w"])
            raise ZeroDivisionError
        assert p.committed == 0
        p.send(1, gradients(2), deadline=PATIENCE)
        assert p.committed == 1


def test_chunks_that_have_not_gone_are_dropped_by_an_abort(listener: Listener) -> None:
    """The window is full, so only one of the chunks has gone when the step is given up."""
    steps = Steps()

    def script(peer: Peer) -> None:
        accept(peer, window_samples=1)
        assert receive(peer).flags == BEGIN
        steps.wait("aborted")
        peer.nothing()
        peer.ack(1)
        assert receive(peer).flags == ABORT
        peer.ack(1)
        chunk = receive(peer)
        assert (chunk.flags, chunk.step) == (BEGIN | END, 2)
        peer.ack(1)
        peer.end()

    listener.script(script)
    with producer(listener) as p:
        with pytest.raises(Timeout, match="1 samples fill the window"), p.step(1, deadline=0.01) as tx:
            tx.put("w", gradients()["w"])
        steps.done("aborted")
        with p.step(2, subset=[], deadline=PATIENCE):
            pass


def test_a_failed_step_can_only_be_aborted(listener: Listener) -> None:
    steps = Steps()

    def script(peer: Peer) -> None:
        accept(peer, window_samples=1)
        steps.wait("timed out")
        receive(peer)
        peer.ack(1)
        assert receive(peer).flags == ABORT
        peer.ack(1)
        peer.end()

    listener.script(script)
    with producer(listener) as p:
        tx = p.step(1)
        with pytest.raises(Timeout):
            tx.put("w", gradients()["w"], deadline=0.01)
        with pytest.raises(Error, match="step 1 has failed and can only be aborted"):
            tx.put("b", gradients()["b"])
        with pytest.raises(Error, match="can only be aborted"):
            tx.commit()
        tx.abort()
        steps.done("timed out")


def test_a_commit_that_takes_too_long_may_be_called_again(listener: Listener) -> None:
    steps = Steps()

    def script(peer: Peer) -> None:
        accept(peer)
        for _ in range(4):
            receive(peer)
        steps.wait("timed out")
        peer.ack(4)
        peer.end()

    listener.script(script)
    with producer(listener) as p:
        tx = p.step(1)
        tx.put_all(gradients(), deadline=PATIENCE)
        with pytest.raises(Timeout, match="acknowledgements"):
            tx.commit(deadline=0.01)
        steps.done("timed out")
        tx.commit(deadline=PATIENCE)
        assert p.committed == 1


def test_reconnect_sends_the_rest_from_the_arrays(listener: Listener) -> None:
    def first(peer: Peer) -> None:
        accept(peer)
        receive(peer)
        receive(peer)
        peer.ack(1)

    def second(peer: Peer) -> None:
        accept(peer, held=2)  # the second one is in the ring, although its ack was not seen
        rest = [receive(peer) for _ in range(2)]
        flat = flat_of(MANIFEST, gradients(4))
        assert rest[0].data == flat[2 * C : 3 * C] and rest[0].flags == 0
        assert rest[1].data == flat[3 * C : MANIFEST.ends[-1]]
        peer.ack(2)
        peer.end()

    chain(listener, first, second)
    with producer(listener) as p:
        p.send(9, gradients(4), deadline=PATIENCE)
        assert (p.reconnects, p.lost, p.committed) == (1, 0, 1)


def test_a_daemon_that_lost_its_ring_gets_the_whole_step_again(listener: Listener) -> None:
    def first(peer: Peer) -> None:
        accept(peer)
        for _ in range(3):
            receive(peer)
        peer.ack(2)

    def second(peer: Peer) -> None:
        accept(peer, stream=3, held=0)  # another stream, and nothing is there
        flat = flat_of(MANIFEST, gradients(5))
        rest = [receive(peer, stream=3) for _ in range(2)]
        assert rest[0].data == flat[2 * C : 3 * C]
        peer.ack(2)
        again = [receive(peer, stream=3) for _ in range(4)]
        assert whole(again) == flat
        peer.ack(4)
        peer.end()

    chain(listener, first, second)
    with producer(listener) as p:
        p.send(9, gradients(5), deadline=PATIENCE)
        assert (p.reconnects, p.lost, p.committed, p.stream) == (1, 2, 1, 3)


def test_what_was_given_up_keeps_its_numbers_over_a_reconnect(listener: Listener) -> None:
    steps = Steps()

    def first(peer: Peer) -> None:
        accept(peer)
        for _ in range(3):
            receive(peer)
        assert receive(peer).flags == ABORT
        peer.ack(1)
        steps.wait("aborted")

    def second(peer: Peer) -> None:
        accept(peer, held=1)
        for _ in range(3):  # samples 1 and 2 had to be sent again, but their arrays are gone
            assert receive(peer).flags == ABORT
        peer.ack(3)
        assert receive(peer).flags == BEGIN | END
        peer.ack(1)
        peer.end()

    chain(listener, first, second)
    with producer(listener) as p:
        with pytest.raises(ZeroDivisionError), p.step(1, deadline=PATIENCE) as tx:
            arrays = gradients()
            tx.put("w", arrays["w"])
            raise ZeroDivisionError
        arrays["w"][:] = 0
        steps.done("aborted")
        with p.step(2, subset=[], deadline=PATIENCE):
            pass


def chain(listener: Listener, *scripts: Any) -> None:
    """One script per connection, in order."""

    def work() -> None:
        try:
            listener.sock.settimeout(PATIENCE)
            for script in scripts:
                peer = Peer(listener.sock.accept()[0])
                with peer.sock:
                    script(peer)
        except BaseException as e:
            listener.errors.append(e)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    listener.threads.append(thread)


def test_a_step_that_is_refused(listener: Listener) -> None:
    def script(peer: Peer) -> None:
        accept(peer)
        for _ in range(4):
            receive(peer)
        peer.note({"code": "step_refused", "reason": "step 3 is behind step 90", "step": 3})
        peer.ack(4)
        assert receive(peer).flags == ABORT
        peer.ack(1)
        assert receive(peer).step == 91
        peer.ack(1)
        peer.end()

    listener.script(script)
    with producer(listener) as p:
        with pytest.raises(StepRefused, match="step 3 was refused: step 3 is behind step 90") as caught:
            p.send(3, gradients(), deadline=PATIENCE)
        assert (caught.value.step, caught.value.reason) == (3, "step 3 is behind step 90")
        assert p.committed == 0 and p.note is None
        with p.step(91, subset=[], deadline=PATIENCE):
            pass


def test_a_step_that_is_refused_while_it_is_put(listener: Listener) -> None:
    def script(peer: Peer) -> None:
        accept(peer, window_samples=1)
        receive(peer)
        peer.note({"code": "step_refused", "reason": "too old", "step": 3})
        peer.ack(1)
        while receive(peer).flags != ABORT:
            peer.ack(1)
        peer.ack(1)
        peer.end()

    listener.script(script)
    with producer(listener) as p, pytest.raises(StepRefused), p.step(3, deadline=PATIENCE) as tx:
        tx.put("w", gradients()["w"])
        tx.put("b", gradients()["b"])


def test_another_producer_takes_the_name(listener: Listener) -> None:
    def script(peer: Peer) -> None:
        accept(peer)
        receive(peer)
        peer.notice("session_taken", "another one has it")

    listener.script(script)
    p = producer(listener)
    with pytest.raises(SessionTaken, match="another one has it"):
        p.send(1, gradients(), deadline=PATIENCE)
    p.abort()


def test_bad_chunks_end_the_connection_for_good_without_patience(listener: Listener) -> None:
    def script(peer: Peer) -> None:
        accept(peer)
        receive(peer)
        peer.notice("bad_chunk", "tensor 'w' is wrong")

    listener.script(script)
    p = producer(listener, reconnect=0)
    with pytest.raises(PeerClosed, match="bad_chunk"):
        p.send(1, gradients(), deadline=PATIENCE)
    p.abort()


def test_refusals(listener: Listener) -> None:
    diff = [{"leaf": "w", "got": "F32[2]", "want": "F32[3]"}]
    body = {"code": "manifest_mismatch", "reason": "another one is in use", "diff": diff}
    listener.script(lambda peer: (peer.hello(), peer.reply(body, status=1))[1])
    with pytest.raises(Refused, match="manifest_mismatch") as caught:
        producer(listener)
    assert caught.value.diff == [Difference("w", "F32[2]", "F32[3]")]


@pytest.mark.parametrize(
    "reply, match",
    [
        ({"chunk_bytes": 1000}, "1000 bytes, which no table may have"), ({"chunk_bytes": "x"}, "chunk_bytes = 'x'"),
        ({"fingerprint": "0" * 64}, "fingerprint is not that"), ({"chunk_bytes": 2 * C}, "fingerprint is not that"),
    ],
)  # fmt: skip
def test_replies_that_cannot_be(listener: Listener, reply: dict[str, Any], match: str) -> None:
    listener.script(lambda peer: (accept(peer, **reply), peer.end())[0])
    with pytest.raises(FormatError, match=match):
        producer(listener)


def test_arguments() -> None:
    for arguments, match in [
        ({"name": ""}, "needs a name"), ({"name": "x" * 129}, "session="), ({"in_place": True}, "memory is shared"),
        ({"reconnect": -1.0}, "reconnect="), ({"encodings": "bf16"}, "part of the manifest"), ({"table": ""}, "table="),
    ]:  # fmt: skip
        options: dict[str, Any] = {"address": "tcp://127.0.0.1:1", "table": "t", "name": "w", "tensors": MANIFEST}
        with pytest.raises(ValueError, match=match):
            StepProducer(**{**options, **arguments})


# -- in place ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fills(socket_path: str) -> Iterator[FillDaemon]:
    made = FillDaemon(socket_path, CHUNKS, batches=8, places=6)
    made.batch_size = 1
    yield made
    made.finish()


def take(filling: Filling, n: int, stream: int = 7, before: Callable[[], None] = lambda: None) -> list[Any]:
    """Waits for ``n`` chunks and takes them; calls ``before`` when one is there, before it says so."""
    found: list[Any] = []
    while len(found) < n:
        rows = filling.take(done=False)
        if rows is None:
            filling.channel.set_daemon_waiting()
            continue
        found += [parse(row, stream) for row in rows]
        before()
        c = filling.channel
        c.words[(c.giveback + 64) // 8] += 1
        if c.waiting():
            c.wake()
    return found


def test_in_place(fills: FillDaemon) -> None:
    def script(peer: Peer, filling: Filling) -> None:
        body = filling.accept(peer, prefetch=6)
        assert body["manifest"] == MANIFEST.to_dict() and body["session"] == "w" and "spec" not in body
        assert whole(take(filling, 4)) == flat_of(MANIFEST, gradients(6))
        peer.sock.recv(1)

    fills.serve(script)
    with StepProducer(fills.address.replace("unix", "shm"), "t", "w", MANIFEST, deadline=PATIENCE) as p:
        p.send(1, gradients(6), deadline=PATIENCE)
        assert (p.committed, p.chunk_bytes) == (1, C)


def test_in_place_a_refused_step_and_an_abort(fills: FillDaemon) -> None:
    def script(peer: Peer, filling: Filling) -> None:
        filling.accept(peer, prefetch=6)
        note = {"code": "step_refused", "reason": "too old", "step": 3}
        assert take(filling, 1, before=lambda: peer.note(note))[0].flags == BEGIN
        assert take(filling, 1)[0].flags == ABORT
        peer.sock.recv(1)

    fills.serve(script)
    arrays = {"n": np.int64(0)}
    p = StepProducer(fills.address, "t", "w", arrays, in_place=True, deadline=PATIENCE)
    with p, pytest.raises(StepRefused, match="too old"):
        p.send(3, arrays, deadline=PATIENCE)


def test_in_place_a_daemon_that_kept_nothing_gets_the_step_again(fills: FillDaemon) -> None:
    def first(peer: Peer, filling: Filling) -> None:
        filling.accept(peer, prefetch=6)
        take(filling, 1)

    def second(peer: Peer, filling: Filling) -> None:
        filling.stream = 9
        for k, place in enumerate(range(6)):
            filling.segment.lend(place, 9)
            assert filling.lent[k][1] == place
        filling.accept(peer, prefetch=6)
        take(filling, 3, stream=9)  # the rest of it, copied over
        filling.lend(6)
        for place in range(5):
            filling.lend(place)
        assert whole(take(filling, 4, stream=9)) == flat_of(MANIFEST, gradients(7))
        peer.sock.recv(1)

    fills.serve(first, second)
    with StepProducer(fills.address, "t", "w", MANIFEST, in_place=True, deadline=PATIENCE) as p:
        p.send(1, gradients(7), deadline=PATIENCE)
        assert (p.lost, p.reconnects, p.stream) == (1, 1, 9)


def test_the_transaction_is_shown(listener: Listener) -> None:
    listener.script(lambda peer: (accept(peer), peer.end())[0])
    with producer(listener) as p:
        tx = p.step(4)
        assert isinstance(tx, StepTx) and "StepTx 4" in repr(tx) and "'w'" in repr(p)
        tx.abort()
        assert "over" in repr(tx)
