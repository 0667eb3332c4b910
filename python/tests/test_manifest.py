"""Manifests: their rules, fingerprints and places, and the headers of safetensors files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ingestd import Difference, SpecError
from ingestd.manifest import DATA_BYTES_MAX, Manifest, Tensor, diff

MLP = (
    '{"tensors":[{"name":"layers.0.w","dtype":"F32","shape":[512,64]},'
    '{"name":"layers.0.b","dtype":"F32","shape":[512],"encoding":"bf16"}],"metadata":{"model":"mlp"}}'
)


def test_the_documented_manifest() -> None:
    m = Manifest.parse(MLP)
    assert m.json() == MLP and Manifest.parse(m.json().encode()) == m
    assert [str(t) for t in m] == ["layers.0.w:F32[512,64]", "layers.0.b:F32[512] bf16"]
    assert (m.offsets, m.ends, m.data_bytes) == ((0, 131072), (131072, 132096), 132096)
    assert (m.metadata, m.names, len(m)) == ({"model": "mlp"}, ["layers.0.w", "layers.0.b"], 2)
    assert m["layers.0.b"] is m[1] and "layers.0.b" in m and "x" not in m
    with pytest.raises(KeyError, match="no tensor 'x'; there are 'layers"):
        m["x"]


def test_the_fingerprint_is_of_the_canonical_bytes() -> None:
    m = Manifest.parse(MLP)
    want = b"ingestd-manifest-1\n" + struct.pack("<I", 2)
    want += struct.pack("<H", 10) + b"layers.0.w\x03F32" + struct.pack("<BQQ", 2, 512, 64) + b"\x00"
    want += struct.pack("<H", 10) + b"layers.0.b\x03F32" + struct.pack("<BQ", 1, 512) + b"\x04bf16"
    assert m.canonical == want
    assert m.id == int.from_bytes(bytes.fromhex(m.fingerprint)[:8], "little")
    assert Manifest(m.tensors).fingerprint == m.fingerprint  # metadata does not count
    assert m.with_encodings(None).fingerprint != m.fingerprint


def test_places_of_tensors() -> None:
    shapes: list[tuple[int, ...]] = [(0,), (1,), (), (64,), (65,), (3, 0), (1,), (0, 7)]
    m = Manifest(Tensor(f"t{i}", "F32", shape) for i, shape in enumerate(shapes))
    assert m.offsets == (0, 0, 256, 512, 768, 1280, 1280, 1536)
    assert m.data_bytes == 1536
    assert [m.at(x) for x in (0, 3, 4, 255, 256, 767, 1027, 1028, 1280, 1284)] == [1, 1, 2, 2, 2, 3, 4, 5, 6, 7]
    assert Manifest([Tensor("empty", "U8", (0,))]).data_bytes == 0


@pytest.mark.parametrize(
    "encoding, shape, want",
    [
        ("", (10,), 40), ("bf16", (10,), 20), ("f16", (), 2), ("f8_e4m3", (10,), 266), ("f8_e5m2", (0, 3), 0),
        ("topk:3", (10,), 24), ("topk:10", (2, 5), 80), ("bf16", (0,), 0),
    ],
)  # fmt: skip
def test_encoded_bytes(encoding: str, shape: tuple[int, ...], want: int) -> None:
    assert Tensor("t", "F32", shape, encoding).encoded_bytes == want


@pytest.mark.parametrize(
    "tensor, match",
    [
        (("", "F32"), "has 0 bytes, want 1 to 512"), (("x" * 513, "F32"), "513 bytes"), (("a\n", "F32"), "control"),
        (("\ud800", "F32"), "Unicode"), (("t", "F31"), "unknown dtype"), (("t", "F32", (1,) * 9), "9 dimensions"),
        (("t", "F32", (-1,)), "dimension -1"), (("t", "F32", (True,)), "dimension True"),
        (("t", "U8", (DATA_BYTES_MAX // 2, 3)), "at most"), (("t", "F16", (2,), "bf16"), "only F32"),
        (("t", "F32", (2,), "zip"), "unknown encoding"), (("t", "F32", (2,), "bf16:"), "unknown encoding"),
        (("t", "F32", (2,), "topk:0"), "unknown encoding"), (("t", "F32", (2,), "topk:01"), "unknown encoding"),
        (("t", "F32", (2,), "topk:3"), "2 elements"), (("t", "F32", (0,), "topk:1"), "0 elements"),
        (("t", "F32", (1 << 32,), "topk:1"), "topk allows at most"),
    ],
)  # fmt: skip
def test_tensors_that_break_a_rule(tensor: tuple[Any, ...], match: str) -> None:
    with pytest.raises(SpecError, match=match):
        Tensor(*tensor)


def test_limits() -> None:
    Tensor("x" * 512, "U8", (1,) * 8)
    assert Tensor("t", "U8", (DATA_BYTES_MAX,)).nbytes == DATA_BYTES_MAX
    Tensor("t", "F32", ((1 << 32) - 2,), "topk:1")
    with pytest.raises(SpecError, match="topk allows"):
        Tensor("t", "F32", ((1 << 32) - 1,), "topk:1")
    assert len(Manifest(Tensor(str(i), "U8") for i in range(48_000))) == 48_000  # more have too long a text
    with pytest.raises(SpecError, match="1 to 65536 tensors"):
        Manifest(Tensor(str(i), "U8") for i in range(65_537))
    with pytest.raises(SpecError, match="1 to 65536 tensors"):
        Manifest([])
    with pytest.raises(SpecError, match="appears twice"):
        Manifest([Tensor("a", "U8"), Tensor("a", "U8")])
    half = Tensor("a", "U8", (DATA_BYTES_MAX // 2,))
    assert Manifest([half, Tensor("b", "U8", half.shape)]).data_bytes == DATA_BYTES_MAX
    with pytest.raises(SpecError, match="the tensors have"):
        Manifest([half, Tensor("b", "U8", half.shape), Tensor("c", "U8")])
    Manifest([Tensor("a", "U8")], {str(i): "" for i in range(1024)})
    with pytest.raises(SpecError, match="1025 entries"):
        Manifest([Tensor("a", "U8")], {str(i): "" for i in range(1025)})
    empty = len(Manifest([Tensor("a", "U8")], {"k": ""}).json())
    Manifest([Tensor("a", "U8")], {"k": "x" * (2_000_000 - empty)})
    with pytest.raises(SpecError, match="bytes of text"):
        Manifest([Tensor("a", "U8")], {"k": "x" * (2_000_001 - empty)})


@pytest.mark.parametrize(
    "text, match",
    [
        ("", "not valid JSON"), ("[]", "not an object"), ("{}", "no field 'tensors'"), ('{"tensors":{}}', "an array"),
        ('{"tensors":[]}', "1 to 65536"), ('{"tensors":[1]}', "tensor 0 is not an object"),
        ('{"tensors":[{"name":"a","dtype":"U8"}]}', "no field 'shape'"),
        ('{"tensors":[{"name":"a","dtype":"U8","shape":[],"x":1}]}', "unknown field 'x'"),
        ('{"tensors":[{"name":"a","name":"a","dtype":"U8","shape":[]}]}', "twice"),
        ('{"tensors":[{"name":"a","dtype":"U8","shape":[1.0]}]}', "dimension 1.0"),
        ('{"tensors":[{"name":"a","dtype":"U8","shape":[NaN]}]}', "NaN"),
        ('{"tensors":[{"name":"a","dtype":"U8","shape":3}]}', "not an array"),
        ('{"tensors":[{"name":1,"dtype":"U8","shape":[]}]}', "not text"),
        ('{"tensors":[{"name":"a","dtype":"F32","shape":[],"encoding":""}]}', "empty; leave it out"),
        ('{"tensors":[{"name":"a","dtype":"F32","shape":[],"encoding":null}]}', "not text"),
        ('{"tensors":[{"name":"a","dtype":"U8","shape":[]}],"metadata":[]}', "not an object"),
        ('{"tensors":[{"name":"a","dtype":"U8","shape":[]}],"metadata":{"a":1}}', "not text"),
        ('{"tensors":[{"name":"a","dtype":"U8","shape":[]}]} x', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)  # fmt: skip
def test_text_that_is_refused(text: str, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        Manifest.parse(text)


def test_from_arrays() -> None:
    arrays = {"w": np.zeros((2, 3), np.float32), "n": np.int64(3), "h": np.zeros(4, np.float16), "e": np.zeros((0, 2))}
    m = Manifest.from_arrays(arrays, {"w": "topk:2"}, {"a": "b"})
    assert [str(t) for t in m] == ["w:F32[2,3] topk:2", "n:I64", "h:F16[4]", "e:F64[0,2]"]
    assert m.metadata == {"a": "b"}
    all_of_them = Manifest.from_arrays({**arrays, "z": np.zeros(0, np.float32)}, "topk:100")
    assert [t.encoding for t in all_of_them] == ["topk:6", "", "", "", ""]
    with pytest.raises(SpecError, match="'x', which is no tensor"):
        Manifest.from_arrays(arrays, {"x": "bf16"})
    with pytest.raises(SpecError, match="complex"):
        Manifest.from_arrays({"c": np.zeros(2, np.complex64)})


def test_from_arrays_of_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    m = Manifest.from_arrays({"b": torch.zeros(3, dtype=torch.bfloat16), "p": torch.nn.Parameter(torch.zeros(2))})
    assert [str(t) for t in m] == ["b:BF16[3]", "p:F32[2]"]


def test_diff() -> None:
    def of(*tensors: Tensor) -> Manifest:
        return Manifest(tensors)

    a, b, c = Tensor("a", "F32", (2,)), Tensor("b", "U8"), Tensor("c", "F32", (2,), "bf16")
    assert diff(of(a, b), of(a, b)) == []
    assert diff(of(a, c), of(b, Tensor("c", "F32", (2,)))) == [
        Difference("b", "", "U8"), Difference("c", "F32[2] bf16", "F32[2]"), Difference("a", "F32[2]", ""),
    ]  # fmt: skip
    assert diff(of(b, a), of(a, b)) == [
        Difference("a", "F32[2] at index 1", "F32[2] at index 0"), Difference("b", "U8 at index 0", "U8 at index 1"),
    ]  # fmt: skip


def safetensors(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_from_a_safetensors_file(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"}, "b": entry("F32", [2], 2, 10), "a": entry("BF16", [1], 0, 2),
        "e": entry("I8", [0], 10, 10),
    }  # fmt: skip
    file = tmp_path / "m.safetensors"
    file.write_bytes(safetensors(header, bytes(10)))
    m = Manifest.from_safetensors(file)
    assert [str(t) for t in m] == ["a:BF16[1]", "b:F32[2]", "e:I8[0]"] and m.metadata == {"format": "pt"}
    assert Manifest.from_safetensors(str(file), {"b": "f16"})["b"].encoding == "f16"


@pytest.mark.parametrize(
    "data, match",
    [
        (b"", "has 0 bytes"), (struct.pack("<Q", 100_000_001), "100000001 bytes, at most"),
        (struct.pack("<Q", 10) + b"{}", "only 2 follow"), (safetensors(b"{]", b""), "not valid JSON"),
        (safetensors([], b""), "not a JSON object"), (safetensors({"__metadata__": {"a": 1}}, b""), "texts"),
        (safetensors({"a": entry("U8", [3], 0, 3)}, bytes(2)), "end at byte"),
        (safetensors({"a": entry("U8", [3], 0, 3)}, bytes(4)), "the file has"),
        (safetensors({"a": entry("U8", [3], 0, 4)}, bytes(4)), "3 bytes, its data_offsets say 4"),
        (safetensors({"a": entry("U8", [3], 3, 0)}, bytes(3)), "say -3"),
        (safetensors({"a": entry("U8", [2], 1, 3)}, bytes(3)), "leaves a hole: it begins at 1"),
        (safetensors({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 3, 5)}, bytes(5)), "'a' ends at 2"),
        (safetensors({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, bytes(3)), "'b' overlaps"),
        (safetensors({"a": {"dtype": "U8", "shape": [1]}}, bytes(1)), "no field 'data_offsets'"),
        (safetensors({"a": {**entry("U8", [1], 0, 1), "x": 1}}, bytes(1)), "unknown field"),
        (safetensors(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', b""), "twice"),
    ],
)  # fmt: skip
def test_safetensors_headers_that_are_refused(tmp_path: Path, data: bytes, match: str) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(data)
    with pytest.raises(SpecError, match=match):
        Manifest.from_safetensors(file)


def test_from_shards(tmp_path: Path) -> None:
    (tmp_path / "m-1").write_bytes(safetensors({"b": entry("U8", [1], 0, 1), "a": entry("U8", [1], 1, 2)}, bytes(2)))
    (tmp_path / "m-2").write_bytes(safetensors({"c": entry("U8", [1], 0, 1)}, bytes(1)))
    index = tmp_path / "m.index.json"

    def say(weights: Any) -> None:
        index.write_text(json.dumps({"metadata": {}, "weight_map": weights}))

    good = {"a": "m-1", "b": "m-1", "c": "m-2"}
    say(good)
    assert Manifest.from_safetensors(index).names == ["b", "a", "c"]
    for weights, match in [
        ({**good, "c": "m-1"}, "'c' should be in m-1, and is in"),
        ({**good, "d": "m-2"}, "in no file"), ({**good, "c": "../m-2"}, "leads out"), ({}, "weight_map"),
        ({"a": "m-1", "c": "m-2"}, "'b' of m-1 is not in the index"),
    ]:  # fmt: skip
        say(weights)
        with pytest.raises(SpecError, match=match):
            Manifest.from_safetensors(index)
    (tmp_path / "m-2").write_bytes(safetensors({"a": entry("U8", [1], 0, 1)}, bytes(1)))
    say({**good, "c": "m-2"})
    with pytest.raises(SpecError, match="'a' is in m-1 and in m-2"):
        Manifest.from_safetensors(index)
