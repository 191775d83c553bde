"""A model's folder of safetensors: what it must hold, and which tensor lies where. No weight is read, and no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearn.errors import ModelError
from unlearn.store.files import some
from unlearn.text import one_line

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# not what Mistral's programs read (it comes beside), and not an adapter, which is refused as such; many a model on the
# hub has its weights as pickles too, which nobody here opens
_WEIGHTS = re.compile(r"(?!consolidated|adapter_model).*\.safetensors")
_LARGEST_INDEX = 1_000_000_000  # bytes


def check_folder(folder: Path) -> None:
    """Say what a local folder lacks before transformers fails on it in its own words."""
    try:
        problem = _problem(folder)
    except ModelError as error:
        problem = str(error)
    if problem:
        raise ModelError(f"model.path: {problem}")


def _problem(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is neither a folder nor a .gguf file"
    names = sorted(path.name for path in folder.iterdir())
    shown = some(names, 20) or "nothing"
    if "adapter_config.json" in names and "config.json" in names:
        # transformers would put the adapter on the model without a word
        merge = "merge the two, or move the adapter into a folder of its own"
        return f"{folder} holds an adapter (adapter_config.json) beside the model: {merge}"
    if "adapter_config.json" in names:
        return f"{folder} is an adapter, not a model: merge it into its base model first"
    if "config.json" not in names:
        return f"{folder} has no config.json; in it: {shown}"
    if said := doubled_weights(folder):
        return said
    placed = read_index(folder)
    if missing := sorted(set((placed or {}).values()) - set(names)):
        return f"{folder} is incomplete: {one_line(some(missing))} missing"
    if placed is None and SINGLE not in names:
        if not any(name.endswith((".bin", ".pt", ".pth")) for name in names):
            return f"{folder} has no {SINGLE}; in it: {shown}"
        convert = "convert them to safetensors (load where you trust them, then save_pretrained)"
        return f"{folder} has its weights as pickles only, which can run code when opened: {convert}"
    if not {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"} & set(names):
        return f"{folder} has no tokenizer (tokenizer.json); in it: {shown}"
    return ""


def doubled_weights(folder: Path) -> str:
    """What to say of a model's folder with more weights than a reader takes; empty where there is nothing to say.

    transformers takes ``model.safetensors`` before an index, and of shards those that the index names. Of the others it
    says nothing, and they may well be the new ones.
    """
    names = sorted(path.name for path in folder.iterdir())
    placed = read_index(folder)
    shards = set((placed or {}).values())
    if SINGLE in names and placed is not None and shards != {SINGLE}:
        return (
            f"{folder} holds two sets of weights, {SINGLE} and the shards that {INDEX} names, and which of them is the "
            f"model cannot be told: remove the old one, either {SINGLE}, or {INDEX} and "
            f"{one_line(some(sorted(shards)))}"
        )
    read = {SINGLE} if placed is None else shards
    others = [n for n in names if n not in read and _WEIGHTS.fullmatch(n)]
    if not others or not read & set(names):
        return ""
    return (
        f"{folder} holds weights beside those that are read ({SINGLE if placed is None else INDEX}), and which "
        f"is the model cannot be told: remove or move {one_line(some(others))} or, if these are new, the others"
    )


def read_index(folder: Path) -> dict[str, str] | None:
    """The file of every tensor, by its name, from the folder's index; None where there is no index."""
    path = folder / INDEX
    if not path.exists():
        return None
    try:
        if path.stat().st_size > _LARGEST_INDEX:
            raise ValueError("it is too large for an index")
        placed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
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


# -- every tensor


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
    """Read and check all headers and the index; all that does not fit together is listed."""
    from safetensors import SafetensorError

    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; give a local folder with a model in safetensors")
    folder = folder.resolve()
    if (folder / INDEX).is_symlink():
        real_place(folder, folder / INDEX)
    placed = None if (folder / SINGLE).is_file() else read_index(folder)
    if placed is None and not (folder / SINGLE).is_file():
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        why = " (weights pickled as .bin or .pt can run any code and are never opened)" if pickled else ""
        raise ModelError(f"{folder}: it has neither {SINGLE} nor {INDEX}{why}")
    if said := doubled_weights(folder):
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


def _read_header(path: Path, name: str) -> dict[str, Stored]:
    """The tensors of one file. The format: 8 bytes with the header's length, the header in JSON, the tensors' bytes."""
    from safetensors import safe_open

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
