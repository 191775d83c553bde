"""The seal on a finished stage: what it was made from, and every file's size and SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unlearn import seen
from unlearn.atomic import fingerprint, sync, write_json_atomic

Verify = Literal["sha256", "size", "once"]
STAGE_FILE = "stage.json"
STAGE_SCHEMA = 1
_SMALL = 64 * 2**20  # bytes; below this a hash costs nothing worth saving


@dataclass(frozen=True, slots=True)
class StageRecord:
    """What ``stage.json`` says: the key, the seconds the stage took, and per file (relative) its bytes and SHA-256."""

    key: str
    seconds: float
    files: Mapping[str, tuple[int, str]]


def seal(folder: Path, key: str, seconds: float) -> None:
    """Bring all files to disk, then write ``stage.json``.

    Raises:
        OSError: a file cannot be read or brought to disk.
    """
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
            os.fsync(f.fileno())
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    for inner in (p for p in folder.rglob("*") if p.is_dir()):
        sync(inner)
    record = {"schema": STAGE_SCHEMA, "key": key, "seconds": round(seconds, 3), "files": files}
    write_json_atomic(folder / STAGE_FILE, {**record, "seal": fingerprint(record)})


def read_record(place: Path) -> StageRecord | None:
    """The seal of a stage's folder; None when it is missing, damaged or of another schema."""
    try:
        data = json.loads((place / STAGE_FILE).read_text(encoding="utf-8"))
        wanted = data.pop("seal", None)  # those of earlier versions have none
        if data["schema"] != STAGE_SCHEMA or wanted not in (None, fingerprint(data)):
            return None
        files = {str(n): (int(f["bytes"]), str(f["sha256"])) for n, f in data["files"].items()}
        return StageRecord(str(data["key"]), float(data["seconds"]), files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return None


def damage_of(place: Path, record: StageRecord, verify: Verify, notes: Path | None = None) -> str | None:
    """What is wrong with a stage's files, or None. Files that are not of the stage do not matter here.

    Args:
        verify: ``sha256`` reads every file. ``size`` trusts the size of files of 64 MiB and more. ``once`` reads what
            this host has not read since it booted, and trusts the rest while it has not been written to.
            ``UNLEARN_VERIFY=full`` makes ``sha256`` of all of them.
        notes: The folder in which ``once`` notes what was read; without one it reads everything.

    Raises:
        UnlearnError: ``UNLEARN_VERIFY`` has a value that means nothing.
    """
    if verify == "once" and notes is not None:
        return seen.damage(place, record.files, notes, record.key[:64])
    by_size = verify == "size" and not seen.verify_always()
    for name, (size, digest) in record.files.items():
        path = place / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if (size < _SMALL or not by_size) and seen.sha256_of(path) != digest:
            return f"the content of {name} has changed (SHA-256 differs)"
    return None


def strangers_in(place: Path, root: Path | None = None) -> list[str]:
    """Files in a stage that its seal does not list. With a damaged seal none can be told apart, so none are named."""
    record = read_record(place)
    if record is None:
        return []
    files = [p for p in place.rglob("*") if p.is_symlink() or not p.is_dir()]
    return [
        str(p.relative_to(root or place))
        for p in files
        if p.relative_to(place).as_posix() not in record.files and p != place / STAGE_FILE
    ]
