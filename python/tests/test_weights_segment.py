"""The segment of weights and the pins, against memory that is laid out from docs/weights.md by hand."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ingestd import FormatError, Manifest
from ingestd.segment import crc32c
from ingestd.weights_segment import Newest, Pins, WeightsSegment

from weights_fakes import MANIFEST, Pages, WeightsMaker, digest_of, flat, sums_of, tensors


def test_reads_what_the_document_says() -> None:
    maker = WeightsMaker(places=3)
    segment = WeightsSegment(maker.memory)
    assert segment.manifest == MANIFEST
    assert (segment.segment_bytes, segment.places) == (maker.bytes, 3)
    assert (segment.place_stride, segment.data_offset) == (maker.stride, maker.data_offset)
    assert segment.newest() is None
    maker.publish(7)
    assert segment.newest() == Newest(7, 1)
    assert [segment.generation(p) for p in range(3)] == [0, 7, 0]
    assert segment.published(1) == 1_700_000_000_000_000_007
    assert segment.publisher(1) == 9
    assert segment.sums(1).tolist() == sums_of(tensors(7))
    assert segment.digest(1) == digest_of(sums_of(tensors(7)))
    at = segment.data(1)
    assert bytes(segment.memory[at : at + segment.data_bytes]) == flat(tensors(7))
    assert at % 4096 == 0


DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "weights.md"


def test_golden_bytes() -> None:
    """The example of docs/weights.md, which weights/golden_test.go makes with the daemon's code."""
    text = DOCUMENT.read_text()
    example = text[text.index("## Example") :]
    memory = bytearray(24_576)
    for offset, line in re.findall(r"^([0-9a-f]{5})  ([0-9a-f]{32})$", example, re.MULTILINE):
        memory[int(offset, 16) : int(offset, 16) + 16] = bytes.fromhex(line)
    segment = WeightsSegment(memory)
    assert str(segment.manifest["w"]) == "w:F32[2]" and str(segment.manifest["b"]) == "b:U8[3]"
    assert (segment.places, segment.segment_bytes, segment.newest()) == (2, 24_576, Newest(7, 0))
    assert [segment.generation(0), segment.generation(1)] == [7, 0]
    at, (w, b) = segment.data(0), segment.manifest.offsets
    assert np.frombuffer(memory, np.float32, 2, at + w).tolist() == [1, -2]
    assert np.frombuffer(memory, np.uint8, 3, at + b).tolist() == [1, 2, 3]
    sums = [crc32c(struct.pack("<2f", 1, -2)), crc32c(bytes([1, 2, 3]))]
    assert segment.sums(0).tolist() == sums
    assert segment.digest(0).hex() in example and segment.digest(0) == digest_of(sums, segment.manifest)
    maker = WeightsMaker(segment.manifest, places=2)
    maker.publish(7, {"w": np.array([1, -2], np.float32), "b": np.array([1, 2, 3], np.uint8)}, place=0)
    maker.memory[maker.place(0) + 8 : maker.place(0) + 16] = memory[segment.place(0) + 8 : segment.place(0) + 16]
    maker.word(maker.place(0) + 48, segment.publisher(0))
    assert bytes(maker.memory) == bytes(memory), "the maker of the other tests lays out the same"


def rewritten(field: int, value: int) -> Callable[[WeightsMaker], None]:
    def change(maker: WeightsMaker) -> None:
        struct.pack_into("<Q", maker.memory, field, value)
        text = bytes(maker.memory[4096 : 4096 + struct.unpack_from("<Q", maker.memory, 48)[0]])
        struct.pack_into("<I", maker.memory, 12, crc32c(text, crc32c(bytes(maker.memory[16:128]))))

    return change


def damaged(offset: int) -> Callable[[WeightsMaker], None]:
    def change(maker: WeightsMaker) -> None:
        maker.memory[offset] ^= 1

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (damaged(0), "starts with"),
        (damaged(8), "version"),
        (damaged(12), "damaged"),
        (damaged(89), "damaged"),
        (damaged(4096), "damaged"),
        (rewritten(16, 4095), "segment_bytes"),
        (rewritten(16, 1 << 40), "segment_bytes"),
        (rewritten(24, 1), "places"),
        (rewritten(24, 65), "places"),
        (rewritten(24, 64), "do not fit"),
        (rewritten(32, 0), "tensors"),
        (rewritten(32, 65_537), "tensors"),
        (rewritten(32, 5), "tensors"),
        (rewritten(40, 8192), "manifest_offset"),
        (rewritten(48, 1), "manifest_bytes"),
        (rewritten(48, 1 << 62), "manifest_bytes"),
        (rewritten(56, 4096), "places_offset"),
        (rewritten(56, 8193), "places_offset"),
        (rewritten(64, 4096), "place_stride"),
        (rewritten(64, (1 << 64) - 4096), "place_stride"),
        (rewritten(72, 0), "data_offset"),
        (rewritten(72, 4097), "data_offset"),
        (rewritten(80, 0), "data_bytes"),
        (rewritten(80, 1 << 63), "data_bytes"),
    ],
)
def test_refuses_what_is_not_sound(change: Callable[[WeightsMaker], None], says: str) -> None:
    maker = WeightsMaker()
    change(maker)
    with pytest.raises(FormatError, match=says):
        WeightsSegment(maker.memory)


def test_refuses_memory_that_is_too_short() -> None:
    with pytest.raises(FormatError, match="header alone"):
        WeightsSegment(bytes(4095))
    maker = WeightsMaker()
    WeightsSegment(maker.memory[: maker.bytes])
    with pytest.raises(FormatError, match="segment_bytes"):
        WeightsSegment(maker.memory[: maker.bytes - 1])


def test_refuses_a_manifest_that_cannot_be_read() -> None:
    maker = WeightsMaker()
    maker.memory[4096] = ord("[")
    rewritten(24, 3)(maker)
    with pytest.raises(FormatError, match="manifest cannot be read"):
        WeightsSegment(maker.memory)


def test_the_newest_must_be_in_the_segment() -> None:
    maker = WeightsMaker(places=2)
    segment = WeightsSegment(maker.memory)
    for word in (5 << 6 | 2, 1):
        maker.word(128, word)
        with pytest.raises(FormatError, match="newest generation"):
            segment.newest()
    for place in (-1, 2):
        with pytest.raises(FormatError, match="place"):
            segment.place(place)


def test_pins_are_what_the_daemon_looks_at() -> None:
    maker, page = WeightsMaker(), Pages()
    pins = Pins(page.memory, WeightsSegment(maker.memory))
    assert pins.pin_newest() is None and page.pinned() == {}
    maker.publish(4)
    assert pins.pin_newest() == Newest(4, 1)
    assert pins.pin_newest() == Newest(4, 1)
    assert page.pinned() == {1: 4}
    maker.publish(5)
    assert pins.pin_newest() == Newest(5, 2)
    assert page.pinned() == {1: 4, 2: 5}
    pins.let_go(1)
    assert page.pinned() == {2: 5}
    pins.let_go(2)
    assert page.pinned() == {}
    with pytest.raises(FormatError, match="page of pins"):
        Pins(bytearray(4095), WeightsSegment(maker.memory))


def test_a_generation_that_is_taken_meanwhile_is_not_pinned() -> None:
    """Between the load of the newest and the look at its place, the daemon publishes twice and takes the place."""
    maker, page = WeightsMaker(places=2), Pages()
    segment = WeightsSegment(maker.memory)
    pins = Pins(page.memory, segment)
    maker.publish(4)
    seen: list[dict[int, int]] = []

    def overtaken() -> None:
        if not seen:
            seen.append(page.pinned())
            maker.publish(5)
            maker.word(maker.place(0), 0)

    pins.fence = overtaken  # type: ignore[assignment]
    assert pins.pin_newest() == Newest(5, 1)
    assert seen == [{0: 4}], "it was pinned before the place was looked at"
    assert page.pinned() == {1: 5}


def test_memory_that_contradicts_itself_ends_the_search() -> None:
    maker, page = WeightsMaker(), Pages()
    pins = Pins(page.memory, WeightsSegment(maker.memory))
    maker.publish(4)
    maker.word(maker.place(1), 3)
    with pytest.raises(FormatError, match="which holds 3"):
        pins.pin_newest()
    assert page.pinned() == {}
    maker.word(maker.place(1), 4)
    pins.pin_newest()
    maker.publish(7)
    with pytest.raises(FormatError, match="4 is pinned"):
        pins.pin_newest()


def test_a_segment_without_bytes() -> None:
    manifest = Manifest.from_arrays({"a": np.zeros((0, 3), np.float32)})
    maker = WeightsMaker(manifest)
    maker.publish(1, {"a": np.zeros((0, 3), np.float32)})
    segment = WeightsSegment(maker.memory)
    assert segment.data_bytes == 0 and segment.newest() == Newest(1, 1)
