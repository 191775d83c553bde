"""Training checkpoints: sealed with every file's SHA-256 when they are whole, and checked before they are used."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from unlearn.atomic import write_json_atomic
from unlearn.console import say

WHOLE = "unlearn_checkpoint_is_whole"  # the seal: how many processes wrote it, and the hash of each file


def seal(checkpoint: Path, processes: int) -> None:
    """Bring a checkpoint's files to disk, then say what they are.

    Raises:
        OSError: a file cannot be read or written.
    """
    files = {}
    for path in sorted(_files(checkpoint)):
        with path.open("rb") as f:
            files[path.relative_to(checkpoint).as_posix()] = hashlib.file_digest(f, "sha256").hexdigest()
            os.fsync(f.fileno())
    write_json_atomic(checkpoint / WHOLE, {"processes": processes, "files": files})


def keep_newest(work: Path, count: int = 2) -> None:
    """Remove all checkpoints but those of the highest numbers; by times of files a clock that jumped would decide."""
    for old in _by_number(work)[count:]:
        shutil.rmtree(old, ignore_errors=True)


def last_checkpoint(work: Path, processes: int = 1) -> str | None:
    """The newest checkpoint that was written to its end and is as it was written, or None.

    One that was cut off, is damaged, or was written by another number of processes is removed, so that it stands in
    nobody's way again; of all but the first, which is what every kill leaves, a line says so.
    """
    for checkpoint in _by_number(work):
        trouble = _trouble(checkpoint, processes)
        if trouble is None:
            return str(checkpoint)
        if trouble:
            say(f"    {checkpoint.name}: {trouble}; training goes on from an older one or begins anew", style="yellow")
        shutil.rmtree(checkpoint, ignore_errors=True)
    return None


def step_of(checkpoint: str) -> int:
    """After which step a checkpoint was written."""
    return int(checkpoint.rpartition("-")[2])


def _by_number(work: Path) -> list[Path]:
    """All checkpoints, the newest first."""
    numbers = {p: p.name.rpartition("-")[2] for p in work.glob("checkpoint-*") if p.is_dir()}
    return sorted((p for p, n in numbers.items() if n.isdecimal()), key=lambda p: -int(numbers[p]))


def _trouble(checkpoint: Path, processes: int) -> str | None:
    """What is wrong with a checkpoint: None for nothing, and nothing to speak of where it was only cut off."""
    if not (checkpoint / WHOLE).is_file():
        return ""
    try:
        told = json.loads((checkpoint / WHOLE).read_text(encoding="utf-8"))
        files, wrote = dict(told["files"]), int(told["processes"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{WHOLE} cannot be read"
    for name, digest in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        with path.open("rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != digest:
                return f"the content of {name} has changed (SHA-256 differs)"
    if wrote != processes:
        return f"{wrote} process{'es' * (wrote > 1)} wrote it, and now it is {processes}"
    return None


def _files(checkpoint: Path) -> list[Path]:
    return [p for p in checkpoint.rglob("*") if p.is_file() and p.name != WHOLE]
