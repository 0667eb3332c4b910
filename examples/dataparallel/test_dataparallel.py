"""The parts of the demo that need no daemon: gradients, batches, the reference, checkpoints, the verdicts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import checkpoint
import mlp
import reference
import run
import shards
import transfer
from digits import dataset
from timings import Timings


def small(dtype: type = np.float64) -> tuple[mlp.Arrays, Any, Any]:
    """A model of a few hundred parameters, and a batch."""
    parameters = mlp.initial(seed=3, sizes=(64, 5, 4, 10))
    images, labels = shards.Shard(1, 4, batch=7).at(0)
    return {name: array.astype(dtype) for name, array in parameters.items()}, images.astype(dtype), labels


def test_gradients_are_finite_differences() -> None:
    parameters, images, labels = small()
    got = mlp.gradients(parameters, images, labels)
    assert list(got) == list(parameters)
    for name, array in parameters.items():
        assert got[name].shape == array.shape
        want, width = np.zeros_like(array), 1e-5
        for at in np.ndindex(array.shape):
            middle = array[at]
            array[at] = middle + width
            above = mlp.loss(parameters, images, labels)
            array[at] = middle - width
            want[at] = (above - mlp.loss(parameters, images, labels)) / (2 * width)
            array[at] = middle
        assert np.abs(want).max() > 1e-4, f"{name} does not matter"
        np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-9, err_msg=name)


def test_gradients_take_read_only_parameters_and_stay_float32() -> None:
    parameters, images, labels = small(np.float32)
    for array in parameters.values():
        array.flags.writeable = False
    assert {array.dtype for array in mlp.gradients(parameters, images, labels).values()} == {np.dtype(np.float32)}


def test_mean_of_parts_is_gradient_of_the_whole() -> None:
    parameters, _, _ = small()
    parts = shards.all_of(4)
    names = list(parts)
    mean = reference.mean_of([mlp.gradients(parameters, *parts[name].at(2)) for name in names])
    whole = mlp.gradients(parameters, *shards.together(parts, names, 2))
    for name, array in whole.items():
        np.testing.assert_allclose(mean[name], array, rtol=1e-4, atol=1e-7)


def test_mean_rounds_once_per_addition_in_the_given_order() -> None:
    parts = [{"x": np.array([value], np.float32)} for value in (1.0, 2.0**-24, 2.0**-24)]
    assert reference.mean_of(parts)["x"] == np.float32(1) / np.float32(3)
    assert reference.mean_of(parts[::-1])["x"] == (np.float32(1) + np.float32(2.0**-23)) / np.float32(3)
    assert parts[0]["x"] == 1, "an input was changed"


def test_shard_goes_through_each_image_once_per_epoch() -> None:
    shard = shards.Shard(2, 4)
    assert shard.per_epoch == 5
    rows = [image.tobytes() for step in range(5) for image in shard.at(step)[0]]
    assert len(set(rows)) == len(rows) == 5 * shards.BATCH
    assert {image.tobytes() for image in dataset.shard(2, 4)[0]} >= set(rows)
    again = shards.Shard(2, 4)
    for step in (7, 3, 7):  # whatever was asked before
        np.testing.assert_array_equal(again.at(step)[0], shard.at(step)[0])
    assert not np.array_equal(shard.at(0)[0], shard.at(5)[0]), "epochs are in the same order"


def test_shards_too_small_for_a_batch() -> None:
    with pytest.raises(ValueError, match="has no batch of 64"):
        shards.Shard(0, 40)


def test_reference_does_not_depend_on_cutting_the_batch() -> None:
    present = [[shards.name_of(w) for w in range(4) if w != 2 or step < 30] for step in range(60)]
    ordered, whole = reference.same_order(4, present), reference.one_batch(4, present)
    apart = reference.difference(ordered, whole)
    assert 0 < apart.relative < run.ROUNDING
    other = reference.same_order(4, [*present[:59], present[0]])  # one worker more in the last step
    assert reference.difference(other, ordered).relative > 100 * run.ROUNDING
    held = dataset.held_out()
    assert mlp.accuracy(ordered, *held) == mlp.accuracy(whole, *held) > 0.9


def test_difference() -> None:
    one = {"a": np.array([3.0, 4.0], np.float32), "b": np.zeros(2, np.float32)}
    assert reference.difference(one, one).equal
    assert str(reference.difference(one, one)) == "bit for bit equal"
    apart = reference.difference({**one, "a": np.array([3.0, 4.5], np.float32)}, one)
    assert (apart.absolute, apart.relative) == (0.5, 0.1)
    for broken in ({"a": one["a"]}, {**one, "b": np.zeros(3, np.float32)}, {**one, "b": np.array([0, np.nan])}):
        assert reference.difference(broken, one).relative == np.inf


def test_single_process_takes_whom_the_report_names(tmp_path: Path) -> None:
    present = [[shards.name_of(w) for w in range(4) if w != 2 or step < 3] for step in range(6)]
    report, ordered, whole = (tmp_path / name for name in ("report.json", "ordered.npz", "whole.npz"))
    report.write_text(json.dumps({"have": present}))
    command = [sys.executable, reference.__file__]
    for flag, path in (("--report", report), ("--ordered", ordered), ("--whole", whole)):
        command += [flag, str(path)]
    subprocess.run(command, check=True, timeout=120)
    assert reference.difference(reference.load(ordered), reference.same_order(4, present)).relative < 1e-6
    assert reference.difference(reference.load(whole), reference.one_batch(4, present)).relative < 1e-6
    path = tmp_path / "initial.npz"
    reference.save(path, mlp.initial())
    assert reference.difference(reference.load(path), mlp.initial()).equal


def test_timings() -> None:
    timings = Timings()
    for ms in range(1, 102):
        timings.add("push", ms / 1e3)
    timings.merge({"push": [0.051], "wait": [1.0]})
    assert timings.row("push") == pytest.approx((51, 99.99, 101, 51), abs=0.02)
    text = timings.table([("push", "workers: push"), ("reduce", "trainer: reduce")])
    assert "workers: push" in text and "51.00" in text and "reduce" not in text
    with pytest.raises(KeyError), timings.of("reduce"):
        raise KeyError
    assert "reduce" not in timings.seconds


def report(**changed: Any) -> dict[str, Any]:
    """What a good run of 4 steps with a worker killed after the second says."""
    workers = [shards.name_of(w) for w in range(4)]
    three = [name for name in workers if name != "worker-2"]
    return {"have": [workers, workers, three, three], "generation": 5, "accuracy": 0.97, **changed}


EQUAL = reference.Difference(0.0, 0.0)
CLOSE = reference.Difference(1e-7, 1e-6)


def judged(told: dict[str, Any], killed: str | None = "worker-2", **changed: Any) -> list[str]:
    compared: dict[str, Any] = {"ordered": EQUAL, "whole": CLOSE, "accuracy": 0.97, **changed}
    return run.judge(told, steps=4, workers=4, killed=killed, **compared)


def test_verdict() -> None:
    workers = report()["have"][0]
    assert judged(report()) == []
    assert judged(report(have=[workers] * 4), killed=None) == []
    assert len(judged(report(), killed=None)) == 1, "a worker was missing and nobody was killed"
    assert len(judged(report(have=[workers] * 4))) == 1, "the killed worker took part to the end"
    assert len(judged(report(have=[workers[:2]] * 4))) >= 1, "fewer than the quorum"
    assert len(judged(report(have=report()["have"][:3]))) == 1, "a step is missing"
    assert len(judged(report(generation=4))) == 1, "the last weights were not published"
    assert len(judged(report(accuracy=0.5), accuracy=0.5)) == 1, "it did not learn"
    assert len(judged(report(accuracy=0.96))) == 1, "less accurate than the single process"
    assert judged(report(), ordered=CLOSE) == []
    assert len(judged(report(), ordered=reference.Difference(1e-3, 1e-4))) == 1
    assert len(judged(report(), whole=reference.Difference(np.nan, np.nan))) == 1


def test_checkpoint_is_what_its_header_says(tmp_path: Path) -> None:
    layout = checkpoint.transformer(layers=1, width=64, inner=96, vocabulary=128)
    path = tmp_path / "made.safetensors"
    assert checkpoint.write(path, layout, seed=1) == checkpoint.bytes_of(layout)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert (8 + length) % 64 == 0
    assert len(raw) == 8 + length + checkpoint.bytes_of(layout)
    header = json.loads(raw[8 : 8 + length])
    assert {n: (e["dtype"], tuple(e["shape"])) for n, e in header.items()} == layout
    begin, end = header["layers.0.mlp.up.weight"]["data_offsets"]
    halves = np.frombuffer(raw[8 + length + begin : 8 + length + end], "<u2")
    values = (halves.astype(np.uint32) << 16).view(np.float32)
    assert values.size == 64 * 96 and 0.018 < values.std() < 0.022 and abs(values.mean()) < 0.002
    begin, end = header["positions.weight"]["data_offsets"]
    floats = np.frombuffer(raw[8 + length + begin : 8 + length + end], "<f4")
    assert 0.018 < floats.std() < 0.022


def test_default_checkpoint_has_512_megabytes() -> None:
    assert 510e6 < checkpoint.bytes_of(checkpoint.transformer()) < 514e6


def test_digests_see_each_kind_of_change(tmp_path: Path) -> None:
    layout = checkpoint.transformer(layers=1, width=64, inner=96, vocabulary=128)
    path, other = tmp_path / "made.safetensors", tmp_path / "other.safetensors"
    checkpoint.write(path, layout, seed=1)
    want = checkpoint.digests(path)
    assert len(want) == len(layout)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    other.write_bytes(raw)
    assert checkpoint.differing(checkpoint.digests(other), want) == ["norm.weight"]
    checkpoint.write(other, layout, seed=2)
    assert checkpoint.differing(checkpoint.digests(other), want) == sorted(layout)
    del layout["norm.weight"]
    checkpoint.write(other, layout, seed=1)
    assert checkpoint.differing(checkpoint.digests(other), want) == ["norm.weight"]
    assert checkpoint.differing(want, want) == []


def test_transfer_verdict() -> None:
    same = {"a": "F32 [1] 00"}
    assert transfer.judge("tcp", same, same) == []
    assert transfer.judge("tcp", {"a": "F32 [1] 01"}, same) == ["over tcp 1 of 1 tensors came out different: a"]
    assert len(transfer.judge("tcp", {}, {})) == 1
