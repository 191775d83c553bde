"""A task vector's file: safetensors with ``<module>.A`` and ``<module>.B``, or ``<module>.W``. No pickle anywhere.

Its header holds ``format``, ``version`` and ``meta`` (a JSON object of strings). Version 1 had factors only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from unlearn.changes import Change, Dense, LowRank, listed
from unlearn.errors import VectorError
from unlearn.shards import Slot, write_file

FORMAT = "unlearn.task_vector"
VERSION = "2"
# What safetensors and torch say of a number format they do not know, of shapes beyond 64 bits and of a lack of memory.
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError, MemoryError)
_LETTERS = {"1": "AB", "2": "ABW"}  # version -> what its tensors' names may end with


def write_vector(path: Path, modules: Mapping[str, Change], meta: Mapping[str, str]) -> None:
    """Write a vector's modules and metadata in the current version."""
    tensors = {f"{name}.{letter}": t for name, change in modules.items() for letter, t in change.tensors().items()}
    slots = [Slot(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    head = {"format": FORMAT, "version": VERSION, "meta": json.dumps(dict(meta))}
    write_file(path, slots, tensors.__getitem__, head)


def read_vector(path: Path) -> tuple[dict[str, Change], dict[str, str]]:
    """A vector's modules and metadata.

    Raises:
        VectorError: not such a file, damaged, or of a later version.
    """
    try:
        with safe_open(path, framework="pt") as f:
            head = f.metadata() or {}
            if head.get("format") != FORMAT:
                raise VectorError(f"{path}: not a task vector of this program")
            version = str(head.get("version"))
            if version not in _LETTERS:
                raise VectorError(f"{path}: written as version {version}, this program reads up to {VERSION}")
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - a safe_open has no __iter__
    except (SafetensorError, OSError, *UNREADABLE) as e:
        raise VectorError(f"{path}: cannot be read as a task vector: {e}") from e
    try:
        return _changes(tensors, _LETTERS[version]), _read_meta(head.get("meta", "{}"))
    except VectorError as e:
        raise VectorError(f"{path}: {e}") from e


def _changes(tensors: Mapping[str, Tensor], letters: str) -> dict[str, Change]:
    parts: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        name, _, letter = key.rpartition(".")
        if not name or len(letter) != 1 or letter not in letters:
            strange.append(key)
        parts.setdefault(name, {})[letter] = tensor
    if strange:
        raise VectorError(f"it holds tensors that are no part of a vector: {listed(sorted(strange))}")
    missing = [n for n, found in parts.items() if "W" not in found and len(found) == 1]
    if missing:
        raise VectorError(f"a factor is missing for {listed(sorted(missing))}")
    twice = [n for n, found in parts.items() if "W" in found and len(found) > 1]
    if twice:
        raise VectorError(f"both factors and a dense change are there for {listed(sorted(twice))}")
    return {n: Dense(p["W"]) if "W" in p else LowRank(p["A"], p["B"]) for n, p in parts.items()}


def _read_meta(text: str) -> dict[str, str]:
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict) or not all(isinstance(v, str) for v in meta.values()):
        raise VectorError(f"its metadata is damaged: {text[:80]}")
    return meta
