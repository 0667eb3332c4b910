"""The same training in one process, to compare with: once in the same order of summing, once as one large batch.

    python examples/dataparallel/reference.py --report report.json --ordered ordered.npz --whole whole.npz

The report is the trainer's: it says whose gradients were in which step.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import mlp
import shards


def mean_of(gradients: list[mlp.Arrays]) -> mlp.Arrays:
    """The mean as ingestd documents it: the first, plus the second, and so on in float32, divided by their number."""
    total = {name: array.astype(np.float32) for name, array in gradients[0].items()}
    for more in gradients[1:]:
        for name, array in total.items():
            array += more[name]
    for array in total.values():
        array /= np.float32(len(gradients))
    return total


def same_order(workers: int, present: list[list[str]]) -> mlp.Arrays:
    """Trains with each present worker's gradients by themselves, averaged in the order of their names."""
    parts = shards.all_of(workers)
    parameters = mlp.initial()
    optimizer = mlp.Momentum(parameters)
    for step, names in enumerate(present):
        optimizer.update(parameters, mean_of([mlp.gradients(parameters, *parts[n].at(step)) for n in sorted(names)]))
    return parameters


def one_batch(workers: int, present: list[list[str]]) -> mlp.Arrays:
    """Trains on the present workers' images as one batch, as one would without workers."""
    parts = shards.all_of(workers)
    parameters = mlp.initial()
    optimizer = mlp.Momentum(parameters)
    for step, names in enumerate(present):
        optimizer.update(parameters, mlp.gradients(parameters, *shards.together(parts, names, step)))
    return parameters


@dataclass
class Difference:
    """How far two sets of parameters are apart."""

    absolute: float  #: the largest of all elements
    relative: float  #: the largest of all tensors: the norm of the difference to that of the expected one

    @property
    def equal(self) -> bool:
        return self.absolute == 0

    def __str__(self) -> str:
        if self.equal:
            return "bit for bit equal"
        return f"max abs difference {self.absolute:.2e}, relative {self.relative:.2e}"


def difference(got: mlp.Arrays, want: mlp.Arrays) -> Difference:
    """Compares; other names or shapes, and anything that is not finite, are infinitely far apart."""
    if {n: a.shape for n, a in got.items()} != {n: a.shape for n, a in want.items()}:
        return Difference(np.inf, np.inf)
    absolute = relative = 0.0
    for name, array in want.items():
        if not (np.isfinite(array).all() and np.isfinite(got[name]).all()):
            return Difference(np.inf, np.inf)
        apart = got[name].astype(np.float64) - array
        norm = float(np.linalg.norm(array.astype(np.float64)))
        absolute = max(absolute, float(np.abs(apart).max(initial=0)))
        relative = max(relative, float(np.linalg.norm(apart)) / norm if norm else float(np.linalg.norm(apart)))
    return Difference(absolute, relative)


def save(path: Path, parameters: mlp.Arrays) -> None:
    """Writes parameters as .npz."""
    np.savez(path, *parameters.values())  # in the order of mlp.initial()


def load(path: Path) -> mlp.Arrays:
    """Reads what :func:`save` has written."""
    with np.load(path) as arrays:
        return {name: arrays[f"arr_{n}"] for n, name in enumerate(mlp.initial())}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train in one process on the images that the workers took.")
    parser.add_argument("--report", type=Path, required=True, help="the trainer's report (JSON)")
    parser.add_argument("--workers", type=int, default=4, help="how many there were")
    parser.add_argument("--ordered", type=Path, required=True, help="where to write weights summed in order (.npz)")
    parser.add_argument("--whole", type=Path, required=True, help="where to write those of one large batch (.npz)")
    options = parser.parse_args()
    present = json.loads(options.report.read_text())["have"]
    save(options.ordered, same_order(options.workers, present))
    save(options.whole, one_batch(options.workers, present))


if __name__ == "__main__":
    main()
