"""The demo: a daemon, four producers and a trainer, each a process of its own; then the figures.

    make demo

Producers 0 and 2 push over TCP, 1 and 3 over a unix socket. When they are done, the daemon is asked to
stop: it publishes what it still holds, the trainer reads it to the end, and everything is compared. Exits
with 0 only if every process ended well, no sample was lost or doubled, and the held-out accuracy is above
0.95.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import dataset
from processes import LOG, Failure, Processes, fail_on_signals, show_log, start_daemon

HERE = Path(__file__).resolve().parent
ACCURACY_MIN = 0.95


def start_producers(processes: Processes, options: argparse.Namespace, addresses: dict[str, str]) -> list[str]:
    names = []
    for shard in range(options.producers):
        transport = "unix" if shard % 2 else "tcp"
        names.append(f"producer {shard} ({transport})")
        processes.start(
            names[-1], sys.executable, str(HERE / "producer.py"), "--address", addresses[transport],
            "--shard", str(shard), "--shards", str(options.producers), "--seconds", str(options.seconds),
            *(["--shift"] if options.shift else []),
            stdout=subprocess.PIPE,
        )  # fmt: skip
    return names


def run(processes: Processes, options: argparse.Namespace, folder: Path) -> list[str]:
    """The demo itself; returns what was not as it should be."""
    until = time.monotonic() + options.seconds + 35
    addresses = start_daemon(
        processes, options.daemon, folder, "--table", "digits", "--spec", dataset.SPEC_TEXT,
        "--batch-size", str(options.batch_size), "--batches", str(options.batches), "--linger", "200ms",
    )  # fmt: skip
    report = folder / "report.json"
    processes.start(
        "the trainer", sys.executable, str(HERE / "trainer.py"),
        "--address", addresses["unix"], "--admin", addresses["admin"], "--report", str(report),
    )  # fmt: skip
    producers = start_producers(processes, options, addresses)
    processes.wait(producers, until)
    pushed: dict[str, int] = {}
    for name in producers:
        output, _ = processes.all[name].communicate()
        told = json.loads(output)
        pushed[str(told["stream"])] = told["samples"]
    processes.all["the daemon"].send_signal(signal.SIGTERM)
    processes.wait(["the trainer", "the daemon"], until)
    return judge(pushed, json.loads(report.read_text()))


def judge(pushed: dict[str, int], seen: dict[str, Any]) -> list[str]:
    """Print the figures; returns what was not as it should be."""
    total = sum(pushed.values())
    lost = sum(max(0, count - seen["streams"].get(stream, 0)) for stream, count in pushed.items()) + seen["lost"]
    figures = [
        ("samples in", f"{total:,} from {len(pushed)} producers, all acked"),
        ("batches read", f"{seen['batches']:,} with {seen['samples']:,} samples"),
        ("samples lost", f"{lost:,}"),
        ("samples doubled", f"{seen['doubled']:,}"),
        ("arrival to lease", f"p50 {seen['p50_ms']:.2f} ms, p99 {seen['p99_ms']:.2f} ms"),
        ("held-out accuracy", f"{seen['accuracy']:.3f} on 360 samples that were never streamed"),
    ]
    print()
    for name, value in figures:
        print(f"{name:<18} {value}")
    wrong = []
    if total == 0:
        wrong.append("no sample was pushed")
    if lost or seen["doubled"] or seen["samples"] != total:
        wrong.append(f"{total:,} samples acked, {seen['samples']:,} read, {lost:,} lost, {seen['doubled']:,} doubled")
    if not seen["accuracy"] > ACCURACY_MIN:
        wrong.append(f"held-out accuracy is {seen['accuracy']:.3f}, not above {ACCURACY_MIN}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="Train on digits that several processes stream through ingestd.")
    parser.add_argument("--daemon", type=Path, default=HERE.parents[1] / "bin" / "ingestd", help="the ingestd binary")
    parser.add_argument("--producers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=12, help="how long the producers stream")
    parser.add_argument(
        "--shift", action=argparse.BooleanOptionalAction, default=True, help="producers move images by up to a pixel"
    )
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=16)
    options = parser.parse_args()
    if not options.daemon.exists():
        print(f"{options.daemon} does not exist: run make build first", file=sys.stderr)
        return 1
    fail_on_signals()
    began, processes = time.monotonic(), Processes()
    with tempfile.TemporaryDirectory(prefix="ingestd-demo-") as folder:
        try:
            wrong = run(processes, options, Path(folder))
        except Failure as failure:
            wrong = [str(failure)]
            show_log(Path(folder) / LOG)
        finally:
            processes.stop()
    for reason in wrong:
        print(f"demo: {reason}", file=sys.stderr)
    print(f"demo {'FAILED' if wrong else 'passed'} in {time.monotonic() - began:.1f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
