"""One worker: reads the newest weights, computes the gradients of its batch, pushes them as a step, and again.

    python examples/dataparallel/worker.py --weights unix:///tmp/i.sock --gradients tcp://127.0.0.1:7420 --worker 0

Generation n of the weights is what step n - 1 is computed with. A worker that was too slow for a generation goes on
with the newest one. It ends when there are weights for the step after the last one, and prints where its time went.
"""

from __future__ import annotations

import argparse
import contextlib
import json

import ingestd

import mlp
import shards
from timings import Timings


def work(options: argparse.Namespace) -> dict[str, object]:
    """Works to the last step; returns the report."""
    name = shards.name_of(options.worker)
    shard = shards.Shard(options.worker, options.workers)
    timings, generation, done = Timings(), 0, 0
    manifest = ingestd.Manifest.from_arrays(mlp.initial())
    with contextlib.ExitStack() as stack:
        weights = stack.enter_context(ingestd.Subscription(options.weights, "weights"))
        producer = stack.enter_context(ingestd.StepProducer(options.gradients, "gradients", name, manifest))
        while True:
            with timings.of("fetch"):
                newest = weights.wait(newer_than=generation, deadline=options.patience)
            with newest:
                generation = newest.generation
                step = generation - 1
                if step >= options.steps:
                    break
                with timings.of("gradients"):
                    parameters = {name: newest[name] for name in manifest.names}
                    gradients = mlp.gradients(parameters, *shard.at(step))
                    del parameters  # views of the daemon's memory: not to be kept beyond the pin
            with timings.of("push"), producer.step(step, deadline=options.patience) as transaction:
                for name, array in gradients.items():
                    transaction.put(name, array)
            done += 1
    return {"worker": options.worker, "steps": done, "seconds": timings.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compute gradients of one shard and push them to ingestd.")
    parser.add_argument(
        "--gradients", required=True, help="where to push: tcp://host:port, unix:///path or shm:///path"
    )
    parser.add_argument("--weights", required=True, help="where to read weights: unix:///path, or tcp://host:port")
    parser.add_argument("--worker", type=int, default=0, help="which worker, from 0")
    parser.add_argument("--workers", type=int, default=4, help="how many there are")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--patience", type=float, default=30, help="seconds after which to give up")
    print(json.dumps(work(parser.parse_args())))


if __name__ == "__main__":
    main()
