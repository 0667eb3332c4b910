"""Headers of chunks, and the cutter, against docs/tensors.md and a plain reference."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ingestd import ChunkError, Manifest, Spec, SpecError, Tensor
from ingestd.chunks import (
    ABORT,
    BEGIN,
    CLOSED,
    END,
    NO_CRC,
    OPENED,
    REFUSED,
    Chunk,
    Cutter,
    Header,
    chunk_bytes_of,
    chunk_spec,
    parse_end,
    producer_id,
)
from ingestd.native import crc32c

DOC = Path(__file__).resolve().parents[2] / "docs" / "tensors.md"
C = 64 << 10
MIXED = Manifest(
    [
        Tensor("a", "F32", (300,)), Tensor("empty", "F32", (0, 3)), Tensor("b", "U8", (5,)),
        Tensor("big", "F32", (2 * C // 4 + 70,)), Tensor("c", "F16", (1,)), Tensor("last", "F32", (100,), "bf16"),
    ]
)  # fmt: skip
HEADER = Header(BEGIN, 9, 7, producer_id("w"), MIXED.id, 256, 3, 512, 77)


def hexdump(name: str) -> bytes:
    """A hex example of the documentation."""
    block = re.search(rf"```hex {name}\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert block is not None, f"docs/tensors.md has no example {name!r}"
    lines = [line.split("|")[0].split()[1:] for line in block[1].splitlines()]
    return bytes(int(byte, 16) for line in lines for byte in line)


def documented() -> Manifest:
    text = re.search(r"```manifest\n(.*?)\n```", DOC.read_text(), re.DOTALL)
    assert text is not None
    return Manifest.parse(text[1])


def test_the_documented_fingerprint() -> None:
    assert bytes.fromhex(documented().fingerprint) == hexdump("fingerprint")


def test_the_documented_header() -> None:
    m = documented()
    data = bytes(1024)
    header = Header(BEGIN, 1234, 7, producer_id("worker-3"), m.id, 0, m.index("layers.0.b"), 1024, crc32c(data))
    assert header.pack() == hexdump("header")
    refused = Header.parse(hexdump("refused"))
    assert refused == header._replace(flags=BEGIN | REFUSED)
    refused.check(m, C)
    assert refused.flat(m) == m.offsets[1]


def test_every_byte_of_a_header_counts() -> None:
    good = HEADER.pack()
    assert Header.parse(good) == HEADER
    for at in range(64):
        for bit in range(8):
            bad = bytearray(good)
            bad[at] ^= 1 << bit
            if (at, 1 << bit) == (6, REFUSED):
                assert Header.parse(bytes(bad)).has(REFUSED)  # not part of the sum, and then the chunk is not used
                continue
            with pytest.raises(ChunkError):
                Header.parse(bytes(bad))
    with pytest.raises(ChunkError, match="63 bytes"):
        Header.parse(good[:63])


def test_unknown_versions_and_flags() -> None:
    for at, value, match in [
        (0, b"ICHL", "starts with"),
        (4, b"\2\0", "version 2"),
        (6, b"\0\1", "unknown flags 0x100"),
    ]:
        raw = bytearray(HEADER.pack())
        raw[at : at + len(value)] = value
        raw[60:] = struct.pack("<I", crc32c(bytes(raw[:60])))
        with pytest.raises(ChunkError, match=match):
            Header.parse(bytes(raw))


def test_headers_that_may_be() -> None:
    place: dict[str, Any] = {"offset": 0, "tensor": 0, "length": 0, "data_crc": 0}
    for header in [
        HEADER, HEADER._replace(flags=0), HEADER._replace(flags=NO_CRC, data_crc=0),
        HEADER._replace(flags=BEGIN, **place), HEADER._replace(flags=ABORT, **place),
        HEADER._replace(flags=OPENED, **place), HEADER._replace(flags=CLOSED, **place),
        HEADER._replace(flags=END, **place), HEADER._replace(flags=BEGIN | END, **{**place, "length": 8}),
        HEADER._replace(offset=0, length=C), HEADER._replace(tensor=0, offset=1024, length=176),
        HEADER._replace(tensor=2, offset=0, length=5), HEADER._replace(tensor=0, offset=0, length=1280 + 5),
        HEADER._replace(tensor=5, offset=0, length=200), HEADER._replace(tensor=5, offset=0, length=256),
    ]:  # fmt: skip
        header.check(MIXED, C)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"manifest": 5}, "its manifest is 0000000000000005"), ({"length": C + 256}, "at most"),
        ({"flags": NO_CRC}, "was not summed"), ({"flags": ABORT}, "no place"), ({"flags": OPENED | CLOSED}, "together"),
        ({"flags": END | ABORT}, "together"), ({"flags": OPENED | BEGIN, "length": 0}, "together"),
        ({"length": 0}, "no place"), ({"flags": 0, "length": 0, "tensor": 0, "offset": 0}, "no flag that says why"),
        ({"flags": END}, "end of a step"), ({"flags": END, "tensor": 0, "offset": 0, "length": 6}, "end of a step"),
        ({"flags": END, "tensor": 0, "offset": 0, "length": 28}, "end of a step"), ({"tensor": 6}, "is of tensor 6"),
        ({"offset": 128}, "tensor 'big' at byte 128: it must start on a multiple"), ({"tensor": 1}, "lies outside"),
        ({"tensor": 2}, "tensor 'b' at byte 256: it lies"), ({"tensor": 5, "offset": 0, "length": 257}, "beyond"),
        ({"length": 511}, "end neither"), ({"offset": 1 << 63}, "lies outside"),
        ({"tensor": 2, "offset": 0, "length": 6}, "end neither"),
    ],
)  # fmt: skip
def test_headers_that_break_a_rule(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ChunkError, match=match):
        HEADER._replace(**change).check(MIXED, C)


def test_the_end_of_a_step() -> None:
    assert parse_end(MIXED, struct.pack("<3I", 0, 2, 5)) == (0, 2, 5)
    assert parse_end(MIXED, b"") == ()
    for bad in [(6,), (1, 1), (2, 1)]:
        with pytest.raises(ChunkError, match="lists tensor"):
            parse_end(MIXED, struct.pack(f"<{len(bad)}I", *bad))


def test_tables_of_chunks() -> None:
    for size in (64 << 10, 1 << 20, 64 << 20):
        assert chunk_bytes_of(chunk_spec(size)) == size
        assert chunk_spec(size).text() == f"header:U8[64],data:U8[{size}]"
    for text in ("header:U8[64],data:U8[65535]", "header:U8[64],data:U8[61440]", "header:U8[64],data:U8[67112960]",
                 "x:U8[1048576]", "header:U8[65],data:U8[1048576]"):  # fmt: skip
        with pytest.raises(SpecError, match="not of kind 'tensors'"):
            chunk_bytes_of(Spec.parse(text))


class Collected:
    """What a cutter made of one transaction."""

    def __init__(self, manifest: Manifest, chunk_bytes: int = C) -> None:
        self.manifest, self.chunks = manifest, list[Chunk]()
        self.cutter = Cutter(manifest, chunk_bytes, self.chunks.append)
        self.cutter.begin(3)

    def flat(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The flat bytes, from chunks whose headers all are sound and that nowhere overlap."""
        out = np.zeros(self.manifest.data_bytes, np.uint8)
        seen = np.zeros(self.manifest.data_bytes, np.bool_)
        for n, chunk in enumerate(self.chunks):
            header = Header.parse(chunk.header(7, 1, self.manifest.id, chunk.crc()).pack())
            header.check(self.manifest, self.cutter.chunk_bytes)
            assert header.has(BEGIN) == (n == 0) and header.step == 3
            data = np.concatenate([*chunk.pieces, np.zeros(0, np.uint8)])
            assert len(data) == header.length and crc32c(data) == header.data_crc
            if not header.has(END) and header.length:
                at = header.flat(self.manifest)
                assert not seen[at : at + len(data)].any()
                seen[at : at + len(data)] = True
                out[at : at + len(data)] = data
        for begin, end in zip(self.manifest.offsets, self.manifest.ends):
            assert seen[begin:end].all() or not seen[begin:end].any()
        return out


def random_bytes(manifest: Manifest) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    rng = np.random.default_rng(5)
    return [rng.integers(1, 256, t.encoded_bytes, np.uint8) for t in manifest]


def expected(manifest: Manifest, data: list[Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    out = np.zeros(manifest.data_bytes, np.uint8)
    for at, raw in zip(manifest.offsets, data):
        out[at : at + len(raw)] = raw
    return out


def test_tensors_in_order_fill_chunks() -> None:
    data = random_bytes(MIXED)
    c = Collected(MIXED)
    for i, raw in enumerate(data):
        c.cutter.put(i, 0, raw)
    assert c.cutter.finish() == {}
    assert [chunk.length for chunk in c.chunks] == [C, C, MIXED.ends[-1] - 2 * C]
    assert np.array_equal(c.flat(), expected(MIXED, data))
    assert np.shares_memory(c.chunks[1].pieces[0], data[3])  # not copied
    c.cutter.begin(3)
    c.chunks.clear()
    for i in reversed(range(len(data))):
        c.cutter.put(i, 0, data[i])
    assert c.cutter.finish() == {}
    assert np.array_equal(c.flat(), expected(MIXED, data)) and len(c.chunks) == 7


@pytest.mark.parametrize("seed", range(20))
def test_slices_in_any_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = random_bytes(MIXED)
    slices = []
    for i, raw in enumerate(data):
        cuts = np.unique(np.concatenate([[0, len(raw)], rng.integers(0, len(raw) + 1, int(rng.integers(0, 9)))]))
        slices += [(i, int(a), raw[a:b]) for a, b in zip(cuts, cuts[1:])]
    if seed:
        order = rng.permutation(len(slices))
        slices = [slices[k] for k in order]
    c = Collected(MIXED)
    for n, (i, at, raw) in enumerate(slices):
        assert c.cutter.missing(i) == MIXED[i].encoded_bytes - sum(len(r) for j, _, r in slices[:n] if j == i)
        c.cutter.put(i, at, raw)
    assert c.cutter.finish() == {}
    assert np.array_equal(c.flat(), expected(MIXED, data))
    if seed == 0:
        assert len(c.chunks) == 3  # in order they are packed as if they had been whole


def test_many_small_tensors_share_chunks() -> None:
    m = Manifest(Tensor(f"t{i}", "U8", (i % 7,)) for i in range(10_000))
    data = random_bytes(m)
    c = Collected(m)
    for i, raw in enumerate(data):
        c.cutter.put(i, 0, raw)
    assert c.cutter.finish() == {}
    assert np.array_equal(c.flat(), expected(m, data))
    assert len(c.chunks) == -(-m.data_bytes // C)
    assert max(len(chunk.pieces) for chunk in c.chunks) == 1


def test_what_is_missing() -> None:
    data = random_bytes(MIXED)
    c = Collected(MIXED)
    c.cutter.put(0, 0, data[0][:1000])
    c.cutter.put(3, 256, data[3][256:])
    missing = {"a": 200, "b": 5, "big": 256, "c": 2, "last": 200}
    assert c.cutter.finish() == missing
    assert not any(chunk.flags & END for chunk in c.chunks)
    c.cutter.put(0, 1000, data[0][1000:])
    for i, at, n in [(2, 0, 5), (3, 0, 256), (4, 0, 2), (5, 0, 200)]:
        c.cutter.put(i, at, data[i][at : at + n])
    assert c.cutter.finish() == {}
    assert np.array_equal(c.flat(), expected(MIXED, data))


def test_subsets() -> None:
    data = random_bytes(MIXED)
    c = Collected(MIXED)
    c.cutter.put(2, 0, data[2])
    c.cutter.put(5, 0, data[5])
    assert c.cutter.finish([5, 1, 2, 0]) == {"a": 1200}
    with pytest.raises(ChunkError, match=r"'last' .*not in the announced subset"):
        c.cutter.finish([2, 1])
    assert c.cutter.finish([5, 2, 1]) == {}
    assert [chunk.flags for chunk in c.chunks] == [BEGIN, 0, END]
    assert parse_end(MIXED, c.chunks[-1].pieces[0].tobytes()) == (1, 2, 5)
    c.flat()
    c.cutter.begin(4)
    c.chunks.clear()
    assert c.cutter.finish([]) == {}
    assert [(chunk.flags, chunk.length) for chunk in c.chunks] == [(BEGIN | END, 0)]
    many = Collected(Manifest(Tensor(str(i), "U8", (0,)) for i in range(16_385)))
    assert many.cutter.finish(range(16_384)) == {}
    many.cutter.begin(5)
    with pytest.raises(ChunkError, match="16385 tensors does not fit"):
        many.cutter.finish(range(16_385))


def test_a_step_of_empty_tensors_has_a_chunk() -> None:
    c = Collected(Manifest([Tensor("e", "F32", (0,)), Tensor("f", "U8", (3, 0))]))
    c.cutter.put(0, 0, np.zeros(0, np.uint8))
    assert c.cutter.finish() == {}
    assert [(chunk.flags, chunk.length) for chunk in c.chunks] == [(BEGIN, 0)]
    c.flat()


def test_bytes_that_were_there_or_do_not_fit() -> None:
    data = random_bytes(MIXED)
    c = Collected(MIXED)
    c.cutter.put(3, 300, data[3][300:1000])
    for at, n, byte in [(300, 1, 300), (0, 301, 300), (999, 10, 999), (512, 256, 512), (0, 3000, 300)]:
        with pytest.raises(ChunkError, match=f"'big' at byte {byte}: it was put"):
            c.cutter.put(3, at, data[3][at : at + n])
    c.cutter.put(2, 1, data[2][1:3])  # less than a block
    with pytest.raises(ChunkError, match="'b' at byte 1: it was put"):
        c.cutter.put(2, 0, data[2])
    c.cutter.put(2, 0, data[2][:1])
    c.cutter.put(2, 3, data[2][3:])
    c.cutter.put(3, 0, data[3][:300])
    c.cutter.put(3, 1000, data[3][1000:])
    with pytest.raises(ChunkError, match="run beyond its 5"):
        c.cutter.put(2, 1, data[2])
    with pytest.raises(ChunkError, match="run beyond"):
        c.cutter.put(2, -1, data[2][:2])
    for i in (0, 4, 5):
        c.cutter.put(i, 0, data[i])
    assert c.cutter.finish() == {}
    assert np.array_equal(c.flat(), expected(MIXED, data))
