"""What else lies in a model's folder, and putting a copy of it beside the edited weights."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from unlearn.atomic import unique
from unlearn.errors import RunFolderError
from unlearn.streamed.layout import INDEX, Checkpoint, real_place

RECORD, JOURNAL = "unlearn.json", ".unlearn-apply.json"
_LAST = ("config.json", INDEX)  # in this order, so that a folder that looks like a model is one
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".pyc"})
_WEIGHTS = frozenset(
    {".safetensors", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".npz", ".npy", ".tflite"}
)
_SPARE = 64 * 2**20  # bytes that stay free


@dataclass(frozen=True, slots=True)
class Others:
    """Files to copy (name in the folder -> where it really lies), and what is left out, in words."""

    copied: dict[str, Path]
    left_out: tuple[str, ...]


def others_of(checkpoint: Checkpoint) -> Others:
    """Every file beside the weights. Hidden ones are no part of a model.

    Raises:
        ModelError: a link that leads out of the model's folder.
    """
    weights = {shard.name for shard in checkpoint.shards}
    found: dict[str, Path] = {}
    left_out: list[str] = []
    for folder, subfolders, names in os.walk(checkpoint.folder):
        here = Path(folder)
        links = [n for n in subfolders if (here / n).is_symlink()]
        left_out += [f"{(here / n).relative_to(checkpoint.folder)} (a link to a folder)" for n in links]
        subfolders[:] = sorted(n for n in subfolders if not n.startswith((".", "__")) and n not in links)
        for name in sorted(n for n in names if not n.startswith(".")):
            relative = (here / name).relative_to(checkpoint.folder).as_posix()
            if relative in weights or relative == RECORD:
                continue
            why = _why_not(here / name, relative == INDEX and checkpoint.indexed)
            if why:
                left_out.append(f"{relative} ({why})")
            else:
                found[relative] = real_place(checkpoint.folder, here / name)
    order = sorted(found, key=lambda n: (_LAST.index(n) if n in _LAST else -1, n))
    return Others({name: found[name] for name in order}, tuple(left_out))


def _why_not(path: Path, is_index: bool) -> str | None:
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        return "may be pickled, which can run any code"
    if suffix in _WEIGHTS or ".onnx_data" in path.name:
        return "unedited weights"
    if path.name.endswith(".index.json") and not is_index:
        return "the index of other weights"
    if not path.is_symlink() and not path.is_file():
        return "no file"
    return None


def copy_file(source: Path, to: Path) -> tuple[int, str]:
    """Copy one file to a new name, bring it to disk, and give its size and SHA-256.

    Raises:
        OSError: it cannot be read or written.
    """
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as old, to.open("xb") as new:
        while part := old.read(2**20):
            digest.update(part)
            size += new.write(part)
        new.flush()
        os.fsync(new.fileno())
    return size, digest.hexdigest()


@contextmanager
def new_file(place: Path) -> Iterator[Path]:
    """A hidden name beside ``place`` for what will be renamed to it; removed if it is still there at the end."""
    temporary = place.with_name(f".{place.name}.{unique()}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def written(place: Path) -> Iterator[None]:
    """Turn what the file system says of the output into a message.

    Raises:
        RunFolderError: with what to do.
    """
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunFolderError(
                f"no space left on the disk (or in the quota) while writing {place}. Make room and run the same "
                "command again, which keeps what is finished, or choose a folder on another disk with --out"
            ) from e
        where = e.filename if isinstance(e.filename, str) and e.filename else place
        raise RunFolderError(f"{where}: {e.strerror or e}") from e


def require_space(folder: Path, needed: int) -> None:
    """Refuse before anything is written if it would not fit.

    Raises:
        RunFolderError: with what is needed and what is free.
    """
    free = shutil.disk_usage(folder).free
    if needed and free < needed + _SPARE:
        raise RunFolderError(
            f"not enough space for {folder}: {needed / 1e6:,.0f} MB are needed and {_SPARE / 1e6:,.0f} MB to spare, "
            f"{free / 1e6:,.0f} MB are free. Make room, or choose a folder on another disk with --out"
        )
