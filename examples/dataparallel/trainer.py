"""The trainer: publishes weights, waits for the workers' gradients, takes a step along their mean, and again.

    python examples/dataparallel/trainer.py --address unix:///tmp/i.sock --out final.npz

The mean is summed into the trainer's own buffers while chunks arrive, straight from the daemon's memory. A step takes
all workers that are there; one whose connection ended is not waited for, as long as --quorum others are complete. The
first step waits for all of them. Prints one line of JSON per step, and writes the final weights and a report.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path

import ingestd
import numpy as np

import mlp
import reference
from digits import dataset
from timings import Timings


def publish(publisher: ingestd.Publisher, parameters: mlp.Arrays, patience: float) -> int:
    """Makes the parameters the newest generation; returns its number."""
    return publisher.publish(parameters, deadline=patience).generation


def train(options: argparse.Namespace) -> dict[str, object]:
    """Trains for the given number of steps; returns the report."""
    parameters = mlp.initial()
    optimizer = mlp.Momentum(parameters)
    mean = {name: np.empty_like(array) for name, array in parameters.items()}
    manifest = ingestd.Manifest.from_arrays(parameters)
    timings, present = Timings(), []
    with contextlib.ExitStack() as stack:
        publisher = stack.enter_context(ingestd.Publisher(options.address, "weights", manifest))
        reader = stack.enter_context(ingestd.GradReader(options.address, "gradients", manifest=manifest))
        generation = publish(publisher, parameters, options.patience)
        for step in range(options.steps):
            quorum = options.workers if step == 0 else options.quorum
            with timings.of("step"):
                with timings.of("wait"):
                    arrived = reader.step(step, quorum=quorum, deadline=options.patience, into=mean)
                with arrived:
                    with timings.of("reduce"):
                        arrived.mean(mean)
                    have = list(arrived.have)
                with timings.of("update"):
                    optimizer.update(parameters, mean)
                with timings.of("publish"):
                    generation = publish(publisher, parameters, options.patience)
            present.append(have)
            print(json.dumps({"step": step, "have": have}), flush=True)
    reference.save(options.out, parameters)
    return {
        "have": present,
        "generation": generation,
        "accuracy": mlp.accuracy(parameters, *dataset.held_out()),
        "seconds": timings.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Average the gradients of several workers and publish weights.")
    parser.add_argument("--address", required=True, help="unix:///path of the daemon")
    parser.add_argument("--workers", type=int, default=4, help="how many there are")
    parser.add_argument("--quorum", type=int, default=3, help="how many must be complete in a step")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--patience", type=float, default=30, help="seconds after which to give up")
    parser.add_argument("--out", type=Path, required=True, help="where to write the final weights (.npz)")
    parser.add_argument("--report", type=Path, required=True, help="where to write the report (JSON)")
    options = parser.parse_args()
    options.report.write_text(json.dumps(train(options)))


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
