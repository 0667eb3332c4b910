"""Encodings against docs/tensors.md, in plain numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ingestd import Tensor, native
from ingestd.encodings import Feedback, decode, encode, f8_scale, top

Floats = np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture(params=["C", "numpy"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "numpy":
        monkeypatch.setattr(native, "_lib", None)
    elif not native.AVAILABLE:
        pytest.skip("the package was built without a compiler")


def values(n: int = 5000, seed: int = 0) -> Floats:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(n) * 10.0 ** rng.integers(-6, 6, n)).astype(np.float32)


def test_bytes_as_they_are() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    raw = encode(Tensor("t", "F32", (2, 3)), x)
    assert np.shares_memory(raw, x) and raw.tobytes() == x.tobytes()
    assert np.array_equal(decode(Tensor("t", "F32", (2, 3)), raw), x)
    for tensor in (Tensor("e", "F32", (0, 4)), Tensor("e", "F32", (0, 4), "f8_e5m2")):
        assert decode(tensor, encode(tensor, np.zeros((0, 4), np.float32))).shape == (0, 4)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_sixteen_bits(kind: str) -> None:
    ml = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    x = values()
    x[:4] = np.inf, -np.inf, np.nan, -0.0
    tensor = Tensor("t", "F32", (5000,), kind)
    raw = encode(tensor, x)
    assert len(raw) == tensor.encoded_bytes == 10_000
    with np.errstate(over="ignore"):
        want = x.astype(ml.bfloat16 if kind == "bf16" else np.float16).astype(np.float32)
    assert np.array_equal(decode(tensor, raw), want, equal_nan=True)
    assert np.signbit(decode(tensor, raw)[3])


@pytest.mark.parametrize("kind, most", [("f8_e4m3", 448), ("f8_e5m2", 57344)])
def test_eight_bits(kind: str, most: int) -> None:
    ml = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    dtype = ml.float8_e4m3fn if kind == "f8_e4m3" else ml.float8_e5m2
    x = values()
    x[:3] = np.inf, -np.inf, np.nan
    tensor = Tensor("t", "F32", (5000,), kind)
    raw = encode(tensor, x)
    assert len(raw) == tensor.encoded_bytes == 256 + 5000 and not raw[4:256].any()
    scale = np.abs(x[np.isfinite(x)]).max() / np.float32(most)
    assert raw[:4].view(np.float32)[0] == scale == np.float32(f8_scale(x, kind))
    want = np.clip((x / scale)[3:], -most, most).astype(dtype)
    assert np.array_equal(raw[259:], want.view(np.uint8))
    decoded = decode(tensor, raw)
    assert np.array_equal(decoded[3:], want.astype(np.float32) * scale)
    assert np.isnan(decoded[2]) and (np.isnan(decoded[:2]) if kind == "f8_e4m3" else np.isinf(decoded[:2])).all()


def test_scales_that_are_one() -> None:
    for x in ([0.0, -0.0], [np.nan, np.inf], [1e-45, 0], [448 * 2.0**-121], []):
        assert f8_scale(np.array(x, np.float32), "f8_e4m3") == 1.0
    assert f8_scale(np.array([448 * 2.0**-120], np.float32), "f8_e4m3") == 2.0**-120
    assert f8_scale(np.array([-896.0, 1], np.float32), "f8_e4m3") == 2.0


def slow_top(x: Floats, k: int) -> list[int]:
    order = sorted(range(len(x)), key=lambda i: (-np.inf if np.isnan(x[i]) else -abs(float(x[i])), i))
    nan = [i for i in range(len(x)) if np.isnan(x[i])]
    order = nan + [i for i in order if not np.isnan(x[i])]
    return sorted(order[:k])


@pytest.mark.parametrize("k", [1, 2, 7, 99, 100])
def test_the_largest_elements(k: int) -> None:
    rng = np.random.default_rng(k)
    for trial in range(20):
        x = rng.integers(-4, 5, 100).astype(np.float32)  # many are equal
        if trial % 2:
            x[rng.integers(0, 100, 5)] = np.nan
            x[rng.integers(0, 100, 5)] = -np.inf
        assert top(x, k).tolist() == slow_top(x, k)
    assert top(np.zeros(5, np.float32), 2).tolist() == [0, 1]


def test_feedback_keeps_what_was_not_sent() -> None:
    tensor = Tensor("t", "F32", (4, 25), "topk:10")
    feedback = Feedback()
    total, sent = np.zeros(100, np.float32), np.zeros(100, np.float32)
    residual = np.zeros(100, np.float32)
    assert feedback.residual("t") is None
    for step in range(30):
        gradient = values(100, step).reshape(4, 25)
        raw = feedback.encode(tensor, gradient)
        pairs = raw.view(native._PAIR)
        assert (np.diff(pairs["index"].astype(int)) > 0).all() and len(raw) == 80
        residual = residual + gradient.reshape(-1)
        assert pairs["index"].tolist() == slow_top(residual, 10)
        assert np.array_equal(pairs["value"], residual[pairs["index"]])
        dense = decode(tensor, raw).reshape(-1)
        assert np.array_equal(dense[pairs["index"]], pairs["value"]) and np.count_nonzero(dense) == 10
        if step % 3 == 2:
            feedback.abort()  # as if it had not been
            residual = residual - gradient.reshape(-1) if feedback.residual("t") is None else feedback.residual("t")
            continue
        residual[pairs["index"]] = 0
        feedback.commit()
        kept = feedback.residual("t")
        assert kept is not None and np.array_equal(kept, residual)
        total += gradient.reshape(-1)
        sent += dense
    assert not np.array_equal(total, sent)
