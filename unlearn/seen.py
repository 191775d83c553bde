"""Whether files still hold what they should: by SHA-256 once per host and boot, after that by size and stat.

Reading gigabytes again at every start costs seconds per job. So it is noted which files a host has read since it booted
and found right: device, inode, size, and times of modification and of change in nanoseconds. Any write to a file,
whoever makes it and whatever it does to the other times, changes one of them. What changes none, a bit that flips on
the disk itself, is found only by reading: ``UNLEARN_VERIFY=full`` reads always, and so does the first start after a
reboot.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from unlearn.atomic import write_json_atomic
from unlearn.errors import RunFolderError, UnlearnError
from unlearn.holder import this_boot

Files = Mapping[str, tuple[int, str]]  # relative name -> bytes, SHA-256 in hex
_MODES = ("once", "full")
_HOSTS = 64  # notes kept per folder


def verify_always() -> bool:
    """Whether ``UNLEARN_VERIFY`` asks for every byte to be read at every use.

    Raises:
        UnlearnError: it has a value that means nothing.
    """
    given = os.environ.get("UNLEARN_VERIFY") or "once"
    if given not in _MODES:
        raise UnlearnError(f"UNLEARN_VERIFY is once (the default) or full, not {given!r}")
    return given == "full"


def damage(folder: Path, files: Files, notes: Path, name: str) -> str | None:
    """What is wrong with the files of a folder, or None.

    Args:
        files: What should be there; other files do not matter.
        notes: Folder in which it is noted what was read; made when missing, done without where it cannot be written.
        name: Of the note, in which the folder's own name is of no account; one file per host.

    Raises:
        UnlearnError: ``UNLEARN_VERIFY`` has a value that means nothing.
    """
    known = {} if verify_always() else _noted(notes, name)
    found: dict[str, list[int]] = {}
    for file, (size, digest) in files.items():
        path = folder / file
        try:
            stat = _stat(path)
            if stat[2] != size:
                return f"{file} has {stat[2]} bytes instead of {size}"
            if known.get(file) != [digest, *stat] and sha256_of(path) != digest:
                return f"the content of {file} has changed (SHA-256 differs)"
            if _stat(path) != stat:
                return f"{file} is being written"
        except FileNotFoundError:
            return f"{file} is missing"
        except OSError as e:
            return f"{file} cannot be read ({e.strerror})"
        found[file] = stat
    fresh = {file: [files[file][1], *stat] for file, stat in found.items()}
    if fresh != known:
        _note(notes, name, fresh)
    return None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remember(folder: Path, files: Files, notes: Path, name: str) -> None:
    """Note that this process has just written and read these files, so that they need not be read again here."""
    with suppress(OSError):  # then they will be read once more
        _note(notes, name, {file: [digest, *_stat(folder / file)] for file, (_, digest) in files.items()})


def _stat(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _place(notes: Path, name: str) -> Path:
    return notes / f"{name}.{hashlib.sha256(this_boot().encode()).hexdigest()[:16]}.json"


def _noted(notes: Path, name: str) -> dict[str, Any]:
    try:
        return dict(json.loads(_place(notes, name).read_text("utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _note(notes: Path, name: str, files: Mapping[str, Sequence[object]]) -> None:
    # where nothing can be written, or no more, the files are read again next time
    with suppress(OSError, RunFolderError):
        notes.mkdir(exist_ok=True)
        write_json_atomic(_place(notes, name), {"files": files})
        others = [p for p in notes.iterdir() if p.name.startswith(f"{name}.") and p.suffix == ".json"]
        for old in sorted(others, key=lambda p: p.stat().st_mtime)[:-_HOSTS]:
            old.unlink(missing_ok=True)  # of hosts and boots that are no more; at worst one reads again
