"""Sums of what a fake daemon delivers, bit by bit."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from ingestd import (
    Manifest,
    Released,
    SpecError,
    StepTimeout,
    Tensor,
    TensorMismatch,
    native,
)
from ingestd.encodings import decode, encode
from tensors import (
    BEGIN,
    END,
    GRADIENTS,
    SMALL,
    Arrays,
    C,
    Make,
    N,
    attach,
    equal,
    gradients,
    reference,
)

from fakes import PATIENCE


@pytest.mark.parametrize("way", ["C", "numpy"])
@pytest.mark.parametrize("eager", [False, True])
def test_sums_in_the_order_of_names(make_grads: Make, monkeypatch: pytest.MonkeyPatch, way: str, eager: bool) -> None:
    if way == "numpy":
        monkeypatch.setattr(native, "_lib", None)
    d = make_grads()
    with attach(d) as r:
        for name in "cab":
            d.opened(name)
        sent = {name: gradients(ord(name), 5) for name in "abc"}
        for part in range(3):  # interleaved, in another order than that of the names
            for name in "cab":
                d.step(name, 5, sent[name], part, part + 1)
        into = {t.name: np.full(t.shape, np.nan, np.float32) for t in GRADIENTS if t.name != "n"} if eager else None
        with r.step(5, quorum=3, deadline=PATIENCE, into=into) as step:
            assert (step.have, step.missing, step.step, step.manifest) == (["a", "b", "c"], {}, 5, GRADIENTS)
            total = step.sum()
            assert list(total) == ["w", "e", "h", "b"]
            for name, array in total.items():
                assert into is None or array is into[name]
                assert equal(array, reference([sent[k] for k in "abc"], name)), name
            out = {"h": np.empty(77, np.float32)}
            assert step.mean(out) == out
            assert equal(out["h"], reference([sent[k] for k in "abc"], "h") / np.float32(3))
            mean = step.mean()
            assert equal(mean["w"], reference([sent[k] for k in "abc"], "w") / np.float32(3))
            assert equal(step.sum()["w"], reference([sent[k] for k in "abc"], "w"))  # anew, after the mean
            for name in "abc":
                for tensor in GRADIENTS.names:
                    got = step.tensor(name, tensor)
                    assert got.dtype == sent[name][tensor].dtype and np.array_equal(got, sent[name][tensor])
            with pytest.raises(KeyError, match="'d' is not complete"):
                step.tensor("d", "w")
            assert r.held == 9
        assert r.held == 0 and len(d.channel.given()) + len(d.free) > 9
        for use in (step.sum, step.mean, lambda: step.tensor("a", "w"), step.__enter__):
            with pytest.raises(Released, match="step 5 was released"):
                use()
        step.release()
        assert r.stats.completed_steps == 1 and r.stats.spilled_bytes == 0


def test_values_pass_through(make_grads: Make) -> None:
    d = make_grads(SMALL)
    special = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, 3.4e38], np.float32)
    special.view(np.uint32)[0] = 0x7FC12345
    with attach(d) as r:
        d.opened("a")
        d.step("a", 0, {"x": special})
        with r.step(0, deadline=PATIENCE) as step:
            assert equal(step.sum()["x"], special)
            assert equal(step.mean()["x"], special)
        d.step("a", 1, {"x": special})
        d.opened("b")
        d.step("b", 1, {"x": special})
        with r.step(1, deadline=PATIENCE) as step:
            with np.errstate(all="ignore"):
                assert np.array_equal(step.sum()["x"], special + special, equal_nan=True)
            assert np.isinf(step.sum()["x"][5])


def test_subsets(make_grads: Make) -> None:
    d = make_grads()
    b = GRADIENTS.index("b")
    flat, raw = GRADIENTS.offsets[b], gradients(2, 1)["b"].tobytes()
    with attach(d) as r:
        into = {"w": np.empty((5, N // 5), np.float32), "b": np.empty(3, np.float32), "h": np.empty(77, np.float32)}
        d.opened("a")
        d.opened("b")
        d.step("a", 1, gradients(1, 1))
        d.send("b", 1, BEGIN, flat, raw)
        with pytest.raises(StepTimeout):
            r.step(1, quorum=2, deadline=0)
        d.send("b", 1, END, 0, struct.pack("<I", b))
        with r.step(1, quorum=2, deadline=PATIENCE, into=into) as step:
            both = [gradients(1, 1), gradients(2, 1)]
            total = step.sum()
            assert equal(total["b"], reference(both, "b")) and equal(total["w"], both[0]["w"])
            assert equal(step.mean()["b"], reference(both, "b") / np.float32(2)) and equal(into["w"], both[0]["w"])
            with pytest.raises(KeyError, match="without tensor 'w'"):
                step.tensor("b", "w")
        d.closed("a")
        d.send("b", 2, BEGIN | END)  # nothing at all
        into["w"][:] = 5
        with r.step(2, deadline=PATIENCE, into=into) as step:
            assert step.have == ["b"] and not step.sum()["w"].any() and not step.mean()["h"].any()
        for bad in ([9], [1, 1], [b]):
            d.send("b", 3, BEGIN, GRADIENTS.offsets[2], gradients(2, 1)["h"].tobytes())
            d.send("b", 3, END, 0, struct.pack(f"<{len(bad)}I", *bad))
            with pytest.raises(StepTimeout):
                r.step(3, deadline=0)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("encoding", ["bf16", "f16", "f8_e4m3", "f8_e5m2", "topk:9000"])
def test_encodings(make_grads: Make, encoding: str, eager: bool) -> None:
    n = 40_000
    manifest = Manifest([Tensor("first", "U8", (256 * 200,)), Tensor("x", "F32", (n,), encoding)])
    tensor, begin = manifest[1], manifest.offsets[1]
    d = make_grads(manifest)
    raws, decoded = {}, {}
    for name in "abc":
        rng = np.random.default_rng(ord(name))
        array = rng.standard_normal(n).astype(np.float32)
        if tensor.kind == "topk":
            index = np.sort(rng.choice(n, 8000, replace=False))
            pairs = np.full(9000, 0xFFFFFFFF, native._PAIR)
            pairs["index"][:8000], pairs["value"][:8000] = index, array[index]
            raws[name] = pairs.view(np.uint8)
        else:
            raws[name] = encode(tensor, array)
        decoded[name] = decode(tensor, raws[name])
    with attach(d) as r:
        for name in "abc":
            d.opened(name)
        for at in range(0, manifest.data_bytes, C):
            for name in "abc":
                flat = np.zeros(manifest.data_bytes, np.uint8)
                flat[begin : begin + len(raws[name])] = raws[name]
                d.send(name, 1, 0 if at else BEGIN, at, flat[at : min(at + C, manifest.ends[-1])].tobytes())
        into = {"x": np.full(n, 7, np.float32)} if eager else None
        with r.step(1, quorum=3, deadline=PATIENCE, into=into) as step:
            want = (decoded["a"] + decoded["b"]) + decoded["c"]
            if tensor.kind == "topk":
                want = ((np.zeros(n, np.float32) + decoded["a"]) + decoded["b"]) + decoded["c"]
            assert equal(step.sum()["x"], want)
            assert equal(step.tensor("b", "x"), decoded["b"])


def test_entries_of_topk_beyond_the_tensor(make_grads: Make) -> None:
    manifest = Manifest([Tensor("x", "F32", (100,), "topk:40")])
    d = make_grads(manifest)
    with attach(d) as r:
        d.opened("a")
        for step, (at, index) in enumerate([(0, 100), (39, 100), (20, 3), (39, 38)]):
            pairs = np.zeros(40, native._PAIR)
            pairs["index"] = np.arange(40)
            pairs["index"][at] = index
            d.send("a", step, BEGIN, 0, pairs.tobytes())
            with pytest.raises(StepTimeout) as caught:
                r.step(step, deadline=0)
            bad = 8 if (at, index) == (0, 100) else 0
            assert f"tensor 'x' at byte {8 * at + bad - bad}: an entry of topk" in caught.value.missing["a"]


def test_what_sums_go_into(make_grads: Make) -> None:
    d = make_grads()
    with attach(d) as r:
        d.opened("a")
        d.step("a", 1, gradients(1, 1))
        bad: list[tuple[Arrays, type[Exception], str]] = [
            ({"x": np.zeros(1, np.float32)}, KeyError, "no tensor 'x'"),
            ({"n": np.zeros((), np.float32)}, SpecError, "'n' is I64, which is not summed"),
            ({"b": np.zeros(3)}, TensorMismatch, "float64"), ({"b": np.zeros(4, np.float32)}, TensorMismatch, "got f"),
            ({"b": np.zeros(6, np.float32)[::2]}, SpecError, "contiguous"), ({"b": [0.0] * 3}, TensorMismatch, "list"),
            ({"b": np.broadcast_to(np.float32(0), 3)}, SpecError, "contiguous and writable"),
        ]  # fmt: skip
        for out, error, match in bad:
            with pytest.raises(error, match=match):
                r.step(1, deadline=PATIENCE, into=out)
        with r.step(1, deadline=PATIENCE) as step:
            for out, error, match in bad:
                with pytest.raises(error, match=match):
                    step.sum(out)
            assert list(step.sum({"b": np.zeros(3, np.float32)})) == ["b"]
