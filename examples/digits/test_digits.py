"""The parts of the demo that need no daemon: the data, the split, the classifier, the ledger, the verdict."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import dataset
import run
from ledger import Ledger
from model import Classifier


def test_data_is_what_the_attribution_says() -> None:
    images, labels = dataset.load()
    assert images.shape == (1797, 8, 8)
    assert images.dtype == np.float32
    assert images.min() == 0 and images.max() == 1
    assert labels.dtype == np.int32
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_split_parts_are_disjoint_and_complete() -> None:
    images, _ = dataset.load()
    held, training = dataset.held_out()[0], dataset.training()[0]
    assert (len(held), len(training)) == (360, 1437)
    shards = [dataset.shard(i, 4)[0] for i in range(4)]
    assert [len(s) for s in shards] == [360, 359, 359, 359]
    rows = sorted(map(bytes, np.concatenate([held, *shards]).reshape(len(images), -1)))
    assert rows == sorted(map(bytes, images.reshape(len(images), -1)))


def test_shard_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="shard 4 of 4"):
        dataset.shard(4, 4)


def test_shift_moves_by_at_most_one_pixel() -> None:
    image = np.zeros((500, 8, 8), np.float32)
    image[:, 4, 4] = 1
    moved = dataset.shifted(image, np.random.default_rng(0))
    places = np.argwhere(moved == 1)[:, 1:]
    assert len(places) == 500
    assert set(map(tuple, places.tolist())) == {(r, c) for r in (3, 4, 5) for c in (3, 4, 5)}
    corner = np.zeros((200, 8, 8), np.float32)
    corner[:, 0, 0] = 1
    assert set(dataset.shifted(corner, np.random.default_rng(0)).sum(axis=(1, 2)).tolist()) == {0.0, 1.0}


def test_classifier_learns_from_read_only_batches() -> None:
    images, labels = dataset.training()
    model, rng = Classifier(), np.random.default_rng(0)
    assert model.accuracy(*dataset.held_out()) < 0.5
    for _ in range(40):
        order = rng.permutation(len(labels))[:1280].reshape(5, 256)
        for rows in order:
            batch, truth = images[rows], labels[rows]
            batch.flags.writeable = truth.flags.writeable = False
            model.step(batch, truth)
    assert model.accuracy(*dataset.held_out()) > 0.95


def batch(*pairs: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    streams, numbers = (np.array(column, np.uint64) for column in zip(*pairs))
    return streams, numbers, np.full(len(pairs), 1_000_000_000, np.uint64), 1_002_000_000


def test_ledger_of_interleaved_streams_without_a_gap() -> None:
    ledger = Ledger()
    ledger.add(*batch((1, 0), (2, 0), (1, 1)))
    ledger.add(*batch((2, 1), (2, 2), (1, 2)))
    assert (ledger.samples, ledger.lost, ledger.doubled) == (6, 0, 0)
    assert ledger.next == {1: 3, 2: 3}
    assert ledger.percentile_ms(50) == pytest.approx(2, rel=0.03)
    assert ledger.percentile_ms(99) == pytest.approx(2, rel=0.03)


@pytest.mark.parametrize(
    ("pairs", "lost", "doubled"),
    [
        ([(1, 1)], 1, 0),  # the first sample is missing
        ([(1, 0), (1, 3)], 2, 0),
        ([(1, 0), (2, 5), (1, 1)], 5, 0),
        ([(1, 0), (1, 0)], 0, 1),
        ([(1, 0), (1, 1), (1, 0)], 0, 1),
    ],
)
def test_ledger_finds_planted_faults(pairs: list[tuple[int, int]], lost: int, doubled: int) -> None:
    ledger = Ledger()
    ledger.add(*batch(*pairs))
    assert (ledger.lost, ledger.doubled) == (lost, doubled)


def test_ledger_finds_faults_between_batches() -> None:
    ledger = Ledger()
    ledger.add(*batch((1, 0)))
    ledger.add(*batch((1, 2)))
    ledger.add(*batch((1, 2)))
    assert (ledger.lost, ledger.doubled) == (1, 1)


SEEN = {"samples": 5, "batches": 2, "lost": 0, "doubled": 0, "p50_ms": 1.0, "p99_ms": 2.0, "accuracy": 0.97}


def test_verdict() -> None:
    good = {**SEEN, "streams": {"1": 2, "2": 3}}
    assert run.judge({"1": 2, "2": 3}, good) == []
    faults: list[tuple[dict[str, int], dict[str, float]]] = [
        ({"1": 2, "2": 4}, {}),  # the last sample of stream 2 never came
        ({"1": 2, "2": 3, "3": 1}, {}),  # nothing of stream 3 came
        ({"1": 2, "2": 3}, {"lost": 1}),
        ({"1": 2, "2": 3}, {"doubled": 1}),
        ({"1": 2, "2": 3}, {"accuracy": 0.95}),
        ({}, {"samples": 0}),
    ]
    for pushed, changed in faults:
        assert len(run.judge(pushed, {**good, **changed})) == 1, (pushed, changed)
