"""The folder an edited checkpoint goes to: whose it is, and which of its files are finished.

A hidden journal lists every finished file with the sizes and checksums of what it was made from and of itself; it is
written before anything else, and after each file. When all are there it becomes ``unlearn.json``, last.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unlearn.atomic import some, sync, write_json_atomic
from unlearn.errors import RunFolderError
from unlearn.lock import Lock
from unlearn.streamed.files import JOURNAL, RECORD, written

LOCK = ".unlearn-lock"
_SCHEMA = 1
_HALF_WRITTEN = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")


@dataclass(frozen=True, slots=True)
class Edit:
    """What an edited checkpoint is beside its base: the vector (SHA-256 of its values), λ, and how it was rounded."""

    vector: str
    coefficient: float
    rounding: str

    def differences(self, other: Edit) -> str:
        """In words; empty when there are none."""
        whats = {
            f"coefficient {other.coefficient!r} there, {self.coefficient!r} here": self.coefficient
            != other.coefficient,
            f"the vector with SHA-256 {other.vector[:12]}… there, {self.vector[:12]}… here": self.vector
            != other.vector,
            f"rounded {other.rounding} there, {self.rounding} here": self.rounding != other.rounding,
        }
        return "; ".join(what for what, so in whats.items() if so)


@dataclass(frozen=True, slots=True)
class Origin:
    """The file of the base that one was made from.

    Attributes:
        size: In bytes.
        changed: The time of its last change (ns), which anybody may set.
        sha256: Of its content; empty: unknown.
        place: Device, number and time of the last change of status (ns) in the file system, which nobody may set;
            empty: unknown.
    """

    size: int
    changed: int
    sha256: str = ""
    place: tuple[int, ...] = ()

    @classmethod
    def of(cls, path: Path) -> Origin:
        """As it is now, not read.

        Raises:
            OSError: it is missing.
        """
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns, "", (status.st_dev, status.st_ino, status.st_ctime_ns))

    def alike(self, other: Origin) -> bool:
        """Whether size and time agree: if not, it was changed."""
        return (self.size, self.changed) == (other.size, other.changed)

    def same_file(self, other: Origin) -> bool:
        """Whether it is certainly the very file, unchanged. Copies and images may keep a fixed time for all files."""
        return self.alike(other) and bool(self.place) and self.place == other.place


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished file: what it was made from, its bytes and SHA-256, and what was measured of modules in it.

    ``survived``: module -> dot, intended, realised, changed, elements (:class:`unlearn.survival.Survival`).
    """

    origin: Origin
    size: int
    sha256: str
    survived: Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Journal:
    """All that is known of an edited checkpoint's folder; ``about`` is for people and checked by nobody."""

    edit: Edit
    files: Mapping[str, Finished]
    about: Mapping[str, Any]

    def with_file(self, name: str, finished: Finished) -> Journal:
        """One more, or another, finished file."""
        return replace(self, files={**self.files, name: finished})

    def without(self, name: str) -> Journal:
        """The same but for one file."""
        return replace(self, files={n: f for n, f in self.files.items() if n != name})

    def to_json(self) -> dict[str, Any]:
        """As it is kept."""
        files = {
            name: {
                "bytes": f.size,
                "sha256": f.sha256,
                "base": {
                    **{"bytes": f.origin.size, "mtime_ns": f.origin.changed, "sha256": f.origin.sha256},
                    "place": list(f.origin.place),
                },
                "survived": {n: list(v) for n, v in f.survived.items()},
            }
            for name, f in self.files.items()
        }
        edit = {"formula": "theta - coefficient * tau", "coefficient": self.edit.coefficient}
        edit |= {"vector_sha256": self.edit.vector, "rounding": self.edit.rounding}
        return {"schema": _SCHEMA, "made_by": "unlearn.apply", **edit, **self.about, "files": files}


def read_journal(path: Path) -> Journal | None:
    """A journal or finished record; None where there is none.

    Raises:
        RunFolderError: damaged, a link, or of a later version.
    """
    try:
        if path.is_symlink():
            raise ValueError("it is a link")
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["made_by"] != "unlearn.apply" or data["schema"] != _SCHEMA:
            raise ValueError("another program or another version wrote it")
        files = {}
        for name, f in data["files"].items():
            b = f["base"]
            place_of_it = tuple(int(n) for n in b.get("place", ()))
            origin = Origin(int(b["bytes"]), int(b["mtime_ns"]), str(b["sha256"]), place_of_it)
            survived = {str(n): [float(x) for x in v] for n, v in f["survived"].items()}
            files[str(name)] = Finished(origin, int(f["bytes"]), str(f["sha256"]), survived)
        edit = Edit(str(data["vector_sha256"]), float(data["coefficient"]), str(data["rounding"]))
        about = {key: data[key] for key in ("vector", "base", "versions", "survived") if key in data}
        return Journal(edit, files, about)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise RunFolderError(
            f"{path}: cannot be read ({e}), so it is unclear what lies beside it: use another --out, or remove that "
            "folder"
        ) from e


@contextmanager
def opened(out: Path, model: Path, edit: Edit, names: Sequence[str]) -> Iterator[tuple[Lock, Journal]]:
    """Make the folder or go on in it, alone: gives the lock, and the journal of an earlier attempt or an empty one.

    Args:
        model: The base's folder, into which nothing may be written.
        names: The files that are to be in it at the end.

    Raises:
        RunFolderError: it is the model's, somebody else's or of another edit, in use, or cannot be written.
    """
    place = out.resolve()
    if place == model or place.is_relative_to(model):
        raise RunFolderError(
            f"{out} is the model's own folder, or in it: choose another --out; nothing is written there"
        )
    if place.exists() and not place.is_dir():
        raise RunFolderError(f"{out} is not a folder: choose another --out")
    new = not place.exists()
    with written(place):
        place.mkdir(parents=True, exist_ok=True)
        if not (place / JOURNAL).exists() and not (place / RECORD).exists():
            _leftovers(place, {})  # before a lock is left in somebody's folder
        lock = Lock.take(place / LOCK)
    try:
        with written(place):
            journal = read_journal(place / RECORD) or read_journal(place / JOURNAL)
            for path in _leftovers(place, journal.files if journal else {}):
                path.unlink(missing_ok=True)
        if journal is not None and (differs := edit.differences(journal.edit)):
            raise RunFolderError(f"{out} holds another edit: {differs}. Use another --out, or remove that folder")
        if journal is not None and (gone := sorted(set(journal.files) - set(names))):
            raise RunFolderError(
                f"{out} holds the edit of another model, with {some(gone)}. Use another --out, or remove that folder"
            )
        yield lock, journal or Journal(edit, {}, {})
    finally:
        lock.release()
        if new:
            with suppress(OSError):
                place.rmdir()  # nothing came of it


def keep_journal(place: Path, journal: Journal) -> None:
    """Write the journal of unfinished work, and take back that it is finished.

    Raises:
        RunFolderError: it cannot be written.
    """
    write_json_atomic(place / JOURNAL, journal.to_json())
    (place / RECORD).unlink(missing_ok=True)
    sync(place)


def seal(place: Path, journal: Journal) -> None:
    """Write that all is finished.

    Raises:
        RunFolderError: it cannot be written.
    """
    write_json_atomic(place / RECORD, journal.to_json())
    (place / JOURNAL).unlink(missing_ok=True)


def _leftovers(place: Path, ours: Mapping[str, Finished]) -> list[Path]:
    """What a killed attempt left half written.

    Raises:
        RunFolderError: something lies there that this command did not write.
    """
    strangers, leftovers = [], []
    for folder, subfolders, names in os.walk(place):
        here = Path(folder)
        links = [n for n in subfolders if (here / n).is_symlink()]
        for name in (*names, *links):
            path = here / name
            relative = path.relative_to(place).as_posix()
            if path.is_symlink():
                strangers.append(f"{relative} (a link)")
            elif _HALF_WRITTEN.fullmatch(name):
                leftovers.append(path)
            elif relative not in ours and relative not in (JOURNAL, RECORD) and not relative.startswith(LOCK):
                strangers.append(relative)
    if strangers:
        raise RunFolderError(
            f"{place} is not empty and not only what this command wrote (it holds {some(sorted(strangers))}): choose "
            "another --out"
        )
    return leftovers
