"""Which images each worker takes at which step: a function of both, so that another process can take the same ones.

The data is that of ``examples/digits``; a worker draws from its own shard, in an order that begins anew every epoch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from digits import dataset

BATCH = 64  # images of one worker in one step

Batch = tuple[dataset.Images, dataset.Labels]


def name_of(worker: int) -> str:
    """A worker's name: that of its gradients."""
    return f"worker-{worker}"


class Shard:
    """The batches of one worker of several."""

    def __init__(self, worker: int, workers: int, batch: int = BATCH) -> None:
        self.images, self.labels = dataset.shard(worker, workers)
        self.worker, self.batch = worker, batch
        self.per_epoch = len(self.labels) // batch
        if self.per_epoch == 0:
            raise ValueError(f"a shard of {len(self.labels)} images has no batch of {batch}: take fewer workers")
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def at(self, step: int) -> Batch:
        """The batch of a step, from 0: images (batch, 8, 8) and labels (batch,)."""
        epoch, turn = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.worker, epoch]).permutation(len(self.labels))
        rows = self._order[turn * self.batch : (turn + 1) * self.batch]
        return self.images[rows], self.labels[rows]


def together(shards: dict[str, Shard], names: list[str], step: int) -> Batch:
    """One batch of the batches of several workers, in the order of their names."""
    parts = [shards[name].at(step) for name in sorted(names)]
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])


def all_of(workers: int) -> dict[str, Shard]:
    """The shards by the workers' names."""
    return {name_of(worker): Shard(worker, workers) for worker in range(workers)}


def present(workers: int, steps: int, leaves: tuple[int, int] | None = None) -> Iterator[list[str]]:
    """Who takes part in each step; of ``leaves = (worker, step)`` the worker is there only before that step."""
    for step in range(steps):
        yield [name_of(w) for w in range(workers) if leaves is None or w != leaves[0] or step < leaves[1]]
