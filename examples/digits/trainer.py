"""The trainer of the demo: fits a classifier straight from the daemon's memory.

    python examples/digits/trainer.py --address unix:///tmp/ingestd.sock

The arrays of a batch are the ring itself: `batch["image"]` is what the socket's bytes landed in, (n, 8, 8)
float32. Nothing is stacked and nothing is copied before the matrix product. The batch goes back at the end
of its `with` block. The trainer ends when the daemon says that the stream is over, and writes what it saw
as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.request
from pathlib import Path

import ingestd
import numpy as np

import dataset
from ledger import Ledger
from model import Classifier

SAMPLE_BYTES = 8 * 8 * 4 + 4


class LiveLine:
    """Once a second: rate, bandwidth, ring fill, accuracy; on a terminal one line that is rewritten."""

    def __init__(self) -> None:
        self.began = self.last = time.monotonic()
        self.samples = 0
        self.terminal = sys.stdout.isatty()

    def due(self) -> bool:
        return time.monotonic() - self.last >= 1

    def show(self, samples: int, fill: float, accuracy: float) -> None:
        now = time.monotonic()
        rate = (samples - self.samples) / (now - self.last)
        self.last, self.samples = now, samples
        bar = "#" * round(fill * 10)
        line = (
            f"{now - self.began:5.1f} s  {rate:9,.0f} samples/s  {rate * SAMPLE_BYTES / 1e6:6.1f} MB/s"
            f"  ring [{bar:<10}] {fill:4.0%}  accuracy {accuracy:.3f}"
        )
        print(("\r" + line) if self.terminal else line, end="" if self.terminal else "\n", flush=True)

    def end(self) -> None:
        if self.terminal:
            print(flush=True)


def ring_fill(admin: str, table: str) -> float:
    """The share of the ring that holds samples, as the daemon's admin endpoint says."""
    with urllib.request.urlopen(f"{admin}/status", timeout=5) as answer:
        status = json.load(answer)
    return float(next(t["fill"] for t in status["tables"] if t["name"] == table))


def train(options: argparse.Namespace) -> dict[str, object]:
    """Train to the end of the stream; returns the report."""
    images, labels = dataset.held_out()
    model, ledger, live = Classifier(), Ledger(), LiveLine()
    batches = 0
    with ingestd.Reader(options.address, options.table) as reader:
        while True:
            try:
                with reader.next(deadline=options.patience) as batch:
                    leased = time.time_ns()
                    model.step(batch["image"], batch["label"])
                    ledger.add(batch.stream, batch.number, batch.arrival, leased)
                    batches += 1
            except ingestd.EndOfStream:
                break
            if live.due():
                live.show(ledger.samples, ring_fill(options.admin, options.table), model.accuracy(images, labels))
    live.end()
    return {
        "samples": ledger.samples,
        "batches": batches,
        "lost": ledger.lost,
        "doubled": ledger.doubled,
        "streams": {str(stream): count for stream, count in ledger.next.items()},
        "p50_ms": ledger.percentile_ms(50),
        "p99_ms": ledger.percentile_ms(99),
        "accuracy": model.accuracy(images, labels),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit a digit classifier from ingestd's batches.")
    parser.add_argument("--address", required=True, help="unix:///path of the daemon")
    parser.add_argument("--admin", default="http://127.0.0.1:7421", help="the daemon's admin endpoint")
    parser.add_argument("--table", default="digits")
    parser.add_argument("--patience", type=float, default=20, help="seconds without a batch after which to give up")
    parser.add_argument("--report", type=Path, help="write the figures to this file instead of standard output")
    options = parser.parse_args()
    report = json.dumps(train(options))
    if options.report:
        options.report.write_text(report)
    else:
        print(report)


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
