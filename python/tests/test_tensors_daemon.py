"""Gradients through the real daemon: sums bit by bit, deaths of producers and daemons, and odd manifests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ingestd import (
    GradReader,
    Manifest,
    Producer,
    Refused,
    SessionTaken,
    SpecError,
    StepProducer,
    StepRefused,
    StepTimeout,
    Tensor,
)
from ingestd.encodings import Feedback, decode, encode

from real import BINARY, Daemon

PATIENCE = 20
C = 64 << 10
Arrays = dict[str, Any]
Start = Callable[..., Daemon]
At = Callable[[Daemon], str]


@pytest.fixture(params=["mapped", "sent"])
def at(request: pytest.FixtureRequest) -> At:
    """Where a reader attaches: the daemon's memory is mapped, or what is read is sent."""
    return lambda d: d.unix if request.param == "mapped" else d.tcp


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a daemon with the table ``grads``."""
    if not os.path.exists(BINARY):
        pytest.fail(f"no daemon at {BINARY}: run `make build`, or name it in INGESTD_BIN")
    daemons: list[Daemon] = []
    with tempfile.TemporaryDirectory(prefix="ingestd-") as folder:

        def run(kept: bool = False, tables: list[Arrays] | None = None, **table: Any) -> Daemon:
            grads = {"name": "grads", "kind": "tensors", "chunk_bytes": C, "batches": 256, **table}
            settings: Arrays = {"segment_dir": folder} if kept else {}
            daemons.append(Daemon(Path(folder), [grads, *(tables or [])], drain_timeout="2s", **settings))
            return daemons[-1]

        yield run
        for d in daemons:
            d.close()


def gradients(who: int, step: int) -> Arrays:
    rng = np.random.default_rng(who * 1000 + step)
    return {
        "w": (rng.standard_normal((400, 250)) * 10.0 ** rng.integers(-9, 9, (400, 250))).astype(np.float32),
        "e": np.zeros((0, 3), np.float32), "h": rng.standard_normal((3, 77)).astype(np.float16),
        "b": rng.standard_normal(250).astype(np.float32), "n": np.int64(who),
    }  # fmt: skip


def summed(arrays: list[Any]) -> Any:
    total = np.asarray(arrays[0]).astype(np.float32)
    for more in arrays[1:]:
        total = total + np.asarray(more).astype(np.float32)
    return total


def equal(a: Any, b: Any) -> bool:
    return a.shape == b.shape and np.array_equal(a.reshape(-1).view(np.uint32), b.reshape(-1).view(np.uint32))


def addresses(d: Daemon) -> list[str]:
    return [d.tcp, d.unix, d.unix.replace("unix", "shm")]


@contextlib.contextmanager
def producers(d: Daemon, n: int, example: Any, **options: Any) -> Iterator[list[StepProducer]]:
    """Producers p0, p1 and so on, each by another way in turn."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(StepProducer(addresses(d)[k % 3], "grads", f"p{k}", example, **options))
            for k in range(n)
        ]


def send_all(ps: list[StepProducer], step: int, arrays: list[Arrays]) -> None:
    """Each producer sends the step in a thread of its own; in turn some put the tensors in another order."""

    def send(k: int) -> None:
        try:
            with ps[k].step(step, deadline=PATIENCE) as tx:
                names = list(arrays[k])
                for name in names if k % 2 else reversed(names):
                    tx.put(name, arrays[k][name])
        except BaseException as e:
            errors.append(e)

    errors: list[BaseException] = []
    threads = [threading.Thread(target=send, args=(k,)) for k in range(len(ps))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(PATIENCE)
    if errors:
        raise errors[0]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_sums_are_those_of_the_reference(start: Start, at: At, batch_size: int) -> None:
    d = start(batch_size=batch_size, linger="2ms")
    into = {t: np.empty(np.shape(a), np.float32) for t, a in gradients(0, 0).items() if t != "n"}
    with GradReader(at(d), "grads") as r, producers(d, 4, gradients(0, 0)) as ps:
        for step in range(6):
            sent = [gradients(k, step) for k in range(4)]
            send_all(ps, step, sent)
            with r.step(step, quorum=4, deadline=PATIENCE, into=into if step % 2 else None) as got:
                assert got.have == ["p0", "p1", "p2", "p3"] and got.missing == {}
                for name, array in got.sum().items():
                    assert equal(array, summed([a[name] for a in sent])), (step, name)
                for name, array in got.mean().items():
                    assert equal(array, summed([a[name] for a in sent]) / np.float32(4))
                assert got.tensor("p2", "n") == 2
        assert r.held == 0 and r.stats.bad_chunks == r.stats.duplicates == r.stats.late == 0


def test_encodings(start: Start, at: At) -> None:
    d = start()
    rng = np.random.default_rng(3)
    encodings = {"a": "bf16", "b": "f16", "c": "f8_e4m3", "d": "f8_e5m2", "k": "topk:50"}
    tensors = [Tensor(name, "F32", (30_000,), encoding) for name, encoding in encodings.items()]
    manifest = Manifest(tensors)
    feedback = [Feedback() for _ in range(3)]
    with GradReader(at(d), "grads") as r, producers(d, 3, manifest) as ps:
        for step in range(3):
            sent = [{t.name: rng.standard_normal(30_000).astype(np.float32) for t in tensors} for _ in range(3)]
            send_all(ps, step, sent)
            with r.step(step, quorum=3, deadline=PATIENCE) as got:
                total = got.sum()
                for t in tensors:
                    arrays = [s[t.name] for s in sent]
                    raws = [f.encode(t, a) if t.kind == "topk" else encode(t, a) for f, a in zip(feedback, arrays)]
                    decoded = [decode(t, raw) for raw in raws]
                    if t.kind == "topk":
                        decoded.insert(0, np.zeros(30_000, np.float32))
                    assert equal(total[t.name], summed(decoded)), t.name
            for f in feedback:
                f.commit()


def test_values_that_are_not_finite(start: Start, at: At) -> None:
    d = start()
    x = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32)
    x.view(np.uint32)[0] = 0xFFC00123
    with GradReader(at(d), "grads") as r, producers(d, 3, {"x": x}) as ps:
        for step, p in enumerate(ps):
            for q in ps:
                q.send(step, {"x": x if q is p else np.zeros(5, np.float32)}, deadline=PATIENCE)
            with r.step(step, quorum=3, deadline=PATIENCE) as got:
                assert equal(got.tensor(p.name, "x"), x)
                assert np.array_equal(got.sum()["x"], x, equal_nan=True)


def test_ten_thousand_tensors_of_a_few_bytes(start: Start, at: At) -> None:
    d = start()
    rng = np.random.default_rng(1)
    sent = [{f"t{i}": rng.standard_normal(i % 4).astype(np.float32) for i in range(10_000)} for _ in range(2)]
    with GradReader(at(d), "grads") as r, producers(d, 2, sent[0]) as ps:
        for p, arrays in zip(ps, sent):
            p.send(1, arrays, deadline=PATIENCE)
        with r.step(1, quorum=2, deadline=PATIENCE) as got:
            total = got.sum()
            assert all(equal(total[name], summed([a[name] for a in sent])) for name in sent[0])


def test_a_tensor_larger_than_the_ring(start: Start, at: At) -> None:
    d = start(batches=8)
    n = 50 * C // 4 + 3
    sent = [{"x": np.random.default_rng(k).standard_normal(n).astype(np.float32)} for k in range(3)]
    into = {"x": np.empty(n, np.float32)}
    with GradReader(at(d), "grads") as r, producers(d, 3, sent[0]) as ps:
        sender = threading.Thread(target=send_all, args=(ps, 1, sent))
        sender.start()
        with r.step(1, quorum=3, deadline=PATIENCE, into=into) as got:
            assert equal(got.sum()["x"], summed([s["x"] for s in sent]))
        sender.join(PATIENCE)
        assert r.stats.spilled_bytes > 100 * C


def test_groups_each_get_every_step(start: Start, at: At) -> None:
    d = start()
    with (
        GradReader(at(d), "grads") as one,
        GradReader(at(d), "grads", "two") as two,
        producers(d, 2, gradients(0, 0)) as ps,
    ):
        send_all(ps, 1, [gradients(0, 1), gradients(1, 1)])
        for r in (one, two):
            with r.step(1, quorum=2, deadline=PATIENCE) as got:
                assert equal(got.sum()["w"], summed([gradients(0, 1)["w"], gradients(1, 1)["w"]]))


DYING = """
import sys, numpy as np
sys.path[:0] = {path!r}
from ingestd import StepProducer
from test_tensors_daemon import gradients
p = StepProducer({address!r}, "grads", "dying", gradients(9, 0))
p.send(1, gradients(9, 1))
tx = p.step(2)
tx.put("w", gradients(9, 2)["w"])
print("now", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("way", [0, 1, 2], ids=["tcp", "unix", "in place"])
def test_a_producer_killed_in_the_middle_of_a_step(start: Start, at: At, way: int) -> None:
    d = start()
    script = DYING.format(path=sys.path, address=addresses(d)[way])
    with (
        GradReader(at(d), "grads") as r,
        producers(d, 2, gradients(0, 0)) as ps,
        subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, text=True) as dying,
    ):
        assert dying.stdout is not None and dying.stdout.readline() == "now\n"
        send_all(ps, 1, [gradients(k, 1) for k in range(2)])
        with r.step(1, quorum=3, deadline=PATIENCE) as got:
            assert got.have == ["dying", "p0", "p1"]
        send_all(ps, 2, [gradients(k, 2) for k in range(2)])
        with r.step(2, quorum=2, deadline=0.05) as got:  # it lives, so that it is waited for to the deadline
            assert got.have == ["p0", "p1"] and got.missing["dying"].startswith("incomplete: ")
        dying.send_signal(signal.SIGKILL)
        dying.wait(PATIENCE)
        send_all(ps, 3, [gradients(k, 3) for k in range(2)])
        with r.step(3, quorum=2, deadline=PATIENCE) as got:  # as soon as its end is seen
            assert got.have == ["p0", "p1"] and got.missing["dying"].startswith("connection ended")
            assert equal(got.sum()["w"], summed([gradients(k, 3)["w"] for k in range(2)]))
        with StepProducer(d.tcp, "grads", "dying", gradients(9, 0)) as again:
            again.send(4, gradients(9, 4), deadline=PATIENCE)
            send_all(ps, 4, [gradients(k, 4) for k in range(2)])
            with r.step(4, quorum=3, deadline=PATIENCE) as got:
                assert equal(got.sum()["w"], summed([gradients(k, 4)["w"] for k in (9, 0, 1)]))


@pytest.mark.parametrize("in_order", [False, True], ids=["killed", "stopped"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "not kept"])
def test_the_daemon_restarts_in_the_middle_of_a_step(start: Start, at: At, kept: bool, in_order: bool) -> None:
    d = start(kept=kept)
    with GradReader(at(d), "grads") as r, producers(d, 3, gradients(0, 0)) as ps:
        send_all(ps, 1, [gradients(k, 1) for k in range(3)])
        with r.step(1, quorum=3, deadline=PATIENCE) as got:
            assert got.have == ["p0", "p1", "p2"]
        open_steps = [p.step(2, deadline=PATIENCE) for p in ps]
        for k, tx in enumerate(open_steps):
            tx.put("w", gradients(k, 2)["w"])
        with pytest.raises(StepTimeout):
            r.step(2, quorum=3, deadline=0.05)  # some of it is held
        d.restart(in_order)
        for k, tx in enumerate(open_steps):
            for name in ("e", "h", "b", "n"):
                tx.put(name, gradients(k, 2)[name])
        threads = [threading.Thread(target=tx.commit) for tx in open_steps]
        for t in threads:
            t.start()
        with r.step(2, quorum=3, deadline=PATIENCE) as got:
            sent = [gradients(k, 2) for k in range(3)]
            for name, array in got.sum().items():
                assert equal(array, summed([a[name] for a in sent])), name
        for t in threads:
            t.join(PATIENCE)
        assert [p.committed for p in ps] == [2, 2, 2]
        assert all(p.reconnects == 1 for p in ps) and r.stats.reconnects == 1
        send_all(ps, 3, [gradients(k, 3) for k in range(3)])
        with r.step(3, quorum=3, deadline=PATIENCE) as got:
            assert equal(got.sum()["w"], summed([gradients(k, 3)["w"] for k in range(3)]))
        assert r.stats.bad_chunks == 0


def test_the_connection_of_a_reader_breaks_in_the_middle_of_a_step(start: Start) -> None:
    """What it holds stays, and what comes again counts once; who was said to be there before is not asked for again."""
    d = start()
    with GradReader(d.tcp, "grads", prefetch=256) as r, producers(d, 3, gradients(0, 0)) as ps:
        for step in range(1, 4):
            open_step = ps[0].step(step, deadline=PATIENCE)
            open_step.put("w", gradients(0, step)["w"])
            ps[1].send(step, gradients(1, step), deadline=PATIENCE)
            with pytest.raises(StepTimeout) as timeout:
                r.step(step, quorum=3, deadline=0.05)  # some of it is held
            assert timeout.value.have in ([], ["p1"])
            reader: Any = r._reader
            reader._receiver.sock.shutdown(socket.SHUT_RDWR)
            for name in ("e", "h", "b", "n"):
                open_step.put(name, gradients(0, step)[name])
            open_step.commit(deadline=PATIENCE)
            ps[2].send(step, gradients(2, step), deadline=PATIENCE)
            with r.step(step, quorum=3, deadline=PATIENCE) as got:
                assert got.have == ["p0", "p1", "p2"]
                for name, array in got.sum().items():
                    assert equal(array, summed([gradients(k, step)[name] for k in range(3)])), name
            assert r.stats.reconnects == step and r.stats.bad_chunks == 0
        assert r.stats.duplicates > 0 and r.producers == ["p0", "p1", "p2"]


def test_a_reader_that_may_hold_little(start: Start, at: At) -> None:
    """What is not copied waits in the ring, and then producers wait: to the deadline, and no step is torn."""
    d = start(batches=16)
    n = 64 * C // 4
    sent = [{"x": np.random.default_rng(k).standard_normal(n).astype(np.float32)} for k in range(2)]
    with GradReader(at(d), "grads", prefetch=8, spill_bytes=1) as r, producers(d, 2, sent[0]) as ps:
        sender = threading.Thread(target=send_all, args=(ps, 1, sent))
        sender.start()
        while not r.stats.spilled_bytes:
            with pytest.raises(StepTimeout):
                r.step(1, quorum=2, deadline=0.05)
        assert r.stats.spilled_bytes <= C and r.held <= 8
        r._spill_bytes = 1 << 30
        with r.step(1, quorum=2, deadline=PATIENCE) as got:
            assert equal(got.sum()["x"], summed([s["x"] for s in sent]))
        sender.join(PATIENCE)


def test_steps_that_are_too_old(start: Start, at: At) -> None:
    d = start(max_lag=2)
    with GradReader(at(d), "grads") as r, producers(d, 3, gradients(0, 0)) as ps:
        ps[0].send(10, gradients(0, 10), deadline=PATIENCE)
        for p in ps[1:]:
            with pytest.raises(StepRefused, match="step 7 was refused") as caught:
                p.send(7, gradients(1, 7), deadline=PATIENCE)
            assert caught.value.step == 7 and caught.value.reason
            p.send(8, gradients(1, 8), deadline=PATIENCE)
        with pytest.raises(StepTimeout) as timeout:
            r.step(7, deadline=0.05)
        assert timeout.value.missing == {"p0": "went on to step 10", "p1": "too old", "p2": "too old"}
        with r.step(8, deadline=PATIENCE) as got:
            assert got.have == ["p1", "p2"]
        assert r.stats.refused > 0


def test_two_producers_of_one_name(start: Start, at: At) -> None:
    d = start()
    one = StepProducer(d.tcp, "grads", "same", gradients(0, 0))
    tx = one.step(1)
    tx.put("w", gradients(1, 1)["w"], deadline=PATIENCE)
    with GradReader(at(d), "grads") as r, StepProducer(d.unix, "grads", "same", gradients(0, 0)) as two:
        two.send(1, gradients(2, 1), deadline=PATIENCE)
        with pytest.raises(SessionTaken):
            tx.put_all({name: a for name, a in gradients(1, 1).items() if name != "w"}, deadline=PATIENCE)
            tx.commit(deadline=PATIENCE)
        tx.abort()
        one.abort()
        with r.step(1, deadline=PATIENCE) as got:
            assert got.have == ["same"] and equal(got.sum()["w"], gradients(2, 1)["w"])


def test_producers_of_one_table_have_one_manifest(start: Start) -> None:
    d = start()
    other = {**gradients(0, 0), "b": np.zeros(3, np.float32)}
    with StepProducer(d.tcp, "grads", "one", gradients(0, 0)):
        for address in addresses(d):
            with pytest.raises(Refused, match="manifest_mismatch") as caught:
                StepProducer(address, "grads", "two", other)
            assert [(x.leaf, x.got, x.want) for x in caught.value.diff] == [("b", "F32[3]", "F32[250]")]
    with StepProducer(d.tcp, "grads", "two", other, deadline=PATIENCE):
        pass


def test_kinds_of_tables(start: Start, at: At) -> None:
    d = start(tables=[{"name": "samples", "spec": "x:F32[3]", "batch_size": 4, "batches": 4}])
    for address in addresses(d):
        with pytest.raises(Refused, match="wrong_kind"):
            StepProducer(address, "samples", "p", gradients(0, 0))
    with pytest.raises(SpecError, match="not of kind 'tensors'"):
        GradReader(at(d), "samples")
    with pytest.raises(Refused):
        Producer(d.tcp, "grads", "x:F32[3]")
