"""The cache: folders that are either whole or not there, however the process that made them ended.

``$UNLEARN_CACHE``, else ``~/.cache/unlearn``. Each entry is keyed by what it was made from, filled in a temporary
folder beside its place and renamed when whole. ``complete.json`` in it, written last, has the size and SHA-256 of
every file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from unlearn.errors import ModelError

MANIFEST = "complete.json"
_TEMPORARY = ".part-"
_STALE_SECONDS = 24 * 3600  # what a killed process left behind; nothing here takes as long


def cache_folder() -> Path:
    """Where downloads and conversions are kept: ``$UNLEARN_CACHE`` or ``~/.cache/unlearn``."""
    return Path(os.environ.get("UNLEARN_CACHE") or "~/.cache/unlearn").expanduser()


def offline() -> bool:
    """True when the environment forbids the network (``UNLEARN_OFFLINE`` or ``HF_HUB_OFFLINE``)."""
    names = ("UNLEARN_OFFLINE", "HF_HUB_OFFLINE")
    return any(os.environ.get(name, "").upper() in {"1", "TRUE", "YES", "ON"} for name in names)


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(what: str, wanted: str, found: str) -> None:
    """Compare two checksums in hex.

    Raises:
        ModelError: they differ; the message has both.
    """
    if wanted != found:
        raise ModelError(
            f"model.path: {what} is not the file that is meant\n  SHA-256 wanted {wanted}\n  SHA-256 found  {found}"
        )


def whole(folder: Path) -> bool:
    """True when every file that ``complete.json`` names is there with its size."""
    try:
        files: dict[str, dict[str, int | str]] = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
        return all((folder / name).stat().st_size == entry["size"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def require_space(folder: Path, needed: int) -> None:
    """Refuse before writing ``needed`` bytes to the file system of ``folder`` when they would not fit.

    Raises:
        ModelError: naming the folder, what is needed and what is free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(
            f"not enough space in {folder.parent}: {needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free. "
            "Free some, or set UNLEARN_CACHE to a folder on another disk"
        )


def entry(cache: Path, key: str, fill: Callable[[Path], None]) -> Path:
    """The folder of one cache entry, made by ``fill`` unless it is there and whole.

    Of two processes that fill the same entry at once, the slower takes the other's.

    Args:
        cache: the cache folder; created when missing.
        key: name of the entry; says everything its content depends on.
        fill: writes the content into the (temporary) folder it is given.

    Raises:
        ModelError: no space left, or the cache cannot be written.
    """
    folder = cache / key
    if whole(folder):
        return folder
    temporary = _temporary(cache)
    try:
        fill(temporary)
        _write_manifest(temporary)
        _publish(temporary, folder)
    except Exception as error:
        if _is_full(error):
            raise _full(cache) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _temporary(cache: Path) -> Path:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _sweep(cache)
        return Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=cache))
    except OSError as error:
        if _is_full(error):
            raise _full(cache) from error
        raise ModelError(
            f"the cache folder {cache} cannot be written ({error.strerror}): set UNLEARN_CACHE to another folder"
        ) from error


def _full(cache: Path) -> ModelError:
    return ModelError(
        f"no space left in the cache folder {cache}: free some, or set UNLEARN_CACHE to a folder on another disk"
    )


def _write_manifest(folder: Path) -> None:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": sha256(p)} for p in found}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", "utf-8")


def _publish(temporary: Path, folder: Path) -> None:
    """Rename into place; a damaged entry there is moved out of the way first."""
    for _ in range(5):
        try:
            temporary.rename(folder)
            return
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.EACCES, errno.ENOTDIR} or not folder.exists():
                raise
        if whole(folder):
            return
        broken = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=folder.parent))
        with suppress(FileNotFoundError):  # another process has just moved it away
            folder.rename(broken / folder.name)
        shutil.rmtree(broken, ignore_errors=True)
    raise ModelError(f"the cache entry {folder} cannot be replaced: remove it and run again")


def _sweep(cache: Path) -> None:
    for leftover in cache.glob(f"{_TEMPORARY}*"):
        try:
            age = time.time() - leftover.stat().st_mtime
        except FileNotFoundError:
            continue  # its process has finished meanwhile
        if age > _STALE_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return True
    # safetensors reports the operating system's error in words only
    return "os error 28)" in str(error) or "StorageFull" in str(error)
