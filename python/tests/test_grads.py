"""GradReader against a fake daemon whose chunks are made by hand."""

from __future__ import annotations

import threading
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
    SpecError,
    StepOrder,
    StepTimeout,
)
from tensors import (
    ABORT,
    BEGIN,
    CLOSED,
    GRADIENTS,
    NO_CRC,
    REFUSED,
    SMALL,
    Arrays,
    C,
    Make,
    N,
    attach,
    equal,
    flat_of,
    gradients,
    header,
    reference,
    small,
)

from fakes import PATIENCE, SPEC, FakeDaemon


def test_attach(make_grads: Make) -> None:
    d = make_grads()
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


def test_it_waits_for_those_that_are_connected(make_grads: Make) -> None:
    d = make_grads(SMALL)
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


def test_it_sleeps_until_the_last_one_is_there(make_grads: Make) -> None:
    d = make_grads(SMALL)
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


def test_those_that_have_left_are_waited_for_only_without_a_quorum(make_grads: Make) -> None:
    d = make_grads(SMALL)
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


def test_a_connection_that_ends_in_the_middle(make_grads: Make) -> None:
    d = make_grads()
    with attach(d) as r:
        d.opened("a")
        d.opened("b")
        d.step("a", 1, gradients(1, 1))
        d.step("b", 1, gradients(2, 1), 0, 2)
        d.closed("b")
        want = sum(t.encoded_bytes for t in GRADIENTS)
        with pytest.raises(StepTimeout) as caught:
            r.step(1, quorum=2, deadline=0)
        assert caught.value.missing == {"b": f"connection ended: {2 * C} of {want} bytes"}
        d.opened("b")
        d.step("b", 1, gradients(2, 1), 2)  # goes on after a reconnect
        with r.step(1, quorum=2, deadline=PATIENCE) as step:
            assert equal(step.sum()["w"], reference([gradients(1, 1), gradients(2, 1)], "w"))


def test_who_leaves_is_taken_out_of_a_sum_that_had_begun(make_grads: Make) -> None:
    d = make_grads()
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


def test_a_step_that_begins_anew(make_grads: Make) -> None:
    """Other bytes in the second attempt, of which some had been summed already."""
    d = make_grads()
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


def test_a_complete_step_that_is_sent_again_is_ignored(make_grads: Make) -> None:
    d = make_grads(SMALL)
    with attach(d) as r:
        d.opened("a")
        d.step("a", 1, small(1))
        d.step("a", 1, small(9))
        d.send("a", 1, ABORT)
        with r.step(1, deadline=PATIENCE) as step:
            assert equal(step.sum()["x"], small(1)["x"])
        assert r.stats.duplicates == 1


def test_aborted_steps(make_grads: Make) -> None:
    d = make_grads()
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


def test_who_went_on_is_not_waited_for(make_grads: Make) -> None:
    d = make_grads()
    with attach(d) as r:
        d.opened("a")
        d.opened("b")
        d.step("a", 1, gradients(1, 1), 0, 2)
        d.step("a", 2, gradients(1, 2))
        d.step("b", 1, gradients(2, 1))
        d.step("b", 3, gradients(2, 3))
        with r.step(1, deadline=PATIENCE) as step:
            want = sum(t.encoded_bytes for t in GRADIENTS)
            assert (step.have, step.missing) == (["b"], {"a": f"incomplete: {2 * C} of {want} bytes"})
        with r.step(2, deadline=PATIENCE) as step:
            assert (step.have, step.missing) == (["a"], {"b": "went on to step 3"})
        assert r.stats.dropped_incomplete == 1


def test_refused_steps(make_grads: Make) -> None:
    d = make_grads(SMALL)
    with attach(d) as r:
        d.opened("a")
        d.opened("b")
        d.send("a", 1, BEGIN | REFUSED, 0, flat_of(SMALL, small(1))[:24])
        d.step("b", 1, small(2))
        with r.step(1, deadline=PATIENCE) as step:
            assert (step.have, step.missing) == (["b"], {"a": "too old"})
        assert r.stats.refused == 1


def test_every_byte_of_a_chunk_counts(make_grads: Make) -> None:
    """Each is flipped in turn: the step is absent then, and its reason names what is known."""
    d = make_grads(SMALL)
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


def test_a_damaged_chunk_spoils_its_step(make_grads: Make) -> None:
    d = make_grads()
    with attach(d) as r:
        d.opened("a")
        d.step("a", 1, gradients(1, 1), 0, 1)
        raw = flat_of(GRADIENTS, gradients(1, 1))
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
def test_overlaps_and_repeats(make_grads: Make, without_sum: bool) -> None:
    d = make_grads()
    raw = flat_of(GRADIENTS, gradients(1, 1))
    flag = NO_CRC if without_sum else 0
    with attach(d) as r:
        d.opened("a")
        d.send("a", 1, BEGIN | flag, 0, raw[:C])
        d.send("a", 1, flag, 0, raw[:C])  # the same again
        d.send("a", 1, flag, C, raw[C : 2 * C])
        d.send("a", 1, flag, 2 * C, raw[2 * C : GRADIENTS.ends[-1]])
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
def test_chunks_in_a_wrong_place(make_grads: Make, over: Arrays, match: str) -> None:
    d = make_grads()
    raw = flat_of(GRADIENTS, gradients(1, 1))
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


def test_a_manifest_that_is_not_the_one(make_grads: Make) -> None:
    d = make_grads()
    with GradReader(d.address, "t", deadline=PATIENCE) as r:
        d.listener.script(lambda peer: (peer.hello(), peer.reply({"table": "t", "manifest": SMALL.to_dict()}))[1])
        d.opened("a")
        with pytest.raises(FormatError, match="gave manifest"):
            r.step(1, deadline=0)


def test_samples_that_did_not_come_or_came_twice(make_grads: Make) -> None:
    d = make_grads()
    raw = flat_of(GRADIENTS, gradients(1, 1))
    with attach(d) as r:
        d.opened("a")
        d.step("a", 1, gradients(1, 1), 0, 1)
        d.chunk(2, header(GRADIENTS, 0, 1, 2, "a", 0, raw[:C]), raw[:C], number=0)  # delivered again
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


def test_more_than_may_be_held_is_copied(make_grads: Make) -> None:
    manifest = Manifest.from_arrays({"big": np.zeros(20 * C // 4, np.float32)})
    d = make_grads(manifest, batches=6, prefetch=4)
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


def test_copies_have_a_limit(make_grads: Make) -> None:
    manifest = Manifest.from_arrays({"big": np.zeros(8 * C // 4, np.float32)})
    d = make_grads(manifest, batches=6, prefetch=2)
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


def test_steps_are_asked_for_in_order(make_grads: Make) -> None:
    d = make_grads(SMALL)
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


def test_a_step_that_nobody_finishes_is_dropped(make_grads: Make) -> None:
    d = make_grads()
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


def test_other_manifests(make_grads: Make) -> None:
    d = make_grads(SMALL)
    with attach(d, manifest=GRADIENTS) as r:
        d.opened("a")
        d.step("a", 1, small(1))
        with pytest.raises(StepTimeout) as caught:
            r.step(1, deadline=0)
        assert caught.value.missing == {"a": "manifest differs"}
        d.manifest = GRADIENTS
        d.opened("b")
        d.step("b", 1, gradients(1, 1))
        with r.step(1, deadline=PATIENCE) as step:
            assert (step.have, step.missing) == (["b"], {"a": "manifest differs"})


def test_the_manifest_may_change_when_all_have_it(make_grads: Make) -> None:
    d = make_grads(SMALL)
    with attach(d) as r:
        d.opened("a")
        d.step("a", 1, small(1))
        with r.step(1, deadline=PATIENCE):
            assert r.manifest == SMALL
        d.closed("a")
        d.manifest = GRADIENTS
        d.serve_manifest()
        d.opened("a")
        d.step("a", 2, gradients(1, 2))
        with r.step(2, deadline=PATIENCE) as step:
            assert r.manifest == GRADIENTS and equal(step.sum()["w"], gradients(1, 2)["w"])


def test_the_end_of_the_table(make_grads: Make) -> None:
    d = make_grads()
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


def test_a_daemon_that_stopped_and_does_not_come_back(make_grads: Make) -> None:
    d = make_grads(SMALL)
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


def test_a_daemon_that_goes_away_for_good(make_grads: Make) -> None:
    d = make_grads()
    with GradReader(d.address, "t", reconnect=0, deadline=PATIENCE) as r:
        d.die()
        with pytest.raises(PeerClosed):
            r.step(1, deadline=PATIENCE)


def test_chunks_of_an_unknown_session(make_grads: Make) -> None:
    d = make_grads(SMALL)
    with attach(d) as r:
        d.streams["x"] = 9
        d.opened("x")
        d.step("x", 1, small(1))
        with r.step(1, deadline=PATIENCE) as step:
            assert step.have == ["stream 9"]


def test_closed_is_of_the_daemon_alone(make_grads: Make) -> None:
    d = make_grads(SMALL)
    with attach(d) as r:
        d.opened("a")
        d.send("a", 0, CLOSED)  # from the producer itself
        d.step("a", 1, small(1))
        with r.step(1, deadline=PATIENCE) as step:
            assert step.have == ["a"]
        assert r.producers == ["a"] and r.stats.bad_chunks == 1
