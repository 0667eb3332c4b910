"""GradReader against a fake daemon whose chunks are made by hand."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from ingestd import (
    Closed,
    EndOfStream,
    FormatError,
    GradReader,
    Manifest,
    PeerClosed,
    Released,
    SpecError,
    StepOrder,
    StepTimeout,
    Tensor,
    TensorMismatch,
    native,
)
from ingestd.encodings import decode, encode
from tensors import ABORT, BEGIN, CLOSED, END, NO_CRC, REFUSED, C, GradDaemon, flat_of, header

from fakes import PATIENCE, SPEC, FakeDaemon

Arrays = dict[str, Any]
Make = Callable[..., GradDaemon]

N = 5 * C // 8  # elements of w: two and a half chunks


def gradients(who: int, step: int) -> Arrays:
    rng = np.random.default_rng(who * 1000 + step)
    return {
        "w": (rng.standard_normal((5, N // 5)) * 10.0 ** rng.integers(-9, 9, (5, N // 5))).astype(np.float32),
        "e": np.zeros((2, 0), np.float32), "h": rng.standard_normal(77).astype(np.float16), "n": np.int64(who),
        "b": rng.standard_normal(3).astype(np.float32),
    }  # fmt: skip


MANIFEST = Manifest.from_arrays(gradients(0, 0))
SMALL = Manifest.from_arrays({"x": np.zeros(6, np.float32)})


def small(k: float) -> Arrays:
    return {"x": np.arange(6, dtype=np.float32) + np.float32(k)}


def reference(arrays: list[Arrays], name: str) -> Any:
    """The documented sum: in the order given, one rounding per addition."""
    total = arrays[0][name].astype(np.float32)
    for more in arrays[1:]:
        total = total + more[name].astype(np.float32)
    return total


def equal(a: Any, b: Any) -> bool:
    return a.shape == b.shape and np.array_equal(a.reshape(-1).view(np.uint32), b.reshape(-1).view(np.uint32))


@pytest.fixture
def make(socket_path: str) -> Iterator[Make]:
    """Makes the fake daemon of a test, which knows producers a, b, c, d as streams 2, 3, 4, 5."""
    made: list[GradDaemon] = []

    def start(manifest: Manifest = MANIFEST, **options: Any) -> GradDaemon:
        made.append(GradDaemon(socket_path, manifest, **options))
        for k, name in enumerate("abcd"):
            made[0].know(name, 2 + k)
        return made[0]

    yield start
    for one in made:
        one.__exit__()


def attach(d: GradDaemon, **options: Any) -> GradReader:
    reader = GradReader(d.address, "t", deadline=PATIENCE, **options)
    d.serve_manifest()
    return reader


def test_attach(make: Make) -> None:
    d = make()
    with GradReader(d.address, "t", "g", client="me", deadline=PATIENCE) as r:
        want = {"role": "train", "table": "t", "byte_order": "little", "prefetch": 1 << 15, "group": "g"}
        assert d.hello == {**want, "client": "me"}
        assert (r.prefetch, r.chunk_bytes, r.producers, r.held, r.manifest) == (16, C, [], 0, None)
    assert r.closed
    with pytest.raises(Closed):
        r.step(0)


def test_a_table_of_samples(socket_path: str) -> None:
    with (
        FakeDaemon(socket_path, SPEC) as d,
        pytest.raises(SpecError, match="not of kind 'tensors'"),
    ):
        GradReader(d.address, "t", deadline=PATIENCE)


@pytest.mark.parametrize("way", ["C", "numpy"])
@pytest.mark.parametrize("eager", [False, True])
def test_sums_in_the_order_of_names(make: Make, monkeypatch: pytest.MonkeyPatch, way: str, eager: bool) -> None:
    if way == "numpy":
        monkeypatch.setattr(native, "_lib", None)
    d = make()
    with attach(d) as r:
        for name in "cab":
            d.opened(name)
        sent = {name: gradients(ord(name), 5) for name in "abc"}
        for part in range(3):  # interleaved, in another order than that of the names
            for name in "cab":
                d.step(name, 5, sent[name], part, part + 1)
        into = {t.name: np.full(t.shape, np.nan, np.float32) for t in MANIFEST if t.name != "n"} if eager else None
        with r.step(5, quorum=3, deadline=PATIENCE, into=into) as step:
            assert (step.have, step.missing, step.step, step.manifest) == (["a", "b", "c"], {}, 5, MANIFEST)
            total = step.sum()
            assert list(total) == ["w", "e", "h", "b"]
            for name, array in total.items():
                assert into is None or array is into[name]
                assert equal(array, reference([sent[k] for k in "abc"], name)), name
            out = {"h": np.empty(77, np.float32)}
            assert step.mean(out) == out
            assert equal(out["h"], reference([sent[k] for k in "abc"], "h") / np.float32(3))
            mean = step.mean()
            assert equal(mean["w"], reference([sent[k] for k in "abc"], "w") / np.float32(3))
            assert equal(step.sum()["w"], reference([sent[k] for k in "abc"], "w"))  # anew, after the mean
            for name in "abc":
                for tensor in MANIFEST.names:
                    got = step.tensor(name, tensor)
                    assert got.dtype == sent[name][tensor].dtype and np.array_equal(got, sent[name][tensor])
            with pytest.raises(KeyError, match="'d' is not complete"):
                step.tensor("d", "w")
            assert r.held == 9
        assert r.held == 0 and len(d.channel.given()) + len(d.free) > 9
        for use in (step.sum, step.mean, lambda: step.tensor("a", "w"), step.__enter__):
            with pytest.raises(Released, match="step 5 was released"):
                use()
        step.release()
        assert r.stats.completed_steps == 1 and r.stats.spilled_bytes == 0


def test_values_pass_through(make: Make) -> None:
    d = make(SMALL)
    special = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, 3.4e38], np.float32)
    special.view(np.uint32)[0] = 0x7FC12345
    with attach(d) as r:
        d.opened("a")
        d.step("a", 0, {"x": special})
        with r.step(0, deadline=PATIENCE) as step:
            assert equal(step.sum()["x"], special)
            assert equal(step.mean()["x"], special)
        d.step("a", 1, {"x": special})
        d.opened("b")
        d.step("b", 1, {"x": special})
        with r.step(1, deadline=PATIENCE) as step:
            with np.errstate(all="ignore"):
                assert np.array_equal(step.sum()["x"], special + special, equal_nan=True)
            assert np.isinf(step.sum()["x"][5])


def test_it_waits_for_those_that_are_connected(make: Make) -> None:
    d = make(SMALL)
    with attach(d) as r:
        with pytest.raises(StepTimeout, match="0 of 1 producers complete") as nobody:
            r.step(1, deadline=0)
        assert (nobody.value.have, nobody.value.missing, nobody.value.step) == ([], {}, 1)
        for name in "abc":
            d.opened(name)
        d.step("a", 1, small(1))
        d.step("b", 1, small(2))
        with pytest.raises(StepTimeout, match="2 of 3") as two:
            r.step(1, quorum=3, deadline=0)
        assert r.producers == ["a", "b", "c"]
        assert (two.value.have, two.value.missing) == (["a", "b"], {"c": "incomplete: 0 of 24 bytes"})
        with r.step(1, quorum=2, deadline=0) as step:  # the deadline is over, and the quorum is met
            assert (step.have, step.missing) == (["a", "b"], {"c": "incomplete: 0 of 24 bytes"})
            assert equal(step.sum()["x"], small(1)["x"] + small(2)["x"])
        d.step("c", 1, small(3))
        for name in "bca":
            d.step(name, 2, small(4))
        with r.step(2, deadline=PATIENCE) as step:
            assert step.have == ["a", "b", "c"]
        assert (r.stats.late, r.stats.completed_steps) == (1, 2)


def test_it_sleeps_until_the_last_one_is_there(make: Make) -> None:
    d = make(SMALL)
    found: list[Any] = []
    with attach(d) as r:
        d.opened("a")
        d.opened("b")
        d.step("a", 1, small(1))
        waiter = threading.Thread(target=lambda: found.append(r.step(1, deadline=PATIENCE)))
        waiter.start()
        while not d.channel.waiting():
            pass
        assert not found
        d.step("b", 1, small(2))
        waiter.join(PATIENCE)
        assert found[0].have == ["a", "b"]
        found[0].release()


def test_those_that_have_left_are_waited_for_only_without_a_quorum(make: Make) -> None:
    d = make(SMALL)
    with attach(d) as r:
        for name in "abc":
            d.opened(name)
        d.step("a", 1, small(1))
        d.step("b", 1, small(2))
        d.closed("c")
        with r.step(1, quorum=2, deadline=PATIENCE) as step:  # at once
            assert (step.have, step.missing) == (["a", "b"], {"c": "connection ended"})
        d.step("a", 2, small(1))
        d.step("b", 2, small(1))
        with pytest.raises(StepTimeout) as caught:
            r.step(2, quorum=3, deadline=0)
        assert caught.value.missing == {"c": "connection ended"} and r.producers == ["a", "b"]
        d.opened("c")
        d.step("c", 2, small(5))
        with r.step(2, quorum=3, deadline=PATIENCE) as step:
            assert step.have == ["a", "b", "c"]


def test_a_connection_that_ends_in_the_middle(make: Make) -> None:
    d = make()
    with attach(d) as r:
        d.opened("a")
        d.opened("b")
        d.step("a", 1, gradients(1, 1))
        d.step("b", 1, gradients(2, 1), 0, 2)
        d.closed("b")
        want = sum(t.encoded_bytes for t in MANIFEST)
        with pytest.raises(StepTimeout) as caught:
            r.step(1, quorum=2, deadline=0)
        assert caught.value.missing == {"b": f"connection ended: {2 * C} of {want} bytes"}
        d.opened("b")
        d.step("b", 1, gradients(2, 1), 2)  # goes on after a reconnect
        with r.step(1, quorum=2, deadline=PATIENCE) as step:
            assert equal(step.sum()["w"], reference([gradients(1, 1), gradients(2, 1)], "w"))


def test_who_leaves_is_taken_out_of_a_sum_that_had_begun(make: Make) -> None:
    d = make()
    with attach(d) as r:
        into = {"w": np.empty((5, N // 5), np.float32), "b": np.empty(3, np.float32)}
        d.opened("a")
        d.opened("b")
        d.step("a", 1, gradients(1, 1))
        d.step("b", 1, gradients(2, 1), 0, 2)  # two cells are summed of both
        with pytest.raises(StepTimeout):
            r.step(1, quorum=2, deadline=0, into=into)
        assert equal(
            into["w"].reshape(-1)[: C // 4], reference([gradients(1, 1), gradients(2, 1)], "w").reshape(-1)[: C // 4]
        )
        d.closed("b")
        with r.step(1, deadline=PATIENCE, into=into) as step:
            assert step.have == ["a"]
            assert equal(step.sum()["w"], gradients(1, 1)["w"]) and equal(into["b"], gradients(1, 1)["b"])


def test_a_step_that_begins_anew(make: Make) -> None:
    """Other bytes in the second attempt, of which some had been summed already."""
    d = make()
    with attach(d) as r:
        into = {"w": np.empty((5, N // 5), np.float32)}
        d.opened("a")
        d.step("a", 1, gradients(1, 1), 0, 2)
        with pytest.raises(StepTimeout):
            r.step(1, deadline=0, into=into)
        d.step("a", 1, gradients(7, 7))
        with r.step(1, deadline=PATIENCE, into=into) as step:
            assert equal(step.sum()["w"], gradients(7, 7)["w"])
        assert r.stats.duplicates == r.stats.bad_chunks == 0


def test_a_complete_step_that_is_sent_again_is_ignored(make: Make) -> None:
    d = make(SMALL)
    with attach(d) as r:
        d.opened("a")
        d.step("a", 1, small(1))
        d.step("a", 1, small(9))
        d.send("a", 1, ABORT)
        with r.step(1, deadline=PATIENCE) as step:
            assert equal(step.sum()["x"], small(1)["x"])
        assert r.stats.duplicates == 1


def test_aborted_steps(make: Make) -> None:
    d = make()
    with attach(d) as r:
        d.opened("a")
        d.opened("b")
        d.step("a", 1, gradients(1, 1), 0, 2)
        d.send("a", 1, ABORT)
        d.step("b", 1, gradients(2, 1))
        with pytest.raises(StepTimeout) as caught:
            r.step(1, quorum=2, deadline=0)
        assert caught.value.missing == {"a": "aborted"}
        assert r.held == 3  # what was aborted is given back
        d.step("a", 1, gradients(3, 1))
        with r.step(1, quorum=2, deadline=PATIENCE) as step:
            assert equal(step.sum()["b"], reference([gradients(3, 1), gradients(2, 1)], "b"))


def test_who_went_on_is_not_waited_for(make: Make) -> None:
    d = make()
    with attach(d) as r:
        d.opened("a")
        d.opened("b")
        d.step("a", 1, gradients(1, 1), 0, 2)
        d.step("a", 2, gradients(1, 2))
        d.step("b", 1, gradients(2, 1))
        d.step("b", 3, gradients(2, 3))
        with r.step(1, deadline=PATIENCE) as step:
            want = sum(t.encoded_bytes for t in MANIFEST)
            assert (step.have, step.missing) == (["b"], {"a": f"incomplete: {2 * C} of {want} bytes"})
        with r.step(2, deadline=PATIENCE) as step:
            assert (step.have, step.missing) == (["a"], {"b": "went on to step 3"})
        assert r.stats.dropped_incomplete == 1


def test_refused_steps(make: Make) -> None:
    d = make(SMALL)
    with attach(d) as r:
        d.opened("a")
        d.opened("b")
        d.send("a", 1, BEGIN | REFUSED, 0, flat_of(SMALL, small(1))[:24])
        d.step("b", 1, small(2))
        with r.step(1, deadline=PATIENCE) as step:
            assert (step.have, step.missing) == (["b"], {"a": "too old"})
        assert r.stats.refused == 1


def test_every_byte_of_a_chunk_counts(make: Make) -> None:
    """Each is flipped in turn: the step is absent then, and its reason names what is known."""
    d = make(SMALL)
    data = flat_of(SMALL, small(1))[:24]
    with attach(d) as r:
        d.opened("a")
        for n in range(64 + 24):
            head = bytearray(header(SMALL, BEGIN, n, 2, "a", 0, data))
            body = bytearray(data)
            (head if n < 64 else body)[n % 64] ^= 1 << (n % 8)
            d.chunk(2, bytes(head), bytes(body))
            with pytest.raises(StepTimeout) as caught:
                r.step(n, deadline=0)
            if n >= 64:
                assert "bad chunk: tensor 'x' at byte 0: the data is damaged" in caught.value.missing["a"]
            d.step("a", n, small(n))  # and then as it was
            with r.step(n, deadline=PATIENCE) as step:
                assert equal(step.sum()["x"], small(n)["x"])
        assert r.stats.bad_chunks == 64 + 24 and r.held == 0


def test_a_damaged_chunk_spoils_its_step(make: Make) -> None:
    d = make()
    with attach(d) as r:
        d.opened("a")
        d.step("a", 1, gradients(1, 1), 0, 1)
        raw = flat_of(MANIFEST, gradients(1, 1))
        d.send("a", 1, 0, C, raw[C : 2 * C], crc=5)
        d.step("a", 1, gradients(1, 1), 2)
        with pytest.raises(StepTimeout) as caught:
            r.step(1, deadline=0)
        assert caught.value.missing["a"].startswith(f"bad chunk: tensor 'w' at byte {C}: the data is damaged")
        assert r.held == 0
        d.step("a", 1, gradients(1, 1))
        with r.step(1, deadline=PATIENCE) as step:
            assert equal(step.sum()["w"], gradients(1, 1)["w"])


@pytest.mark.parametrize("without_sum", [False, True])
def test_overlaps_and_repeats(make: Make, without_sum: bool) -> None:
    d = make()
    raw = flat_of(MANIFEST, gradients(1, 1))
    flag = NO_CRC if without_sum else 0
    with attach(d) as r:
        d.opened("a")
        d.send("a", 1, BEGIN | flag, 0, raw[:C])
        d.send("a", 1, flag, 0, raw[:C])  # the same again
        d.send("a", 1, flag, C, raw[C : 2 * C])
        d.send("a", 1, flag, 2 * C, raw[2 * C : MANIFEST.ends[-1]])
        with r.step(1, deadline=PATIENCE) as step:
            assert equal(step.sum()["w"], gradients(1, 1)["w"])
        assert r.stats.duplicates == 1
        for n, (flat, end) in enumerate([(C - 256, 2 * C - 256), (0, 256), (256, C), (0, C + 256)]):
            d.send("a", 2 + n, BEGIN, 0, raw[:C])
            if end - flat > C:
                flat, end = 256, C
            other = bytes(end - flat)
            d.send("a", 2 + n, 0, flat, other)
            with pytest.raises(StepTimeout) as caught:
                r.step(2 + n, deadline=0)
            assert "overlaps what has come before" in caught.value.missing["a"]
        assert r.stats.bad_chunks == 4


@pytest.mark.parametrize(
    "over, match",
    [
        ({"manifest": 1}, "nobody knows its manifest"), ({"tensor": 9}, "is of tensor 9"), ({"stream": 3}, "stream 3"),
        ({"offset": 128}, "multiple of 256"), ({"offset": 1 << 40}, "lies outside"), ({"length": C + 256}, "at most"),
        ({"length": 300}, "end neither"), ({"flags_": BEGIN | ABORT}, "no data and no place"),
    ],
)  # fmt: skip
def test_chunks_in_a_wrong_place(make: Make, over: Arrays, match: str) -> None:
    d = make()
    raw = flat_of(MANIFEST, gradients(1, 1))
    with attach(d) as r:
        d.opened("a")
        d.send("a", 1, BEGIN, 0, raw[:C])
        if "manifest" in over:
            body = {"code": "unknown_manifest", "reason": "no"}
            with pytest.raises(StepTimeout):
                r.step(1, deadline=0)
            d.listener.script(lambda peer: (peer.hello(), peer.reply(body, status=1))[1])
        d.send("a", 1, 0, C, raw[C : 2 * C], **over)
        with pytest.raises(StepTimeout) as caught:
            r.step(1, deadline=0)
        assert match in caught.value.missing["a"] and r.stats.bad_chunks == 1


def test_a_manifest_that_is_not_the_one(make: Make) -> None:
    d = make()
    with GradReader(d.address, "t", deadline=PATIENCE) as r:
        d.listener.script(lambda peer: (peer.hello(), peer.reply({"table": "t", "manifest": SMALL.to_dict()}))[1])
        d.opened("a")
        with pytest.raises(FormatError, match="gave manifest"):
            r.step(1, deadline=0)


def test_samples_that_did_not_come_or_came_twice(make: Make) -> None:
    d = make()
    raw = flat_of(MANIFEST, gradients(1, 1))
    with attach(d) as r:
        d.opened("a")
        d.step("a", 1, gradients(1, 1), 0, 1)
        d.chunk(2, header(MANIFEST, 0, 1, 2, "a", 0, raw[:C]), raw[:C], number=0)  # delivered again
        d.step("a", 1, gradients(1, 1), 1)
        with r.step(1, deadline=PATIENCE) as step:
            assert equal(step.sum()["w"], gradients(1, 1)["w"])
        assert r.stats.duplicates == 1
        d.step("a", 2, gradients(1, 1), 0, 1)
        d.numbers[2] += 1  # one is lost
        d.step("a", 2, gradients(1, 1), 2)
        with pytest.raises(StepTimeout) as caught:
            r.step(2, deadline=0)
        assert caught.value.missing == {"a": "incomplete: 1 chunks did not come to this reader"}
        d.step("b", 2, gradients(2, 2), 1)
        with pytest.raises(StepTimeout) as caught:
            r.step(2, deadline=0)
        assert caught.value.missing["b"] == "incomplete: its beginning did not come to this reader"


def test_more_than_may_be_held_is_copied(make: Make) -> None:
    manifest = Manifest.from_arrays({"big": np.zeros(20 * C // 4, np.float32)})
    d = make(manifest, batches=6, prefetch=4)
    arrays = {
        name: {"big": np.random.default_rng(ord(name)).standard_normal(20 * C // 4).astype("f4")} for name in "ab"
    }
    with attach(d) as r:
        d.opened("a")
        d.opened("b")
        into = {"big": np.empty(20 * C // 4, np.float32)}
        for part in range(20):
            for name in "ab":
                d.step(name, 1, arrays[name], part, part + 1)
            with pytest.raises(StepTimeout):
                r.step(1, quorum=3, deadline=0, into=into)
            assert r.held <= 4
        assert r.stats.spilled_bytes >= 36 * C
        with r.step(1, quorum=2, deadline=0, into=into) as step:
            assert equal(step.sum()["big"], reference([arrays["a"], arrays["b"]], "big"))
            assert np.array_equal(step.tensor("b", "big"), arrays["b"]["big"])


def test_copies_have_a_limit(make: Make) -> None:
    manifest = Manifest.from_arrays({"big": np.zeros(8 * C // 4, np.float32)})
    d = make(manifest, batches=6, prefetch=2)
    arrays = {"big": np.ones(8 * C // 4, np.float32)}
    with attach(d, spill_bytes=2 * C) as r:
        d.opened("a")
        with pytest.raises(StepTimeout):
            r.step(1, deadline=0)
        d.step("a", 1, arrays, 0, 5)
        with pytest.raises(StepTimeout) as caught:
            r.step(1, deadline=0)
        assert caught.value.missing == {"a": f"incomplete: {4 * C} of {8 * C} bytes"}  # the others wait in the ring
        assert r.stats.spilled_bytes == 2 * C and r.held == 2


def test_steps_are_asked_for_in_order(make: Make) -> None:
    d = make(SMALL)
    with attach(d) as r:
        d.opened("a")
        for step in (1, 2, 3, 5):
            d.step("a", step, small(step))
        with r.step(3, deadline=PATIENCE) as three:
            with r.step(5, deadline=PATIENCE) as five:  # both are held
                assert equal(five.sum()["x"], small(5)["x"])
            assert equal(three.sum()["x"], small(3)["x"])
        for step in (3, 5):
            with pytest.raises(StepOrder, match=f"step {step} is asked for after step 5"):
                r.step(step)
        with pytest.raises(ValueError, match="quorum=0"):
            r.step(6, quorum=0)
        assert r.held == 0


def test_a_step_that_nobody_finishes_is_dropped(make: Make) -> None:
    d = make()
    with attach(d, keep_incomplete=0.0) as r:
        d.opened("a")
        d.opened("b")
        d.step("a", 1, gradients(1, 1), 0, 2)
        d.step("b", 7, gradients(1, 1), 0, 1)
        with pytest.raises(StepTimeout):
            r.step(1, deadline=0)
        assert r.held == 2 and r.stats.dropped_incomplete == 1  # that of step 1 is waited for
        with pytest.raises(StepTimeout) as caught:
            r.step(7, deadline=0)
        assert "nothing came for 0 s" in caught.value.missing["b"]
        assert r.held == 0 and r.stats.dropped_incomplete == 2


def test_other_manifests(make: Make) -> None:
    d = make(SMALL)
    with attach(d, manifest=MANIFEST) as r:
        d.opened("a")
        d.step("a", 1, small(1))
        with pytest.raises(StepTimeout) as caught:
            r.step(1, deadline=0)
        assert caught.value.missing == {"a": "manifest differs"}
        d.manifest = MANIFEST
        d.opened("b")
        d.step("b", 1, gradients(1, 1))
        with r.step(1, deadline=PATIENCE) as step:
            assert (step.have, step.missing) == (["b"], {"a": "manifest differs"})


def test_the_manifest_may_change_when_all_have_it(make: Make) -> None:
    d = make(SMALL)
    with attach(d) as r:
        d.opened("a")
        d.step("a", 1, small(1))
        with r.step(1, deadline=PATIENCE):
            assert r.manifest == SMALL
        d.closed("a")
        d.manifest = MANIFEST
        d.serve_manifest()
        d.opened("a")
        d.step("a", 2, gradients(1, 2))
        with r.step(2, deadline=PATIENCE) as step:
            assert r.manifest == MANIFEST and equal(step.sum()["w"], gradients(1, 2)["w"])


def test_subsets(make: Make) -> None:
    d = make()
    b = MANIFEST.index("b")
    flat, raw = MANIFEST.offsets[b], gradients(2, 1)["b"].tobytes()
    with attach(d) as r:
        into = {"w": np.empty((5, N // 5), np.float32), "b": np.empty(3, np.float32), "h": np.empty(77, np.float32)}
        d.opened("a")
        d.opened("b")
        d.step("a", 1, gradients(1, 1))
        d.send("b", 1, BEGIN, flat, raw)
        with pytest.raises(StepTimeout):
            r.step(1, quorum=2, deadline=0)
        d.send("b", 1, END, 0, struct.pack("<I", b))
        with r.step(1, quorum=2, deadline=PATIENCE, into=into) as step:
            both = [gradients(1, 1), gradients(2, 1)]
            total = step.sum()
            assert equal(total["b"], reference(both, "b")) and equal(total["w"], both[0]["w"])
            assert equal(step.mean()["b"], reference(both, "b") / np.float32(2)) and equal(into["w"], both[0]["w"])
            with pytest.raises(KeyError, match="without tensor 'w'"):
                step.tensor("b", "w")
        d.closed("a")
        d.send("b", 2, BEGIN | END)  # nothing at all
        into["w"][:] = 5
        with r.step(2, deadline=PATIENCE, into=into) as step:
            assert step.have == ["b"] and not step.sum()["w"].any() and not step.mean()["h"].any()
        for bad in ([9], [1, 1], [b]):
            d.send("b", 3, BEGIN, MANIFEST.offsets[2], gradients(2, 1)["h"].tobytes())
            d.send("b", 3, END, 0, struct.pack(f"<{len(bad)}I", *bad))
            with pytest.raises(StepTimeout):
                r.step(3, deadline=0)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("encoding", ["bf16", "f16", "f8_e4m3", "f8_e5m2", "topk:9000"])
def test_encodings(make: Make, encoding: str, eager: bool) -> None:
    n = 40_000
    manifest = Manifest([Tensor("first", "U8", (256 * 200,)), Tensor("x", "F32", (n,), encoding)])
    tensor, begin = manifest[1], manifest.offsets[1]
    d = make(manifest)
    raws, decoded = {}, {}
    for name in "abc":
        rng = np.random.default_rng(ord(name))
        array = rng.standard_normal(n).astype(np.float32)
        if tensor.kind == "topk":
            index = np.sort(rng.choice(n, 8000, replace=False))
            pairs = np.full(9000, 0xFFFFFFFF, native._PAIR)
            pairs["index"][:8000], pairs["value"][:8000] = index, array[index]
            raws[name] = pairs.view(np.uint8)
        else:
            raws[name] = encode(tensor, array)
        decoded[name] = decode(tensor, raws[name])
    with attach(d) as r:
        for name in "abc":
            d.opened(name)
        for at in range(0, manifest.data_bytes, C):
            for name in "abc":
                flat = np.zeros(manifest.data_bytes, np.uint8)
                flat[begin : begin + len(raws[name])] = raws[name]
                d.send(name, 1, 0 if at else BEGIN, at, flat[at : min(at + C, manifest.ends[-1])].tobytes())
        into = {"x": np.full(n, 7, np.float32)} if eager else None
        with r.step(1, quorum=3, deadline=PATIENCE, into=into) as step:
            want = (decoded["a"] + decoded["b"]) + decoded["c"]
            if tensor.kind == "topk":
                want = ((np.zeros(n, np.float32) + decoded["a"]) + decoded["b"]) + decoded["c"]
            assert equal(step.sum()["x"], want)
            assert equal(step.tensor("b", "x"), decoded["b"])


def test_entries_of_topk_beyond_the_tensor(make: Make) -> None:
    manifest = Manifest([Tensor("x", "F32", (100,), "topk:40")])
    d = make(manifest)
    with attach(d) as r:
        d.opened("a")
        for step, (at, index) in enumerate([(0, 100), (39, 100), (20, 3), (39, 38)]):
            pairs = np.zeros(40, native._PAIR)
            pairs["index"] = np.arange(40)
            pairs["index"][at] = index
            d.send("a", step, BEGIN, 0, pairs.tobytes())
            with pytest.raises(StepTimeout) as caught:
                r.step(step, deadline=0)
            bad = 8 if (at, index) == (0, 100) else 0
            assert f"tensor 'x' at byte {8 * at + bad - bad}: an entry of topk" in caught.value.missing["a"]


def test_what_sums_go_into(make: Make) -> None:
    d = make()
    with attach(d) as r:
        d.opened("a")
        d.step("a", 1, gradients(1, 1))
        bad: list[tuple[Arrays, type[Exception], str]] = [
            ({"x": np.zeros(1, np.float32)}, KeyError, "no tensor 'x'"),
            ({"n": np.zeros((), np.float32)}, SpecError, "'n' is I64, which is not summed"),
            ({"b": np.zeros(3)}, TensorMismatch, "float64"), ({"b": np.zeros(4, np.float32)}, TensorMismatch, "got f"),
            ({"b": np.zeros(6, np.float32)[::2]}, SpecError, "contiguous"), ({"b": [0.0] * 3}, TensorMismatch, "list"),
            ({"b": np.broadcast_to(np.float32(0), 3)}, SpecError, "contiguous and writable"),
        ]  # fmt: skip
        for out, error, match in bad:
            with pytest.raises(error, match=match):
                r.step(1, deadline=PATIENCE, into=out)
        with r.step(1, deadline=PATIENCE) as step:
            for out, error, match in bad:
                with pytest.raises(error, match=match):
                    step.sum(out)
            assert list(step.sum({"b": np.zeros(3, np.float32)})) == ["b"]


def test_the_end_of_the_table(make: Make) -> None:
    d = make()
    with attach(d, reconnect=0) as r:
        d.opened("a")
        d.opened("b")
        d.step("a", 1, gradients(1, 1))
        d.step("b", 1, gradients(1, 1), 0, 2)
        d.channel.close()
        with r.step(1, deadline=PATIENCE) as step:
            assert step.have == ["a"] and "at the end of the table" in step.missing["b"]
        assert r.held == 0
        with pytest.raises(EndOfStream):
            r.step(2, deadline=PATIENCE)


def test_a_daemon_that_stopped_and_does_not_come_back(make: Make) -> None:
    d = make(SMALL)
    with attach(d, reconnect=1e-9) as r:
        d.opened("a")
        d.step("a", 2, small(2))
        with pytest.raises(StepTimeout):
            r.step(1, deadline=0)
        d.listener.sock.close()
        d.channel.close()
        with pytest.raises(EndOfStream):
            r.step(1, deadline=PATIENCE)
        assert r.held == 0 and r.stats.spilled_bytes == 24


def test_a_daemon_that_goes_away_for_good(make: Make) -> None:
    d = make()
    with GradReader(d.address, "t", reconnect=0, deadline=PATIENCE) as r:
        d.die()
        with pytest.raises(PeerClosed):
            r.step(1, deadline=PATIENCE)


def test_chunks_of_an_unknown_session(make: Make) -> None:
    d = make(SMALL)
    with attach(d) as r:
        d.streams["x"] = 9
        d.opened("x")
        d.step("x", 1, small(1))
        with r.step(1, deadline=PATIENCE) as step:
            assert step.have == ["stream 9"]


def test_closed_is_of_the_daemon_alone(make: Make) -> None:
    d = make(SMALL)
    with attach(d) as r:
        d.opened("a")
        d.send("a", 0, CLOSED)  # from the producer itself
        d.step("a", 1, small(1))
        with r.step(1, deadline=PATIENCE) as step:
            assert step.have == ["a"]
        assert r.producers == ["a"] and r.stats.bad_chunks == 1
