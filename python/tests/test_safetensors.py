"""safetensors files: written here and read back, here, by the safetensors package and by the daemon's command line."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ingestd import Closed, Manifest, Publisher, SpecError, Tensor, subscribe
from ingestd.dtypes import NUMPY
from ingestd.safetensors import SafeTensors, write

from real import BINARY, PATIENCE, Daemon
from weights_fakes import tensors


def model() -> dict[str, Any]:
    """Every dtype, empty tensors, scalars, and names of all sorts."""
    found: dict[str, Any] = {}
    for i, (name, dtype) in enumerate(NUMPY.items()):
        bits = (np.arange(6 * dtype.itemsize) * 7 + i).astype(np.uint8)
        found[f"{name}.w"] = (bits % 2 if name == "BOOL" else bits).view(dtype).reshape(2, 3)
    found["scalar"] = np.array(-1.5)
    found["empty"] = np.zeros((0, 7), np.float32)
    found['ünïcode "quoted" \\ / <&>'] = np.arange(5, dtype=np.uint8)
    return found


def same(got: Any, want: dict[str, Any]) -> None:
    assert set(got) == set(want)
    for name, array in want.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape
        assert got[name].tobytes() == array.tobytes(), name


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, model(), metadata={"b": "2", "a": "ä"})
    with SafeTensors(path) as file:
        same(file, model())
        assert len(file) == len(model()) and file.metadata == {"a": "ä", "b": "2"}
        assert all(not array.flags.writeable and array.flags.aligned for array in file.values())
        kept = file["F32.w"]
    assert kept.tobytes() == model()["F32.w"].tobytes()
    with pytest.raises(Closed):
        file["F32.w"]
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    assert header % 64 == 0 and len(data) == header + sum(a.nbytes for a in model().values())
    assert oct(path.stat().st_mode & 0o777) == "0o644" and os.listdir(tmp_path) == ["model.safetensors"]
    with SafeTensors(path) as file:
        write(tmp_path / "again", file)
    assert (tmp_path / "again").read_bytes() == data


def test_the_order_is_kept_where_it_can_be(tmp_path: Path) -> None:
    path = tmp_path / "x"
    aligned = {"z": np.zeros(4, np.float32), "a": np.zeros(8, np.uint8), "m": np.zeros(1, np.float64)}
    write(path, aligned)
    assert list(SafeTensors(path)) == ["z", "a", "m"]
    write(path, {"z": np.zeros(3, np.uint8), "a": np.zeros(2, np.float32), "m": np.zeros(1, np.float64)})
    file = SafeTensors(path)
    assert list(file) == ["m", "a", "z"]
    manifest = Manifest([file.manifest["z"], file.manifest["a"]])
    write(path, file, manifest)
    assert list(SafeTensors(path)) == ["a", "z"]


def test_the_package_reads_what_is_written_here(tmp_path: Path) -> None:
    numpy_side = pytest.importorskip("safetensors.numpy", reason="the safetensors package is not installed")
    safetensors = pytest.importorskip("safetensors")
    known = {n: a for n, a in model().items() if not n.startswith(("F8", "BF16"))}  # those that it has for numpy
    write(tmp_path / "x", model() | {}, metadata={"k": "v"})
    with safetensors.safe_open(tmp_path / "x", framework="numpy") as file:
        assert file.metadata() == {"k": "v"} and set(file.keys()) == set(model())
        for name, array in known.items():
            assert file.get_tensor(name).tobytes() == array.tobytes()
    raw = dict(safetensors.deserialize((tmp_path / "x").read_bytes()))
    for name, array in model().items():
        assert bytes(raw[name]["data"]) == array.tobytes() and tuple(raw[name]["shape"]) == array.shape
    write(tmp_path / "x", known)
    same(numpy_side.load_file(tmp_path / "x"), known)


def test_what_the_package_writes_is_read_here(tmp_path: Path) -> None:
    numpy_side = pytest.importorskip("safetensors.numpy", reason="the safetensors package is not installed")
    known = {n: a for n, a in model().items() if not n.startswith(("F8", "BF16"))}
    numpy_side.save_file(known, tmp_path / "x", metadata={"k": "v"})
    with SafeTensors(tmp_path / "x") as file:
        same(file, known)
        assert file.metadata == {"k": "v"}


def raw(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


ENTRY = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        (b"{", b"", "not valid JSON"),
        (b"[]", b"", "not a JSON object"),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', b"", "twice"),
        ({"a": ENTRY}, b"123", "end at byte"),
        ({"a": ENTRY}, b"12345", "end at byte"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [3, 7]}}, b"1234567", "overlaps"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [5, 9]}}, b"123456789", "leaves a hole"),
        ({"a": {**ENTRY, "data_offsets": [1, 5]}}, b"12345", "leaves a hole"),
        ({"a": {**ENTRY, "data_offsets": [0, 5]}}, b"12345", "has 4 bytes, its data_offsets say 5"),
        ({"a": {**ENTRY, "data_offsets": [4, 0]}}, b"1234", "data_offsets"),
        ({"a": {**ENTRY, "dtype": "F4"}}, b"1234", "unknown dtype 'F4'"),
        ({"a": {**ENTRY, "shape": [-1]}}, b"1234", "dimension"),
        ({"a": {**ENTRY, "more": 1}}, b"1234", "unknown field"),
        ({"a": ENTRY, "__metadata__": {"k": 1}}, b"1234", "__metadata__"),
    ],
)
def test_refusals(tmp_path: Path, header: Any, data: bytes, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        SafeTensors(raw(tmp_path / "x", header, data))


def test_headers_of_wrong_length(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for data, says in (
        (b"", "8 and a header"),
        (b"\x02\0\0\0\0\0\0", "8 and a header"),
        ((100_000_001).to_bytes(8, "little"), "at most 100000000"),
        ((100_000_000).to_bytes(8, "little") + b"{}", "cut short"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "at most"),
    ):
        path.write_bytes(data)
        with pytest.raises(SpecError, match=says):
            SafeTensors(path)
    with pytest.raises(FileNotFoundError):
        SafeTensors(tmp_path / "none")


def test_an_index(tmp_path: Path) -> None:
    write(tmp_path / "1.safetensors", {"a": np.arange(3)}, metadata={"format": "pt", "n": "1"})
    write(tmp_path / "2.safetensors", {"b": np.arange(4.0)}, metadata={"n": "2"})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"b": "2.safetensors", "a": "1.safetensors"}}))
    with SafeTensors(index) as file:
        same(file, {"a": np.arange(3), "b": np.arange(4.0)})
        assert list(file) == ["a", "b"] and file.metadata == {"format": "pt", "n": "2"}
    index.write_text(json.dumps({"weight_map": {"b": "../2.safetensors"}}))
    with pytest.raises(SpecError, match="leads out of the folder"):
        SafeTensors(index)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"before")
    a = np.zeros(3, np.float32)
    for call, error in (
        (lambda: write(path, {"__metadata__": a}), SpecError),
        (lambda: write(path, {"a": a}, Manifest([Tensor("a", "F32", (3,), "bf16")])), SpecError),
        (lambda: write(path, {"a": a}, Manifest([Tensor("a", "F32", (4,))])), SpecError),
        (lambda: write(path, {"a": a}, Manifest([Tensor("b", "F32", (3,))])), KeyError),
        (lambda: write(path, {"a": a}, metadata={"k": 1}), SpecError),  # type: ignore[dict-item]
    ):
        with pytest.raises(error):
            call()
        assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["x"]


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    if not os.path.exists(BINARY):
        pytest.fail(f"no daemon at {BINARY}: run `make build`, or name it in INGESTD_BIN")
    with tempfile.TemporaryDirectory(prefix="ingestd-") as folder:
        d = Daemon(Path(folder), [{"name": "w", "kind": "weights"}])
        yield d
        d.close()


def run(*arguments: str) -> None:
    done = subprocess.run([BINARY, "weights", *arguments], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arrays", [model(), tensors(3)], ids=["model", "tensors"])
def test_the_command_line_writes_the_same_bytes(tmp_path: Path, daemon: Daemon, arrays: dict[str, Any]) -> None:
    safetensors = pytest.importorskip("safetensors", reason="the safetensors package is not installed")
    mine, theirs = tmp_path / "mine.safetensors", tmp_path / "theirs.safetensors"
    write(mine, arrays)
    run("publish", "--table", "w", "--addr", daemon.unix, str(mine))
    for address in (daemon.unix, daemon.tcp):
        with subscribe(address, "w") as sub, sub.wait(deadline=PATIENCE) as w:
            same(w, arrays)
            w.verify()
            write(tmp_path / "copy", w)
        theirs.unlink(missing_ok=True)
        run("get", "--table", "w", "--addr", address, "-o", str(theirs))
        with SafeTensors(theirs) as file:
            same(file, arrays)
        raw = dict(safetensors.deserialize(theirs.read_bytes()))
        assert all(bytes(raw[name]["data"]) == array.tobytes() for name, array in arrays.items())
        assert (int.from_bytes(theirs.read_bytes()[:8], "little") + 8) % 64 == 0
        assert theirs.read_bytes() == (tmp_path / "copy").read_bytes()


def test_a_file_is_published(tmp_path: Path, daemon: Daemon) -> None:
    write(tmp_path / "x", tensors(4))
    with SafeTensors(tmp_path / "x") as file, Publisher(daemon.tcp, "w", file.manifest) as pub:
        pub.publish(file, deadline=PATIENCE)
    with subscribe(daemon.unix, "w") as sub, sub.latest() as w:
        same(w, tensors(4))
