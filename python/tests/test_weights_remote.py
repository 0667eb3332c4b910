"""A subscription over a connection, against a fake daemon: cuts at every stage, wrong sums, differences, odd bytes."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from ingestd import (
    Closed,
    Manifest,
    NoGeneration,
    PeerClosed,
    Refused,
    ShuttingDown,
    Tensor,
    Timeout,
)

from fakes import PATIENCE, Listener, Peer, Steps
from weights_fakes import (
    DAMAGED,
    MANIFEST,
    SHOWN,
    accept_reader,
    announce,
    check,
    digest_of,
    end,
    flat,
    give,
    gone,
    subscribe,
    sums_of,
    tensors,
)


def test_generations(listener: Listener) -> None:
    steps = Steps()

    def script(peer: Peer) -> None:
        hello = accept_reader(peer)
        unix = {"stream": True} if listener.address.startswith("unix") else {}
        assert hello == {
            "role": "subscribe",
            "table": "w",
            "byte_order": "little",
            "delta": True,
            **unix,
            "client": "me",
        }
        give(peer, 3)
        steps.wait("first")
        give(peer, 4)
        give(peer, 9)
        peer.nothing()
        gone(peer)

    listener.script(script)
    with subscribe(listener, client="me") as sub:
        with sub.latest() as w:
            check(w, 3)
            assert (w.generation, w.published) == (3, 1_700_000_000_000_000_003)
            assert w.digest == digest_of(sums_of(tensors(3))).hex() and w.sums.tolist() == sums_of(tensors(3))
            assert all(not a.flags.writeable and a.ctypes.data % 64 == 0 for a in w.values() if a.size)
            w.verify()
            assert w.intact and sub.reader == 4
            with pytest.raises(Timeout, match="above 3; the newest is 3"):
                sub.wait(w, deadline=0.01)
        steps.done("first")
        with sub.wait(newer_than=8, deadline=PATIENCE) as w:
            check(w, 9)
        assert sub.stats is not None and sub.stats.generations == 3 and sub.stats.deltas == 0
        assert sub.stats.bytes == 3 * MANIFEST.data_bytes and sub.stats.buffers == 2


def test_what_is_held_is_not_written(tcp: Listener) -> None:
    steps = Steps()

    def script(peer: Peer) -> None:
        accept_reader(peer)
        for generation in range(1, 5):
            steps.wait(f"{generation}")
            give(peer, generation)

    tcp.script(script)
    with subscribe(tcp) as sub:
        kept = []
        for generation in range(1, 5):
            steps.done(f"{generation}")
            with sub.wait(newer_than=generation - 1, deadline=PATIENCE) as w:
                if generation % 2:
                    kept.append((generation, w["layers.0.w"]))
        for generation, view in kept:
            assert np.array_equal(view, tensors(generation)["layers.0.w"])
        assert sub.stats is not None and sub.stats.buffers == 3


def test_what_differs_alone_is_sent(tcp: Listener) -> None:
    first = tensors(1)
    second = {**first, "layers.0.b": np.full(3, 77, np.int16), "step": np.array(77, np.int64)}
    third = {**second}

    def ranges(*names: str) -> list[list[int]]:
        return [[MANIFEST.offsets[MANIFEST.index(n)], MANIFEST[n].encoded_bytes] for n in names]

    def script(peer: Peer) -> None:
        assert accept_reader(peer)["delta"] is True
        peer.sock.sendall(announce(peer, 1, first))
        assert peer.exactly(1) == SHOWN
        for generation, arrays, names in ((2, second, ["layers.0.b", "step"]), (3, third, [])):
            where = ranges(*names)
            n = sum(n for _, n in where)
            announce(peer, generation, arrays, base=generation - 1, ranges=where, bytes=n)
            for name in names:
                peer.sock.sendall(np.asarray(arrays[name]).tobytes())
            assert peer.exactly(1) == SHOWN

    tcp.script(script)
    with subscribe(tcp) as sub, sub.wait(newer_than=2, deadline=PATIENCE) as w:
        assert all(np.array_equal(w[name], array) for name, array in third.items())
        w.verify()
        assert sub.stats is not None and sub.stats.deltas == 2
        assert sub.stats.bytes == MANIFEST.data_bytes + 6 + 8


def test_a_difference_that_does_not_agree_with_its_base(tcp: Listener) -> None:
    """The daemon says that only one tensor differs, and the sums say otherwise."""
    second = {**tensors(1), "step": np.array(77, np.int64)}

    def script(peer: Peer) -> None:
        accept_reader(peer)
        give(peer, 1)
        announce(peer, 2, second, base=1, ranges=[], bytes=0)
        assert peer.exactly(1) == DAMAGED
        peer.sock.sendall(announce(peer, 2, second))
        assert peer.exactly(1) == SHOWN

    tcp.script(script)
    with subscribe(tcp) as sub, sub.wait(newer_than=1, deadline=PATIENCE) as w:
        assert w["step"] == 77
        assert sub.stats is not None and sub.stats.bad_sums == 1


@pytest.mark.parametrize("where", ["first byte", "in the middle", "last byte"])
def test_wrong_sums_are_never_shown(listener: Listener, where: str) -> None:
    steps = Steps()

    def script(peer: Peer) -> None:
        accept_reader(peer)
        data = bytearray(announce(peer, 1, tensors(1)))
        at = {"first byte": 0, "in the middle": MANIFEST.offsets[3] + 99_999, "last byte": MANIFEST.offsets[4] + 7}
        data[at[where]] ^= 0x10
        peer.sock.sendall(data)
        assert peer.exactly(1) == DAMAGED
        steps.wait("looked")
        give(peer, 1)

    listener.script(script)
    with subscribe(listener) as sub:
        with pytest.raises(Timeout):
            sub.wait(deadline=0.05)
        steps.done("looked")
        with sub.wait(deadline=PATIENCE) as w:
            check(w, 1)


def test_a_wrong_sum_of_an_empty_tensor(tcp: Listener) -> None:
    def script(peer: Peer) -> None:
        accept_reader(peer)
        sums = sums_of(tensors(1))
        sums[1] = 7
        peer.sock.sendall(announce(peer, 1, tensors(1), sums=sums))
        assert peer.exactly(1) == DAMAGED
        give(peer, 1)

    tcp.script(script)
    with subscribe(tcp) as sub, sub.wait(deadline=PATIENCE) as w:
        check(w, 1)


def test_each_damage_is_found(tcp: Listener) -> None:
    """One tensor of 24 bytes: each byte in turn."""
    arrays = {"a": np.arange(24, dtype=np.uint8)}
    manifest = Manifest.from_arrays(arrays)

    def script(peer: Peer) -> None:
        accept_reader(peer, manifest)
        for n in range(24):
            data = bytearray(announce(peer, 1, arrays, manifest))
            data[n] ^= 1 << n % 8
            peer.sock.sendall(data)
            assert peer.exactly(1) == DAMAGED
        data = bytearray(announce(peer, 1, arrays, manifest))
        data[24] = 1  # behind the tensor: nobody's
        peer.sock.sendall(data)
        assert peer.exactly(1) == SHOWN

    tcp.script(script)
    with subscribe(tcp) as sub, sub.wait(deadline=PATIENCE) as w:
        assert np.array_equal(w["a"], arrays["a"])
        assert sub.stats is not None and sub.stats.bad_sums == 24


SUMS = 4 * len(MANIFEST)
CUTS = ["hello", "reply", "nothing", "length", "announcement", "sums", 0, 1, 255, 256, 100_000, MANIFEST.data_bytes - 1]


class Cutter:
    """A socket through which only so many bytes go."""

    def __init__(self, sock: socket.socket, left: int) -> None:
        self.sock, self.left = sock, left

    def sendall(self, data: bytes) -> None:
        self.sock.sendall(data[: self.left])
        self.left = max(0, self.left - len(data))


@pytest.mark.parametrize("cut", CUTS)
def test_cut_at_every_stage(listener: Listener, cut: str | int) -> None:
    def first(peer: Peer) -> None:
        if cut == "hello":
            return
        body = peer.hello()
        reply = {"table": "w", "reader": 4, "newest": 1, "manifest": MANIFEST.to_dict()}
        if cut == "reply":
            peer.sock.sendall(b"INGESTD\n\1\0\0\0\xff\0\0\0{")
            return
        peer.reply(reply)
        assert "resume" not in body and "have" not in body
        if cut == "nothing":
            return

        class Counted:
            sock = Cutter(peer.sock, {"length": 3, "announcement": 60}.get(str(cut), 1 << 30))

        data = announce(Counted, 5, tensors(5))  # type: ignore[arg-type]
        if cut == "sums" or isinstance(cut, int):
            peer.sock.sendall(data[: cut if isinstance(cut, int) else 0])

    def second(peer: Peer) -> None:
        hello = accept_reader(peer)
        if isinstance(cut, int) and cut:
            assert hello["resume"] == 5 and hello["resume_digest"] == digest_of(sums_of(tensors(5))).hex()
            assert 0 < hello["resume_offset"] <= cut
        else:
            assert "resume" not in hello
        start = hello.get("resume_offset", 0)
        assert "have" not in hello and hello["wait"] is True
        peer.sock.sendall(announce(peer, 5, tensors(5), **{"from": start})[start:])
        assert peer.exactly(1) == SHOWN

    def serve_first() -> None:
        listener.script(first).join(PATIENCE)
        listener.script(second)

    if cut in ("hello", "reply"):
        listener.script(first)
        with pytest.raises(PeerClosed):
            subscribe(listener)
        return
    threading.Thread(target=serve_first).start()
    with subscribe(listener) as sub, sub.wait(deadline=PATIENCE) as w:
        check(w, 5)
        w.verify()
        assert sub.stats is not None and sub.stats.reconnects == 1
        assert sub.stats.resumed == (1 if isinstance(cut, int) and cut else 0)
        assert sub.stats.bytes == MANIFEST.data_bytes, "no byte came twice"


def test_resumed_many_times(tcp: Listener) -> None:
    """Every connection brings a little more, or something newer."""
    dice = random.Random(4)

    def script(peer: Peer) -> None:
        hello = accept_reader(peer)
        start = hello.get("resume_offset", 0)
        n = dice.choice([0, 1, 300, 65_536, 100_000])
        peer.sock.sendall(announce(peer, 5, tensors(5), **{"from": start})[start : start + n])
        if start + n >= MANIFEST.data_bytes:
            assert peer.exactly(1) == SHOWN
            over.set()

    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            tcp.script(script).join(PATIENCE)

    server = threading.Thread(target=serve)
    server.start()
    with subscribe(tcp) as sub:
        with sub.wait(deadline=PATIENCE) as w:
            check(w, 5)
            assert sub.stats is not None and sub.stats.resumed > 1 and sub.stats.bytes == MANIFEST.data_bytes
        server.join(PATIENCE)


def test_a_newer_one_instead_of_the_rest(tcp: Listener) -> None:
    def first(peer: Peer) -> None:
        accept_reader(peer)
        peer.sock.sendall(announce(peer, 5, tensors(5))[:70_000])

    def second(peer: Peer) -> None:
        assert accept_reader(peer)["resume"] == 5
        give(peer, 6)

    threading.Thread(target=lambda: (tcp.script(first).join(PATIENCE), tcp.script(second))).start()
    with subscribe(tcp) as sub, sub.wait(deadline=PATIENCE) as w:
        check(w, 6)
        assert sub.stats is not None and sub.stats.buffers == 1


def test_a_difference_that_breaks_is_sent_again(tcp: Listener) -> None:
    second = {**tensors(1), "step": np.array(77, np.int64)}
    where = [[MANIFEST.offsets[MANIFEST.index("step")], 8]]

    def first(peer: Peer) -> None:
        accept_reader(peer)
        give(peer, 1)
        announce(peer, 2, second, base=1, ranges=where, bytes=8)
        peer.sock.sendall(b"abc")

    def again(peer: Peer) -> None:
        hello = accept_reader(peer)
        assert (hello["have"], hello["delta"]) == (1, True) and "resume" not in hello
        assert hello["have_digest"] == digest_of(sums_of(tensors(1))).hex()
        announce(peer, 2, second, base=1, ranges=where, bytes=8)
        peer.sock.sendall(struct.pack("<q", 77))
        assert peer.exactly(1) == SHOWN

    threading.Thread(target=lambda: (tcp.script(first).join(PATIENCE), tcp.script(again))).start()
    with subscribe(tcp) as sub, sub.wait(newer_than=1, deadline=PATIENCE) as w:
        assert w["step"] == 77 and np.array_equal(w["layers.1.w"], tensors(1)["layers.1.w"])


def test_without_differences(tcp: Listener) -> None:
    def first(peer: Peer) -> None:
        accept_reader(peer)
        give(peer, 1)

    def again(peer: Peer) -> None:
        hello = accept_reader(peer)
        assert hello["have"] == 1 and "delta" not in hello
        give(peer, 2)

    threading.Thread(target=lambda: (tcp.script(first).join(PATIENCE), tcp.script(again))).start()
    with subscribe(tcp, delta=False) as sub, sub.wait(newer_than=1, deadline=PATIENCE) as w:
        check(w, 2)


def test_callers_hold_all_memory(tcp: Listener) -> None:
    """There is no connection meanwhile: the daemon does not wait for them."""
    ended, steps = threading.Event(), Steps()

    def first(peer: Peer) -> None:
        accept_reader(peer)
        give(peer, 1)
        steps.wait("held 1")
        give(peer, 2)
        steps.wait("held 2")
        announce(peer, 3, tensors(3))
        gone(peer)
        ended.set()

    def again(peer: Peer) -> None:
        assert accept_reader(peer)["have"] == 2
        give(peer, 4)

    tcp.script(first)
    with subscribe(tcp, buffers=2) as sub:
        one = sub.wait(deadline=PATIENCE)
        steps.done("held 1")
        two = sub.wait(one, deadline=PATIENCE)
        steps.done("held 2")
        assert ended.wait(PATIENCE)
        with pytest.raises(Timeout, match="callers hold all 2 generations"):
            sub.wait(two, deadline=0.01)
        check(one, 1)
        check(two, 2)
        tcp.script(again)
        one.release()
        with sub.wait(two, deadline=PATIENCE) as w:
            check(w, 4)
        check(two, 2)
        two.release()
    with pytest.raises(ValueError, match="at least 2"):
        subscribe(tcp, buffers=1)


def test_another_manifest(tcp: Listener) -> None:
    other = Manifest([Tensor("other", "U8", (3,))])
    arrays = {"other": np.array([1, 2, 3], np.uint8)}

    def first(peer: Peer) -> None:
        accept_reader(peer)
        give(peer, 1)
        end(peer, "replaced")

    def again(peer: Peer) -> None:
        assert accept_reader(peer, other)["have"] == 1
        peer.sock.sendall(announce(peer, 2, arrays, other))
        assert peer.exactly(1) == SHOWN
        announce(peer, 3, arrays, other, base=2, ranges=[], bytes=0)
        assert peer.exactly(1) == SHOWN

    threading.Thread(target=lambda: (tcp.script(first).join(PATIENCE), tcp.script(again))).start()
    with subscribe(tcp) as sub:
        with sub.wait(deadline=PATIENCE) as w:
            if w.generation == 1:
                check(w, 1)
        with sub.wait(newer_than=2, deadline=PATIENCE) as w:
            assert w.manifest == other and w["other"].tolist() == [1, 2, 3]


def test_numbers_of_another_life_of_the_daemon(tcp: Listener) -> None:
    def first(peer: Peer) -> None:
        accept_reader(peer)
        give(peer, 50)

    def again(peer: Peer) -> None:
        accept_reader(peer)
        give(peer, 2)

    tcp.script(first)
    with subscribe(tcp) as sub:
        with sub.wait(deadline=PATIENCE) as w:
            assert w.generation == 50
        tcp.script(again)
        with sub.wait(newer_than=50, deadline=PATIENCE) as w:
            check(w, 2)


def refuse(listener: Listener, code: str, wait: bool = False) -> threading.Thread:
    def script(peer: Peer) -> None:
        assert peer.hello().get("wait", False) is wait
        peer.reply({"code": code, "reason": f"this is {code}"}, status=1)

    return listener.script(script)


def test_nothing_was_published(tcp: Listener) -> None:
    steps = Steps()

    def script(peer: Peer) -> None:
        hello = peer.hello()
        assert hello["wait"] is True
        steps.wait("publish")
        peer.reply({"table": "w", "reader": 4, "newest": 1, "manifest": MANIFEST.to_dict()})
        give(peer, 1)

    refuse(tcp, "no_generation")
    with subscribe(tcp) as sub:
        tcp.script(script)
        with pytest.raises(NoGeneration):
            sub.latest()
        steps.done("publish")
        with sub.wait(deadline=PATIENCE) as w:
            check(w, 1)
        sub.latest().release()


def test_refusals(listener: Listener) -> None:
    for code in ("unknown_table", "wrong_kind"):
        refuse(listener, code)
        with pytest.raises(Refused) as caught:
            subscribe(listener)
        assert caught.value.code == code
    refuse(listener, "shutting_down")
    with pytest.raises(ShuttingDown):
        subscribe(listener)


def test_refused_when_it_connects_again(tcp: Listener) -> None:
    def first(peer: Peer) -> None:
        accept_reader(peer)
        give(peer, 1)

    tcp.script(first).join(0)
    with subscribe(tcp) as sub:
        sub.wait(deadline=PATIENCE).release()
        refuse(tcp, "shutting_down", wait=True).join(PATIENCE)
        refuse(tcp, "unknown_table", wait=True).join(PATIENCE)
        for call in (lambda: sub.wait(newer_than=1, deadline=PATIENCE), sub.latest):
            with pytest.raises(Refused, match="unknown_table"):
                call()


def test_close(listener: Listener) -> None:
    """It ends a transfer, calls that wait, and the thread; what is held stays."""

    def script(peer: Peer) -> None:
        accept_reader(peer)
        give(peer, 1)
        with contextlib.suppress(OSError):  # it may be closed already
            peer.sock.sendall(announce(peer, 2, tensors(2))[:1000])
            gone(peer)

    listener.script(script)
    with ThreadPoolExecutor(2) as pool:
        sub = subscribe(listener)
        w = sub.wait(deadline=PATIENCE)
        waiting = [pool.submit(sub.wait, 1) for _ in range(2)]
        sub.close()
        sub.close()
        for one in waiting:
            with pytest.raises(Closed):
                one.result(PATIENCE)
    for call in (sub.latest, sub.wait):
        with pytest.raises(Closed):
            call()
    assert not [t for t in threading.enumerate() if t.name == "ingestd-weights"]
    check(w, 1)
    w.release()


def test_a_subscription_that_is_dropped(tcp: Listener) -> None:
    def script(peer: Peer) -> None:
        accept_reader(peer)
        gone(peer)

    tcp.script(script)
    sub = subscribe(tcp)
    with pytest.warns(ResourceWarning, match="unclosed"):
        del sub
        gc.collect()
    assert not [t for t in threading.enumerate() if t.name == "ingestd-weights"]


def test_after_a_fork(tcp: Listener) -> None:
    steps = Steps()

    def script(peer: Peer) -> None:
        accept_reader(peer)
        give(peer, 1)
        steps.wait("forked")
        give(peer, 2)

    tcp.script(script)
    with subscribe(tcp) as sub:
        w = sub.wait(deadline=PATIENCE)
        pid = os.fork()
        if pid == 0:
            code = 0
            for call in (lambda: w["step"], sub.latest, sub.wait):
                try:
                    call()
                    code += 1
                except Closed:
                    pass
            sub.close()
            os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        check(w, 1)
        steps.done("forked")
        with sub.wait(w, deadline=PATIENCE) as newer:
            check(newer, 2)


def test_no_bytes_at_all(tcp: Listener) -> None:
    arrays = {"a": np.zeros((0, 3), np.float32), "b": np.zeros(0, np.int8)}
    manifest = Manifest.from_arrays(arrays)

    def script(peer: Peer) -> None:
        accept_reader(peer, manifest)
        for generation, ranges in ((1, [[0, 0]]), (2, [])):
            announce(peer, generation, arrays, manifest, ranges=ranges)
            assert peer.exactly(1) == SHOWN

    tcp.script(script)
    with subscribe(tcp) as sub, sub.wait(newer_than=1, deadline=PATIENCE) as w:
        assert w["a"].shape == (0, 3) and w["b"].size == 0


@pytest.mark.parametrize("seed", range(5))
def test_any_tensors_in_any_pieces(tcp: Listener, seed: int) -> None:
    """Random manifests, differences and cuts; what is shown is always one whole generation."""
    dice = random.Random(seed)
    sizes = [dice.choice([0, 1, 255, 256, 257, 5000, 70_000]) for _ in range(dice.randrange(1, 40))]
    manifest = Manifest(Tensor(f"t{i}", "U8", (n,)) for i, n in enumerate(sizes))
    states = [{t.name: np.frombuffer(dice.randbytes(t.nbytes), np.uint8) for t in manifest}]
    for _ in range(12):
        changed = set(dice.sample(manifest.names, dice.randrange(len(manifest) + 1)))
        new = {n: np.frombuffer(dice.randbytes(len(a)), np.uint8) for n, a in states[-1].items() if n in changed}
        states.append({**states[-1], **new})
    over = threading.Event()

    def script(peer: Peer) -> None:
        hello = accept_reader(peer, manifest)
        have, resume = hello.get("have", 0), hello.get("resume", 0)
        budget = dice.randrange(1, 200_000) if dice.random() < 0.8 else 1 << 40
        while have < len(states):
            generation = resume or dice.randrange(have + 1, min(have + 4, len(states) + 1))
            arrays, more = states[generation - 1], {"from": hello["resume_offset"]} if resume else {}
            data = flat(arrays, manifest)[more.get("from", 0) :]
            if have and not resume and dice.random() < 0.7:
                base = states[have - 1]
                spans = [
                    [at, t.nbytes]
                    for t, at in zip(manifest, manifest.offsets)
                    if arrays[t.name].tobytes() != base[t.name].tobytes()
                ]
                data = b"".join(flat(arrays, manifest)[at : at + n] for at, n in spans)
                more = {"base": have, "ranges": spans, "bytes": len(data)}
            announce(peer, generation, arrays, manifest, **more)
            resume = 0
            peer.sock.sendall(data[:budget])
            budget -= len(data)
            if budget < 0:
                return
            assert peer.exactly(1) == SHOWN
            have = generation
        over.set()

    def serve() -> None:
        while not over.is_set():
            tcp.script(script).join(PATIENCE)

    server = threading.Thread(target=serve)
    server.start()
    with subscribe(tcp) as sub:
        seen = 0
        while seen < len(states):
            with sub.wait(newer_than=seen, deadline=PATIENCE) as w:
                seen = w.generation
                want = states[seen - 1]
                assert all(np.array_equal(w[name], array) for name, array in want.items())
                w.verify()
        server.join(PATIENCE)
