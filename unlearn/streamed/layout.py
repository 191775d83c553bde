"""What lies where in a checkpoint of safetensors, read from headers and index alone and checked to the last byte.

The format: 8 bytes (little-endian) with the header's length, the header (JSON: name -> dtype, shape, byte range), and
the tensors' bytes without gaps. https://github.com/huggingface/safetensors#format. Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearn.atomic import some
from unlearn.errors import ModelError
from unlearn.fetch import INDEX as INDEX
from unlearn.fetch import SINGLE as SINGLE
from unlearn.fetch import doubled_weights

_LARGEST_HEADER = 100_000_000  # bytes, as the reference reader has it
_LARGEST_INDEX = 1_000_000_000
BITS: Mapping[str, int] = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64},
    **{"F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file: number format (``BF16``), shape, and the bytes of the file it takes, end excluded."""

    name: str
    format: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of weights: its name, where it really lies, its size in bytes, and its tensors in the file's order."""

    name: str
    path: Path
    size: int
    tensors: tuple[Stored, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's weights: the files in order of their names, and whether an index lists them."""

    folder: Path
    shards: tuple[Shard, ...]
    indexed: bool

    @property
    def size(self) -> int:
        """Bytes of all files of weights."""
        return sum(shard.size for shard in self.shards)

    def tensors(self) -> dict[str, tuple[Shard, Stored]]:
        """Every tensor by its stored name, with its file."""
        return {tensor.name: (shard, tensor) for shard in self.shards for tensor in shard.tensors}


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read and check all headers and the index; no weight is read.

    Raises:
        ModelError: no folder, no weights in safetensors, or anything that does not fit together; all of it is listed.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; --model takes a local folder with a model in safetensors")
    folder = folder.resolve()
    placed = None if (folder / SINGLE).is_file() else _read_index(folder)
    if said := doubled_weights(folder, () if placed is None else set(placed.values())):
        raise ModelError(said)
    names = [SINGLE] if placed is None else sorted(set(placed.values()))
    shards, problems = [], []
    for name in names:
        try:
            shards.append(_read_shard(folder, name))
        except ModelError as e:
            problems.append(str(e))
    if not problems:
        problems = _disagreements(folder, shards, placed)
    if problems:
        raise ModelError("\n".join([f"{folder}: its weights are damaged or do not belong together:", *problems]))
    return Checkpoint(folder, tuple(shards), placed is not None)


def real_place(folder: Path, path: Path) -> Path:
    """Where a file of a model's folder really lies.

    Links may lead within the folder, and in a snapshot of the hub's cache to the cache's own blobs; any other one would
    draw a file of the reader's into a model that is handed on.

    Raises:
        ModelError: a link that leads elsewhere, or nowhere.
    """
    try:
        place = path.resolve(strict=True)
    except (OSError, RuntimeError) as e:
        raise ModelError(f"{path}: missing, or a link that leads nowhere") from e
    home = folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if place.is_relative_to(home) or (blobs is not None and place.is_relative_to(blobs.resolve())):
        return place
    raise ModelError(f"{path}: a link that leads out of the model's folder: put the file itself there")


def plain_name(name: object) -> bool:
    """Whether something is the name of a file of weights and nothing more: no path, no blank, no control character."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not name.startswith(".")
        and len(name) <= 200
        and all(c.isprintable() and c not in '/\\:*?"<>|' for c in name)
    )


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
        index = json.loads(place.read_text(encoding="utf-8"), object_pairs_hook=_once)
        placed = index["weight_map"]
        if not isinstance(placed, dict) or not placed:
            raise ValueError("its weight_map lists nothing")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as e:
        raise ModelError(f"{path}: damaged, or no index of weights: {_reason(e)}") from e
    strange = sorted({str(file) for file in placed.values() if not plain_name(file)})
    if strange:
        raise ModelError(
            f"{path}: it names files that are no plain names of .safetensors files in that folder: {some(strange)}"
        )
    return placed


def _read_shard(folder: Path, name: str) -> Shard:
    path = folder / name
    place = real_place(folder, path)
    try:
        with place.open("rb") as file:
            status = place.stat()
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is no regular file")
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or not 2 <= length <= min(_LARGEST_HEADER, status.st_size - 8):
                raise ValueError("its first 8 bytes give no length of a header: cut off, or no safetensors file")
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_once)
        tensors = _tensors(header, 8 + length)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as e:
        raise ModelError(f"  {path.name}: {_reason(e)}") from e
    end = max((t.end for t in tensors), default=8 + length)
    if end != status.st_size:
        what = "cut off" if status.st_size < end else "longer than it should be"
        raise ModelError(f"  {path.name}: {what}: its header needs {end} bytes, the file has {status.st_size}")
    return Shard(name, place, status.st_size, tuple(tensors))


def _tensors(header: Any, start: int) -> list[Stored]:
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(v, str) for v in notes.values()):
        raise ValueError("its __metadata__ are no strings")
    tensors = sorted((_stored(name, entry, start) for name, entry in header.items()), key=lambda t: (t.begin, t.end))
    at = start
    for t in tensors:
        if t.begin != at:
            raise ValueError(f"{some([t.name])} begins at byte {t.begin}, where the one before ends at {at}")
        at = t.end
    return tensors


def _stored(name: str, entry: Any, start: int) -> Stored:
    what = some([name])
    if not isinstance(entry, dict) or entry.get("dtype") not in BITS:
        raise ValueError(f"{what} has a number format that is not known")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{what} has a shape or offsets that are no lists of whole numbers from 0")
    bits = math.prod(shape) * BITS[entry["dtype"]]
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise ValueError(f"{what} should take {bits / 8:g} bytes, its offsets say {offsets[1] - offsets[0]}")
    return Stored(name, entry["dtype"], tuple(shape), start + offsets[0], start + offsets[1])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _disagreements(folder: Path, shards: Iterable[Shard], placed: Mapping[str, str] | None) -> list[str]:
    """What index and files say differently."""
    problems = []
    found: dict[str, str] = {}
    for shard in shards:
        if twice := [t.name for t in shard.tensors if t.name in found]:
            problems.append(f"  {shard.name}: also in {found[twice[0]]}: {some(twice)}")
        found |= {t.name: shard.name for t in shard.tensors}
    if placed is not None:
        lost: dict[str, list[str]] = {}
        for name, file in placed.items():
            if found.get(name) != file:
                lost.setdefault(file, []).append(name)
        problems += [
            f"  {file}: {INDEX} says it holds {some(names)}, which it does not" for file, names in lost.items()
        ]
        if extra := [name for name in found if name not in placed]:
            problems.append(f"  {INDEX} does not list {some(extra)}")
    if not found:
        problems.append(f"  {folder} holds no tensor at all")
    return problems


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key comes twice: readers would differ in which one counts."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name comes twice in it")
    return made


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if isinstance(error, RecursionError | MemoryError):
        return "nested too deeply, or too large"
    return " ".join(str(error).split())[:300]
