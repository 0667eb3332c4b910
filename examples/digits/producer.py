"""One producer of the demo: streams its shard of the digits, epoch after epoch, until its time is over.

    python examples/digits/producer.py --address tcp://127.0.0.1:7420 --shard 0 --shards 4

Each epoch is shuffled; with --shift each image is also moved by up to one pixel. When all is acked it
prints one line of JSON: its stream's number and how many samples were acked.
"""

from __future__ import annotations

import argparse
import json
import time

import ingestd
import numpy as np

import dataset


def stream(options: argparse.Namespace) -> dict[str, int]:
    """Push for the given time; returns what the report says."""
    images, labels = dataset.shard(options.shard, options.shards)
    rng = np.random.default_rng(options.shard)
    end = time.monotonic() + options.seconds
    with ingestd.Producer(options.address, options.table, dataset.SPEC_TEXT) as producer:
        while time.monotonic() < end:
            order = rng.permutation(len(labels))
            epoch = dataset.shifted(images[order], rng) if options.shift else images[order]
            producer.push_batch({"image": epoch, "label": labels[order]}, deadline=30)
        producer.flush(deadline=30)
        return {"stream": producer.stream, "samples": producer.acked}


def main() -> None:
    parser = argparse.ArgumentParser(description="Stream one shard of the digits to ingestd.")
    parser.add_argument("--address", required=True, help="tcp://host:port or unix:///path of the daemon")
    parser.add_argument("--table", default="digits")
    parser.add_argument("--shard", type=int, default=0, help="which shard, from 0")
    parser.add_argument("--shards", type=int, default=1, help="how many producers there are")
    parser.add_argument("--seconds", type=float, default=10, help="how long to stream")
    parser.add_argument("--shift", action="store_true", help="move each image by up to one pixel")
    print(json.dumps(stream(parser.parse_args())))


if __name__ == "__main__":
    main()
