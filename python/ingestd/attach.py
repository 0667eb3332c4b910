"""Mapping what the daemon hands over when it accepts a trainer or a filler: the segment and the channel."""

from __future__ import annotations

import mmap
import os

from .channel import Channel
from .errors import FormatError
from .segment import Segment
from .wire import Reply

__all__ = ["attach"]


def attach(reply: Reply, fds: list[int], writable: bool) -> tuple[Segment, mmap.mmap, Channel]:
    """The segment, its memory, and the channel, all checked. The descriptors stay the caller's. Raises FormatError."""
    if len(fds) != 4:
        raise FormatError(f"the daemon passed {len(fds)} descriptors, want 4")
    segment_fd, channel_fd, wake, signal = fds
    size = os.fstat(segment_fd).st_size
    if size < reply.integer("segment_bytes", 1):
        raise FormatError(f"the segment has {size} bytes, the daemon said {reply.body['segment_bytes']}")
    # Mapping the pages now keeps the first touch of each out of the training loop.
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    memory = mmap.mmap(segment_fd, size, flags=flags, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
    segment = Segment(memory)
    if segment.fingerprint.hex() != segment.spec.fingerprint:
        raise FormatError("the segment's fingerprint is not that of its spec")
    if reply.body.get("fingerprint") not in (None, segment.spec.fingerprint):
        raise FormatError("the segment's spec is not the one that the daemon agreed to")
    for field, have in (("batch_size", segment.batch_size), ("batches", segment.batches)):
        if reply.body.get(field, have) != have:
            raise FormatError(f"the segment has {field} {have}, the daemon said {reply.body[field]}")
    channel = mmap.mmap(channel_fd, os.fstat(channel_fd).st_size, flags=mmap.MAP_SHARED)
    return segment, memory, Channel(channel, wake, signal)
