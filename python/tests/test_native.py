"""Sums and accumulation: C against numpy, both against plain references, bit by bit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from ingestd import native

KINDS = ["f32", "f16", "bf16", "f8_e4m3", "f8_e5m2"]
SIZES = [0, 1, 7, 8, 255, 256, 511, 512, 767, 768, 769, 24_575, 24_576, 24_577, 100_001, (1 << 20) + 5]

Bits = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture(params=["C", "C, sums not folded", "numpy"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test with the C library, with and without the widest instructions, and without it."""
    if request.param == "numpy":
        monkeypatch.setattr(native, "_lib", None)
    elif not native.AVAILABLE:
        pytest.skip("the package was built without a compiler")
    elif request.param != "C":
        native._lib.ingestd_crc32c_folding(0)
        yield str(request.param)
        native._lib.ingestd_crc32c_folding(1)
        return
    yield str(request.param)


def slow_crc(data: bytes, crc: int = 0) -> int:
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def random(n: int, seed: int = 1) -> Bits:
    return np.random.default_rng(seed).integers(0, 256, n, np.uint8)


def every_float(n: int = 1 << 20) -> Bits:
    """Floats of all magnitudes, with NaN, infinities, zeros, subnormals and ties among them."""
    bits = np.random.default_rng(2).integers(0, 1 << 32, n, np.uint32)
    bits[: 1 << 16] = np.arange(1 << 16, dtype=np.uint32) << 16  # every bfloat16
    bits[1 << 16 : 2 << 16] = (np.arange(1 << 16, dtype=np.uint32) << 16) | 0x8000  # half-way between two of them
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    bits[2 << 16 : 3 << 16] = halves.view(np.uint32)
    with np.errstate(all="ignore"):
        bits[3 << 16 : 4 << 16] = ((halves.astype(np.float64) + np.roll(halves, 1)) / 2).astype(np.float32).view("u4")
    return bits.view(np.float32)


def test_it_is_built_where_there_is_a_compiler() -> None:
    if shutil.which("gcc") is None and shutil.which("cc") is None:
        pytest.skip("no compiler here, so the package is built without C")
    assert native.AVAILABLE, "the package has no C library although there is a compiler: pip install -e python"


def test_known_sums(way: str) -> None:
    # RFC 3720, B.4
    for data, want in [
        (b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (b"", 0),
        (bytes(range(32)), 0x46DD794E), (bytes(range(31, -1, -1)), 0x113FDB5C),
    ]:  # fmt: skip
        for form in (data, bytearray(data), memoryview(data), np.frombuffer(data, np.uint8)):
            assert native.crc32c(form) == want
    assert native.crc32c(b"56789", native.crc32c(b"1234")) == 0xE3069283


@pytest.mark.parametrize("n", SIZES)
def test_sums_of_all_lengths(way: str, n: int) -> None:
    data = random(n + 3)[3:]  # not aligned
    whole = native.crc32c(data, 7)
    if n <= 100_001:
        assert whole == slow_crc(data.tobytes(), 7)
    cut = n // 3
    assert native.crc32c(data[cut:], native.crc32c(data[:cut], 7)) == whole
    assert native.combine(native.crc32c(data[:cut], 7), native.crc32c(data[cut:]), n - cut) == whole
    for past_caches in (False, True):
        into = np.full(n + 64, 0xEE, np.uint8)
        assert native.copy_crc(into[32 : 32 + n], data, 7, past_caches) == whole
        assert np.array_equal(into[32 : 32 + n], data)
        assert (into[:32] == 0xEE).all() and (into[32 + n :] == 0xEE).all()


def test_sums_and_copies_begin_anywhere(way: str) -> None:
    data, into = random(1024), np.empty(1024, np.uint8)
    for n in (255, 256, 319, 320, 383, 512, 900):
        for at in range(64):
            want = slow_crc(data[at : at + n].tobytes())
            assert native.crc32c(data[at : at + n]) == want
            for past_caches in (False, True):
                into[:] = 0xEE
                assert native.copy_crc(into[63 - at : 63 - at + n], data[at : at + n], 0, past_caches) == want
                assert np.array_equal(into[63 - at : 63 - at + n], data[at : at + n])
                assert (into[: 63 - at] == 0xEE).all() and (into[63 - at + n :] == 0xEE).all()


def test_folded_sums_of_all_short_lengths() -> None:
    if not native.AVAILABLE:
        pytest.skip("the package was built without a compiler")
    data = random(4096 + 64)
    for n in range(4097):
        part = data[n % 64 :][:n]
        assert native.crc32c(part, n) == native._lib.ingestd_crc32c_table(n, part.ctypes.data, n)


def test_the_table_gives_what_the_instruction_gives() -> None:
    if not native.AVAILABLE:
        pytest.skip("the package was built without a compiler")
    for n in SIZES:
        data = random(n)
        assert native._lib.ingestd_crc32c_table(3, data.ctypes.data, n) == native.crc32c(data, 3)


def test_combining_over_great_lengths(way: str) -> None:
    a, b, n = native.crc32c(b"left"), native.crc32c(b"right"), (1 << 35) + 12345
    assert native.combine(a, native.combine(b, a, 1 << 33), n + (1 << 33)) == native.combine(
        native.combine(a, b, n), a, 1 << 33
    )


def test_memory_that_cannot_be_taken(way: str) -> None:
    with pytest.raises(ValueError, match="read-only"):
        native.copy_crc(b"abc", b"abc")
    with pytest.raises(ValueError, match="do not fit"):
        native.copy_crc(bytearray(2), b"abc")
    with pytest.raises(ValueError, match="not contiguous"):
        native.crc32c(np.zeros((4, 4), np.uint8)[:, 1])
    with pytest.raises(ValueError, match="float32"):
        native.accumulate(np.zeros(4), bytes(16), "f32", False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="3 bytes of f16 for 2"):
        native.accumulate(np.zeros(2, np.float32), bytes(3), "f16", False)


def plain_values(raw: Bits, kind: str, scale: float) -> Bits:
    ml = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    dtype = {
        "f32": np.float32, "f16": np.float16, "bf16": ml.bfloat16, "f8_e4m3": ml.float8_e4m3fn,
        "f8_e5m2": ml.float8_e5m2,
    }[kind]  # fmt: skip
    values = raw.view(dtype).astype(np.float32)
    return values * np.float32(scale) if kind.startswith("f8") else values


def same(a: Bits, b: Bits) -> bool:
    """Equal bit by bit, but any NaN is as good as another."""
    nan = np.isnan(a)
    return np.array_equal(nan, np.isnan(b)) and np.array_equal(a.view(np.uint32)[~nan], b.view(np.uint32)[~nan])


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation(way: str, kind: str) -> None:
    item = native._ITEM[kind]
    raw = every_float().view(np.uint8) if kind == "f32" else np.concatenate([np.arange(1 << 16, dtype=np.uint16)] * 3)
    raw = raw.view(np.uint8)
    for n in (0, 1, 7, 8, 9, 100, len(raw) // item):
        for scale in (1.0, 0.3125, 1e-30):
            part = raw[: n * item]
            with np.errstate(all="ignore"):
                want = plain_values(part, kind, scale)
                into = np.full(n, 5, np.float32)
                native.accumulate(into, part, kind, False, scale)
                assert same(into, want)
                start = np.random.default_rng(3).standard_normal(n).astype(np.float32)
                into = start.copy()
                native.accumulate(into, part, kind, True, scale)
                assert same(into, start + want)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_many_are_made_in_order(way: str, kind: str) -> None:
    item = native._ITEM[kind]
    for n in (0, 1, 4095, 4096, 4097, 70_001):
        for count in (1, 2, 5):
            floats = [np.random.default_rng(k).standard_normal(n).astype(np.float32) * 10**k for k in range(count)]
            sources = [f.view(np.uint8) if kind == "f32" else native.encode(f, kind) for f in floats]
            scales = [0.5 + k for k in range(count)]
            want = plain_values(sources[0], kind, scales[0])
            for source, scale in zip(sources[1:], scales[1:]):
                want = want + plain_values(source, kind, scale)
            into = np.full(n, np.nan, np.float32)
            native.sum_of(into, sources, kind, scales)
            assert same(into, want)
    for bad in ([], [np.zeros(3, np.uint8)], [np.zeros(16 * item, np.uint8)[::2]]):
        with pytest.raises(ValueError, match="want 1 or more sources"):
            native.sum_of(np.zeros(8, np.float32), bad, kind, [1.0])


def test_values_pass_through_untouched(way: str) -> None:
    raw = every_float().view(np.uint8)
    into = np.zeros(len(raw) // 4, np.float32)
    native.accumulate(into, raw, "f32", False)
    assert np.array_equal(into.view(np.uint8), raw)  # also which NaN it is


@pytest.mark.parametrize("kind", KINDS[1:3])
def test_narrowing_against_ml_dtypes(way: str, kind: str) -> None:
    ml = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    values = every_float()
    got = native.encode(values, kind).view(np.uint16)
    with np.errstate(all="ignore"):
        want = values.astype(ml.bfloat16 if kind == "bf16" else np.float16).view(np.uint16)
    nan = np.isnan(values)
    assert np.array_equal(got[~nan], want[~nan])
    quiet, exponent = (0x40, 0x7F80) if kind == "bf16" else (0x200, 0x7C00)
    assert (got[nan] & quiet).all() and ((got[nan] & exponent) == exponent).all()
    assert np.array_equal(got[nan] >> 15, values.view(np.uint32)[nan] >> 31)


@pytest.mark.parametrize("kind, most", [("f8_e4m3", 448.0), ("f8_e5m2", 57344.0)])
@pytest.mark.parametrize("scale", [1.0, 0.37, 3e10])
def test_eight_bits_against_ml_dtypes(way: str, kind: str, most: float, scale: float) -> None:
    ml = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    values = every_float()
    dtype = ml.float8_e4m3fn if kind == "f8_e4m3" else ml.float8_e5m2
    every = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    with np.errstate(all="ignore"):
        values[:256] = every * np.float32(scale)
        values[256:512] = (every + np.roll(every, 1)) / 2 * np.float32(scale)
        got = native.encode(values, kind, scale)
        x = values / np.float32(scale)
        finite = np.isfinite(x)
        want = np.clip(x, -most, most).astype(dtype).view(np.uint8)
    overflown = ~finite & np.isfinite(values)  # the division overflows, which no scale of ours makes it do
    assert np.array_equal(got[finite], want[finite])
    rest = ~finite & ~overflown
    decoded = got.view(dtype).astype(np.float32)[rest]
    infinite = np.isinf(values[rest])
    assert np.isnan(decoded[~infinite]).all()
    if kind == "f8_e4m3":
        assert np.isnan(decoded[infinite]).all()
    else:
        assert np.array_equal(decoded[infinite], values[rest][infinite])


def test_every_value_of_eight_bits_survives(way: str) -> None:
    for kind in KINDS[3:]:
        raw = np.arange(256, dtype=np.uint8)
        into = np.zeros(256, np.float32)
        native.accumulate(into, raw, kind, False)
        again = native.encode(into, kind)
        finite = np.isfinite(into)
        assert np.array_equal(again[finite], raw[finite])
        assert same(native.f8_values(kind), into)


def test_the_largest_magnitude(way: str) -> None:
    def of(*values: float) -> float:
        return native.largest_finite(np.array(values, np.float32))

    assert of() == 0 and of(np.nan, -np.inf) == 0
    assert of(1, -3, np.inf, np.nan) == 3
    values = every_float()
    assert native.largest_finite(values) == np.abs(values[np.isfinite(values)]).max()


def pairs(*entries: tuple[int, float]) -> Bits:
    return np.array(list(entries), native._PAIR).view(np.uint8)


def test_sparse_entries(way: str) -> None:
    into = np.ones(5, np.float32)
    native.scatter_add(into, pairs((0, 1.5), (4, -2), (0xFFFFFFFF, 9)))
    assert into.tolist() == [2.5, 1, 1, 1, -1]
    native.scatter_add(into, pairs((5, 1)))
    assert into.tolist() == [2.5, 1, 1, 1, -1]
    unused = 0xFFFFFFFF
    assert native.check_pairs(pairs(), 5, 3) == (-1, 3)
    assert native.check_pairs(pairs((0, 1), (4, 1)), 5) == (-1, 4)
    assert native.check_pairs(pairs((3, 1), (unused, 0), (unused, 0)), 5, 2) == (-1, unused)
    for bad, at, last in [
        (pairs((0, 1), (5, 1)), 1, -1), (pairs((1, 1), (1, 1)), 1, -1), (pairs((2, 1), (1, 1)), 1, -1),
        (pairs((2, 1)), 0, 2), (pairs((unused, 0), (1, 1)), 1, -1), (pairs((1, 0)), 0, unused),
    ]:  # fmt: skip
        assert native.check_pairs(bad, 5, last)[0] == at


def test_without_the_library() -> None:
    script = "from ingestd import native; assert not native.AVAILABLE; print(native.crc32c(b'123456789'))"
    environment = {"INGESTD_NATIVE": "0", "PYTHONPATH": ":".join(sys.path)}
    out = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True, text=True)
    assert int(out.stdout) == 0xE3069283
