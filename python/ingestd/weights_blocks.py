"""Copying and summing tensors in blocks, on several threads where it is worth them. The interpreter's lock is free
meanwhile: :mod:`.native` does the work.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .manifest import Manifest
from .native import PAST_CACHES_BYTES, combine, copy_crc, crc32c
from .spec import Array

__all__ = ["copy_tensors", "digest_of", "sum_tensors"]

#: Bytes of one block: what a thread takes at a time. Large enough that taking one costs nothing beside it.
BLOCK_BYTES = 1 << 20
#: Bytes below which no thread is started: to start and join one takes as long as this many bytes do.
ALONE_BYTES = 4 << 20
THREADS_MAX = 4


class _Block(NamedTuple):
    tensor: int
    offset: int  # in its tensor
    length: int


def sum_tensors(manifest: Manifest, flat: Array, which: Iterable[int]) -> dict[int, int]:
    """The CRC-32C of the bytes of each tensor in ``which``; ``flat`` holds the manifest's ``data_bytes`` bytes."""

    def work(block: _Block) -> int:
        at = manifest.offsets[block.tensor] + block.offset
        return crc32c(flat[at : at + block.length])

    return _in_blocks(manifest, which, work)


def copy_tensors(manifest: Manifest, flat: Array, sources: dict[int, Array]) -> dict[int, int]:
    """Copies tensors, given as arrays of bytes, to where they lie in ``flat``; returns their sums, made on the way."""

    past_caches = sum(len(source) for source in sources.values()) >= PAST_CACHES_BYTES

    def work(block: _Block) -> int:
        at = manifest.offsets[block.tensor] + block.offset
        source = sources[block.tensor][block.offset : block.offset + block.length]
        return copy_crc(flat[at : at + block.length], source, past_caches=past_caches)

    return _in_blocks(manifest, sources, work)


def digest_of(manifest: Manifest, sums: NDArray[Any]) -> bytes:
    """The digest of a generation: SHA-256 of the manifest's fingerprint and the sums (``docs/weights.md``)."""
    digest = hashlib.sha256(bytes.fromhex(manifest.fingerprint))
    digest.update(np.ascontiguousarray(sums, np.dtype("<u4")).tobytes())
    return digest.digest()


def _in_blocks(manifest: Manifest, which: Iterable[int], work: Callable[[_Block], int]) -> dict[int, int]:
    blocks = []
    for i in which:
        size = manifest.tensors[i].encoded_bytes
        blocks += [_Block(i, at, min(BLOCK_BYTES, size - at)) for at in range(0, size or 1, BLOCK_BYTES)]
    found = _spread(blocks, work)
    sums: dict[int, int] = {}
    for block, crc in zip(blocks, found):
        sums[block.tensor] = combine(sums[block.tensor], crc, block.length) if block.offset else crc
    return sums


def _spread(blocks: Sequence[_Block], work: Callable[[_Block], int]) -> list[int]:
    """The results of all blocks, in order."""
    total = sum(block.length for block in blocks)
    threads = 1 if total < ALONE_BYTES else min(THREADS_MAX, os.cpu_count() or 1, len(blocks))
    if threads == 1:
        return [work(block) for block in blocks]
    found = [0] * len(blocks)
    errors: list[BaseException] = []
    turn, numbers = threading.Lock(), iter(range(len(blocks)))

    def run() -> None:
        try:
            while not errors:
                with turn:
                    n = next(numbers, -1)
                if n < 0:
                    return
                found[n] = work(blocks[n])
        except BaseException as e:
            errors.append(e)

    # Threads of their own for each call: they cost little beside the work, and a pool would not survive a fork.
    helpers = [threading.Thread(target=run, name="ingestd-sums", daemon=True) for _ in range(threads - 1)]
    for helper in helpers:
        helper.start()
    run()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]
    return found
