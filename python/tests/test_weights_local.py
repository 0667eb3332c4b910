"""A subscription that maps the memory, against a fake daemon: views, pins, news, ends, attaching again."""

from __future__ import annotations

import gc
import os
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from ingestd import (
    BadSum,
    Closed,
    Ended,
    FormatError,
    Manifest,
    NoGeneration,
    PeerClosed,
    Refused,
    Released,
    ShuttingDown,
    SpecError,
    Subscription,
    Tensor,
    Timeout,
    subscribe,
)
from ingestd.dtypes import RAW

from fakes import PATIENCE
from weights_fakes import MANIFEST, Attached, Readers, WeightsMaker, check, digest_of, sums_of, tensors


@pytest.fixture
def readers(socket_path: str) -> Iterator[Readers]:
    made = Readers(socket_path)
    yield made
    made.close()


@pytest.fixture
def attached(readers: Readers) -> Attached:
    """A table with generation 4, and one reader that may attach."""
    maker = WeightsMaker()
    maker.publish(4)
    return readers.serve(maker)


def load(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed")


@pytest.fixture
def torch() -> Any:
    return load("torch")


@pytest.fixture
def jax() -> Any:
    return load("jax")


def test_the_newest_generation(readers: Readers, attached: Attached) -> None:
    with subscribe(readers.address, "w", client="me") as sub:
        assert attached.hello == {"role": "subscribe", "table": "w", "byte_order": "little", "client": "me"}
        assert sub.reader == 4 and sub.stats is None
        with sub.latest() as w:
            assert attached.pages.pinned() == {1: 4}
            check(w, 4)
            assert (w.generation, w.published) == (4, 1_700_000_000_000_000_004)
            assert w.digest == digest_of(sums_of(tensors(4))).hex() and w.sums.tolist() == sums_of(tensors(4))
            assert w.manifest == MANIFEST and w.names == list(tensors(4)) and len(w) == 6
            assert "step" in w and "none" not in w and dict(w.items()).keys() == tensors(4).keys()
            assert all(not a.flags.writeable and a.ctypes.data % 64 == 0 for a in w.values() if a.size)
            with pytest.raises(KeyError, match="no tensor 'none'"):
                w["none"]
            with pytest.raises(ValueError, match="read-only"):
                w["layers.0.w"][0] = 1
            w.verify()
            assert w.intact and not w.released
            assert "Weights 4: 6 tensors" in repr(w)
        assert w.released and not w.intact and attached.pages.pinned() == {}
    assert attached.detached.wait(PATIENCE)


def test_after_the_release(readers: Readers, attached: Attached) -> None:
    with subscribe(readers.address, "w") as sub:
        w = sub.latest()
        w.release()
        w.release()
        calls = [
            lambda: w["step"], lambda: w.sums, lambda: w.verify(), lambda: w.copy(), lambda: w.select("*"),
            lambda: w.into({}), lambda: w.rows("step", ()), lambda: w.dlpack("step"), lambda: w.__enter__(),
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(Released, match="generation 4 was released"):
                call()
        assert "released" in repr(w)


def test_arrays_keep_the_pin(readers: Readers, attached: Attached) -> None:
    with subscribe(readers.address, "w") as sub:
        w = sub.latest()
        part = w["layers.0.w"][1:, 0]
        with pytest.warns(ResourceWarning, match=r"4 was released and stays pinned: arrays of 'layers.0.w' "):
            w.release()
        assert attached.pages.pinned() == {1: 4} and w.intact
        assert np.array_equal(part, tensors(4)["layers.0.w"][1:, 0])
        del part
        assert attached.pages.pinned() == {}


def test_a_generation_that_is_dropped_lets_go_with_its_arrays(readers: Readers, attached: Attached) -> None:
    with subscribe(readers.address, "w") as sub:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step = sub.latest()["step"]
        assert attached.pages.pinned() == {1: 4}
        assert step == 4
        del step
        assert attached.pages.pinned() == {}
        sub.latest()
        assert attached.pages.pinned() == {}


def test_one_generation_is_pinned_once_however_often_it_is_taken(readers: Readers, attached: Attached) -> None:
    with subscribe(readers.address, "w") as sub:
        a, b = sub.latest(), sub.latest()
        attached.maker.publish(5)
        c = sub.latest()
        assert attached.pages.pinned() == {1: 4, 2: 5}
        a.release()
        assert attached.pages.pinned() == {1: 4, 2: 5}
        b.release()
        assert attached.pages.pinned() == {2: 5}
        check(c, 5)
        c.release()


def test_close_leaves_what_is_held(readers: Readers, attached: Attached) -> None:
    sub = subscribe(readers.address, "w")
    w = sub.latest()
    sub.close()
    sub.close()
    assert sub.closed
    for call in (sub.latest, sub.wait):
        with pytest.raises(Closed, match="subscription is closed"):
            call()
    assert attached.pages.pinned() == {1: 4} and not attached.detached.is_set()
    check(w, 4)
    w.release()
    assert attached.detached.wait(PATIENCE) and attached.pages.pinned() == {}


def test_select_rows_copy(readers: Readers, attached: Attached) -> None:
    with subscribe(readers.address, "w") as sub:
        with sub.latest() as w:
            assert list(w.select("layers.0.*")) == ["layers.0.w", "layers.0.b"]
            assert list(w.select("*.w")) == ["layers.0.w", "layers.1.w"] and w.select("none") == {}
            rows = w.rows("layers.1.w", [3, 1, 3])
            assert np.array_equal(w["layers.1.w"][2:4], tensors(4)["layers.1.w"][2:4])
            first = w.rows("layers.0.w", slice(0, 2))
            some = w.copy(["step"])
            copies = w.copy()
        assert attached.pages.pinned() == {}
        check(copies, 4)
        assert all(a.flags.writeable and a.flags.owndata for a in [*copies.values(), first, *some.values()])
        assert np.array_equal(rows, tensors(4)["layers.1.w"][[3, 1, 3]])
        assert np.array_equal(first, tensors(4)["layers.0.w"][:2])


def test_into_a_state(readers: Readers, attached: Attached) -> None:
    with subscribe(readers.address, "w") as sub, sub.latest() as w:
        state = {name: np.full_like(a, 1) for name, a in tensors(0).items()}
        wide = np.zeros((5, 6), np.float32)
        state["layers.0.w"] = wide[:, ::2]  # not contiguous
        w.into(state)
        check(state, 4)
        assert not wide[:, 1::2].any()
        part = {"layers.0.b": np.zeros(3, np.int16)}
        with pytest.raises(KeyError, match=r"layers\.0\.w"):
            w.into(part)
        assert not part["layers.0.b"].any()
        w.into(part, strict=False)
        assert part["layers.0.b"].tolist() == [4, 4, 4]


def test_into_what_does_not_fit(readers: Readers, attached: Attached) -> None:
    with subscribe(readers.address, "w") as sub, sub.latest() as w:
        step, fixed = np.array(1, np.int64), np.zeros(3, np.int16)
        fixed.flags.writeable = False
        wrong: list[tuple[Any, type[Exception], str]] = [
            (np.zeros(3, np.int32), SpecError, "dtype int32, want int16"),
            (np.zeros(4, np.int16), SpecError, r"shape is \[4\], want \[3\]"),
            (fixed, SpecError, "read-only"),
            ([1, 2, 3], TypeError, "cannot copy into list"),
        ]
        for target, error, says in wrong:
            with pytest.raises(error, match=says):
                w.into({"step": step, "layers.0.b": target}, strict=False)
        with pytest.raises(KeyError, match="no tensor 'more'"):
            w.into({"step": step, "more": step}, strict=False)
        assert step == 1, "nothing was written"


def test_damage_is_found_before_anything_is_copied(readers: Readers, attached: Attached) -> None:
    with subscribe(readers.address, "w") as sub, sub.latest() as w:
        maker = attached.maker
        at = maker.place(1) + maker.data_offset + MANIFEST.offsets[MANIFEST.index("layers.1.w")] + 12_345
        maker.memory[at] ^= 1
        with pytest.raises(BadSum, match=r"'layers.1.w' of generation 4 is damaged"):
            w.verify()
        w.verify(["step", "layers.0.w"])
        state = {name: np.zeros_like(a) for name, a in tensors(0).items()}
        with pytest.raises(BadSum):
            w.into(state)
        assert not state["layers.0.w"].any()
        maker.memory[at] ^= 1
        w.verify()
        maker.memory[maker.place(1) + 64] ^= 1
        with pytest.raises(BadSum, match="digest"):
            w.verify()


def test_news(readers: Readers, attached: Attached) -> None:
    with subscribe(readers.address, "w") as sub:
        with sub.wait() as w:
            assert w.generation == 4
        with pytest.raises(Timeout, match="above 4; the newest is 4"):
            sub.wait(w, deadline=0)
        with pytest.raises(Timeout):
            sub.wait(newer_than=4, deadline=0.01)
        attached.news(3)  # merged, and about a generation that is known
        with pytest.raises(Timeout):
            sub.wait(newer_than=4, deadline=0.01)
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(sub.wait, g, PATIENCE) for g in (4, 5, 4)]
            attached.maker.publish(5)
            attached.news()
            for one in (waiting[0], waiting[2]):
                assert one.result(PATIENCE).generation == 5
            assert sub.latest().generation == 5, "it does not wait behind a call that waits"
            attached.maker.publish(6)
            attached.news()
            assert waiting[1].result(PATIENCE).generation == 6
        with pytest.raises(ValueError, match="deadline"):
            sub.wait(deadline=-1)


def test_close_ends_a_call_that_waits(readers: Readers, attached: Attached) -> None:
    with subscribe(readers.address, "w") as sub, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(sub.wait, 4) for _ in range(2)]
        sub.close()
        for one in waiting:
            with pytest.raises(Closed):
                one.result(PATIENCE)


def test_nothing_was_published(readers: Readers) -> None:
    maker = WeightsMaker()
    readers.refuse("no_generation", wait=False)
    with subscribe(readers.address, "w") as sub:
        readers.refuse("no_generation", wait=False)
        with pytest.raises(NoGeneration, match="table 'w' yet"):
            sub.latest()
        assert sub.reader == 0
        attached = readers.serve(maker)
        maker.publish(1)
        with sub.wait(deadline=PATIENCE) as w:
            assert attached.hello["wait"] is True
            check(w, 1)


def test_a_first_generation_that_does_not_come(readers: Readers) -> None:
    gone = threading.Event()
    readers.refuse("no_generation")
    with subscribe(readers.address, "w") as sub:

        def silent(peer: Any) -> None:
            peer.hello()
            assert peer.sock.recv(1) == b""
            gone.set()

        readers.listener.script(silent)
        with pytest.raises(Timeout, match="waiting for its first generation"):
            sub.wait(deadline=0.05)
        assert gone.wait(PATIENCE)


def test_refusals(readers: Readers) -> None:
    for code in ("unknown_table", "wrong_kind"):
        readers.refuse(code)
        with pytest.raises(Refused, match=f"this is {code}") as caught:
            subscribe(readers.address, "w")
        assert caught.value.code == code
    readers.refuse("shutting_down")
    with pytest.raises(ShuttingDown):
        subscribe(readers.address, "w")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"segment_bytes": 1 << 40}, "the daemon said"),
        ({"segment_bytes": 0}, "segment_bytes"),
        ({"reader": "x"}, "reader"),
        ({"fds": 1}, "passed 1 descriptors"),
        ({"fds": 3}, "passed 3 descriptors"),
        ({"pins": 4095}, "page of pins has 4095"),
        ({"magic": b"INGDSEG1"}, "starts with"),
    ],
)
def test_a_daemon_of_another_kind(readers: Readers, attached: Attached, change: dict[str, Any], says: str) -> None:
    attached.over = {k: v for k, v in change.items() if k in ("segment_bytes", "reader")}
    attached.fds = (attached.fds * 2)[: change.get("fds", 2)]
    os.truncate(attached.pages.fd, change.get("pins", 4096))
    attached.maker.memory[:8] = change.get("magic", b"INGWGTS1")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FormatError, match=says):
        subscribe(readers.address, "w")
    assert attached.detached.wait(PATIENCE)
    attached.end()
    attached.thread.join(PATIENCE)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before, "descriptors were left open"


def test_the_weights_are_replaced(readers: Readers, attached: Attached) -> None:
    other = Manifest([Tensor("other", "U8", (3,))])
    maker = WeightsMaker(other, places=2)
    with subscribe(readers.address, "w") as sub:
        old = sub.latest()
        again = readers.serve(maker)
        maker.publish(5, {"other": np.array([1, 2, 3], np.uint8)})
        attached.peer.notice("replaced", "another manifest")
        attached.end()
        with sub.wait(newer_than=old, deadline=PATIENCE) as w:
            assert again.hello["wait"] is True and w["other"].tolist() == [1, 2, 3]
            assert again.pages.pinned() == {1: 5}
        check(old, 4)  # its memory is nobody else's now
        assert old.intact
        old.release()
        assert attached.detached.wait(PATIENCE)


def test_replaced_and_nothing_published_since(readers: Readers, attached: Attached) -> None:
    with subscribe(readers.address, "w") as sub:
        attached.peer.notice("replaced", "another manifest")
        attached.end()
        readers.refuse("no_generation", wait=False)
        with pytest.raises(NoGeneration):
            sub.latest()


def test_ends(readers: Readers, attached: Attached) -> None:
    """The call that finds the daemon gone says how; the next one attaches again."""
    with subscribe(readers.address, "w") as sub:
        for code, error in (("shutting_down", ShuttingDown), ("bad_peer", Ended), ("", PeerClosed)):
            held = sub.latest()
            if code:
                attached.peer.notice(code, "because")
            attached.hang_up()
            with pytest.raises(error, match="because" if code else "went away") as caught:
                sub.wait(newer_than=4, deadline=PATIENCE)
            assert getattr(caught.value, "code", "") == code
            check(held, 4)
            attached = readers.serve(attached.maker)
        assert sub.latest().generation == 4


def test_a_generation_that_the_daemon_took_back(readers: Readers, attached: Attached) -> None:
    with subscribe(readers.address, "w") as sub:
        w = sub.latest()
        attached.hang_up()
        attached.maker.publish(7)  # its place: the pin was gone with the connection
        assert not w.intact
        state = {"step": np.zeros((), np.int64)}
        for call in (w.copy, w.verify, lambda: w.rows("step", ()), lambda: w.into(state, strict=False)):
            with pytest.raises((PeerClosed, BadSum)):
                call()
        assert state["step"] == 0


@pytest.mark.parametrize("odd", [b"\x02", b"\x01\x01\x07", b"\0\1\0\0\0x", b"\0\xff\xff\xff\xffx", b"\0\2\0\0\0[]"])
def test_bytes_that_break_the_protocol(readers: Readers, attached: Attached, odd: bytes) -> None:
    with subscribe(readers.address, "w") as sub:
        attached.peer.sock.sendall(odd)
        with pytest.raises(FormatError, match=r"daemon|notice"):
            sub.wait(newer_than=4, deadline=PATIENCE)


def test_a_notice_in_parts(readers: Readers, attached: Attached) -> None:
    with subscribe(readers.address, "w") as sub:
        text = b'{"code":"shutting_down","reason":"later"}'
        for byte in b"\x01\0" + len(text).to_bytes(4, "little") + text[:-1]:
            attached.peer.sock.sendall(bytes([byte]))
            with sub.latest() as w:
                assert w.generation == 4
        attached.peer.sock.sendall(text[-1:])
        with pytest.raises(ShuttingDown, match="later"):
            sub.wait(newer_than=4, deadline=PATIENCE)


def test_a_segment_that_lies(readers: Readers, attached: Attached) -> None:
    with subscribe(readers.address, "w") as sub:
        attached.maker.word(128, 5 << 6 | 63)
        with pytest.raises(FormatError, match="place 63"):
            sub.latest()


def test_after_a_fork(readers: Readers, attached: Attached) -> None:
    with subscribe(readers.address, "w") as sub:
        w = sub.latest()
        view = w["step"]
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            said = []
            for call in (lambda: w["step"], sub.latest, sub.wait):
                try:
                    call()
                except Closed as e:
                    said.append(str(e))
            sub.close()
            del w, view
            gc.collect()
            os.write(write, "\n".join(said).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            said = pipe.read().splitlines()
        os.waitpid(pid, 0)
        assert len(said) == 3 and all("fork" in line for line in said)
        assert attached.pages.pinned() == {1: 4} and not attached.detached.is_set()
        assert view == 4
        with pytest.raises(Timeout):
            sub.wait(w, deadline=0.01)


def test_many_tensors_cost_nothing_before_they_are_looked_at(readers: Readers) -> None:
    arrays = {f"t{i}": np.full(i % 3, i, np.int32) for i in range(10_000)}
    maker = WeightsMaker(Manifest.from_arrays(arrays))
    maker.publish(1, arrays)
    readers.serve(maker)
    with subscribe(readers.address, "w") as sub, sub.latest() as w:
        assert w["t9998"].tolist() == [9998, 9998] and w["t9999"].size == 0
        assert len(w._roots) == 2
        w.verify()
        assert all(np.array_equal(w[name], a) for name, a in arrays.items())


@pytest.mark.skipif(not hasattr(np, "from_dlpack"), reason="this numpy has no from_dlpack: it came with 1.23")
def test_numpy_takes_dlpack(readers: Readers, attached: Attached) -> None:
    with subscribe(readers.address, "w") as sub:
        with sub.latest() as w:
            array = np.from_dlpack(w.dlpack("layers.0.w"))
            assert array.ctypes.data == w["layers.0.w"].ctypes.data
        assert attached.pages.pinned() == {1: 4}
        assert np.array_equal(array, tensors(4)["layers.0.w"])
        del array
        gc.collect()
        assert attached.pages.pinned() == {}


LOW = {
    "bf16": Tensor("bf16", "BF16", (2, 2)),
    "e4m3": Tensor("e4m3", "F8_E4M3", (3,)),
    "as bf16": Tensor("as bf16", "F32", (2,), "bf16"),
    "as f16": Tensor("as f16", "F32", (2,), "f16"),
    "as f8": Tensor("as f8", "F32", (2,), "f8_e4m3"),
    "top": Tensor("top", "F32", (9,), "topk:2"),
}


@pytest.fixture
def low(readers: Readers) -> Iterator[Subscription]:
    """Tensors of types that numpy does not know, and encoded ones."""
    manifest = Manifest(LOW.values())
    stored = {name: np.arange(t.encoded_bytes).astype(np.uint8) for name, t in LOW.items()}
    maker = WeightsMaker(manifest)
    maker.publish(1, stored)
    readers.serve(maker)
    with subscribe(readers.address, "w") as sub:
        yield sub


def test_types_that_numpy_does_not_know(low: Subscription) -> None:
    with low.latest() as w:
        raw = {name: w[name].reshape(-1).view(np.uint8).tolist() for name in w}
        assert raw == {name: [i % 256 for i in range(t.encoded_bytes)] for name, t in LOW.items()}
        assert w["bf16"].shape == (2, 2) and w["bf16"].dtype == LOW["bf16"].numpy_dtype
        assert w["as bf16"].dtype == w["bf16"].dtype and w["as bf16"].shape == (2,)
        assert w["as f16"].dtype == np.float16 and w["as f8"].shape == (258,) and w["top"].shape == (16,)
        bits = {"bf16": np.zeros((2, 2), RAW["BF16"]), "e4m3": np.zeros(3, LOW["e4m3"].numpy_dtype)}
        w.into(bits, strict=False)
        assert bits["bf16"].view(np.uint8).reshape(-1).tolist() == list(range(8))


def test_torch(torch: Any, low: Subscription) -> None:
    with low.latest() as w:
        tensor = w.torch("bf16")
        assert tensor.dtype == torch.bfloat16 and tuple(tensor.shape) == (2, 2)
        own = w.torch(copy=True)
        assert set(own) == set(LOW)
        state = {"bf16": torch.nn.Parameter(torch.zeros((2, 2), dtype=torch.bfloat16))}
        w.into(state, strict=False)
        assert torch.equal(state["bf16"].data, tensor)
        with pytest.raises(SpecError, match=r"torch.float32, want torch.bfloat16"):
            w.into({"bf16": torch.zeros((2, 2))}, strict=False)
    assert tensor.view(torch.uint8).reshape(-1).tolist() == list(range(8))


def test_torch_keeps_the_pin(torch: Any, readers: Readers, attached: Attached) -> None:
    with subscribe(readers.address, "w") as sub:
        with sub.latest() as w:
            tensor = w.torch("layers.0.w")[1:]
        assert attached.pages.pinned() == {1: 4}
        del tensor
        gc.collect()
        assert attached.pages.pinned() == {}


def test_jax_keeps_the_pin(jax: Any, readers: Readers, attached: Attached) -> None:
    with subscribe(readers.address, "w") as sub:
        with sub.latest() as w:
            array = w.jax("layers.0.w")
            own = w.jax("layers.0.w", copy=True)
            with pytest.raises(TypeError, match="JAX arrays cannot be written"):
                w.into({"layers.0.w": own}, strict=False)
        assert attached.pages.pinned() == {1: 4}
        assert np.array_equal(array, tensors(4)["layers.0.w"]) and np.array_equal(own, array)
        del array
        gc.collect()
        assert attached.pages.pinned() == {}


def test_an_unclosed_subscription_says_so(readers: Readers, attached: Attached) -> None:
    sub = subscribe(readers.address, "w")
    with pytest.warns(ResourceWarning, match="unclosed <Subscription"):
        del sub
    assert attached.detached.wait(PATIENCE)


def test_addresses() -> None:
    with pytest.raises(ValueError, match="write tcp://"):
        subscribe("nowhere", "w")
    with pytest.raises(ValueError, match="reconnect"):
        subscribe("unix:///x", "w", reconnect=-1)
    with pytest.raises(PeerClosed, match="is ingestd running"):
        subscribe("unix:///nowhere/at/all", "w")


def test_values_of_encoded_tensors(low: Subscription) -> None:
    with low.latest() as w:
        stored = np.arange(4).astype(np.uint8)
        assert w.decoded("as f16").tolist() == stored.view(np.float16).astype(np.float32).tolist()
        assert w.decoded("as bf16").dtype == np.float32 and w.decoded("as f8").shape == (2,)
        assert w.decoded("bf16").ctypes.data == w["bf16"].ctypes.data
