"""Producer and Reader against the real daemon: ``bin/ingestd``, or the binary that INGESTD_BIN names."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ingestd import (
    AllHeld,
    Ended,
    EndOfStream,
    PeerClosed,
    Producer,
    Reader,
    Refused,
    Spec,
    Timeout,
)

from real import PATIENCE, POINT, Serve, point, points, verify


@pytest.mark.parametrize("ack", ["queued", "committed"])
def test_everything_pushed_is_read_once_and_in_order(serve: Serve, ack: str) -> None:
    d = serve(batch_size=16, batches=4)
    each = 500

    def produce(who: int) -> None:
        with Producer(d.tcp if who % 2 else d.unix, "t", POINT, ack=ack) as p:
            for k in range(0, each, 50):
                for i in range(k, k + 10):
                    p.push(point(who, i), deadline=PATIENCE)
                p.push_batch(points(who, k + 10, 40), deadline=PATIENCE)

    producers = [threading.Thread(target=produce, args=(who,)) for who in range(4)]

    def finish() -> None:
        for t in producers:
            t.join()
        d.process.terminate()

    with Reader(d.unix, "t", POINT) as reader:
        finisher = threading.Thread(target=finish)
        for t in [*producers, finisher]:
            t.start()
        seen: dict[int, list[int]] = {who: [] for who in range(4)}
        streams: dict[int, int] = {}
        for batch in reader:
            assert 1 <= batch.count <= 16
            assert all(a.ctypes.data % 64 == 0 and not a.flags.writeable for a in batch.leaves)
            for row in range(batch.count):
                who, k = verify(batch.tree, row)
                assert batch.number[row] == k == len(seen[who])
                assert streams.setdefault(int(batch.stream[row]), who) == who
                assert batch.arrival[row] > 1_600_000_000_000_000_000
                seen[who].append(k)
        finisher.join()
    assert {who: len(ks) for who, ks in seen.items()} == dict.fromkeys(range(4), each)
    assert d.process.wait(PATIENCE) == 0, d.said()


def test_the_arrays_lie_in_the_daemons_memory(serve: Serve) -> None:
    d = serve()
    with Reader(d.unix, "t") as reader, Producer(d.tcp, "t", POINT) as p:
        assert reader.spec == Spec.parse(POINT)
        p.push_batch(points(1, 0, 8), deadline=PATIENCE)
        with reader.next(deadline=PATIENCE) as batch:
            address = batch["action"].ctypes.data
            for line in Path("/proc/self/maps").read_text().splitlines():
                low, high = (int(x, 16) for x in line.split()[0].split("-"))
                if low <= address < high:
                    assert "memfd" in line or "hugepage" in line, line
                    assert line.split()[1] == "r--s", line
                    break
            else:
                pytest.fail("the array lies nowhere")


@pytest.mark.parametrize(
    ("spec", "leaf", "got", "want"),
    [
        (POINT.replace("action:I64", "action:U64"), "action", "U64", "I64"),
        (POINT.replace("[4,4]", "[16]"), "obs/image", "U8[16]", "U8[4,4]"),
        (POINT.replace("done", "ended"), "done", "", "BOOL"),
    ],
)
def test_a_wrong_spec_is_refused_with_the_difference(serve: Serve, spec: str, leaf: str, got: str, want: str) -> None:
    d = serve()
    makers: list[Callable[[], object]] = [
        lambda: Producer(d.tcp, "t", spec),
        lambda: Producer(d.unix, "t", spec),
        lambda: Reader(d.unix, "t", spec),
    ]
    for make in makers:
        with pytest.raises(Refused) as refused:
            make()
        assert refused.value.code == "spec_mismatch"
        assert (leaf, got, want) in refused.value.diff
        assert refused.value.spec is not None and Spec.parse(refused.value.spec) == Spec.parse(POINT)


def test_a_missing_table_is_refused_with_those_there_are(serve: Serve) -> None:
    d = serve()
    makers: list[Callable[[], object]] = [lambda: Producer(d.tcp, "no", POINT), lambda: Reader(d.unix, "no")]
    for make in makers:
        with pytest.raises(Refused, match="t") as refused:
            make()
        assert refused.value.code == "unknown_table"


def test_a_full_ring_holds_the_producer_back_and_loses_nothing(serve: Serve) -> None:
    d = serve(batch_size=4, batches=2)
    with Producer(d.tcp, "t", POINT, window_samples=8) as p:
        sent = 0
        with pytest.raises(Timeout):
            while True:  # nobody reads: the ring, the queue and the window fill up
                p.push(point(1, sent), deadline=0.2)
                sent += 1
        assert p.pushed == sent
        with Reader(d.unix, "t", prefetch=1) as reader:
            seen = 0
            while seen < sent // 4 * 4:
                with reader.next(deadline=PATIENCE) as batch:
                    for row in range(batch.count):
                        assert verify(batch.tree, row) == (1, seen)
                        seen += 1
            p.flush(deadline=PATIENCE)


def test_linger_publishes_a_partial_batch(serve: Serve) -> None:
    d = serve(linger="1ms")
    with Reader(d.unix, "t") as reader, Producer(d.unix, "t", POINT) as p:
        p.push_batch(points(2, 0, 3), deadline=PATIENCE)
        seen = 0
        while seen < 3:
            with reader.next(deadline=PATIENCE) as batch:
                assert batch.count <= 3
                for row in range(batch.count):
                    assert verify(batch.tree, row) == (2, seen)
                    seen += 1


def test_several_batches_are_held_at_once(serve: Serve) -> None:
    d = serve(batches=8)
    with Reader(d.unix, "t", prefetch=2) as reader, Producer(d.unix, "t", POINT) as p:
        assert reader.prefetch == 2
        p.push_batch(points(3, 0, 24), deadline=PATIENCE)
        a, b = reader.next(deadline=PATIENCE), reader.next(deadline=PATIENCE)
        with pytest.raises(AllHeld):
            reader.next(deadline=0)
        b.release()
        c = reader.next(deadline=PATIENCE)
        assert [int(x["action"][0]) & 0xFFFF for x in (a, c)] == [0, 16]
        a.release()
        c.release()
        with pytest.raises(Timeout):
            reader.next(deadline=0)


TRAINER = """
import os, signal, sys
from ingestd import Reader
reader = Reader(sys.argv[1], "t", prefetch=1)
batch = reader.next(deadline=60)
print(batch.seq, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_trainer_held_goes_to_another(serve: Serve) -> None:
    d = serve()
    with Producer(d.unix, "t", POINT) as p:
        p.push_batch(points(4, 0, 16), deadline=PATIENCE)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(x for x in sys.path if x)}
        done = subprocess.run([sys.executable, "-c", TRAINER, d.unix], stdout=subprocess.PIPE, text=True, env=env)
        assert done.returncode == -signal.SIGKILL and done.stdout.strip() == "0"
        with Reader(d.unix, "t") as reader:
            # Each exactly once; batch 1 first where the daemon learns of the death only then.
            seen = []
            for _ in range(2):
                with reader.next(deadline=PATIENCE) as batch:
                    seen += [verify(batch.tree, row) for row in range(batch.count)]
            assert sorted(seen) == [(4, k) for k in range(16)]
            with pytest.raises(Timeout):
                reader.next(deadline=0)


def test_released_arrays_turn_to_junk_when_checked(serve: Serve) -> None:
    d = serve()
    with Reader(d.unix, "t", check=True) as reader, Producer(d.unix, "t", POINT) as p:
        for k in range(0, 64, 8):
            p.push_batch(points(5, k, 8), deadline=PATIENCE)
            batch = reader.next(deadline=PATIENCE)
            kept = batch["obs/image"]
            assert verify(batch.tree, 7) == (5, k + 7)
            batch.release()
            assert (kept == 0xCC).all()


def test_a_stopping_daemon_says_so(serve: Serve) -> None:
    d = serve()
    p = Producer(d.tcp, "t", POINT)
    with Reader(d.unix, "t") as reader:
        p.push_batch(points(6, 0, 11), deadline=PATIENCE)
        p.flush(deadline=PATIENCE)
        d.process.terminate()
        seen = 0
        for batch in reader:
            for row in range(batch.count):
                assert verify(batch.tree, row) == (6, seen)
                seen += 1
        assert seen == 11  # what was acknowledged was drained, the last batch short
        with pytest.raises(EndOfStream):
            reader.next(deadline=PATIENCE)
    with pytest.raises(Ended) as ended:
        while True:
            p.push(point(6, 0), deadline=PATIENCE)
            p.flush(deadline=PATIENCE)
    assert ended.value.code == "shutting_down"
    p.abort()
    assert d.process.wait(PATIENCE) == 0, d.said()


def test_a_killed_daemon_is_noticed(serve: Serve) -> None:
    d = serve()
    p = Producer(d.tcp, "t", POINT)
    with Reader(d.unix, "t") as reader:
        p.push(point(7, 0))
        p.flush(deadline=PATIENCE)
        d.kill()
        with pytest.raises(PeerClosed):
            reader.next(deadline=PATIENCE)
    with pytest.raises(PeerClosed):
        while True:
            p.push(point(7, 1), deadline=PATIENCE)
            p.flush(deadline=PATIENCE)
    p.abort()


def test_large_leaves_and_low_precision(serve: Serve) -> None:
    spec = Spec.parse("w:BF16[300000],g:F32[300001],m:F8_E4M3[7]")
    d = serve(spec=spec.text(), batch_size=2, batches=3)
    rng = np.random.default_rng(3)
    raw = [[rng.integers(0, 256, leaf.nbytes, np.uint8) for leaf in spec.leaves] for _ in range(6)]

    def produce() -> None:
        with Producer(d.tcp, "t", spec) as p:
            for leaves in raw:
                arrays = [b.view(leaf.numpy_dtype) for b, leaf in zip(leaves, spec.leaves)]
                p.push(spec.unflatten(arrays), deadline=PATIENCE)

    thread = threading.Thread(target=produce)
    with Reader(d.unix, "t") as reader:
        thread.start()
        for number in range(0, 6, 2):
            with reader.next(deadline=PATIENCE) as batch:
                assert batch.count == 2
                for i, leaf in enumerate(spec.leaves):
                    assert batch[leaf.name].dtype == leaf.numpy_dtype
                    for row in range(2):
                        got = batch[leaf.name][row].view(np.uint8)
                        assert np.array_equal(got, raw[number + row][i])
        thread.join()


def test_a_session_is_known_again(serve: Serve) -> None:
    d = serve()
    with Producer(d.tcp, "t", POINT, session="worker") as p:
        assert p.held == 0


def test_refusals_of_options(serve: Serve) -> None:
    d = serve()
    with pytest.raises(Refused) as refused:
        Producer(d.tcp, "t", POINT, ack="later")
    assert refused.value.code in ("bad_option", "bad_handshake")
