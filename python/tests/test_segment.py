"""The segment reader against the golden bytes that the daemon's own code is tested with, and against damage."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest
from ingestd import FormatError, Spec
from ingestd.native import crc32c
from ingestd.segment import LEASED, LENT, OPEN, Group, Segment, Session, State

from fakes import SPEC, SegmentMaker, image, sample

GOLDEN = Path(__file__).resolve().parents[2] / "ring" / "testdata" / "golden.seg"


def test_crc32c_check_value() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"56789", crc32c(b"1234")) == 0xE3069283
    assert crc32c(b"") == 0


def test_golden_bytes() -> None:
    # Made by ring/golden_test.go: batch 0 leased, opening 1 open with one slot committed, one place lent with one row.
    s = Segment(GOLDEN.read_bytes())
    assert (s.batch_size, s.batches, s.sample_bytes, s.table) == (4, 3, 18, "golden")
    assert s.created == 1_700_000_000 * 10**9 + 5
    assert s.spec == Spec.parse("image:F32[2,2],label:I16")
    assert (s.reserved, s.published, s.leased, s.closed) == (5, 1, 1, False)
    assert (s.streams, s.boot, s.clean) == (3, bytes(16), False)
    assert s.sessions_max == 3
    second = 1_700_000_000 * 10**9
    assert s.sessions() == [Session("worker-1", 1, 3, second), Session("worker-2", 3, 1, second + 7)]
    assert s.groups() == [Group(0, "train", second + 9), Group(1, "eval", second + 9)]
    states = [s.state(i) for i in range(3)]
    assert sorted(states, key=lambda x: x.phase) == [
        State(1, OPEN, 1, 0, 0),
        State(0, LEASED, 4, 0, 4, pending=0b11),
        State(0, LENT, 1, 0, 0, stream=3),
    ]
    base = s.place(next(i for i, x in enumerate(states) if x.phase == LEASED))

    def column(offset: int, dtype: str, *shape: int) -> np.ndarray:
        return np.ndarray((4, *shape), dtype, buffer=s.memory, offset=base + offset)

    number = np.array([0, 1, 0, 1])
    assert column(s.stream_column, "<u8").tolist() == [1, 1, 2, 2]
    assert column(s.number_column, "<u8").tolist() == number.tolist()
    # One commit has one time of arrival; the second sample of a run shares it.
    assert set(column(s.arrival_column, "<u8").tolist()) == {1_700_000_001 * 10**9}
    images = column(s.columns[0].offset, "<f4", 2, 2)
    assert np.array_equal(images, np.stack([image(k) for k in number]))
    assert column(s.columns[1].offset, "<i2").tolist() == [100, 101, 200, 201]


def test_the_makers_segment_reads_back() -> None:
    maker = SegmentMaker(SPEC)
    maker.fill(1, 7, [sample(0), sample(1)])
    s = Segment(maker.memory)
    assert s.spec == SPEC and s.fingerprint.hex() == SPEC.fingerprint
    assert s.state(1) == State(7, LEASED, 2, 0, 2, pending=1)
    assert s.state_word(1) == 7 << 3 | 4
    with pytest.raises(FormatError, match="place 3, the segment has 3"):
        s.state(3)


def test_sessions_and_groups() -> None:
    maker = SegmentMaker(SPEC, sessions=3)
    s = Segment(maker.memory)
    assert (s.sessions_max, s.sessions(), s.groups()) == (3, [], [])
    maker.entry(maker.sessions_offset + 256 * 2, "w\u00e9rker", seen=5, stream=9, held=1 << 40)
    maker.entry(maker.groups_offset + 256 * 63, "eval", seen=6)
    maker.entry(maker.groups_offset, "default", seen=7)
    assert s.sessions() == [Session("w\u00e9rker", 9, 1 << 40, 5)]
    assert s.groups() == [Group(0, "default", 7), Group(63, "eval", 6)]
    maker.word(maker.sessions_offset + 256 * 2, 0)
    assert s.sessions() == []
    maker.entry(maker.groups_offset, "x" * 128, seen=0)
    assert s.groups()[0].name == "x" * 128
    maker.word(maker.groups_offset + 24, 129)
    with pytest.raises(FormatError, match="group in the segment has 129 bytes"):
        s.groups()


def test_a_lent_place_and_the_words_of_the_daemon() -> None:
    maker = SegmentMaker(SPEC)
    maker.lend(2, stream=11)
    at = maker.states_offset + 64 * 2
    maker.word(at + 8, 3)
    maker.word(at + 48, 2)
    s = Segment(maker.memory)
    assert s.state(2) == State(0, LENT, 3, 0, 0, stream=11, settled=2)
    assert (s.streams, s.boot, s.clean) == (0, bytes(16), False)
    for offset, value in ((456, 7), (464, 8), (472, 9), (480, 1)):
        maker.word(offset, value)
    assert (s.streams, s.boot, s.clean) == (7, struct.pack("<QQ", 8, 9), True)


def test_every_flipped_bit_is_noticed() -> None:
    whole = GOLDEN.read_bytes()
    spec_end = 512 + 16 * 2 + struct.unpack_from("<Q", whole, 72)[0]
    for at in [*range(256), *range(512, spec_end)]:
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            with pytest.raises(FormatError):
                Segment(damaged)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 522, 32767])
def test_cut_segments(size: int) -> None:
    with pytest.raises(FormatError):
        Segment(GOLDEN.read_bytes()[:size])


def forged(offset: int, value: int, form: str = "<Q") -> bytearray:
    """The golden segment with one field changed and its checksum made right."""
    data = bytearray(GOLDEN.read_bytes())
    struct.pack_into(form, data, offset, value)
    end = 512 + 16 * 2 + struct.unpack_from("<Q", data, 72)[0]
    struct.pack_into("<I", data, 12, crc32c(bytes(data[512:end]), crc32c(bytes(data[16:256]))))
    return data


@pytest.mark.parametrize(
    ("offset", "value", "says"),
    [
        (16, 32769, "segment_bytes is 32769, want 512 to 32768"),
        (16, 32767, "do not fit"),
        (24, 0, "batch_size is 0"),
        (24, 1 << 32, "batch_size"),
        (24, 1000, "does not fit into a batch"),
        (32, 1, "batches is 1"),
        (32, 4, "state lines run into its sessions"),
        (32, 65537, "batches is 65537"),
        (40, 0, "columns is 0"),
        (40, 3, "spec_offset is 544, want 560"),
        (40, 4097, "columns is 4097"),
        (48, 19, "add up"),
        (56, 528, "columns_offset"),
        (64, 545, "spec_offset"),
        (72, 1, "spec_bytes is 1"),
        (72, 300, "runs into its state lines"),
        (80, 0, "runs into its state lines"),
        (80, 705, "not aligned"),
        (80, 1 << 63, "state lines run into"),
        (88, 4097, "not aligned"),
        (88, 0, "groups run into its batches"),
        (200, 0, "sessions is 0"),
        (200, 4, "sessions run into its groups"),
        (200, 65537, "sessions is 65537"),
        (208, 897, "sessions or groups are not aligned"),
        (208, 1 << 63, "sessions run into"),
        (216, 1665, "sessions or groups are not aligned"),
        (216, 4096 + 64, "groups run into its batches"),
        (96, 0, "do not fit"),
        (96, 1 << 63, "do not fit"),
        (96, 4095, "not aligned"),
        (104, 8, "column stream"),
        (112, 0, "column number"),
        (120, 1 << 40, "column arrival does not fit"),
        (512, 0, "column leaf 0"),
        (520, 0, "column leaf 0 is empty"),
        (520, 1 << 60, "column leaf 0 does not fit"),
        (536, 3, "add up"),
    ],
)
def test_forged_fields(offset: int, value: int, says: str) -> None:
    data = forged(offset, value) if offset != 72 else bytearray(GOLDEN.read_bytes())
    if offset == 72:
        struct.pack_into("<Q", data, 72, value)
    with pytest.raises(FormatError, match=re.escape(says)):
        Segment(data)


def test_forged_columns_and_spec() -> None:
    data = forged(520, 14)
    struct.pack_into("<Q", data, 536, 4)  # 14 + 4 bytes: the sum is right, the leaves are not
    end = 512 + 16 * 2 + struct.unpack_from("<Q", data, 72)[0]
    struct.pack_into("<I", data, 12, crc32c(bytes(data[512:end]), crc32c(bytes(data[16:256]))))
    with pytest.raises(FormatError, match="do not fit the leaves"):
        Segment(data)
    with pytest.raises(FormatError, match="spec cannot be read"):
        Segment(forged(544, 0x7B, "<H"))
    with pytest.raises(FormatError, match="version 1"):
        Segment(forged(8, 1, "<I"))
    with pytest.raises(FormatError, match="version 3"):
        Segment(forged(8, 3, "<I"))
    assert Segment(forged(16, 32768)).segment_bytes == 32768
    assert Segment(bytes(forged(16, 32768)) + bytes(4096)).segment_bytes == 32768  # memory may be larger
