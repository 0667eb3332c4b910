"""The digits: loading, the split, and the shards of the producers.

The split is by line number, so it needs no random numbers and no second file: every fifth line (0, 5, 10,
...) is held out. That is 360 held-out samples and 1,437 for training. Producers never see a held-out
sample.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DATA_FILE = Path(__file__).with_name("digits.csv.gz")
SAMPLES = 1797
HELD_OUT_EVERY = 5
SPEC_TEXT = "image:F32[8,8],label:I32"

Images = NDArray[np.float32]
Labels = NDArray[np.int32]


def load(path: Path = DATA_FILE) -> tuple[Images, Labels]:
    """All samples: images (1797, 8, 8) with values from 0 to 1, and labels (1797,)."""
    table = np.loadtxt(path, delimiter=",", dtype=np.float32)
    if table.shape != (SAMPLES, 65):
        raise ValueError(f"{path} holds a table of {table.shape}, not ({SAMPLES}, 65): restore the file")
    images: Images = (table[:, :64] / np.float32(16)).reshape(-1, 8, 8)
    return images, table[:, 64].astype(np.int32)


def held_out() -> tuple[Images, Labels]:
    """The samples that training never sees."""
    images, labels = load()
    return images[::HELD_OUT_EVERY], labels[::HELD_OUT_EVERY]


def training() -> tuple[Images, Labels]:
    """The samples to train on."""
    images, labels = load()
    keep = np.arange(len(labels)) % HELD_OUT_EVERY != 0
    return images[keep], labels[keep]


def shard(index: int, shards: int) -> tuple[Images, Labels]:
    """The training samples of one producer of several: every sample belongs to exactly one of them."""
    if not 0 <= index < shards:
        raise ValueError(f"shard {index} of {shards} does not exist: give 0 to {shards - 1}")
    images, labels = training()
    return np.ascontiguousarray(images[index::shards]), labels[index::shards].copy()


def shifted(images: Images, rng: np.random.Generator) -> Images:
    """A copy in which each image is moved by at most one pixel each way; what enters at the border is 0."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    rows = rng.integers(0, 3, len(images))[:, None, None] + np.arange(8)[None, :, None]
    columns = rng.integers(0, 3, len(images))[:, None, None] + np.arange(8)[None, None, :]
    moved: Images = padded[np.arange(len(images))[:, None, None], rows, columns]
    return moved
