"""Sessions, groups and kept segments with the real daemon, which is killed under load."""

from __future__ import annotations

import os
import random
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ingestd import (
    EndOfStream,
    FillProducer,
    Full,
    Lost,
    LostBatches,
    PeerClosed,
    Producer,
    Reader,
    Refused,
    SessionTaken,
    ShuttingDown,
    Timeout,
)

from real import PATIENCE, POINT, Daemon, Serve, point, points, verify

Make = Callable[..., Any]
MAKERS: dict[str, Make] = {
    "tcp": lambda d, **options: Producer(d.tcp, "t", POINT, **options),
    "unix": lambda d, **options: Producer(d.unix, "t", POINT, **options),
    "fill": lambda d, **options: FillProducer(d.unix, "t", POINT, **options),
}


class Trainer:
    """Reads everything, over all lives of the daemon; a batch that comes a second time must be the same one."""

    def __init__(self, d: Daemon, seed: int) -> None:
        self.d, self.dice = d, random.Random(seed)
        self.batches: dict[int, list[tuple[int, int]]] = {}
        self.again = 0
        self.over = False
        self.errors: list[BaseException] = []
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        try:
            while self.read():
                pass
        except BaseException as e:
            self.errors.append(e)

    def read(self) -> bool:
        """One attachment; False at the end of the stream."""
        try:
            with Reader(self.d.unix, "t", prefetch=2) as reader:
                while True:
                    with reader.next(deadline=PATIENCE) as batch:
                        rows = [verify(batch.tree, row) for row in range(batch.count)]
                    if batch.seq in self.batches:
                        self.again += 1
                        assert self.batches[batch.seq] == rows
                    self.batches[batch.seq] = rows
        except EndOfStream:
            return not self.over  # a daemon that stops and keeps the rest says so too
        except (PeerClosed, Refused):  # the daemon is killed, or has not begun yet
            return True

    def finish(self) -> list[tuple[int, int]]:
        self.thread.join(PATIENCE)
        if self.errors:
            raise self.errors[0]
        assert not self.thread.is_alive()
        return [row for seq in sorted(self.batches) for row in self.batches[seq]]


@pytest.mark.parametrize("kind", ["tcp", "unix", "fill"])
@pytest.mark.parametrize("how", ["kill", "stop"])
def test_restarts_of_a_daemon_that_keeps_its_segment_lose_nothing_and_repeat_nothing(
    serve: Serve, tmp_path: Path, kind: str, how: str
) -> None:
    seed = 1
    d = serve(batch_size=16, batches=16, linger="5ms", segment_dir=str(tmp_path))
    trainer = Trainer(d, seed)
    dice = random.Random(seed)
    total, kills = 4000, 4
    p = MAKERS[kind](d, session="worker", reconnect=PATIENCE)
    killer: list[threading.Thread] = []
    done = 0
    while done < total:
        k = min(dice.randrange(1, 40), total - done)
        p.push_batch(points(1, done, k), deadline=PATIENCE)
        done += k
        if len(killer) < kills and done > total * (len(killer) + 1) // (kills + 1):
            if killer:
                killer[-1].join()
            killer.append(threading.Thread(target=d.restart, args=(how == "stop",)))
            killer[-1].start()
    killer[-1].join()
    p.flush(deadline=PATIENCE)
    assert (p.pushed, p.acked, p.lost) == (total, total, 0)
    p.close(deadline=PATIENCE)
    trainer.over = True
    d.stop()
    seen = trainer.finish()
    assert sorted(seen) == [(1, k) for k in range(total)], f"seed {seed}"
    assert p.reconnects >= 1


@pytest.mark.parametrize("kind", ["unix", "fill"])
def test_a_producer_of_another_process_goes_on_after_held(serve: Serve, tmp_path: Path, kind: str) -> None:
    d = serve(linger="1ms", segment_dir=str(tmp_path))
    with MAKERS[kind](d, session="a") as p:
        p.push_batch(points(2, 0, 11), deadline=PATIENCE)
    d.restart()
    with MAKERS[kind](d, session="a") as p, Reader(d.unix, "t") as reader:
        assert (p.held, p.stream) == (11, 1)
        p.push_batch(points(2, p.held, 9), deadline=PATIENCE)
        seen: list[int] = []
        while len(seen) < 20:
            with reader.next(deadline=PATIENCE) as batch:
                assert set(batch.stream.tolist()) == {1}
                assert [verify(batch.tree, row)[1] for row in range(batch.count)] == batch.number.tolist()
                seen += batch.number.tolist()
        assert sorted(seen) == list(range(20))


@pytest.mark.parametrize("kind", ["unix", "fill"])
def test_a_daemon_that_keeps_nothing_loses_what_it_acknowledged_and_says_so(serve: Serve, kind: str) -> None:
    d = serve(linger="1ms")
    make = MAKERS[kind]
    strict, lax = make(d, session="strict"), make(d, session="lax", continue_after_loss=True)
    for p in (strict, lax):
        p.push_batch(points(3, 0, 5), deadline=PATIENCE)
        p.flush(deadline=PATIENCE)
    d.restart()
    with pytest.raises(Lost, match="samples 0 to 4 of session 'strict'"):
        while True:
            strict.push(point(3, 5), deadline=PATIENCE)
            strict.flush(deadline=PATIENCE)
    strict.abort()
    while lax.reconnects == 0:
        lax.push(point(3, 5), deadline=PATIENCE)
        lax.flush(deadline=PATIENCE)
    assert lax.lost == 5
    lax.close(deadline=PATIENCE)


@pytest.mark.parametrize("kind", ["unix", "fill"])
def test_the_last_that_asks_has_the_session(serve: Serve, kind: str) -> None:
    d = serve(linger="1ms")
    first = MAKERS[kind](d, session="s")
    first.push_batch(points(4, 0, 3), deadline=PATIENCE)
    first.flush(deadline=PATIENCE)
    with MAKERS[kind](d, session="s") as second:
        assert (second.held, second.stream) == (3, first.stream)
        with pytest.raises(SessionTaken):
            while True:
                first.push(point(4, 9), deadline=PATIENCE)
                first.flush(deadline=PATIENCE)
        first.abort()
        second.push(point(4, 3), deadline=PATIENCE)


@pytest.mark.parametrize("kind", ["tcp", "unix", "fill"])
def test_a_full_ring_names_the_trainer_that_holds_it(serve: Serve, kind: str) -> None:
    d = serve(batch_size=4, batches=4)
    with Reader(d.unix, "t", prefetch=1, client="slow one") as reader:
        p = MAKERS[kind](d, **({"prefetch": 1} if kind == "fill" else {"window_samples": 4}))
        p.push_batch(points(5, 0, 4), deadline=PATIENCE)
        with reader.next(deadline=PATIENCE) as batch, pytest.raises(Full) as full:
            while True:
                try:
                    p.push(point(5, 4), deadline=0.2)
                except Full:
                    raise
                except Timeout:
                    pass
        e = full.value
        assert (e.group, e.client, e.pid, e.batch) == ("default", "slow one", os.getpid(), batch.seq)
        assert e.trainer == reader.trainer and e.since > 0 and e.code == "ring_full"
    p.abort()


def test_groups_see_every_batch_and_share_their_own(serve: Serve) -> None:
    d = serve(batch_size=4, batches=16, more={"groups": [{"name": "train"}, {"name": "eval"}]})
    with Producer(d.unix, "t", POINT) as p:
        p.push_batch(points(6, 0, 40), deadline=PATIENCE)
    with (
        Reader(d.unix, "t", group="train", prefetch=2) as a,
        Reader(d.unix, "t", group="train", prefetch=2) as b,
        Reader(d.unix, "t", group="eval", prefetch=2) as c,
    ):
        assert (a.group, c.group) == ("train", "eval")
        d.process.terminate()
        seen: dict[str, list[int]] = {"train": [], "eval": []}

        def read(reader: Reader) -> None:
            for batch in reader:
                seen[reader.group] += [verify(batch.tree, row)[1] for row in range(batch.count)]

        threads = [threading.Thread(target=read, args=(r,)) for r in (a, b, c)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(PATIENCE)
    assert sorted(seen["train"]) == list(range(40)) and seen["eval"] == list(range(40))


def test_a_group_that_may_lose_is_told_what_it_lost(serve: Serve) -> None:
    groups = [{"name": "fast"}, {"name": "slow", "on_lag": "lose"}]
    d = serve(batch_size=4, batches=4, more={"groups": groups})
    with (
        Reader(d.unix, "t", group="fast", prefetch=1) as fast,
        Reader(d.unix, "t", group="slow", prefetch=1) as slow,
        Producer(d.unix, "t", POINT) as p,
    ):
        for number in range(20):
            p.push_batch(points(7, 4 * number, 4), deadline=PATIENCE)
            with fast.next(deadline=PATIENCE) as batch:
                assert batch.seq == number
        seen, lost = [], []
        while not seen or seen[-1] != 19:
            try:
                with slow.next(deadline=PATIENCE) as batch:
                    assert verify(batch.tree, 0) == (7, 4 * batch.seq)
                    seen.append(batch.seq)
            except LostBatches as e:
                assert e.group == "slow"
                lost += range(e.first, e.first + e.n)
        assert sorted(seen + lost) == list(range(20)) and lost and slow.lost == len(lost)


@pytest.mark.parametrize("kind", ["tcp", "fill"])
def test_a_stopping_daemon_is_told_from_one_that_died(serve: Serve, kind: str) -> None:
    d = serve()
    p = MAKERS[kind](d)
    p.push(point(8, 0))
    p.flush(deadline=PATIENCE)
    with Reader(d.unix, "t") as reader:
        d.process.terminate()
        with pytest.raises((ShuttingDown, EndOfStream)) as ended:
            while True:
                p.push(point(8, 1), deadline=PATIENCE)
                p.flush(deadline=PATIENCE)
        assert kind == "fill" or isinstance(ended.value, ShuttingDown)
        for batch in reader:
            assert verify(batch.tree, 0)[0] == 8
    p.abort()
    assert d.process.wait(PATIENCE) == 0, d.said()


def test_fill_and_push_share_a_table(serve: Serve) -> None:
    d = serve(batch_size=8, batches=16, linger="2ms")
    each = 400

    def fill(who: int) -> None:
        with FillProducer(d.unix, "t", POINT) as p:
            done = 0
            while done < each:
                with p.reserve(min(5, each - done), deadline=PATIENCE) as slots:
                    for i in range(len(slots)):
                        want = point(who, done + i)
                        slots["obs/image"][i] = want["obs"]["image"]
                        slots["obs/pos/(0)"][i] = want["obs"]["pos"][0]
                        slots["obs/pos/(1)"][i] = want["obs"]["pos"][1]
                        slots["action"][i] = want["action"]
                        slots["done"][i] = want["done"]
                    done += len(slots)

    def push(who: int) -> None:
        with Producer(d.tcp, "t", POINT) as p:
            p.push_batch(points(who, 0, each), deadline=PATIENCE)

    with Reader(d.unix, "t", prefetch=2) as reader:
        threads = [threading.Thread(target=run, args=(who,)) for who, run in ((1, fill), (2, push), (3, fill))]
        for t in threads:
            t.start()
        following = {1: 0, 2: 0, 3: 0}
        while sum(following.values()) < 3 * each:
            with reader.next(deadline=PATIENCE) as batch:
                for row in range(batch.count):
                    who, k = verify(batch.tree, row)
                    assert k == following[who] and batch.number[row] == k
                    following[who] += 1
        for t in threads:
            t.join(PATIENCE)


def test_a_filler_in_place_is_read_where_it_wrote(serve: Serve) -> None:
    d = serve(batch_size=4, batches=8)
    with FillProducer(d.unix, "t", POINT) as p, Reader(d.unix, "t") as reader:
        filler = p._open()
        with p.reserve(4, deadline=PATIENCE) as slots:
            assert len(slots) == 4
            attached = filler._attached
            assert attached is not None
            place = attached.places[0].index
            for name, array in zip(("obs/image", "action", "done"), (3, 1 << 32, True)):
                slots[name][:] = array
        with reader.next(deadline=PATIENCE) as batch:
            assert batch.place == place  # not a byte was copied
            assert np.array_equal(batch["action"], np.full(4, 1 << 32)) and (batch["obs/image"] == 3).all()


def test_settling_publishes_what_waits(serve: Serve) -> None:
    d = serve(batch_size=8, batches=8, local_producers={"settle_after": "1h"})
    with FillProducer(d.unix, "t", POINT) as p, Reader(d.unix, "t") as reader:
        p.push_batch(points(9, 0, 5), deadline=PATIENCE)
        p.settle(deadline=PATIENCE)
        p.flush(deadline=PATIENCE)
        with Producer(d.unix, "t", POINT) as other:  # shares the batch that the rows were copied to
            other.push_batch(points(10, 0, 3), deadline=PATIENCE)
        with reader.next(deadline=PATIENCE) as batch:
            assert [verify(batch.tree, row) for row in range(8)] == [(9, k) for k in range(5)] + [
                (10, k) for k in range(3)
            ]


def test_dataset_workers_share_the_batches(serve: Serve) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch", reason="torch is not installed")
    from ingestd.torch import IngestDataset

    d = serve(batch_size=4, batches=16)
    with Producer(d.unix, "t", POINT) as p:
        p.push_batch(points(11, 0, 48), deadline=PATIENCE)
    dataset = IngestDataset(d.unix, "t", prefetch=2, deadline=PATIENCE)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking with threads
        batches = iter(loader)
        seen = [next(batches)]
        d.process.terminate()
        seen += list(batches)
    found = [verify(batch, row) for batch in seen for row in range(4)]
    assert sorted(found) == [(11, k) for k in range(48)]
