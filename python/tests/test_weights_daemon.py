"""Weights with the real daemon: publishers and readers in place and over TCP, killed, stopped, all places pinned."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ingestd import (
    Manifest,
    NoGeneration,
    NotWritten,
    OldGeneration,
    PeerClosed,
    Pin,
    Pinned,
    Publisher,
    Refused,
    Subscription,
    Timeout,
    subscribe,
    weights_publish,
)

from real import BINARY, PATIENCE, Daemon
from weights_fakes import MANIFEST, check, tensors

Start = Callable[..., Daemon]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts daemons with one table of weights, ``w``."""
    if not os.path.exists(BINARY):
        pytest.fail(f"no daemon at {BINARY}: run `make build`, or name it in INGESTD_BIN")
    daemons: list[Daemon] = []
    with tempfile.TemporaryDirectory(prefix="ingestd-") as folder:

        def run(**table: Any) -> Daemon:
            where = Path(folder) / str(len(daemons))
            where.mkdir()
            daemons.append(Daemon(where, [{"name": "w", "kind": "weights", **table}]))
            return daemons[-1]

        yield run
        for d in daemons:
            d.close()


PUBLISHERS: dict[str, Callable[[Daemon], dict[str, Any]]] = {
    "in place": lambda d: {"address": d.unix, "in_place": True},
    "streamed": lambda d: {"address": d.unix, "in_place": False},
    "tcp": lambda d: {"address": d.tcp},
}
READERS: dict[str, Callable[[Daemon], dict[str, Any]]] = {
    "mapped": lambda d: {"address": d.unix},
    "streamed": lambda d: {"address": d.unix, "stream": True},
    "tcp": lambda d: {"address": d.tcp},
    "tcp, whole": lambda d: {"address": d.tcp, "delta": False},
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("publisher", PUBLISHERS)
def test_publish_and_read(start: Start, publisher: str, reader: str) -> None:
    d = start()
    sub = Subscription(table="w", **READERS[reader](d))
    with pytest.raises(NoGeneration):
        sub.latest()
    with sub, Publisher(table="w", tensors=MANIFEST, **PUBLISHERS[publisher](d)) as pub:
        for k in (1, 2, 3, 4, 5):
            if k % 2:
                done = pub.publish(tensors(k), deadline=PATIENCE)
            else:
                with pub.begin(deadline=PATIENCE) as draft:
                    for name, array in tensors(k).items():
                        draft[name][...] = array
                assert draft.published is not None
                done = draft.published
            with sub.wait(newer_than=k - 1, deadline=PATIENCE) as w:
                check(w, k)
                w.verify()
                assert (w.generation, w.digest) == (k, done.digest)
        same = pub.publish(tensors(5))
        assert same == (6, done.digest)
        sub.wait(newer_than=5, deadline=PATIENCE).release()
        pub.publish({**tensors(5), "step": np.array(99, np.int64)})
        with sub.wait(newer_than=6, deadline=PATIENCE) as w:
            check({**w, "step": tensors(5)["step"]}, 5)
            assert w["step"] == 99
        if sub.stats is not None:
            # Of the last two, nothing and one tensor differ; of the others so much that they are sent whole.
            whole = "whole" in reader
            assert (sub.stats.generations, sub.stats.deltas, sub.stats.bad_sums) == (7, 0 if whole else 2, 0)
            assert sub.stats.bytes == MANIFEST.data_bytes * 7 if whole else MANIFEST.data_bytes * 5 + 8


def test_all_places_are_pinned(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    d = start(generations=2)
    with Publisher(d.unix, "w", MANIFEST) as pub, subscribe(d.unix, "w", client="slow reader") as sub:
        pub.publish(tensors(1))
        one = sub.wait(deadline=PATIENCE)
        pub.publish(tensors(2))
        for deadline in (0, 0.2):
            with pytest.raises(Pinned, match="'slow reader', pid") as caught:
                pub.begin(deadline=deadline)
            (pin,) = caught.value.pins
            assert (pin.client, pin.pid, pin.generation, pin.reader) == ("slow reader", os.getpid(), 1, sub.reader)
            assert abs(pin.since / 1e9 - time.time()) < PATIENCE
        check(one, 1)
        told = weights_publish._pins

        def release(answer: dict[str, Any]) -> list[Pin]:
            """The daemon says that it waits, and for whom."""
            assert answer["op"] == "waiting"
            one.release()
            return told(answer)

        monkeypatch.setattr(weights_publish, "_pins", release)
        pub.publish(tensors(3), deadline=PATIENCE)
        assert one.released
        with sub.latest() as w:
            check(w, 3)


def test_arrays_keep_the_pin(start: Start) -> None:
    d = start(generations=2)
    with Publisher(d.unix, "w", MANIFEST) as pub, subscribe(d.unix, "w") as sub:
        pub.publish(tensors(1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            with sub.latest() as w:
                row, exported = w["layers.0.w"][2], w.dlpack("layers.1.w").array()
        pub.publish(tensors(2))
        with pytest.raises(Pinned):
            pub.publish(tensors(3), deadline=0)
        assert np.array_equal(row, tensors(1)["layers.0.w"][2])
        del row
        with pytest.raises(Pinned):
            pub.publish(tensors(3), deadline=0)
        assert np.array_equal(exported, tensors(1)["layers.1.w"])
        del exported
        gc.collect()
        pub.publish(tensors(3), deadline=PATIENCE)


READER = """
import sys
from ingestd import subscribe
sub = subscribe(sys.argv[1], "w", client="child")
w = sub.wait(deadline=60)
print(w.generation, w["step"], flush=True)
sys.stdin.read()
"""

PUBLISHER = """
import sys, os, signal
sys.path.insert(0, sys.argv[3])
from ingestd import Publisher
from weights_fakes import MANIFEST, tensors
pub = Publisher(sys.argv[1], "w", MANIFEST)
stage = sys.argv[2]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
if stage == "connected": die()
draft = pub.begin(deadline=60)
if stage == "begun": die()
for i, (name, array) in enumerate(tensors(2).items()):
    if stage == "half" and i == 3: die()
    draft.put(name, array)
if stage == "written": die()
if stage == "sums":
    if pub.in_place:
        pub._write_sums(draft)
    else:
        pub._stream(pub._line, draft, None, __import__("ingestd")._io.Deadline(60))
    die()
draft.commit()
print("committed", flush=True)
die()
"""


def child(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_a_reader_that_is_killed_while_it_pins(start: Start) -> None:
    d = start(generations=2)
    with Publisher(d.unix, "w", MANIFEST) as pub:
        pub.publish(tensors(1))
        reader = child(READER, d.unix)
        assert reader.stdout is not None and reader.stdout.readline() == "1 1\n"
        pub.publish(tensors(2))
        with pytest.raises(Pinned) as caught:
            pub.begin(deadline=0)
        assert [(p.client, p.pid) for p in caught.value.pins] == [("child", reader.pid)]
        reader.kill()
        assert pub.publish(tensors(3), deadline=PATIENCE).generation == 3
        reader.wait(PATIENCE)
        reader.stdout.close()
        if reader.stdin is not None:
            reader.stdin.close()


@pytest.mark.parametrize("stage", ["connected", "begun", "half", "written", "sums", "committed"])
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_publisher_that_is_killed(start: Start, kind: str, stage: str) -> None:
    """What it had not committed is nowhere; the next one goes on."""
    d = start()
    address = d.unix if kind == "unix" else d.tcp
    with subscribe(d.unix, "w") as sub:
        with Publisher(address, "w", MANIFEST) as pub:
            pub.publish(tensors(1))
        killed = child(PUBLISHER, address, stage, str(Path(__file__).parent))
        said = killed.communicate(timeout=PATIENCE)[0]
        assert said == ("committed\n" if stage == "committed" else "")
        with Publisher(address, "w", MANIFEST, deadline=PATIENCE) as pub:
            newest = 2 if stage == "committed" else 1
            with sub.latest() as w:
                check(w, newest)
                w.verify()
            after = pub.publish(tensors(9), deadline=PATIENCE).generation
            assert after > newest
            with sub.wait(newer_than=newest, deadline=PATIENCE) as w:
                check(w, 9)


def test_one_publisher_at_a_time(start: Start) -> None:
    d = start()
    with Publisher(d.unix, "w", MANIFEST) as pub:
        for address in (d.unix, d.tcp):
            with pytest.raises(Refused) as caught:
                Publisher(address, "w", MANIFEST, deadline=0.2)
            assert caught.value.code == "publisher_active"

        class Next(Publisher):
            def _connect(self, until: Any) -> None:
                try:
                    super()._connect(until)
                except Refused:
                    pub.close()  # it is tried again
                    raise

        with Next(d.tcp, "w", MANIFEST, deadline=PATIENCE) as other:
            assert pub.closed
            other.publish(tensors(1))


def test_numbers(start: Start) -> None:
    d = start()
    with Publisher(d.unix, "w", MANIFEST) as pub:
        assert pub.publish(tensors(1), generation=40).generation == 40
        for number in (40, 39):
            with pytest.raises(OldGeneration):
                pub.publish(tensors(1), generation=number)
        assert pub.publish(tensors(1)).generation == 41
        with pytest.raises(NotWritten), pub.begin():
            pass
        assert pub.publish(tensors(1)).generation >= 42


@pytest.mark.parametrize("reader", READERS)
def test_another_manifest(start: Start, reader: str) -> None:
    d = start()
    other = {"only": np.arange(1000, dtype=np.float64)}
    with Subscription(table="w", **READERS[reader](d)) as sub:
        with Publisher(d.unix, "w", MANIFEST) as pub:
            pub.publish(tensors(1))
        old = sub.wait(deadline=PATIENCE)
        with Publisher(d.tcp, "w", other) as pub:
            pub.publish(other)
        with sub.wait(newer_than=old, deadline=PATIENCE) as w:
            assert np.array_equal(w["only"], other["only"]) and len(w) == 1
        check(old, 1)
        old.release()


def test_ten_thousand_tiny_tensors(start: Start) -> None:
    d = start()
    arrays = {f"t{i}": np.full(i % 3, i, np.int32) for i in range(10_000)}
    for publisher, reader in (("in place", "tcp"), ("streamed", "mapped"), ("tcp", "streamed")):
        with Publisher(table="w", tensors=arrays, **PUBLISHERS[publisher](d)) as pub:
            pub.publish(arrays, deadline=PATIENCE)
        with Subscription(table="w", **READERS[reader](d)) as sub, sub.wait(deadline=PATIENCE) as w:
            assert all(np.array_equal(w[name], a) for name, a in arrays.items())


@pytest.mark.parametrize("reader", READERS)
def test_the_daemon_stops_and_starts(start: Start, reader: str) -> None:
    """What is held stays; the subscription finds the next life of the daemon."""
    d = start()
    with Subscription(table="w", **READERS[reader](d)) as sub:
        with Publisher(d.unix, "w", MANIFEST) as pub:
            for k in (1, 2, 3):
                pub.publish(tensors(k))
        old = sub.wait(newer_than=2, deadline=PATIENCE)
        d.restart(in_order=True)
        if reader == "mapped":
            with pytest.raises(PeerClosed):
                sub.wait(old, deadline=PATIENCE)
        with Publisher(d.unix, "w", MANIFEST) as pub:
            pub.publish(tensors(1))
            with sub.wait(old, deadline=PATIENCE) as w:
                check(w, 1)
        check(old, 3)
        old.release()


def test_a_publisher_and_its_daemon(start: Start) -> None:
    d = start()
    with Publisher(d.unix, "w", MANIFEST) as pub:
        pub.publish(tensors(1))
        d.restart()
        with pytest.raises(PeerClosed):
            pub.publish(tensors(2), deadline=PATIENCE)
        assert pub.publish(tensors(2), deadline=PATIENCE).generation >= 1


@pytest.mark.parametrize("reader", READERS)
def test_a_publisher_that_is_faster(start: Start, reader: str) -> None:
    """Readers see whole generations only, some of them, in order."""
    d = start()
    seen: list[int] = []
    with Subscription(table="w", **READERS[reader](d)) as sub, Publisher(d.unix, "w", MANIFEST) as pub:

        def read() -> None:
            while not seen or seen[-1] < 200:
                with sub.wait(newer_than=seen[-1] if seen else 0, deadline=PATIENCE) as w:
                    seen.append(w.generation)
                    check(w, w.generation)

        thread = threading.Thread(target=read)
        thread.start()
        for k in range(1, 201):
            pub.publish(tensors(k), deadline=PATIENCE)
        thread.join(PATIENCE)
    assert seen == sorted(set(seen)) and seen[-1] == 200


@pytest.mark.parametrize("publisher", PUBLISHERS)
def test_encoded_tensors(start: Start, publisher: str) -> None:
    d = start()
    values = {name: np.linspace(-2, 2, 999, dtype=np.float32) for name in ("bf16", "f16", "f8_e4m3", "f8_e5m2", "none")}
    manifest = Manifest.from_arrays(values, {name: name for name in values if name != "none"})
    with Publisher(table="w", tensors=manifest, **PUBLISHERS[publisher](d)) as pub:
        pub.publish(values)
        with subscribe(d.unix, "w") as sub, sub.latest() as w:
            w.verify()
            for name, near in (("bf16", 2**-8), ("f16", 2**-11), ("f8_e4m3", 0.07), ("f8_e5m2", 0.13), ("none", 0)):
                assert np.allclose(w.decoded(name), values[name], rtol=near, atol=1e-2 if near else 0)
            with pub.begin() as draft:  # as they are stored
                for name in w:
                    draft.put(name, w[name])
        with subscribe(d.tcp, "w") as sub, sub.wait(newer_than=1, deadline=PATIENCE) as w:
            assert w["none"].tolist() == values["none"].tolist() and w["f8_e4m3"].shape == (256 + 999,)


def test_waiting(start: Start) -> None:
    d = start()
    for reader in READERS.values():
        with Subscription(table="w", **reader(d)) as sub, pytest.raises(Timeout):
            sub.wait(deadline=0.05)
    for address in (d.unix, d.tcp):
        with pytest.raises(Refused) as caught:
            subscribe(address, "none")
        assert caught.value.code == "unknown_table"


class Proxy:
    """Connections to the daemon that are cut after so many bytes, up or down; the next budget for each connection."""

    def __init__(self, address: str, up: list[int], down: list[int]) -> None:
        self.host, _, port = address.removeprefix("tcp://").rpartition(":")
        self.port, self.budgets = int(port), (up, down)
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self.sock.getsockname()[1]}"
        self.threads = [threading.Thread(target=self.run, daemon=True)]
        self.threads[0].start()

    def run(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, daemon = self.sock.accept()[0], socket.create_connection((self.host, self.port))
                for n, (a, b) in enumerate([(client, daemon), (daemon, client)]):
                    budget = self.budgets[n].pop(0) if self.budgets[n] else 1 << 60
                    self.threads.append(threading.Thread(target=self.relay, args=(a, b, budget), daemon=True))
                    self.threads[-1].start()

    def relay(self, a: socket.socket, b: socket.socket, budget: int) -> None:
        with contextlib.suppress(OSError):  # the other direction was cut
            while budget and (data := a.recv(min(budget, 1 << 16))):
                b.sendall(data)
                budget -= len(data)
        for sock in (a, b):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(PATIENCE)
        self.sock.close()


BIG = {"a": np.arange(1 << 20, dtype=np.uint32), "b": np.arange(999, dtype=np.uint8), "c": np.ones(1 << 18)}


def test_transfers_that_break_go_on(start: Start) -> None:
    d = start()
    with Publisher(d.unix, "w", BIG) as pub:
        done = pub.publish(BIG)
        proxy = Proxy(d.tcp, [], [700_000, 100, 1_900_000, 0, 2_000_000, 1_234_567])
        with subscribe(proxy.address, "w", reconnect=PATIENCE) as sub, sub.wait(deadline=PATIENCE) as w:
            assert w.digest == done.digest and all(np.array_equal(w[name], array) for name, array in BIG.items())
            assert sub.stats is not None and sub.stats.resumed >= 3
            assert sub.stats.bytes == pub.manifest.data_bytes, "no byte came twice"
            pub.publish({**BIG, "b": BIG["b"] + np.uint8(1)})
            with sub.wait(w, deadline=PATIENCE) as newer:
                assert newer["b"][0] == 1 and np.array_equal(newer["a"], BIG["a"])
            assert sub.stats.bytes == pub.manifest.data_bytes + 999
        proxy.close()


@pytest.mark.parametrize("cut", [0, 3, 400, 600, 700, 70_000, 3_000_000, 6_000_000, 6_294_600])
def test_a_publisher_whose_connection_breaks(start: Start, cut: int) -> None:
    """Readers see the old generation or, where only the end was lost, the new one; never a part."""
    d = start()
    with Publisher(d.unix, "w", BIG) as pub:
        old = pub.publish(BIG)
    changed = {**BIG, "c": BIG["c"] * 2}
    proxy = Proxy(d.tcp, [cut], [])
    try:
        with Publisher(proxy.address, "w", BIG, deadline=PATIENCE) as pub:
            pub.publish(changed, deadline=PATIENCE)
    except PeerClosed:
        pass
    with subscribe(d.unix, "w") as sub, sub.latest() as w:
        w.verify()
        assert w.digest == old.digest if w.generation == old.generation else w["c"][0] == 2
        assert np.array_equal(w["c"], BIG["c"]) or np.array_equal(w["c"], changed["c"])
    with Publisher(proxy.address, "w", BIG, deadline=PATIENCE) as pub:
        again = pub.publish(changed, deadline=PATIENCE)
    with subscribe(d.unix, "w") as sub, sub.latest() as w:
        assert (w.generation, w.digest) == again
    proxy.close()
