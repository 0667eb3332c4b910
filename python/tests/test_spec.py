"""Spec: the forms it is read from and written to, fingerprints, trees, and the checks of what is pushed."""

from __future__ import annotations

import collections
import hashlib
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ingestd import Difference, Leaf, Spec, SpecError, __version__, diff
from ingestd.dtypes import ITEMSIZE, NUMPY, RAW
from ingestd.version import CLIENT

DIGITS = "image:F32[8,8],label:I32"
DIGITS_FINGERPRINT = "0e343799944 80fac d5bbe2e29cbd8a2d b47fcdc7299e0177 5ac7af25c287da9e".replace(" ", "")


def test_text_and_json_forms() -> None:
    s = Spec.parse(DIGITS)
    assert s.leaves == (Leaf("image", "F32", (8, 8)), Leaf("label", "I32"))
    assert s.sample_bytes == 260
    assert s.text() == str(s) == DIGITS
    assert s.json() == (
        '{"leaves":[{"name":"image","dtype":"F32","shape":[8,8]},{"name":"label","dtype":"I32","shape":[]}]}'
    )
    assert Spec.parse(s.json()) == s == Spec.parse(s.json().encode())
    assert hash(Spec.parse(DIGITS)) == hash(s)


def test_fingerprint_is_the_documented_hash() -> None:
    s = Spec.parse(DIGITS)
    by_hand = (
        b"ingestd-spec-1\n" + b"\x02\0\0\0"
        b"\x05\0image" + b"\x03F32" + b"\x02" + b"\x08\0\0\0\0\0\0\0" * 2 + b"\x05\0label" + b"\x03I32" + b"\0"
    )
    assert s.canonical == by_hand
    assert s.fingerprint == hashlib.sha256(by_hand).hexdigest() == DIGITS_FINGERPRINT
    others = ["a:U8", "b:U8", "a:I8", "a:U8[1]", "a:U8[2,3]", "a:U8[3,2]", "a:U8[6]", "a:U8,b:U8", "b:U8,a:U8"]
    assert len({Spec.parse(t).fingerprint for t in others}) == len(others)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("obs/(0)", "obs/(0):U8"),
        ("[0]", '"[0]":U8'),
        ("a b", '"a b":U8'),
        ('say "hi"\\', '"say \\"hi\\"\\\\":U8'),
        ("a,b:c", '"a,b:c":U8'),
        ("größe/日本", "größe/日本:U8"),
        ("nb\u00a0sp", '"nb\\u00a0sp":U8'),
        ("{x", '"{x":U8'),
        (".", ".:U8"),
    ],
)
def test_names_in_the_text_form(name: str, text: str) -> None:
    s = Spec([Leaf(name, "U8")])
    assert s.text() == text
    assert Spec.parse(text) == s
    assert Spec.parse(s.json()) == s


def test_blanks_and_escapes_in_the_text_form() -> None:
    s = Spec.parse(' "\\x61\\142\\u0063" : F32 [ ] ,\n\tb:I8[ 2 , 3 ] ')
    assert s.leaves == (Leaf("abc", "F32"), Leaf("b", "I8", (2, 3)))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cannot read the spec"),
        ("a", "name:DTYPE"),
        ("a:", "cannot read"),
        (":F32", "cannot read"),
        ("a:F32[", "cannot read"),
        ("a:F32]", "cannot read"),
        ("a:F32,", "character 6"),
        ("a:F32 b:I32", "cannot read"),
        ("[0]:F32", "double quotes"),
        ('"a:F32', "cannot read"),
        ('"a\\q":F32', "escape"),
        ('"\\xff":F32', "not UTF-8"),
        ('"\\ud800":F32', "escape"),
        ("a:f32", "unknown dtype 'f32'; use one of BOOL"),
        ("a:F32[1.5]", "whole numbers"),
        ("a:F32[2,]", "whole numbers"),
        ("a:F32[-1]", "whole numbers"),
        ("a:F32[0]", "1 or more"),
        ("a:F32[1,1,1,1,1,1,1,1,1]", "9 dimensions, at most 8"),
        ("a:U8[4294967297]", "at most 4294967296"),
        ("a:U8[9223372036854775807,9223372036854775807]", "at most 4294967296"),
        ("a:U8[4294967296],b:U8", "a sample has 4294967297 bytes"),
        ("a:F32,a:I32", "'a' appears twice"),
        ('"":F32', "has 0 bytes"),
        ("n" * 129 + ":F32", "129 bytes"),
        ("é" * 65 + ":F32", "130 bytes"),
        ('"a\\n":F32', "control character"),
        (",".join(f"l{i}:U8" for i in range(4097)), "4096 leaves"),
        ("{", "not valid JSON"),
        ("{}", "no field 'leaves'"),
        ('{"leaves":[]}', "1 to 4096"),
        ('{"leaves":3}', "not an array"),
        ('{"leaves":[3]}', "not an object"),
        ('{"leaves":[],"x":1}', "unknown field 'x'"),
        ('{"leaves":[{"name":"a","dtype":"U8"}]}', "no field 'shape'"),
        ('{"leaves":[{"name":"a","dtype":"U8","shape":[],"z":0}]}', "unknown field 'z'"),
        ('{"leaves":[{"name":"a","name":"b","dtype":"U8","shape":[]}]}', "twice"),
        ('{"leaves":[{"name":1,"dtype":"U8","shape":[]}]}', "not text"),
        ('{"leaves":[{"name":"a","dtype":1,"shape":[]}]}', "not text"),
        ('{"leaves":[{"name":"a","dtype":"U8","shape":3}]}', "not an array"),
        ('{"leaves":[{"name":"a","dtype":"U8","shape":[2.0]}]}', "2.0"),
        ('{"leaves":[{"name":"a","dtype":"U8","shape":[true]}]}', "True"),
        ('{"leaves":[{"name":"\\ud800","dtype":"U8","shape":[]}]}', "not valid Unicode"),
        ('{"leaves":' + "[" * 100_000, "not valid JSON"),
        ("{" + " " * 2_097_152, "at most 2097152"),
    ],
)
def test_bad_specs_are_refused_with_a_reason(text: str, says: str) -> None:
    with pytest.raises(SpecError, match=re.escape(says)):
        Spec.parse(text)
    with pytest.raises(ValueError):
        Spec.parse(text)


def test_limits_are_reachable() -> None:
    assert Spec.parse("a:U8[4294967296]").sample_bytes == 1 << 32
    assert len(Spec.parse(",".join(f"l{i}:U8" for i in range(4096)))) == 4096
    assert Spec.parse("n" * 128 + ":F32[1,1,1,1,1,1,1,1]").sample_bytes == 4
    with pytest.raises(SpecError, match="not UTF-8"):
        Spec.parse(b"\xff:U8")


def test_trees_come_back_as_they_were() -> None:
    a, b, c, d = (np.full((2,), i, np.float32) for i in range(4))
    tree = {"obs": ({"rgb": a, "depth": [b, c]}, d), "reward": np.float64(0.5), "done": True, "step": 7}
    s = Spec.from_example(tree)
    assert [leaf.name for leaf in s.leaves] == [
        "obs/(0)/rgb", "obs/(0)/depth/[0]", "obs/(0)/depth/[1]", "obs/(1)", "reward", "done", "step",
    ]  # fmt: skip
    assert [leaf.layout for leaf in s.leaves] == ["F32[2]"] * 4 + ["F64", "BOOL", "I64"]
    leaves = s.flatten(tree)
    back = Spec.parse(s.text()).unflatten(leaves)
    assert back["obs"][0]["depth"][1] is leaves[2]
    assert type(back["obs"]) is tuple and type(back["obs"][0]["depth"]) is list
    assert back["step"] == 7 and back["done"].dtype == np.bool_
    with pytest.raises(SpecError, match="got 2 leaves, the spec has 7"):
        s.unflatten(leaves[:2])


@pytest.mark.parametrize("tree", [np.zeros(3), [np.zeros(3)], (np.int8(1), [np.int8(2)]), {"a": {"b": (np.int8(1),)}}])
def test_tree_shapes(tree: Any) -> None:
    s = Spec.from_example(tree)
    back = Spec.parse(s.json()).unflatten(s.flatten(tree))
    assert str(back) == str(tree) or repr(s.flatten(back)) == repr(s.flatten(tree))
    assert type(back) is type(tree)


def test_a_single_array_is_named_by_a_dot() -> None:
    assert Spec.from_example(np.zeros((2, 3), np.int8)).text() == ".:I8[2,3]"
    assert Spec.from_example({"a": {".": 1.0}}).text() == "a/.:F64"


def test_named_tuples_come_back_as_tuples() -> None:
    point = collections.namedtuple("point", "x y")
    s = Spec.from_example(point(np.int8(1), np.int8(2)))
    assert s.text() == "(0):I8,(1):I8"
    assert s.unflatten(s.flatten(point(np.int8(3), np.int8(4)))) == (3, 4)


@pytest.mark.parametrize("text", ["a:U8,a/b:U8", "a/b:U8,a:U8", '"[1]":U8', '"[0]":U8,x:U8', '(0):U8,"[1]":U8'])
def test_names_that_make_no_tree_make_a_flat_dict(text: str) -> None:
    s = Spec.parse(text)
    tree = {leaf.name: np.uint8(i) for i, leaf in enumerate(s.leaves)}
    assert s.unflatten(s.flatten(tree)) == tree


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({}, "empty dict at the top"),
        ({"a": []}, "empty list at 'a'"),
        ({"a": None}, "None at"),
        ({1: np.zeros(2)}, "is not text"),
        ({"a/b": np.zeros(2)}, "contains '/'"),
        ({"[0]": np.zeros(2)}, "read back as structure"),
        ({".": np.zeros(2)}, "read back as structure"),
        ({"": np.zeros(2)}, "has 0 bytes"),
        ({"a": np.zeros(2, complex)}, "complex128, which no leaf can have"),
        ({"a": np.zeros(2, ">f4")}, "big-endian"),
        ({"a": "text"}, "is a str"),
        ({"a": object()}, "is a object"),
        ({"a": np.array(["x"])}, "which no leaf can have"),
        ({"a": np.zeros((0, 3))}, "1 or more"),
        ({"a": 1 << 64}, "does not fit into 64 bits"),
    ],
)
def test_examples_that_cannot_be_samples(tree: Any, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        Spec.from_example(tree)


def test_what_is_pushed_is_checked() -> None:
    s = Spec.parse("image:F32[2,2],label:I16,obs/(0):U8[3],obs/(1):BOOL")
    good = {"image": np.zeros((2, 2), np.float32), "label": 3, "obs": (np.zeros(3, np.uint8), True)}
    assert [a.dtype.name for a in s.flatten(good)] == ["float32", "int16", "uint8", "bool"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"image": np.zeros((2, 2))}, r"'image': got dtype F64 \(float64\), want F32"),
        ({"image": np.zeros((2, 3), np.float32)}, r"got shape \(2, 3\), want \(2, 2\)"),
        ({"image": np.zeros((2, 2), ">f4")}, "big-endian"),
        ({"image": np.zeros((2, 2), np.int32)}, "want F32"),
        ({"image": 1.0}, "single number"),
        ({"label": 1 << 15}, "32768 does not fit into I16"),
        ({"label": 1.0}, "got float 1.0, want I16"),
        ({"label": True}, "got bool True, want I16"),
        ({"label": np.int64(3)}, "want I16"),
        ({"obs": [np.zeros(3, np.uint8), True]}, "at 'obs': got list, want tuple of 2"),
        ({"obs": (np.zeros(3, np.uint8),)}, "got 1 items, want 2"),
        ({"obs": 3}, "at 'obs': got int, want tuple"),
        ({"more": 1}, "unexpected key 'more'"),
    ]
    for change, says in cases:
        with pytest.raises(SpecError, match=says):
            s.flatten({**good, **change})
    with pytest.raises(SpecError, match="key 'label' is missing"):
        s.flatten({"image": good["image"], "obs": good["obs"]})
    with pytest.raises(SpecError, match="want a mapping with keys 'image', 'label', 'obs'"):
        s.flatten([1, 2])
    with pytest.raises(SpecError, match="does not fit into F16"):
        Spec.parse("a:F16").flatten({"a": 1e9})
    assert Spec.parse("a:F16").flatten({"a": float("inf")})[0] == np.inf


def test_batches_are_checked() -> None:
    s = Spec.parse("image:F32[2,2],label:I16")
    n, leaves = s.flatten_batch({"image": np.zeros((5, 2, 2), np.float32), "label": np.zeros(5, np.int16)})
    assert n == 5 and leaves[1].shape == (5,)
    for change, says in [
        ({"label": np.zeros(4, np.int16)}, "holds 4 samples, leaf 'image' holds 5"),
        ({"label": np.int16(1)}, "no leading axis"),
        ({"label": np.zeros((5, 1), np.int16)}, r"got shape \(5, 1\), want \(5,\)"),
    ]:
        with pytest.raises(SpecError, match=says):
            s.flatten_batch({"image": np.zeros((5, 2, 2), np.float32), **change})


def test_every_dtype_round_trips() -> None:
    for name, size in ITEMSIZE.items():
        assert NUMPY[name].itemsize == size
        s = Spec.parse(f"x:{name}[2]")
        bits = np.arange(2 * size, dtype=np.uint8) % 2
        array = bits.view(NUMPY[name])
        assert Spec.from_example({"x": array}) == s or name in RAW
        assert s.flatten({"x": array})[0].tobytes() == bits.tobytes()


def test_low_precision_as_raw_bits() -> None:
    s = Spec.parse("a:BF16[2],b:F8_E4M3,c:F8_E5M2")
    leaves = s.flatten({"a": np.array([0x3F80, 0], np.uint16), "b": np.uint8(1), "c": np.uint8(2)})
    assert [a.dtype for a in leaves] == [NUMPY["BF16"], NUMPY["F8_E4M3"], NUMPY["F8_E5M2"]]
    assert leaves[0].tobytes() == b"\x80\x3f\0\0"


def test_ml_dtypes() -> None:
    ml = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed, so BF16 and FP8 are raw bits here")
    tree = {"a": np.ones(2, ml.bfloat16), "b": np.ones(1, ml.float8_e4m3fn), "c": np.ones(1, ml.float8_e5m2)}
    s = Spec.from_example(tree)
    assert s.text() == "a:BF16[2],b:F8_E4M3[1],c:F8_E5M2[1]"
    assert s.flatten(tree)[0].tobytes() == b"\x80\x3f\x80\x3f"
    assert Spec.parse("a:BF16").flatten({"a": 1.0})[0].tobytes() == b"\x80\x3f"


class Jax:
    """Like a JAX array: no numpy array, but gives one."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.data


def test_other_array_types() -> None:
    data = np.zeros((2, 2), np.float32)
    s = Spec.from_example({"a": Jax(data)})
    assert s.text() == "a:F32[2,2]"
    assert s.flatten({"a": Jax(data)})[0] is data
    with pytest.raises(SpecError, match="want F32"):
        s.flatten({"a": Jax(np.zeros((2, 2)))})


def test_torch_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    # A stand-in with torch's ways: bfloat16 has no numpy(), devices other than the cpu have none either.
    class Tensor:
        __module__ = "torch"

        def __init__(self, data: Any, dtype: str, device: str = "cpu") -> None:
            self.data, self.dtype, self.device = data, dtype, device

        def detach(self) -> Tensor:
            return self

        def view(self, dtype: str) -> Tensor:
            return Tensor(self.data, f"torch.{dtype}")

        def numpy(self) -> Any:
            if self.dtype == "torch.bfloat16":
                raise TypeError("Got unsupported ScalarType BFloat16")
            return self.data

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(int16="int16", uint8="uint8"))
    bits = np.array([0x3F80], np.int16)
    assert Spec.from_example({"w": Tensor(np.zeros(2, np.float32), "torch.float32")}).text() == "w:F32[2]"
    assert Spec.parse("w:BF16[1]").flatten({"w": Tensor(bits, "torch.bfloat16")})[0].tobytes() == b"\x80\x3f"
    with pytest.raises(SpecError, match="tensor on cuda:0; copy it to the host first"):
        Spec.from_example({"w": Tensor(bits, "torch.float32", "cuda:0")})


def test_diff() -> None:
    want = Spec.parse("a:F32[2,3],b:I32,c:U8")
    assert diff(want, want) == []
    assert Spec.parse("a:F32[3,2],b:I32,d:U8").diff(want) == [
        Difference("a", "F32[3,2]", "F32[2,3]"),
        Difference("c", "", "U8"),
        Difference("d", "U8", ""),
    ]
    assert Spec.parse("b:I32,a:F32[2,3],c:U8").diff(want) == [
        Difference("a", "F32[2,3] at index 1", "F32[2,3] at index 0"),
        Difference("b", "I32 at index 0", "I32 at index 1"),
    ]
    assert Spec.parse("x:U8,a:F32[2,3],b:I32,c:U8").diff(want) == [Difference("x", "U8", "")]
    assert str(Difference("a", "", "U8")) == "leaf 'a' is missing (want U8)"


def test_the_version_is_that_of_the_package() -> None:
    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text()
    assert f'\nversion = "{__version__}"\n' in text
    assert f"ingestd-python/{__version__}" == CLIENT
