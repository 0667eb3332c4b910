"""Leaves of a batch as arrays of torch and JAX. Neither is needed by this package; both are imported when asked for."""

from __future__ import annotations

import importlib
from typing import Any

from .dtypes import NUMPY, RAW
from .errors import Error
from .lease import Leased

__all__ = ["imported", "to_jax", "to_torch"]

_TORCH_RAW = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


def imported(module: str, package: str) -> Any:
    """The module, or an ImportError that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise ImportError(f"{package} is needed for this and cannot be imported ({e}): pip install {package}") from e


def to_torch(leased: Leased, copy: bool) -> Any:
    """The leaf as a CPU tensor: over the shared memory, or of its own."""
    torch = imported("torch", "torch")
    tensor = torch.from_dlpack(leased.array() if copy else leased)
    if leased.leaf.dtype in _TORCH_RAW:
        kind = getattr(torch, _TORCH_RAW[leased.leaf.dtype], None)
        if kind is None:
            raise Error(
                f"this torch has no {_TORCH_RAW[leased.leaf.dtype]}: leaf {leased.leaf.name!r} needs a newer one"
            )
        tensor = tensor.view(kind)
    return tensor.clone() if copy else tensor


def to_jax(leased: Leased, copy: bool) -> Any:
    """The leaf as a CPU array of JAX: over the shared memory where JAX can, or of its own."""
    jax = imported("jax", "jax")
    dlpack = imported("jax.dlpack", "jax")
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        if leased.leaf.dtype in RAW:
            return jax.numpy.asarray(leased.array().copy().view(NUMPY[leased.leaf.dtype]))
        return jax.numpy.asarray(leased.array().copy()) if copy else dlpack.from_dlpack(leased)
