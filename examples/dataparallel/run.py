"""Data-parallel training through ingestd, compared with the same training in one process; then a checkpoint's way.

    make demo

Twice the same training: four workers push gradients, a trainer averages them and publishes weights. In the second run
one worker is killed half-way (kill -9) and the others go on. Both times the final weights are compared with those of
one process that takes the same images. Then a safetensors file of 512 MB is published and fetched (transfer.py). Exits
with 0 only if all of it is as it should be.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import mlp
import reference
import shards
import transfer
from digits import dataset, processes
from timings import Timings

HERE = Path(__file__).resolve().parent
QUORUM = 3
ROUNDING = 1e-5  # most that float32 rounding may move a tensor, relative to its norm, over a whole training
ACCURACY_MIN = 0.95
ROWS = [
    ("fetch", "workers: wait for weights"),
    ("gradients", "workers: compute gradients"),
    ("push", "workers: push, until all is acknowledged"),
    ("wait", "trainer: wait, and sum what arrives"),
    ("reduce", "trainer: reduce what is left, divide"),
    ("update", "trainer: update"),
    ("publish", "trainer: publish"),
    ("step", "trainer: the whole step"),
]


class Progress(threading.Thread):
    """Reads what the trainer prints, shows some of it, and kills a worker in the middle if it was told one."""

    def __init__(
        self, trainer: subprocess.Popen[str], children: processes.Processes, steps: int, killed: str | None
    ) -> None:
        super().__init__(daemon=True)
        self.trainer, self.children, self.steps, self.killed = trainer, children, steps, killed
        self.have: list[str] = []

    def run(self) -> None:
        assert self.trainer.stdout is not None
        for line in self.trainer.stdout:
            told = json.loads(line)
            step, have = told["step"], told["have"]
            if have != self.have or (step + 1) % 50 == 0:
                print(f"  step {step + 1:4}/{self.steps}  gradients of {', '.join(have)}", flush=True)
            self.have = have
            if self.killed and step + 1 == self.steps // 2:
                print(f"  kill -9 {self.killed}", flush=True)
                self.children.kill(self.killed)


def train(children: processes.Processes, options: argparse.Namespace, folder: Path, killed: str | None) -> list[str]:
    """One training; returns what was not as it should be."""
    until = time.monotonic() + 60
    addresses = processes.start_daemon(children, options.daemon, folder, "--config", str(HERE / "ingestd.yaml"))
    common = "--workers", str(options.workers), "--steps", str(options.steps)
    report, final = folder / "report.json", folder / "final.npz"
    trainer = children.start(
        "the trainer", sys.executable, str(HERE / "trainer.py"), "--address", addresses["unix"],
        "--quorum", str(QUORUM), "--report", str(report), "--out", str(final), *common, stdout=subprocess.PIPE,
    )  # fmt: skip
    progress = Progress(trainer, children, options.steps, killed)
    workers = [shards.name_of(worker) for worker in range(options.workers)]
    ways = [addresses["tcp"], addresses["unix"], addresses["tcp"], addresses["unix"].replace("unix://", "shm://")]
    for worker, name in enumerate(workers):  # gradients by every transport; weights: one as from another machine
        children.start(
            name, sys.executable, str(HERE / "worker.py"), "--worker", str(worker), *common,
            "--gradients", ways[worker % len(ways)],
            "--weights", addresses["tcp" if worker == 0 else "unix"], stdout=subprocess.PIPE,
        )  # fmt: skip
    progress.start()
    children.wait(["the trainer", *(name for name in workers if name != killed)], until)
    progress.join()
    told = json.loads(report.read_text())
    timings = Timings(told["seconds"])
    for name in workers:
        if name != killed:
            output, _ = children.all[name].communicate()
            timings.merge(json.loads(output)["seconds"])
    print(timings.table(ROWS))
    ordered, whole = single_process(children, options, folder, report)
    parameters = reference.load(final)
    return judge(
        told, steps=options.steps, workers=options.workers, killed=killed,
        ordered=reference.difference(parameters, ordered), whole=reference.difference(parameters, whole),
        accuracy=mlp.accuracy(whole, *dataset.held_out()),
    )  # fmt: skip


def single_process(
    children: processes.Processes, options: argparse.Namespace, folder: Path, report: Path
) -> tuple[mlp.Arrays, mlp.Arrays]:
    """The weights of one process that takes the same images: summed in the same order, and as one batch."""
    ordered, whole = folder / "ordered.npz", folder / "whole.npz"
    children.start(
        "the single process", sys.executable, str(HERE / "reference.py"), "--report", str(report),
        "--workers", str(options.workers), "--ordered", str(ordered), "--whole", str(whole),
    )  # fmt: skip
    children.wait(["the single process"], time.monotonic() + 60)
    return reference.load(ordered), reference.load(whole)


def judge(
    told: dict[str, Any],
    *,
    steps: int,
    workers: int,
    killed: str | None,
    ordered: reference.Difference,
    whole: reference.Difference,
    accuracy: float,
) -> list[str]:
    """Print the figures; returns what was not as it should be."""
    have = told["have"]
    names = {shards.name_of(worker) for worker in range(workers)}
    complete = sum(set(present) == names for present in have)
    figures = [
        ("steps", f"{len(have)}, {complete} of them with the gradients of all {workers} workers"),
        ("one process, summed in the same order", str(ordered)),
        ("one process, the same images as one batch", str(whole)),
        ("held-out accuracy", f"{told['accuracy']:.4f}; of the one process {accuracy:.4f}"),
    ]
    print()
    for name, value in figures:
        print(f"{name:<44} {value}")
    wrong = []
    if len(have) != steps or told["generation"] != steps + 1:
        wrong.append(f"{len(have)} steps and {told['generation']} generations, not {steps} and {steps + 1}")
    if any(len(present) < QUORUM for present in have):
        wrong.append(f"a step was taken with fewer than {QUORUM} workers")
    if killed is None and complete != len(have):
        wrong.append(f"{len(have) - complete} steps were taken without a worker, and nobody was killed")
    if killed is not None and (complete == 0 or killed in have[-1]):
        wrong.append(f"{killed} was to be killed half-way: it took part in the last step, or never")
    for what, apart in (("in the same order", ordered), ("as one batch", whole)):
        if not apart.relative <= ROUNDING:
            wrong.append(f"the weights are not those of one process {what}: {apart}")
    if not told["accuracy"] >= accuracy:
        wrong.append(f"held-out accuracy is {told['accuracy']:.4f}, of one process {accuracy:.4f}")
    if not told["accuracy"] > ACCURACY_MIN:
        wrong.append(f"held-out accuracy is {told['accuracy']:.4f}, not above {ACCURACY_MIN}")
    return wrong


def phase(title: str, options: argparse.Namespace, body: Any) -> list[str]:
    """Runs one part with its own daemon and folder; a failure there is a reason too."""
    print(f"\n{title}", flush=True)
    began, children = time.monotonic(), processes.Processes()
    with tempfile.TemporaryDirectory(prefix="ingestd-demo-", dir=options.folder) as folder:
        try:
            wrong: list[str] = body(children, Path(folder))
        except processes.Failure as failure:
            wrong = [str(failure)]
            processes.show_log(Path(folder) / processes.LOG)
        finally:
            children.stop()
    print(f"({time.monotonic() - began:.1f} s)")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="Train data-parallel through ingestd, and move a checkpoint.")
    parser.add_argument("--daemon", type=Path, default=HERE.parents[1] / "bin" / "ingestd", help="the ingestd binary")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=transfer.LAYERS, help="of the checkpoint; 16 are 512 MB")
    parser.add_argument("--folder", type=Path, help="where to make temporary folders; they are removed")
    options = parser.parse_args()
    if not options.daemon.exists():
        print(f"{options.daemon} does not exist: run make build first", file=sys.stderr)
        return 1
    processes.fail_on_signals()
    began = time.monotonic()
    killed = shards.name_of(options.workers // 2)
    wrong = phase(
        f"Data-parallel training: {options.workers} workers, {options.steps} steps", options,
        lambda children, folder: train(children, options, folder, None),
    )  # fmt: skip
    wrong += phase(
        f"The same, and {killed} is killed half-way", options,
        lambda children, folder: train(children, options, folder, killed),
    )  # fmt: skip
    wrong += phase(
        "A checkpoint: published, fetched, compared", options,
        lambda children, folder: transfer.run(children, options.daemon, folder, options.layers),
    )  # fmt: skip
    for reason in wrong:
        print(f"demo: {reason}", file=sys.stderr)
    print(f"demo {'FAILED' if wrong else 'passed'} in {time.monotonic() - began:.1f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
