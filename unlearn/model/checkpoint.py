"""A model's folder of safetensors: which tensor lies where, read from headers and index alone. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from unlearn.errors import ModelError
from unlearn.model.locate import INDEX, SINGLE, doubled_weights
from unlearn.store.files import some

_LARGEST_INDEX = 1_000_000_000  # bytes


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor: its file, number format (``BF16``), shape, and the bytes of the file it takes, end excluded."""

    name: str
    file: str
    format: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's weights: where each file really lies, every tensor by its name, and whether an index lists them."""

    folder: Path
    files: Mapping[str, Path]
    tensors: Mapping[str, Stored]
    indexed: bool


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read and check all headers and the index; no weight is read. All that does not fit together is listed."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; give a local folder with a model in safetensors")
    folder = folder.resolve()
    placed = None if (folder / SINGLE).is_file() else _read_index(folder)
    if said := doubled_weights(folder, () if placed is None else set(placed.values())):
        raise ModelError(said)
    files: dict[str, Path] = {}
    tensors: dict[str, Stored] = {}
    problems: list[str] = []
    for name in [SINGLE] if placed is None else sorted(set(placed.values())):
        try:
            files[name] = real_place(folder, folder / name)
            found = _read_header(files[name], name)
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            problems.append(f"  {name}: {error}")
            continue
        if twice := [f"{n} (also in {tensors[n].file})" for n in found if n in tensors]:
            problems.append(f"  {name}: holds again {some(twice)}")
        if lost := [n for n, file in (placed or {}).items() if file == name and n not in found]:
            problems.append(f"  {name}: {INDEX} says it holds {some(lost)}, which it does not")
        if extra := [n for n in found if placed is not None and n not in placed]:
            problems.append(f"  {INDEX} does not list {some(extra)} of {name}")
        tensors |= found
    if not tensors and not problems:
        problems.append("  it holds no tensor at all")
    if problems:
        raise ModelError("\n".join([f"{folder}: its weights are damaged or do not belong together:", *problems]))
    return Checkpoint(folder, files, tensors, placed is not None)


def real_place(folder: Path, path: Path) -> Path:
    """Where a file of a model's folder really lies.

    Links may lead within the folder, and in a snapshot of the hub's cache to the cache's own blobs; any other one would
    draw a file of the reader's into a model that is handed on.
    """
    try:
        place = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{path}: missing, or a link that leads nowhere") from error
    home = folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if place.is_relative_to(home) or (blobs is not None and place.is_relative_to(blobs.resolve())):
        return place
    raise ModelError(f"{path}: a link that leads out of the model's folder: put the file itself there")


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    if not path.exists() and not path.is_symlink():
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        why = " (weights pickled as .bin or .pt can run any code and are never opened)" if pickled else ""
        raise ModelError(f"{folder}: it has neither {SINGLE} nor {INDEX}{why}")
    place = real_place(folder, path)
    try:
        if place.stat().st_size > _LARGEST_INDEX:
            raise ValueError("it is too large for an index")
        placed = json.loads(place.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(placed, dict) or not placed:
            raise ValueError("its weight_map lists nothing")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{path}: damaged, or no index of weights: {error}") from error
    if strange := sorted({str(file) for file in placed.values() if not _plain_name(file)}):
        raise ModelError(
            f"{path}: it names files that are no plain names of .safetensors files in that folder: {some(strange)}"
        )
    return placed


def _plain_name(name: object) -> bool:
    """No path, no hidden file, no control character."""
    if not isinstance(name, str) or name.startswith(".") or not name.endswith(".safetensors"):
        return False
    return name.isprintable() and not set(name) & set('/\\:*?"<>|')


def _read_header(path: Path, name: str) -> dict[str, Stored]:
    """The tensors of one file. The format: 8 bytes with the header's length, the header in JSON, the tensors' bytes."""
    if not path.is_file():
        raise ValueError("it is no regular file")
    with safe_open(path, framework="numpy"):
        pass  # checks that the header is whole and that the tensors fill the file, without gap or overlap
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length), object_pairs_hook=_once)
    header.pop("__metadata__", None)
    start = 8 + length
    return {
        key: Stored(key, name, entry["dtype"], tuple(entry["shape"]), *(start + n for n in entry["data_offsets"]))
        for key, entry in header.items()
    }


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key comes twice: readers would differ in which one counts."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name comes twice in it")
    return dict(pairs)
