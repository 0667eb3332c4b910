"""Made checkpoints: safetensors files with the names and shapes of a small transformer, and digests of what is in one.

The format is read and written here by hand, and not with ingestd's own code, so that the demo compares with something
else than what it shows.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Layout = dict[str, tuple[str, tuple[int, ...]]]  # name -> (dtype, shape)

WIDTH, INNER, VOCABULARY, CONTEXT = 1024, 3072, 32768, 2048
LAYERS = 16  # with these the tensors have 512 MB
ITEM_BYTES = {"BF16": 2, "F32": 4}
_PART = 1 << 22  # elements that are made at a time


def transformer(layers: int = LAYERS, width: int = WIDTH, inner: int = INNER, vocabulary: int = VOCABULARY) -> Layout:
    """Tensors of a decoder: matrices in BF16, norms and positions in F32."""
    layout: Layout = {"embed.weight": ("BF16", (vocabulary, width)), "positions.weight": ("F32", (CONTEXT, width))}
    for n in range(layers):
        layout[f"layers.{n}.norm1.weight"] = ("F32", (width,))
        for part in "qkvo":
            layout[f"layers.{n}.attention.{part}.weight"] = ("BF16", (width, width))
        layout[f"layers.{n}.norm2.weight"] = ("F32", (width,))
        layout[f"layers.{n}.mlp.gate.weight"] = ("BF16", (inner, width))
        layout[f"layers.{n}.mlp.up.weight"] = ("BF16", (inner, width))
        layout[f"layers.{n}.mlp.down.weight"] = ("BF16", (width, inner))
    layout["norm.weight"] = ("F32", (width,))
    return layout


def bytes_of(layout: Layout) -> int:
    """Bytes of all tensors."""
    return sum(ITEM_BYTES[dtype] * int(np.prod(shape)) for dtype, shape in layout.values())


def write(path: Path, layout: Layout, seed: int) -> int:
    """Writes normally distributed values; returns the bytes of the tensors."""
    entries: dict[str, dict[str, Any]] = {}
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + ITEM_BYTES[dtype] * int(np.prod(shape))
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-(8 + len(header)) % 64)
    rng = np.random.default_rng(seed)
    with path.open("wb") as out:
        out.write(len(header).to_bytes(8, "little"))
        out.write(header)
        for dtype, shape in layout.values():
            for part in _values(rng, dtype, int(np.prod(shape))):
                out.write(part.tobytes())
    return end


def _values(rng: np.random.Generator, dtype: str, elements: int) -> Iterator[NDArray[Any]]:
    for at in range(0, elements, _PART):
        values = rng.standard_normal(min(_PART, elements - at), np.float32) * np.float32(0.02)
        if dtype == "F32":
            yield values
            continue
        bits = values.view(np.uint32)  # BF16 is the upper half, rounded to nearest even
        yield ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)


def digests(path: Path) -> dict[str, str]:
    """What is in a safetensors file: dtype, shape and SHA-256 of the bytes, by name."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        length = int.from_bytes(mapped[:8], "little")
        entries = json.loads(mapped[8 : 8 + length])
        data = 8 + length
        found: dict[str, str] = {}
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            with memoryview(mapped)[data + begin : data + end] as view:
                digest = hashlib.sha256(view).hexdigest()
            found[name] = f"{entry['dtype']} {entry['shape']} {digest}"
    return found


def differing(got: dict[str, str], want: dict[str, str]) -> list[str]:
    """Names of the tensors that are not the same in both."""
    return sorted(name for name in got.keys() | want.keys() if got.get(name) != want.get(name))
