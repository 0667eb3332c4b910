"""A checkpoint's way through the daemon and back: `ingestd weights publish`, `ingestd weights get`, digests compared.

Once over TCP, as between machines, and once over the unix socket, where the publisher writes into the daemon's memory
and the reader maps it.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import checkpoint
from checkpoint import LAYERS
from digits import processes

__all__ = ["LAYERS", "judge", "run"]

TABLE = "checkpoint"
ALLOWED_S = 60.0  # for one command


def run(children: processes.Processes, daemon: Path, folder: Path, layers: int) -> list[str]:
    """Makes the file and moves it both ways; returns what was not as it should be."""
    made, fetched = folder / "made.safetensors", folder / "fetched.safetensors"
    began = time.perf_counter()
    size = checkpoint.write(made, checkpoint.transformer(layers), seed=layers)
    want = checkpoint.digests(made)
    print(f"made {len(want)} tensors, {size / 1e6:.0f} MB, BF16 and F32, in {time.perf_counter() - began:.1f} s")
    config = folder / "ingestd.yaml"
    config.write_text(f"tables:\n  - {{name: {TABLE}, kind: weights, generations: 2}}\n")
    addresses = processes.start_daemon(children, daemon, folder, "--config", str(config))
    wrong = []
    for transport, words in (("tcp", "streamed"), ("unix", "in place")):
        publish = command(children, daemon, "publish", str(made), addresses[transport])
        get = command(children, daemon, "get", str(fetched), addresses[transport])
        print(f"{transport:<5} publish ({words}) {rate(publish, size)}; get {rate(get, size)}", flush=True)
        wrong += judge(transport, checkpoint.digests(fetched), want)
        fetched.unlink()
    if not wrong:
        print(f"SHA-256 of all {len(want)} tensors is the same after both ways")
    return wrong


def command(children: processes.Processes, daemon: Path, verb: str, path: str, address: str) -> float:
    """Runs one `ingestd weights` command to its end; returns its seconds."""
    arguments = ["weights", verb, "--addr", address, "--table", TABLE]
    arguments += ["-o", path] if verb == "get" else [path]
    began = time.perf_counter()
    name = f"ingestd weights {verb}"
    children.start(name, str(daemon), *arguments, stdout=subprocess.DEVNULL)
    children.wait([name], time.monotonic() + ALLOWED_S)
    return time.perf_counter() - began


def rate(seconds: float, size: int) -> str:
    """Seconds and GB/s, the start of the program included."""
    return f"{seconds:.2f} s, {size / 1e9 / seconds:.2f} GB/s"


def judge(transport: str, got: dict[str, str], want: dict[str, str]) -> list[str]:
    """What was not as it should be."""
    if not want:
        return ["there was nothing to compare"]
    apart = checkpoint.differing(got, want)
    if not apart:
        return []
    names = ", ".join(apart[:3]) + (", ..." if len(apart) > 3 else "")
    return [f"over {transport} {len(apart)} of {len(want)} tensors came out different: {names}"]
