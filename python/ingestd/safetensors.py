"""safetensors files: read by mapping them, and written so that their data starts on 64 bytes.

::

    with SafeTensors("model.safetensors") as file:   # or an index: model.safetensors.index.json
        with Publisher(address, "weights", file.manifest) as pub:
            pub.publish(file)                        # a mapping of names and read-only arrays
    write("copy.safetensors", sub.latest())

Everything that a header says is checked before it is used: every byte of the data belongs to exactly one tensor, whose
length is that of its shape and dtype. Format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from .dtypes import ITEMSIZE
from .errors import Closed, SpecError
from .manifest import Manifest, read_safetensors_header, read_safetensors_index
from .spec import Array
from .weights_draft import bytes_of

__all__ = ["SafeTensors", "write"]

DATA_ALIGN = 64  # what the data of files that write() makes starts on
HEADER_BYTES_MAX = 100_000_000
_METADATA = "__metadata__"


class SafeTensors(Mapping[str, Array]):
    """A file, or all files that an index (``*.json``) names, mapped: read-only arrays by name.

    Tensors are in the order in which they lie in the file, files in the order of their names. Arrays stay valid after
    :meth:`close`; a file that is cut short meanwhile ends the process with SIGBUS, so replace files by renaming, as
    :func:`write` does. Raises SpecError that says what is wrong with a file, OSError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        self.path = path
        self._arrays: dict[str, tuple[Any, int]] | None = {}
        tensors = []
        metadata: dict[str, str] = {}
        for name in read_safetensors_index(path) if path.suffix == ".json" else [path]:
            with name.open("rb") as file:
                header = read_safetensors_header(file)
                size = os.fstat(file.fileno()).st_size
                memory = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) if header.tensors else None
            for placed in header.tensors:
                if placed.end > size:
                    raise SpecError(f"{name} was cut short while it was read")
                self._arrays[placed.tensor.name] = memory, placed.begin
                tensors.append(placed.tensor)
            metadata.update(header.metadata)
        #: the tensors; their metadata is the files'
        self.manifest = Manifest(tensors, metadata)

    @property
    def metadata(self) -> dict[str, str]:
        """The files' ``__metadata__``; of several files, what the last one says."""
        return self.manifest.metadata

    def __getitem__(self, name: str) -> Array:
        """The tensor's array, read-only; not aligned where the file does not align it. Raises KeyError, Closed."""
        tensor = self.manifest[name]
        if self._arrays is None:
            raise Closed(f"{self.path} is closed")
        memory, begin = self._arrays[name]
        return np.ndarray(tensor.shape, tensor.numpy_dtype, buffer=memory, offset=begin)

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest.names)

    def __len__(self) -> int:
        return len(self.manifest)

    def close(self) -> None:
        """Lets go of the files, as soon as no array of theirs is in use."""
        self._arrays = None

    def __enter__(self) -> SafeTensors:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SafeTensors {self.path}: {len(self)} tensors>"


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    manifest: Manifest | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors into one file: a generation of weights, or a dict of numpy, torch (CPU) or JAX arrays.

    ``manifest`` says their order and dtypes (None: as in ``tensors``), ``metadata`` what stands beside them (None: the
    manifest's). The file is there whole or not at all: it is written beside its place, to the disk, and then renamed,
    over a file that may be there. Tensors lie in order, without holes, as the format demands, unless that would put
    one where its elements are not aligned; then those of larger elements come first.

    Raises SpecError, KeyError, OSError.
    """
    if manifest is None:
        found = getattr(tensors, "manifest", None)
        manifest = found if isinstance(found, Manifest) else Manifest.from_arrays(tensors)
    header, order = _header(manifest, manifest.metadata if metadata is None else metadata)
    path = Path(path)
    fd, beside = tempfile.mkstemp(prefix=".ingestd-", suffix=".safetensors", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(header)
            for i in order:
                tensor = manifest.tensors[i]
                file.write(bytes_of(tensor, tensors[tensor.name]).data)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name lasts
    finally:
        os.close(folder)


def _header(manifest: Manifest, metadata: Mapping[str, str]) -> tuple[bytes, list[int]]:
    """What comes before the data, and the tensors in the order in which they lie."""
    for tensor in manifest:
        if tensor.encoding:
            raise SpecError(f"tensor {tensor.name!r} is encoded as {tensor.encoding}; files hold tensors as they are")
        if tensor.name == _METADATA:
            raise SpecError(f"a tensor may not be named {_METADATA} in a file")
    sizes = [ITEMSIZE[tensor.dtype] for tensor in manifest]
    order = list(range(len(manifest)))
    at, aligned = 0, True
    for tensor, size in zip(manifest, sizes):
        aligned = aligned and at % size == 0
        at += tensor.nbytes
    if not aligned:
        order.sort(key=lambda i: -sizes[i])
    top: dict[str, Any] = {}
    if metadata:
        top[_METADATA] = {key: metadata[key] for key in sorted(metadata)}
        if not all(isinstance(x, str) for pair in metadata.items() for x in pair):
            raise SpecError("the metadata is not text by text")
    at = 0
    for i in order:
        tensor = manifest.tensors[i]
        where = [at, at + tensor.nbytes]
        top[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": where}
        at += tensor.nbytes
    text = json.dumps(top, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGN)
    if len(text) > HEADER_BYTES_MAX:
        raise SpecError(f"the header would have {len(text)} bytes, at most {HEADER_BYTES_MAX} are allowed")
    return len(text).to_bytes(8, "little") + text, order
