"""The structure of a sample: nested dicts, lists and tuples, kept in the names of the leaves.

A name is a path: its parts are separated by ``/``; a part ``[0]`` is a list index, ``(0)`` a tuple index, anything
else a mapping key; the whole name ``.`` is a sample that is one array. ``{"obs": (a, b)}`` has the leaves ``obs/(0)``
and ``obs/(1)``. Named tuples are taken as tuples and come back as plain ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Union

from .errors import SpecError

__all__ = ["Node", "build", "collect", "names_and_leaves", "rebuild"]

_INDEX = re.compile(r"\[(0|[1-9][0-9]{0,5})\]|\((0|[1-9][0-9]{0,5})\)")

#: A leaf's number in spec order, or a container of nodes.
Node = Union[int, dict[str, Any], list[Any], tuple[Any, ...]]


def names_and_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Name and value of every leaf, dicts in their own order. Raises SpecError for what cannot come back the same."""
    if not isinstance(tree, (Mapping, list, tuple)):
        return [(".", tree)]
    found: list[tuple[str, Any]] = []
    _walk(tree, "", found)
    return found


def _walk(node: Any, path: str, found: list[tuple[str, Any]]) -> None:
    here = f"at {path[:-1]!r}" if path else "at the top"
    if isinstance(node, (Mapping, list, tuple)):
        if not node:
            raise SpecError(f"empty {type(node).__name__} {here}: it has no leaf to keep its place; leave it out")
        if path.count("/") > 64:
            raise SpecError(f"the tree is nested more than 64 deep {here}")
    if isinstance(node, Mapping):
        for key, value in node.items():
            _check_key(key, here, top=not path)
            _walk(value, f"{path}{key}/", found)
    elif isinstance(node, (list, tuple)):
        left, right = "[]" if isinstance(node, list) else "()"
        for i, value in enumerate(node):
            _walk(value, f"{path}{left}{i}{right}/", found)
    elif node is None:
        raise SpecError(f"None {here}: a leaf is an array or a number")
    else:
        found.append((path[:-1], node))


def _check_key(key: Any, here: str, top: bool) -> None:
    if not isinstance(key, str):
        raise SpecError(f"mapping key {key!r} {here} is not text: names of leaves are made from keys")
    if "/" in key:
        raise SpecError(f"mapping key {key!r} {here} contains '/', which separates the parts of a name; rename it")
    if _INDEX.fullmatch(key) or (top and key == "."):
        raise SpecError(f"mapping key {key!r} {here} would be read back as structure; rename it")


def build(names: Sequence[str]) -> Node:
    """The tree that the names of the leaves describe, with each leaf's number in its place.

    Names that describe no tree (a leaf below another leaf, indices with gaps, mixed kinds) make one flat dict.
    """
    if list(names) == ["."]:
        return 0
    root: dict[str, Any] = {}
    for number, name in enumerate(names):
        node = root
        *path, last = name.split("/")
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                return {n: i for i, n in enumerate(names)}
        if last in node:
            return {n: i for i, n in enumerate(names)}
        node[last] = number
    try:
        return _close(root)
    except ValueError:
        return {n: i for i, n in enumerate(names)}


def _close(node: Any) -> Node:
    """Turns dicts whose keys are all indices into lists and tuples; ValueError where they are not consistent."""
    if isinstance(node, int):
        return node
    kinds = [_INDEX.fullmatch(key) for key in node]
    if not any(kinds):
        return {key: _close(child) for key, child in node.items()}
    brackets = {m and m.group(0)[0] for m in kinds}
    if len(brackets) != 1:
        raise ValueError
    bracket = brackets.pop()
    left, right = "[]" if bracket == "[" else "()"
    try:
        items = [_close(node[f"{left}{i}{right}"]) for i in range(len(node))]
    except KeyError:
        raise ValueError from None
    return items if bracket == "[" else tuple(items)


def collect(node: Node, tree: Any, out: list[Any], path: str = "") -> None:
    """Puts the leaves of ``tree`` into ``out`` by their numbers; SpecError names the first place that differs."""
    if isinstance(node, int):
        out[node] = tree
    elif isinstance(node, dict):
        if not isinstance(tree, Mapping):
            raise SpecError(f"{_at(path)}: got {type(tree).__name__}, want a mapping with keys {_some(node)}")
        if len(tree) != len(node):
            for key in tree:
                if key not in node:
                    raise SpecError(f"{_at(path)}: unexpected key {key!r}; want {_some(node)}")
        for key, child in node.items():
            try:
                value = tree[key]
            except KeyError:
                raise SpecError(f"{_at(path)}: key {key!r} is missing; got {_some(tree)}") from None
            if isinstance(child, int):
                out[child] = value
            else:
                collect(child, value, out, f"{path}{key}/")
    else:
        kind = type(node)
        if not isinstance(tree, kind):
            raise SpecError(f"{_at(path)}: got {type(tree).__name__}, want {kind.__name__} of {len(node)}")
        if len(tree) != len(node):
            raise SpecError(f"{_at(path)}: got {len(tree)} items, want {len(node)}")
        for i, (child, value) in enumerate(zip(node, tree)):
            collect(child, value, out, f"{path}{i}/")


def rebuild(node: Node, leaves: Sequence[Any]) -> Any:
    """The tree with ``leaves`` in spec order put back into their places."""
    if isinstance(node, int):
        return leaves[node]
    if isinstance(node, dict):
        return {key: rebuild(child, leaves) for key, child in node.items()}
    if isinstance(node, list):
        return [rebuild(child, leaves) for child in node]
    return tuple(rebuild(child, leaves) for child in node)


def _at(path: str) -> str:
    return f"at {path[:-1]!r}" if path else "at the top of the sample"


def _some(keys: Any) -> str:
    names = [repr(k) for k in keys]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
